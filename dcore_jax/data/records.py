"""Loads published rows of any known schema from local files and from data sets on the hub."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from absl import logging

from dcore_jax import hub
from dcore_jax.data import reference_rows, row_schemas
from dcore_jax.data.dialogues import CALL_STYLES, Record
from dcore_jax.data.record_files import TEXT_FILES, Found, Unreadable, file_kind, read_records
from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.files import data_path

_FILES = (*TEXT_FILES, '.parquet')
# What adapters raise for records that are built otherwise than their schema says. An error of the
# program itself could be among them; it is logged, as every record that is left out is.
ODD = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

Made = TypeVar('Made')


def load_records(name: str) -> list[Found]:
  """Loads the records of a data set.

  JSON files are read here and not by `datasets`: Arrow knows one type a column, and fills the
  nested specs and arguments of every record with the keys of all others. From what comes through
  `datasets`, fields without a value are taken out again.

  Args:
    name: a JSON, JSON-lines or CSV file, perhaps compressed (.gz, .zst), or a Parquet file, by its
      path or below the data folder; a folder there, or `owner/name[@revision]` on the hub (see
      `hub`). Behind a # stands a file of the folder, or a configuration; without one, a folder of
      one text file is that file, and `datasets` reads the split `train` of any other.

  Returns:
    The records in order; an `Unreadable` in the place of one that cannot be parsed.

  Raises:
    ValueError: nothing of that name, or a file that cannot be read.
  """
  place, _, part = name.partition('#')
  path = find_records(place)
  if path.is_dir():
    if part and file_kind(pathlib.Path(part)) in _FILES:
      path = _inside(path, part, name)
    else:
      # One file is all there is to read, and no guess of `datasets` is needed.
      held = [file for file in sorted(path.rglob('*')) if file_kind(file) in TEXT_FILES]
      others = any(path.rglob('*.parquet'))
      if len(held) == 1 and not part and not others:
        path = held[0]
  if path.is_file():
    if file_kind(path) in TEXT_FILES:
      return read_records(path)
    # `datasets` would guess the format of any other file, and fail with an error about itself.
    if path.suffix != '.parquet':
      raise ValueError(
        f'{name!r} is no file of rows; known are {_FILES}, the first with .gz or .zst'
      )
  # Importing `datasets` takes 1.5 s, which programs on JSON files should not pay.
  import datasets

  try:
    if path.is_dir():
      # The card of a data set is in its folder, and says which files its parts are.
      options = [part] if part else []
      found = datasets.load_dataset(str(path), *options, split='train')
    else:
      found = datasets.load_dataset('parquet', data_files=str(path), split='train')
  except Exception as error:  # readers of files raise errors of all kinds
    raise ValueError(f'{name!r} cannot be read: {error}') from error
  # Arrow gives every record all columns, so absent fields come back as None.
  return [_without_nulls(record) for record in found.to_list()]


def names_file(place: str) -> bool:
  """Whether a place is the path of a file of rows: hub names hold a slash, too, and no ending."""
  return file_kind(pathlib.Path(place)) in _FILES


def find_records(place: str) -> pathlib.Path:
  """Finds the file or folder of a data set, here or on the hub.

  Args:
    place: as `load_records` takes it, without what stands behind a #.

  Raises:
    ValueError: it is nowhere, see `hub.find`.
  """
  if names_file(place) or not hub.is_name(place):
    return data_path(place)
  # What is here goes before the hub: nothing is downloaded then.
  return hub.find(place, 'dataset')


def _inside(folder: pathlib.Path, part: str, name: str) -> pathlib.Path:
  """Returns a file of a data set; raises ValueError where its folder has no such file."""
  path = folder / part
  # A name must not lead out of the folder; links into the hub's cache are its own.
  if pathlib.PurePath(part).is_absolute() or '..' in pathlib.PurePath(part).parts:
    raise ValueError(f'{name!r}: {part!r} leads out of the data set')
  if not path.is_file():
    raise ValueError(f'{name!r}: the data set has no file {part!r}')
  return path


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value


@dataclasses.dataclass(frozen=True)
class Converted(Generic[Made]):
  """What became of records, and how many were left out as unreadable."""

  made: list[Made]
  unreadable: int


# (record, name of the record) -> what is made of it; raises one of ODD for what it cannot read.
Convert = Callable[[Record, str], list[Made]]


def convert_records(
  records: Sequence[Any], place: str, convert: Convert[Made], *, unreadable: str, option: str
) -> Converted[Made]:
  """Converts records one by one, so that an unreadable record does not affect the others.

  Args:
    records: of any types; only objects can be converted.
    place: where they are from. It names the records that have no id.
    convert: see `Convert`.
    unreadable: 'error', or 'drop': what cannot be converted is left out, counted and logged.
    option: the config's field that says so.

  Raises:
    ValueError: a record that cannot be converted, by place and number; no records, or none that can
      be converted.
  """
  # A misspelt 'drop' must not act as one of the two.
  if unreadable not in ('error', 'drop'):
    raise ValueError(f"{option} = {unreadable!r}; expected 'error' or 'drop'")
  # An empty file is more often a wrong path than an intended data set of no rows.
  if not records:
    raise ValueError(f'{place} holds no records')
  # The stem becomes a part of row ids, which are written to files: it must show no folders.
  stem = pathlib.Path(place).name.partition('.')[0]
  made = []
  problems = []
  for number, record in enumerate(records):
    try:
      if isinstance(record, Unreadable):
        raise ValueError(f'cannot be read: {record.reason}')
      # JSON lists may hold texts and numbers, which have no fields to convert.
      if not isinstance(record, dict):
        raise ValueError(f'cannot be read: it is of type {type(record).__name__}, not an object')
      made += convert(record, f'{stem}-{number}')
    except ODD as error:
      # The number is that of the record in its file, counted from 0, so that it can be found again.
      problems.append(f'{place}, row {number}, {_reason(error)}')
      if unreadable == 'error':
        raise ValueError(f"{problems[0]}; {option} = 'drop' would leave it out") from error
  if problems:
    logging.warning(
      '%d of %d records of %s are left out; the first: %s',
      len(problems),
      len(records),
      place,
      problems[0],
    )
    # 'drop' is meant for odd records. If no record can be read, the schema or the file is wrong.
    if len(problems) == len(records):
      raise ValueError(f'none of {len(records)} records can be read; the first: {problems[0]}')
  return Converted(made, len(problems))


def _reason(error: Exception) -> str:
  # str(KeyError) is the bare key, which alone does not say that it is missing.
  if isinstance(error, KeyError):
    return f'cannot be read: it lacks {error}'
  if isinstance(error, RecursionError):
    return 'cannot be read: it is nested too deeply'
  text = str(error) or type(error).__name__
  return text if text.startswith('cannot be read') else f'cannot be read: {text}'


def _by_schema(
  convert: Callable[[Record, str, str], list[Made]], schema: str | None
) -> Convert[Made]:
  """Makes a `Convert` of a function of (record, schema, name)."""

  def adapted(record: Record, name: str) -> list[Made]:
    # Each record is recognised alone, because files are mixed from several sources.
    found = schema or row_schemas.recognise(record)
    if found is None:
      raise ValueError(
        f'no known schema has the fields {sorted(record)}; known are {row_schemas.SCHEMAS}'
      )
    try:
      return convert(record, found, name)
    except ODD as error:
      reason = _reason(error).removeprefix('cannot be read: ')
      # The schema is named because the guess itself may be what is wrong.
      raise ValueError(f'cannot be read as {found}: {reason}') from error

  return adapted


def split_schema(name: str) -> tuple[str | None, str]:
  """Returns (schema, or None where it is to be guessed; place) of `[schema:]place`."""
  schema, _, place = name.partition(':')
  # Only known schemas are split off: a path may contain a colon of its own.
  return (schema, place) if schema in row_schemas.SCHEMAS else (None, name)


# --- rows for fine-tuning -------------------------------------------------------------------------


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
    unreadable: 'error', or 'drop': records that cannot be read are left out, counted and logged.

  Raises:
    ValueError: a record that cannot be read or is of no known schema, by file, number and reason; a
      data set without a readable record.
  """
  rows = []
  left_out = 0
  for name in names:
    # Each data set may have its own schema, so that a run can mix sources.
    schema, place = split_schema(name)
    found = adapt_rows(
      load_records(place), place, call_style=call_style, unreadable=unreadable, schema=schema
    )
    rows += found.rows
    left_out += found.unreadable
  return Rows(rows, left_out)


