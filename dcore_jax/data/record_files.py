"""Records of published files, read one by one, so that an odd one can be left out.

A file is JSON (a list), JSON lines or CSV, as UTF-8 with or without a byte-order mark, and perhaps
compressed (.gz, .zst). What is wrong with the file itself is an error. What is wrong with one
record stays with that record, as an `Unreadable` in its place.
"""

import collections
import csv
import dataclasses
import gzip
import io
import itertools
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from dcore_jax.files import decode_utf8

TEXT_FILES = ('.json', '.jsonl', '.ndjson', '.csv')
COMPRESSED = ('.gz', '.zst')
# Levels of lists and objects in a record. Real ones have some ten. Python's own readers and
# printers of JSON give up at some hundreds, a number that depends on who calls them.
MAX_DEPTH = 64
# Characters of a CSV cell. Python's default of 131,072 is less than a long list of tools.
_MAX_CELL = 1 << 28

_TOO_DEEP = f'has more than {MAX_DEPTH} levels of lists and objects'
_DECODER = json.JSONDecoder()
# A string that never ends is taken to the end of the text: else each quote in it would be looked at
# as a beginning, which takes minutes for 1 MB.
_STRING_OR_MARK = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')
_ODD_SURROGATE = re.compile('[\ud800-\udfff]')


@dataclasses.dataclass(frozen=True)
class Unreadable:
  """A record that cannot be read, and why."""

  reason: str


Found = dict[str, Any] | Unreadable


def file_kind(path: pathlib.Path) -> str:
  """Returns the last suffix of a file without `.gz` or `.zst`, such as '.jsonl'; '' for none."""
  # rows.jsonl.gz has two suffixes, and its format is the inner one.
  suffixes = [suffix.lower() for suffix in path.suffixes]
  if suffixes and suffixes[-1] in COMPRESSED:
    suffixes.pop()
  return suffixes[-1] if suffixes else ''


def read_records(path: pathlib.Path) -> list[Found]:
  """Reads the records of a file of one of TEXT_FILES.

  Raises:
    ValueError: naming the file (and line) where it is not UTF-8, cannot be decompressed, or is no
      list of records.
  """
  text = _decode(_read_bytes(path), path.name)
  kind = file_kind(path)
  if kind == '.csv':
    return list(_csv_records(text, path.name))
  # The first character tells a list from JSON lines, because the ending .json is used for both.
  start = text.lstrip()[:1]
  # Files of JSON lines are also called .json (BFCL's are). One object alone is no list of records.
  if kind == '.json' and start != '{':
    return list(_listed_records(text, path.name))
  records = []
  # Text in JSON may hold other line separators, such as U+2028: only '\n' ends a record.
  for number, line in enumerate(text.split('\n'), 1):
    line = line.strip().lstrip('\ufeff')  # files put behind each other have marks inside
    if line:
      records.append(_record(line, f'line {number} '))
  # A .json file that is one object over several lines has no readable line.
  if kind == '.json' and all(isinstance(record, Unreadable) for record in records):
    raise ValueError(f'{path.name}: expected a list of objects')
  return records


def _read_bytes(path: pathlib.Path) -> bytes:
  suffix = path.suffix.lower()
  try:
    if suffix == '.gz':
      with gzip.open(path) as file:
        return file.read()
    if suffix == '.zst':
      # Arrow comes with `datasets` and reads this format. Its import takes some tenths of a second,
      # which other files should not cost.
      import pyarrow

      with pyarrow.input_stream(str(path), compression='zstd') as file:
        return file.read()
    return path.read_bytes()
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f'{path.name} cannot be read: {error}') from error


def _decode(data: bytes, name: str) -> str:
  """Decodes a file; a byte that is not UTF-8 becomes half of a surrogate pair.

  Raises:
    ValueError: naming the file where it is UTF-16.
  """
  try:
    return decode_utf8(data, name)
  except ValueError:
    # Zero bytes stand all over UTF-16. Else some records may be odd, and the others are not.
    if b'\0' in data[:1000]:
      raise
  return data.decode('utf-8-sig', 'surrogateescape')


def _listed_records(text: str, name: str) -> Iterator[Found]:
  """Yields the elements of a JSON list, each of which is parsed alone."""
  place = _space_end(text, 0)
  if text[place : place + 1] != '[':
    raise ValueError(f'{name}: expected a list of objects')
  place = _space_end(text, place + 1)
  # Elements are found one by one: json.loads on the whole list would fail with one bad element.
  while text[place : place + 1] != ']':
    end = _element_end(text, place)
    if end is None:
      raise ValueError(f'{name}, line {_line(text, place)} is not JSON: the list never ends')
    yield _record(text[place:end].strip(), '')
    place = end
    # Python's parser would refuse this comma too. To accept it here alone would be inconsistent.
    if text[place] == ',':
      place = _space_end(text, place + 1)
      if text[place : place + 1] == ']':
        raise ValueError(f'{name}, line {_line(text, place)} is not JSON: a comma stands before ]')
  if text[place + 1 :].strip():
    raise ValueError(f'{name}, line {_line(text, place)} is not JSON: text follows the list')


def _line(text: str, place: int) -> int:
  return text.count('\n', 0, place) + 1


def _space_end(text: str, place: int) -> int:
  while place < len(text) and text[place] in ' \t\r\n':
    place += 1
  return place


