"""Runs simulations of tau2-bench with its own orchestrator, in the environment of tau2-bench.

`suite` starts it with that environment's Python. It imports the standard library, tau2, and files
of this folder that do the same. The first line of stdin is a JSON object:

    agent      {'base_url', 'model', 'key', 'temperature', 'max_tokens', 'timeout'}
    user       the same, or null for the scripted user
    policies   {domain: text} that stand in for the package's
    tasks      {domain: {id: task}}
    jobs       [{'domain', 'task', 'trial', 'seed'}]; trial null asks for the floor of a task
    max_steps, max_errors, time_limit, concurrency

stdout gets one JSON object a line, see `Run`, or {'stop': text} where an endpoint stays away. When
stdin ends, all ends. Each simulation is a process of its own, a fork of this one. What a model
wrote may make a tool compute for ever (tau2's `calculate` evaluates sums), and a process can be
ended.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

if __name__ == '__main__':
  # Behind the packages of the environment. Imported from there is only what uses Python alone.
  sys.path.append(str(pathlib.Path(__file__).resolve().parents[3]))

from dcore_jax.evaluate.tau2.simulation import Harness, work


class Run:
  """A simulation under way, as its parent knows it; `record` is the line about it."""

  def __init__(self, job: Mapping[str, Any], process: Any, pipe: Any):
    self.process = process
    self.pipe = pipe
    self.begun = time.monotonic()
    self.final = ''
    self._whose = 'harness'  # turn
    self._problems: dict[str, dict[str, int]] = {'agent': {}, 'user': {}}
    self._messages: list[dict[str, Any]] = []
    self._job = job
    self._end: dict[str, Any] | None = None

  def take(self, event: Mapping[str, Any]) -> None:
    """Takes what the process has told."""
    if 'ended' in event:
      self._end = dict(event)
      if self._end.pop('final', False):
        fault = event['fault']
        self.final = f'the endpoint of the {fault["of"]} is {fault["reason"]}: {fault["detail"]}'
    elif 'turn' in event:
      self._whose = event['turn']
      # A call belongs to who made it.
      if self._whose == 'tool':
        self._whose = 'agent' if event['of'] == 'assistant' else 'user'
    elif 'problem' in event:
      counts = self._problems[event['of']]
      counts[event['problem']] = counts.get(event['problem'], 0) + 1
    else:
      self._messages.append(event['message'])

  @property
  def ended(self) -> bool:
    """Whether the process has said its last word."""
    return self._end is not None

  def end(self, reason: str, detail: str) -> None:
    """Notes that the process was ended, or ended by itself, without a last word."""
    if not self.ended:
      side = self._whose if self._whose in self._problems else 'harness'
      self._end = {'ended': 'fault', 'fault': {'of': side, 'reason': reason, 'detail': detail}}

  def record(self) -> dict[str, Any]:
    """Returns the line of a process that has ended."""
    seconds = round(time.monotonic() - self.begun, 3)
    found = dict(self._job) | {'reward': None, 'fault': None} | (self._end or {})
    if self._job['trial'] is None:
      return found
    return found | {
      'seconds': seconds,
      'problems': self._problems,
      'messages': self._messages,
    }


def _start(harness: Harness, job: Any, order: Any) -> Run:
  fork = multiprocessing.get_context('fork')
  ours, theirs = fork.Pipe(duplex=False)
  # As daemons they end with this process.
  process = fork.Process(target=work, args=(harness, job, order, theirs), daemon=True)
  process.start()
  theirs.close()
  return Run(job, process, ours)


def _finish(run: Run) -> None:
  # What is left of it are threads of its HTTP client.
  if run.ended:
    run.process.kill()
  run.process.join()
  run.pipe.close()
  code = run.process.exitcode
  run.end('killed', f'its process ended with status {code}')


def supervise(
  harness: Harness, order: Mapping[str, Any], write: Callable[[dict[str, Any]], None]
) -> None:
  """Runs all jobs, `concurrency` at once, and writes the record of each as it ends."""
  waiting = list(reversed(order['jobs']))
  runs: dict[Any, Run] = {}
  while waiting or runs:
    while waiting and len(runs) < order['concurrency']:
      run = _start(harness, waiting.pop(), order)
      runs[run.pipe] = run
    # A second: how late a time limit may be kept.
    ready = multiprocessing.connection.wait([*runs, sys.stdin.fileno()], timeout=1.0)
    if sys.stdin.fileno() in ready:
      return  # the suite has gone
    for pipe in ready:
      with contextlib.suppress(EOFError):
        while pipe.poll():
          runs[pipe].take(json.loads(pipe.recv_bytes()))
        if not runs[pipe].ended:
          continue
      _finish(runs[pipe])
    now = time.monotonic()
    for run in list(runs.values()):
      late = now - run.begun > order['time_limit']
      if late and not run.pipe.closed:
        run.end('time_limit', f'ended after {order["time_limit"]:g} s')
        _finish(run)
    for pipe in [pipe for pipe, run in runs.items() if pipe.closed]:
      run = runs.pop(pipe)
      if run.final:
        write({'stop': run.final})
        return
      write(run.record())


def main() -> None:
  """Runs the order of stdin."""
  out = os.fdopen(os.dup(sys.stdout.fileno()), 'w', encoding='utf-8')
  # tau2 prints its warnings between our lines.
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, sys.stdout.fileno())
  # Read without a buffer: what is left of stdin tells when it ends.
  line = b''
  while not line.endswith(b'\n'):
    piece = os.read(sys.stdin.fileno(), 1 << 20)
    if not piece:
      return
    line += piece
  order = json.loads(line)

  def write(record: dict[str, Any]) -> None:
    print(json.dumps(record), file=out, flush=True)

  harness = Harness()
  harness.warm_up()
  try:
    supervise(harness, order, write)
  finally:
    # Threads of clients must not keep a process whose work is done.
    for process in multiprocessing.active_children():
      process.kill()
  out.flush()
  os._exit(0)


if __name__ == '__main__':
  main()