def adapt_rows(
  records: Sequence[Any],
  place: str,
  *,
  call_style: str = 'python',
  unreadable: str = 'error',
  schema: str | None = None,
) -> Rows:
  """Makes rows of records that are there already; see `sft_rows`.

  Args:
    records: in any of the schemas.
    place: what errors call them.
    call_style, unreadable: see `sft_rows`.
    schema: that of all records; None guesses it for each.

  Raises:
    ValueError: as `sft_rows`.
  """
  # Checked before any record, or 'drop' would count every record as unreadable.
  if call_style not in CALL_STYLES:
    raise ValueError(f'sft.call_style = {call_style!r}; expected one of {CALL_STYLES}')

  def convert(record: Record, found: str, name: str) -> list[Record]:
    return row_schemas.to_rows(record, found, name, call_style)

  converted = convert_records(
    records, place, _by_schema(convert, schema), unreadable=unreadable, option='sft.unreadable'
  )
  return Rows(converted.made, converted.unreadable)


# --- rows for reinforcement learning --------------------------------------------------------------


def rl_points(names: Sequence[str], *, unreadable: str = 'error') -> list[DecisionPoint]:
  """Loads the decision points of the named data sets.

  Args:
    names: as `sft_rows` takes them; see `reference_rows` for what a record holds.
    unreadable: 'error', or 'drop': records that cannot be read are left out, counted and logged.

  Raises:
    ValueError: as `sft_rows`.
  """
  points = []
  for name in names:
    schema, place = split_schema(name)

    # The default binds the schema of this data set; a closure would see that of the last one.
    def convert(record: Record, name: str, schema: str | None = schema) -> list[DecisionPoint]:
      return reference_rows.read_points(record, schema, name)

    converted = convert_records(
      load_records(place), place, convert, unreadable=unreadable, option='rl.unreadable'
    )
    points += converted.made
  return points