def _element_end(text: str, place: int) -> int | None:
  """Finds the comma or bracket behind an element of a list, whatever the element holds."""
  try:
    _, end = _DECODER.raw_decode(text, place)
    end = _space_end(text, end)
    if text[end : end + 1] in (',', ']'):
      return end
  except (ValueError, RecursionError):
    pass
  # A parser does not tell where an element ends that it cannot parse: brackets are counted.
  depth = 0
  for match in _STRING_OR_MARK.finditer(text, place):
    mark = match[0]
    if mark in ('[', '{'):
      depth += 1
    elif depth == 0 and mark in (',', ']'):
      return match.start()
    elif mark in (']', '}'):
      depth -= 1
  return None


def _csv_records(text: str, name: str) -> Iterator[Found]:
  """Yields the rows of a CSV file with a header, as texts by column; empty cells are absent."""
  lines = io.StringIO(text, newline='').readlines()
  # The limit is global to the process, so it is put back at the end.
  limit = csv.field_size_limit(_MAX_CELL)
  try:
    rows = csv.reader(lines, strict=True)
    columns = next(rows, [])
    # A dict would keep the last of the two columns and lose the other without a word.
    if len(set(columns)) < len(columns):
      raise ValueError(f'{name}: two columns have one name: {columns}')
    before = 0  # lines that this reader was not given
    begun = rows.line_num
    while begun < len(lines):
      try:
        cells = next(rows)
      except csv.Error as error:
        # Nobody knows how far such a row reaches, so that the next line is tried.
        yield Unreadable(f'line {begun + 1} is not CSV: {error}')
        begun += 1
        before = begun
        rows = csv.reader((lines[number] for number in range(begun, len(lines))), strict=True)
        continue
      if cells:
        yield _csv_record(columns, cells, begun + 1)
      begun = before + rows.line_num
  except csv.Error as error:
    raise ValueError(f'{name}, line 1 is not CSV: {error}') from error
  finally:
    csv.field_size_limit(limit)


def _csv_record(columns: list[str], cells: list[str], line: int) -> Found:
  # Usually a comma was not quoted.
  if len(cells) > len(columns):
    return Unreadable(f'line {line} has more cells than the header ({len(columns)})')
  try:
    _refuse_bytes(''.join(cells))
  except ValueError as error:
    return Unreadable(f'line {line} {error}')
  # Cells that a short row lacks are as empty as others.
  return {column: cell for column, cell in zip(columns, cells, strict=False) if cell}


def _record(text: str, where: str) -> Found:
  try:
    _refuse_bytes(text)
    record = parse_strictly(text)
  except ValueError as error:
    return Unreadable(f'{where}{error}')
  if not isinstance(record, dict):
    return Unreadable(f'{where}holds a value of type {type(record).__name__}, not an object')
  return record


def _refuse_bytes(text: str) -> None:
  """Raises ValueError where a text holds what `_decode` has made of a byte."""
  found = _ODD_SURROGATE.search(text)
  if found:
    raise ValueError(f'is not UTF-8 text: it holds the byte {ord(found[0]) & 0xFF:#x}')


def parse_strictly(text: str) -> Any:
  """Parses JSON text in which nothing can be lost or break later.

  Raises:
    ValueError: text that is no JSON, NaN or infinity, a key that is given twice in one object, half
      of a surrogate pair, more than MAX_DEPTH levels, or a number of too many digits.
  """
  try:
    # Models, and scripts that paste texts together, break lines inside of strings. JSON forbids
    # that, but nothing is lost by it.
    value = json.loads(
      text,
      strict=False,
      object_pairs_hook=_unique_keys,
      parse_constant=_no_constant,
      parse_float=_finite,
    )
  except json.JSONDecodeError as error:
    raise ValueError(f'is not JSON: {error}') from error
  except ValueError as error:  # of the hooks, or of an integer of too many digits
    raise ValueError(f'cannot be read: {error}') from error
  except RecursionError as error:
    raise ValueError(_TOO_DEEP) from error
  _check_depth(value)
  # JSON escapes can spell characters that no text has, at which tokenizers and files fail.
  if _SURROGATE.search(text):
    refuse_surrogates(value)
  return value


def refuse_surrogates(value: Any) -> None:
  """Raises ValueError where a text in a JSON value holds half of a surrogate pair."""
  if _ODD_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
    raise ValueError('holds half of a surrogate pair')


def _check_depth(value: Any) -> None:
  level = [value] if isinstance(value, (dict, list)) else []
  # Level by level and not recursively, because deep values are what this check is for.
  for _ in range(MAX_DEPTH):
    items = itertools.chain.from_iterable(
      one.values() if isinstance(one, dict) else one for one in level
    )
    level = [item for item in items if isinstance(item, (dict, list))]
    if not level:
      return
  raise ValueError(_TOO_DEEP)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  # json.loads keeps the last value of a repeated key, and the first would be lost.
  record = dict(pairs)
  if len(record) < len(pairs):
    # Counted once: a count for each key would take a minute for an object of 1 MB.
    counts = collections.Counter(name for name, _ in pairs)
    twice = next(name for name, count in counts.items() if count > 1)
    raise ValueError(f'the key {twice!r} is given twice')
  return record


def _no_constant(word: str) -> Any:
  raise ValueError(f'{word} is no JSON number')


def _finite(digits: str) -> float:
  # 1e999 is valid JSON and becomes infinity, which JSON has no word for.
  value = float(digits)
  if not math.isfinite(value):
    raise ValueError(f'{digits} is too large a number')
  return value
