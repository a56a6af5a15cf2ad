"""Numbers of a run: one JSON object a line in `metrics.jsonl`, also for TensorBoard and sinks."""

import json
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from dcore_jax import distributed
from dcore_jax.files import named_errors, replace_text
from dcore_jax.train.sinks import Sink

METRICS_FILE = 'metrics.jsonl'


class Metrics:
  """Appends scalars to `workdir/metrics.jsonl` and `workdir/tensorboard`; a context manager.

  Of several hosts only the first writes. A line that a killed process left half written is cut off
  on opening, so that the next row starts on a line of its own.

  Args:
    workdir: the folder.
    sinks: other programs that get each row, see `train.sinks`; closed with the files.
  """

  def __init__(self, workdir: str | os.PathLike, sinks: Sequence[Sink] = ()):
    self._sinks = list(sinks)
    self._workdir = pathlib.Path(workdir)
    self._path = self._workdir / METRICS_FILE
    # All hosts have the same numbers, and two writers would interleave their lines in one file.
    if not distributed.writes():
      self._file = None
      self._board = None
      return
    self._workdir.mkdir(parents=True, exist_ok=True)
    # Before the file is opened for appending: the position of the next row is the end of the file.
    _cut_torn_line(self._path)
    self._file = self._path.open('a', encoding='utf-8')
    self._board = _Board(self._workdir / 'tensorboard')

  def write(self, stage: str, step: int, **scalars: Any) -> None:
    """Writes one row {'stage', 'step', **scalars}; values that are not finite become null.

    Scalars are Python's, numpy's or jax's. The row has no wall-clock time (TensorBoard's has), so
    that the rows of two runs of one seed differ in their rates only.

    Raises:
      ValueError: a value is no single number.
    """
    # Every host converts the values, so that a bad one fails on all of them and not on the first
    # alone.
    values = {name: _plain_scalar(name, value) for name, value in scalars.items()}
    if not self._file:
      return
    row = {'stage': stage, 'step': int(step), **values}
    with named_errors(self._path):
      self._file.write(json.dumps(row, allow_nan=False) + '\n')
      # A killed process loses its buffers; a person who watches the run reads the file meanwhile.
      self._file.flush()
    self._board.write(stage, int(step), values)
    for sink in self._sinks:
      sink.write(stage, int(step), values)

  def rewind(self, stage: str, step: int) -> list[dict[str, Any]]:
    """Drops the rows of a stage from `step` on and returns those before.

    A stage that resumes at `step` is about to write them again.
    """
    rows = read_metrics(self._workdir)
    # Other stages' rows stay as they are.
    kept = [row for row in rows if row['stage'] != stage or row['step'] < step]
    if self._file and len(kept) < len(rows):
      self._file.close()
      # The file is replaced as a whole: a kill in the midst of it leaves the old rows or the new
      # ones.
      replace_text(self._path, ''.join(json.dumps(row) + '\n' for row in kept))
      self._file = self._path.open('a', encoding='utf-8')
    return [row for row in kept if row['stage'] == stage]

  def close(self) -> None:
    """Closes the files."""
    if self._file:
      with named_errors(self._path):
        self._file.close()
      self._board.close()
    for sink in self._sinks:
      sink.close()

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(self, *_) -> None:
    self.close()


class _Board:
  """Writes numbers for TensorBoard.

  Without tensorboardX's own writer, whose thread dies on a full disk: its queue is then full after
  ten numbers, and a run that waits for room in it waits for ever.
  """

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(exist_ok=True)
    self._folder = folder
    self._flushed = 0.0
    with named_errors(folder):
      self._events = EventsWriter(str(folder / 'events'))

  def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
    found = []
    for name, value in values.items():
      # TensorBoard has no place for null.
      if value is not None:
        found.append(Summary.Value(tag=f'{stage}/{name}', simple_value=float(value)))
    event = Event(step=step, wall_time=time.time(), summary=Summary(value=found))
    with named_errors(self._folder):
      self._events.write_event(event)
      # A flush waits for the disk; every 10 s a run that is watched shows something new.
      if time.monotonic() - self._flushed > 10:
        self._flushed = time.monotonic()
        self._events.flush()

  def close(self) -> None:
    with named_errors(self._folder):
      self._events.close()


def read_metrics(workdir: str | os.PathLike, stage: str | None = None) -> list[dict[str, Any]]:
  """Reads the rows in the order written, of one stage or of all; [] where nothing was written.

  A last line without its newline is a write that was cut short, and is left out.

  Raises:
    ValueError: a line inside the file is not a row (the file was edited or damaged).
  """
  path = pathlib.Path(workdir) / METRICS_FILE
  if not path.exists():
    return []
  # Split as bytes, because a torn line may end inside of a UTF-8 character. Behind the last newline
  # stands nothing, or a torn line.
  lines = path.read_bytes().split(b'\n')[:-1]
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{path}, line {number} is not JSON: {line[:80]!r}') from error
    if not isinstance(row, dict) or not {'stage', 'step'} <= row.keys():
      raise ValueError(f'{path}, line {number} has no stage and step: {line[:80]!r}')
    rows.append(row)
  return [row for row in rows if stage is None or row['stage'] == stage]


def _plain_scalar(name: str, value: Any) -> int | float | bool | None:
  """Returns a number that JSON has; raises ValueError for anything else."""
  if value is None or isinstance(value, (bool, int)):
    return value
  if isinstance(value, str) or np.size(value) != 1:
    raise ValueError(f'metric {name!r} must be one number, got {str(value)[:80]!r}')
  value = np.asarray(value).item()
  if not isinstance(value, (bool, int, float)):
    value = float(value)  # .item() leaves bfloat16 and other extension types as they are
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _cut_torn_line(path: pathlib.Path) -> None:
  """Cuts off what stands behind the last newline."""
  if path.exists():
    content = path.read_bytes()
    whole = content.rfind(b'\n') + 1
    if whole < len(content):
      os.truncate(path, whole)
