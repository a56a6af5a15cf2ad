"""Numbers of a run: one JSON object a line in `metrics.jsonl`, the same in TensorBoard; JSON files written whole."""

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
  """Appends scalars to `workdir/metrics.jsonl` and to `workdir/tensorboard`, of several hosts on the first; a context manager.

  A line that an earlier, killed process left half written is cut off on opening, so that the next row starts clean.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._workdir = pathlib.Path(workdir)
    self._path = self._workdir / METRICS_FILE
    if not distributed.writes():
      self._file = self._board = None
      return
    self._workdir.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(self._path)
    self._file = self._path.open('a', encoding='utf-8')
    # Unbuffered enough to be watched live: TensorBoard's file is flushed every ten seconds.
    self._board = tensorboardX.SummaryWriter(str(self._workdir / 'tensorboard'), flush_secs=10)

  def write(self, stage: str, step: int, **scalars: Any) -> None:
    """One row {'stage', 'step', **scalars}. Python, numpy and jax scalars; what is not finite is written as null.

    The row itself adds no wall-clock time (TensorBoard has it): two runs of one seed differ in their rates alone.

    Raises:
      ValueError: a value is no single number.
    """
    values = {name: _plain_scalar(name, value) for name, value in scalars.items()}
    if not self._file:
      return
    row = {'stage': stage, 'step': int(step), **values}
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()
    for name, value in values.items():
      if value is not None:
        self._board.add_scalar(f'{stage}/{name}', value, int(step))

  def rewind(self, stage: str, step: int) -> list[dict[str, Any]]:
    """Drops the rows of `stage` from `step` on, which a stage resumed at `step` is about to write again -> those before."""
    rows = read_metrics(self._workdir)
    kept = [row for row in rows if row['stage'] != stage or row['step'] < step]
    if self._file and len(kept) < len(rows):
      self._file.close()
      replace_text(self._path, ''.join(json.dumps(row) + '\n' for row in kept))
      self._file = self._path.open('a', encoding='utf-8')
    return [row for row in kept if row['stage'] == stage]

  def close(self) -> None:
    if self._file:
      self._file.close()
      self._board.close()

  def __enter__(self) -> 'Metrics':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def read_metrics(workdir: str | os.PathLike, stage: str | None = None) -> list[dict[str, Any]]:
  """The rows in the order written, of one stage or of all; [] where nothing was written.

  A last line without its newline is a write that was cut short, and is left out.

  Raises:
    ValueError: a line inside the file is not a row (the file was edited or damaged).
  """
  path = pathlib.Path(workdir) / METRICS_FILE
  if not path.exists():
    return []
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
  if value is None or isinstance(value, (bool, int)):
    return value
  if isinstance(value, str) or np.size(value) != 1:
    raise ValueError(f'metric {name!r} must be one number, got {str(value)[:80]!r}')
  value = np.asarray(value).item()
  if not isinstance(value, (bool, int, float)):
    value = float(value)  # bfloat16 and its like come out of .item() as themselves
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: pathlib.Path) -> None:
  if path.exists():
    content = path.read_bytes()
    whole = content.rfind(b'\n') + 1
    if whole < len(content):
      os.truncate(path, whole)
