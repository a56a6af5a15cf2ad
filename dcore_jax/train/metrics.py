"""Numbers of a run: one JSON object a line in `metrics.jsonl`, and the same in TensorBoard."""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np
import tensorboardX

from dcore_jax import distributed
from dcore_jax.files import replace_text

METRICS_FILE = 'metrics.jsonl'


class Metrics:
  """Appends scalars to `workdir/metrics.jsonl` and `workdir/tensorboard`; a context manager.

  Of several hosts only the first writes. A line that a killed process left half written is cut off
  on opening, so that the next row starts on a line of its own.
  """

  def __init__(self, workdir: str | os.PathLike):
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
    # Ten seconds instead of TensorBoard's two minutes, so that a run can be watched live.
    self._board = tensorboardX.SummaryWriter(str(self._workdir / 'tensorboard'), flush_secs=10)

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
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    # A killed process loses its buffers; a person who watches the run reads the file meanwhile.
    self._file.flush()
    for name, value in values.items():
      # TensorBoard has no place for null.
      if value is not None:
        self._board.add_scalar(f'{stage}/{name}', value, int(step))

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
      self._file.close()
      self._board.close()

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(self, *_) -> None:
    self.close()


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
