"""Published rows: local files or hub data sets, in whatever schema they are published in."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import logging

from dcore_jax.data import row_schemas
from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.files import data_path, read_rows

_FILES = ('.json', '.jsonl', '.parquet')
_HUB_NAME = re.compile(r'[\w.-]+/[\w.-]+')


def load_records(name: str) -> list[dict[str, Any]]:
  """Loads the records of a data set.

  JSON files are read here and not by `datasets`: Arrow knows one type a column, and fills the
  nested specs and arguments of every record with the keys of all others. From what comes through
  `datasets`, fields without a value are taken out again.

  Args:
    name: a JSON or JSON-lines file, or a Parquet file or folder that `datasets` reads, by its path
      or below the data folder. Otherwise `owner/name[#configuration]` on the hub (its split
      `train`).

  Raises:
    ValueError: nothing of that name, or content that cannot be read.
  """
  place, _, configuration = name.partition('#')
  on_hub = pathlib.Path(place).suffix not in _FILES and _HUB_NAME.fullmatch(place)
  try:
    path = data_path(place)
  except ValueError:
    if not on_hub:
      raise
    path = None
  if path is not None and path.suffix in ('.json', '.jsonl'):
    return read_rows(path)
  # Importing `datasets` takes 1.5 s, which programs on JSON files should not pay.
  import datasets

  try:
    if path is None:
      options = [configuration] if configuration else []
      found = datasets.load_dataset(place, *options, split='train')
    elif path.is_dir():
      found = datasets.load_dataset(str(path), split='train')
    else:
      found = datasets.load_dataset('parquet', data_files=str(path), split='train')
  except Exception as error:  # the network, the hub and readers of files raise errors of all kinds
    raise ValueError(
      f'{name!r} can be loaded neither from disk nor from the hub: {error}'
    ) from error
  return [_without_nulls(record) for record in found.to_list()]


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows {id, conversations[, tools]}, and how many records were left out as unreadable."""

  rows: list[dict[str, Any]]
  unreadable: int


def sft_rows(
  names: Sequence[str], *, call_style: str = 'python', unreadable: str = 'error'
) -> Rows:
  """Loads rows of the named data sets, in order, whatever schema they are published in.

  Args:
    names: as `load_records` takes them. A schema before a colon is not guessed: `toolace:PATH`.
    call_style: how tools and calls are written where a schema holds them as data, see
      `row_schemas`.
    unreadable: 'error', or 'drop': records that break their schema's promises are left out, counted
      and logged.

  Raises:
    ValueError: a record of no known schema, by file, number and fields; one that cannot be read; a
      data set without a readable record.
  """
  if unreadable not in ('error', 'drop'):
    raise ValueError(f"sft.unreadable = {unreadable!r}; expected 'error' or 'drop'")
  if call_style not in row_schemas.CALL_STYLES:
    raise ValueError(f'sft.call_style = {call_style!r}; expected one of {row_schemas.CALL_STYLES}')
  rows = []
  left_out = 0
  for name in names:
    found = _data_set_rows(name, call_style, unreadable)
    rows += found.rows
    left_out += found.unreadable
  return Rows(rows, left_out)


def _data_set_rows(name: str, call_style: str, unreadable: str) -> Rows:
  schema, _, place = name.partition(':')
  if schema not in row_schemas.SCHEMAS:
    schema = None
    place = name
  stem = pathlib.Path(place).stem
  records = load_records(place)
  if not records:
    raise ValueError(f'{place} holds no records')
  rows = []
  problems = []
  for number, record in enumerate(records):
    found = schema or row_schemas.recognise(record)
    if found is None:
      raise ValueError(
        f'{place}, row {number}: no known schema has the fields {sorted(record)}; '
        f'known are {row_schemas.SCHEMAS}'
      )
    try:
      rows += row_schemas.to_rows(record, found, f'{stem}-{number}', call_style)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
      reason = f'it lacks {error}' if isinstance(error, KeyError) else error
      problems.append(f'{place}, row {number}, cannot be read as {found}: {reason}')
      if unreadable == 'error':
        raise ValueError(problems[0] + "; sft.unreadable = 'drop' would leave it out") from error
  if problems:
    logging.warning(
      '%d of %d records of %s are left out; the first: %s',
      len(problems),
      len(records),
      place,
      problems[0],
    )
    if len(problems) == len(records):
      raise ValueError(f'none of {len(records)} records can be read; the first: {problems[0]}')
  return Rows(rows, len(problems))


def rl_points(names: Sequence[str]) -> list[DecisionPoint]:
  """Loads the decision points of the named files of ToolRL rows."""
  points = []
  for name in names:
    path = data_path(name)
    for number, record in enumerate(read_rows(path)):
      point, _ = row_schemas.toolrl_point(record, f'{path.stem}-{number}')
      points.append(point)
  return points
