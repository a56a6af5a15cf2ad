"""The files of a distillation: outcomes and rows in shards, and the time of all calls."""

import collections
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dcore_jax.data.seeds import Seed
from dcore_jax.distill.algorithm import SeedOutcome, by_length
from dcore_jax.files import read_json, read_json_lines, replace_text, write_json_atomic

# Kept seeds of each kind, and dropped seeds of each reason, on the sample page. A person is to read
# all of it.
_KEPT_SHOWN = 4
_DROPPED_SHOWN = 3
_CLOCK_INTERVAL = 10.0  # seconds of its time that a killed call loses at most


class Clock:
  """Measures the time of a run that may take several calls.

  It is the time from here on, and what earlier calls have left in a file.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._began = time.perf_counter()
    # A killed call leaves its time in the file, and the next one adds its own.
    self._before = read_json(path)['seconds'] if path.exists() else 0.0
    self._written = self._began

  def tick(self) -> None:
    """Writes the time down where that was last done some seconds ago."""
    if time.perf_counter() - self._written >= _CLOCK_INTERVAL:
      self.write()

  def write(self) -> float:
    """Writes the time down and returns it in seconds."""
    self._written = time.perf_counter()
    seconds = self._before + self._written - self._began
    write_json_atomic(self._path, {'seconds': seconds})
    return seconds


class Shards:
  """Outcomes of a run in files of `size` seeds each.

  A shard is written, whole, when the last of its seeds is finished.
  """

  def __init__(self, folder: pathlib.Path, seeds: Sequence[Seed], size: int):
    self._folder = folder
    self._seeds = seeds
    self._size = size
    # Outcomes that wait for the others of their shard; at most the open shards are in memory.
    self._open: dict[int, dict[int, SeedOutcome]] = collections.defaultdict(dict)

  def _numbers(self, shard: int) -> range:
    return range(shard * self._size, min((shard + 1) * self._size, len(self._seeds)))

  def _rows_path(self, shard: int) -> pathlib.Path:
    # Five digits, so that names sort in the order of the shards.
    return self._folder / f'rows-{shard:05d}.jsonl'

  def _outcomes_path(self, shard: int) -> pathlib.Path:
    return self._folder / f'outcomes-{shard:05d}.jsonl'

  # The last shard may be smaller than the others.
  @property
  def _shards(self) -> range:
    # Rounded up.
    return range(-(-len(self._seeds) // self._size))

  def unfinished(self) -> list[int]:
    """Returns the numbers of the seeds of unwritten shards, in the order to begin with.

    Shard follows shard, so that they are written on the way and not all of them at the end. In each
    shard the longest chains come first.
    """
    result = []
    for shard in self._shards:
      if not self._rows_path(shard).exists():
        numbers = self._numbers(shard)
        places = by_length(self._seeds[number] for number in numbers)
        result += [numbers[place] for place in places]
    return result

  def file(self, number: int, outcome: SeedOutcome) -> None:
    """Takes the outcome of seed `number`; writes its shard if it was the last one."""
    shard = number // self._size
    self._open[shard][number] = outcome
    if len(self._open[shard]) < len(self._numbers(shard)):
      return
    done = self._open.pop(shard)
    records = []
    rows = []
    for seed in self._numbers(shard):
      # A record holds the number of rows; the rows have a file of their own.
      records.append(vars(done[seed]) | {'value': len(done[seed].value)})
      rows += done[seed].value
    # Rows are written last, because a shard with a file of rows counts as finished.
    replace_text(self._outcomes_path(shard), json_lines(records))
    replace_text(self._rows_path(shard), json_lines(rows))

  def outcomes(self) -> Iterator[dict[str, Any]]:
    """Yields the outcomes of all seeds from the files; `value` is the number of rows."""
    for shard in self._shards:
      yield from read_json_lines(self._outcomes_path(shard))

  def sample(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Chooses what to look at -> (rows, outcomes of dropped seeds).

    The rows are those of the first kept seeds of each kind. The outcomes are those of the first
    dropped seeds of each reason.
    """
    # One pass over the outcomes, which need not fit into memory together.
    kept: collections.Counter[str] = collections.Counter()
    wanted = set()
    dropped = collections.defaultdict(list)
    for record in self.outcomes():
      if record['reason']:
        if len(dropped[record['reason']]) < _DROPPED_SHOWN:
          dropped[record['reason']].append(record)
      elif kept[record['kind']] < _KEPT_SHOWN:
        kept[record['kind']] += 1
        wanted.add(record['seed'])
    rows = []
    for shard in self._shards:
      for row in read_json_lines(self._rows_path(shard)):
        # By the seed that a row names: one seed has several rows.
        if row['provenance']['seed'] in wanted:
          rows.append(row)
    lost = []
    for records in dropped.values():
      lost += records
    return rows, lost


def json_lines(records: Sequence[Any]) -> str:
  """Writes every record as a line of JSON."""
  return ''.join(json.dumps(record) + '\n' for record in records)
