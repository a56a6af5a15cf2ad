"""Files that other programs and people read.

Text and JSON are written whole or not at all. JSON and JSON-lines records are read so that errors
name their place.
"""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
  """Writes `obj` as indented JSON; readers see the old file or the whole new one, never a part.

  Raises:
    ValueError: `obj` holds NaN or infinity, which JSON does not have.
  """
  text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False) + '\n'
  replace_text(pathlib.Path(path), text)


def read_json(path: str | os.PathLike) -> Any:
  """Reads a JSON file; raises ValueError with its name where it is not JSON."""
  return parse_json(decode_utf8(pathlib.Path(path).read_bytes(), str(path)), str(path))


def decode_utf8(data: bytes, name: str) -> str:
  """Decodes UTF-8 text, without a byte-order mark in front.

  Raises:
    ValueError: naming the file and the line where the bytes are something else.
  """
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise ValueError(f'{name}, line {line} is not UTF-8 text: {error.reason}') from error
  # UTF-16 of plain letters is valid UTF-8 with a zero byte beside every letter.
  if '\0' in text[:1000]:
    raise ValueError(f'{name}, line 1 is not UTF-8 text: it holds zero bytes, as UTF-16 does')
  return text


def read_json_lines(path: pathlib.Path) -> list[Any]:
  """Reads a file with one JSON value a line; blank lines are skipped.

  Raises:
    ValueError: naming file and line of what is not JSON.
  """
  values = []
  # Text in JSON may hold other line separators, such as U+2028: only '\n' ends a value.
  for number, line in enumerate(decode_utf8(path.read_bytes(), path.name).split('\n'), 1):
    if line.strip():
      values.append(parse_json(line, f'{path.name}, line {number}'))
  return values


def replace_text(path: pathlib.Path, text: str) -> None:
  """Writes a file that readers see whole or not at all; of several hosts only the first writes."""
  if not is_writer():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with named_errors(path), beside.open('w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      # A rename may reach the disk before the data: a power cut would leave an empty file.
      os.fsync(file.fileno())
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(path: pathlib.Path) -> Iterator[None]:
  """Gives an error of the system the name of the file that is written.

  `open` knows it; `write` on a full disk says no more than that there is no space.
  """
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def is_writer() -> bool:
  """Whether this process is the one that writes results."""
  # A program without jax is one process on one host. It should not pay for importing jax (2 s).
  if 'jax' not in sys.modules:
    return True
  from dcore_jax import distributed

  return distributed.writes()


def data_folder() -> pathlib.Path:
  """Returns the folder of third-party data: the environment's `DCORE_DATA`, or ../shared/data."""
  return pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data'))


def data_path(name: str) -> pathlib.Path:
  """Finds a file or folder by its path or below the data folder.

  Raises:
    ValueError: it is in neither place.
  """
  folder = data_folder()
  for path in (pathlib.Path(name), folder / name):
    if path.exists():
      return path
  raise ValueError(
    f'{name!r} is not there, and neither is it in the data folder {str(folder)!r}; '
    'set DCORE_DATA to the folder that holds it'
  )


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the records of a JSON list or a JSON-lines file.

  Raises:
    ValueError: naming file and line of what cannot be parsed, or a record that is no object.
  """
  if path.suffix == '.jsonl':
    rows = read_json_lines(path)
  else:
    rows = parse_json(decode_utf8(path.read_bytes(), path.name), path.name)
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f'{path.name}: expected a list of objects')
  return rows


def parse_json(text: str, where: str) -> Any:
  """Parses JSON text; raises ValueError with `where` if it is not JSON."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where} is not JSON: {error}') from error
