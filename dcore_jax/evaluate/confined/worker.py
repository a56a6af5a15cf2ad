"""A process of its own for what judges answers, asked and answered in lines.

It has an empty environment, no terminal, and a temporary folder that goes when it ends. It confines
itself (`confinement`) before it looks at an answer.
"""

import json
import math
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import dcore_jax

_START_SECONDS = 600.0  # a busy machine imports a large package for minutes
_MOST_BYTES = 1 << 24  # of a line
_LOOK_SECONDS = 0.2  # between two looks at the processor time


class Ended(Exception):
  """The process has ended, or was ended, before it answered; says why."""


class Worker:
  """A module of this package, run as a program. Use it in a `with`, which ends the process.

  The module prints a line when it is ready, and one for each line that it reads.

  Args:
    module: its name.
    arguments: on its command line.
    alone: with the standard library alone, and no other package.

  Raises:
    ValueError: it does not become ready; holds its last words.
  """

  def __init__(self, module: str, arguments: Sequence[str] = (), *, alone: bool = False):
    self._folder = tempfile.TemporaryDirectory(prefix='dcore_jax-judge-')
    # pylint: disable-next=consider-using-with
    self._errors = tempfile.TemporaryFile()
    self._pending = b''
    self._deadline = time.monotonic() + _START_SECONDS
    self._most_cpu = math.inf
    root = str(pathlib.Path(dcore_jax.__file__).resolve().parents[1])
    places = [root]
    if not alone:
      places += [str(pathlib.Path(place).resolve()) for place in sys.path if place]
    options = ['-B', '-P', '-S'] if alone else ['-B', '-P']
    self._process = subprocess.Popen(
      [sys.executable, *options, '-m', module, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      cwd=self._folder.name,
      # Some of our environment is secret, and none of it is needed.
      env={'PYTHONPATH': os.pathsep.join(places), 'PYTHONHASHSEED': '0'},
      # No terminal, and a group that can be ended as one.
      start_new_session=True,
    )
    os.set_blocking(self._process.stdin.fileno(), False)
    try:
      self._read()
    except Ended as ended:
      words = self._last_words()
      self.close()
      raise ValueError(f'{module} does not start: {words or ended}') from ended
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *details: Any) -> None:
    self.close()

  def allow(self, seconds: float, patience: float) -> None:
    """Says how much the process may use from now on.

    Args:
      seconds: of processor time, which does not depend on what else the machine does.
      patience: by the clock, for a process that waits.
    """
    self._deadline = time.monotonic() + patience
    self._most_cpu = self._cpu_seconds() + seconds

  def ask(self, line: bytes) -> bytes:
    """Sends a line, without its end, and returns the answer.

    Raises:
      Ended: there is no answer: 'limit' of processor time, 'timeout', 'output' (too long a line),
        'exit', 'signal_9'. The process is of no use any more.
    """
    descriptor = self._process.stdin.fileno()
    rest = line + b'\n'
    # A process that does not read must not hold us up once the pipe is full.
    while rest:
      if select.select([], [descriptor], [], self._look())[1]:
        try:
          rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
          raise Ended(self._how()) from error
    return self._read()

  def ask_json(self, job: Any) -> Any:
    """Sends JSON and returns JSON; see `ask`. For processes whose answers are our own."""
    return json.loads(self.ask(json.dumps(job).encode()))

  def close(self) -> None:
    """Ends the process."""
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout, self._errors):
      file.close()
    self._folder.cleanup()

  def _look(self) -> float:
    """Returns the seconds until the next look; raises Ended where a limit is reached."""
    if self._cpu_seconds() > self._most_cpu:
      raise Ended('limit')
    left = self._deadline - time.monotonic()
    if left <= 0:
      raise Ended('timeout')
    return min(left, _LOOK_SECONDS)

  def _cpu_seconds(self) -> float:
    """Returns the processor time so far; 0 where the system does not say."""
    try:
      # Behind the name, which may hold blanks, the 12th and 13th field are ticks.
      path = pathlib.Path(f'/proc/{self._process.pid}/stat')
      fields = path.read_text(encoding='utf-8').rpartition(')')[2].split()
    except OSError:
      return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

  def _read(self) -> bytes:
    descriptor = self._process.stdout.fileno()
    while b'\n' not in self._pending:
      if len(self._pending) > _MOST_BYTES:
        raise Ended('output')
      if not select.select([descriptor], [], [], self._look())[0]:
        continue
      data = os.read(descriptor, 1 << 16)
      if not data:
        raise Ended(self._how())
      self._pending += data
    line, _, self._pending = self._pending.partition(b'\n')
    return line

  def _how(self) -> str:
    try:
      code = self._process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      return 'output_closed'
    # The kernel keeps limits by signals.
    return f'signal_{-code}' if code < 0 else 'exit'

  def _last_words(self) -> str:
    self._errors.seek(0)
    lines = self._errors.read().decode(errors='replace').strip().splitlines()
    return lines[-1] if lines else ''
