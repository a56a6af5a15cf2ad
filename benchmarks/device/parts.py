"""The parts of a first day on accelerators: which to measure, each in a process of its own, and the
file of what has been measured.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.device import rows
from benchmarks.device.rows import Row
from benchmarks.device.worker import PARTS
from dcore_jax.files import replace_text

_ROOT = pathlib.Path(__file__).parents[2]
_WORKER = 'benchmarks.device.worker'


class Log(NamedTuple):
  """What has been measured on a machine, in a file that is only added to.

  Attributes:
    path: JSON lines: {'machine', 'size'} first; then rows, and {'part', 'seconds'} where a part
      ended.
    told: the first line.
    ended: name of each part that was measured -> its rows, those of the last time.
  """

  path: pathlib.Path
  told: dict[str, Any]
  ended: dict[str, list[Row]]

  def write(self, record: dict[str, Any]) -> None:
    """Adds a line."""
    with self.path.open('a', encoding='utf-8') as file:
      file.write(json.dumps(record) + '\n')

  @property
  def rows(self) -> list[Row]:
    """All rows, in the order of the parts."""
    return [row for name in PARTS for row in self.ended.get(name, [])]


def open_log(path: pathlib.Path, told: dict[str, Any]) -> Log:
  """Reads what is there, or begins a file.

  Raises:
    ValueError: it is of another machine or other sizes, or no such file.
  """
  log = Log(path, told, {})
  if not path.is_file():
    path.parent.mkdir(parents=True, exist_ok=True)
    log.write(told)
    return log
  whole, end, rest = path.read_text(encoding='utf-8').rpartition('\n')
  if rest:
    # A process that was killed may leave half a line.
    replace_text(path, whole + end)
  begun: dict[str, list[Row]] = {}
  for number, text in enumerate(whole.splitlines()):
    try:
      record = json.loads(text)
      if number == 0:
        before = record['machine'], record['size']
      elif 'seconds' in record and 'case' not in record:
        log.ended[record['part']] = begun.pop(record['part'], [])
      else:
        begun.setdefault(record['part'], []).append(Row.from_json(record))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(
        f'{path}, line {number + 1} cannot be read ({error}); name another --workdir'
      ) from error
  same = ('platform', 'kind', 'count')
  here = told['machine'], told['size']
  if [before[0].get(name) for name in same] != [here[0][name] for name in same] or (
    before[1] != here[1]
  ):
    raise ValueError(
      f'{path} is of {before[0].get("count")} x {before[0].get("kind")}, --size={before[1]!r}, not '
      f'of {here[0]["count"]} x {here[0]["kind"]}, --size={here[1]!r}; name another --workdir'
    )
  return log._replace(told={'machine': before[0], 'size': before[1]})


def wanted(parts: Sequence[str], log: Log) -> list[str]:
  """Returns the parts to be measured: those that are named, or what is missing or failed.

  Raises:
    ValueError: a part that is not known.
  """
  unknown = [name for name in parts if name not in PARTS]
  if unknown:
    raise ValueError(f'unknown parts {unknown}; known are {list(PARTS)}')
  if parts:
    return [name for name in PARTS if name in parts]
  missing = []
  for name in PARTS:
    failed = any(row.verdict == rows.FAILED for row in log.ended.get(name, []))
    if name not in log.ended or failed:
      missing.append(name)
  return missing


class _Worker:
  """A worker process with all that it starts, which is ended at its time limit."""

  def __init__(self, arguments: list[str], limit: float):
    # A session of its own, so that a server or a training of the part ends with it.
    self._process = subprocess.Popen(
      [sys.executable, '-m', _WORKER, *arguments],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.late = False
    self._timer = threading.Timer(limit, self._stop)
    self._timer.daemon = True

  def lines(self) -> Iterator[str]:
    """Yields what it prints until it ends; ends it with the caller."""
    self._timer.start()
    try:
      yield from self._process.stdout
      self._process.wait()
    finally:
      self._timer.cancel()
      self._kill()

  @property
  def status(self) -> int:
    """Its exit status, negative for a signal."""
    return self._process.wait()

  def _stop(self) -> None:
    self.late = True
    self._kill()

  def _kill(self) -> None:
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass  # it has ended, and all that it started
    self._process.wait()


def run_part(name: str, told: dict[str, Any], limit: float) -> Iterator[Row]:
  """Yields the rows of a part as they come; what goes wrong is the last one."""
  with tempfile.TemporaryDirectory() as folder:
    worker = _Worker([name, json.dumps(told | {'folder': folder})], limit)
    for text in worker.lines():
      try:
        row = Row.from_json(json.loads(text))
      except (json.JSONDecodeError, TypeError, AttributeError):
        # Libraries print, too.
        print(text, end='', file=sys.stderr)
        continue
      yield row
    if worker.late:
      reason = f'stopped after {limit:.0f} s; --parts={name} with more --minutes gives it longer'
      yield rows.failed(name, 'time', reason)
    elif worker.status < 0:
      yield rows.failed(name, 'process', f'ended by {signal.Signals(-worker.status).name}')
    elif worker.status:
      yield rows.failed(name, 'process', f'ended with status {worker.status}')


def examined(limit: float) -> dict[str, Any]:
  """Returns the machine, as a process of its own sees it.

  Raises:
    ValueError: jax finds no devices.
  """
  worker = _Worker(['machine'], limit)
  for text in worker.lines():
    if text.startswith('{"machine"'):
      return json.loads(text)['machine']
    print(text, end='', file=sys.stderr)
  raise ValueError(
    'jax finds no devices in time' if worker.late else 'jax finds no devices; see above'
  )


def limit_of(name: str, minutes: float, chosen: Sequence[str]) -> float:
  """Returns the seconds of a part: its share of the minutes, among the parts that are chosen."""
  whole = sum(part.minutes for part in PARTS.values())
  some = sum(PARTS[each].minutes for each in chosen)
  # Few parts alone do not get all of the time of the others: at most twice their own.
  return 60 * minutes * PARTS[name].minutes / max(some, whole / 2)
