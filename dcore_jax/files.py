"""Files that other programs and people read: JSON written whole, JSON and JSON-lines records read with their place in errors."""

import json
import os
import pathlib
from typing import Any

from dcore_jax import distributed


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
  """Writes `obj` as indented JSON; readers see the old file or the whole new one, never a part. NaN: ValueError."""
  replace_text(
    pathlib.Path(path), json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False) + '\n'
  )


def read_json(path: str | os.PathLike) -> Any:
  """The content of a JSON file; ValueError names the file when it is not JSON."""
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error


def replace_text(path: pathlib.Path, text: str) -> None:
  """Writes a file that readers see whole or not at all; of several hosts the first one does."""
  if not distributed.writes():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with beside.open('w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(
        file.fileno()
      )  # a rename that outlives its data would leave an empty file after a power cut
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


def data_path(name: str) -> pathlib.Path:
  """A file or folder by its path or below the data folder (`DCORE_DATA`, default ../shared/data); ValueError if in neither."""
  folder = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data'))
  for path in (pathlib.Path(name), folder / name):
    if path.exists():
      return path
  raise ValueError(
    f'{name!r} is not there, and neither is it in the data folder {str(folder)!r}; '
    'set DCORE_DATA to the folder that holds it'
  )


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a JSON list or a JSON-lines file; ValueError names file and line of what cannot be parsed."""
  text = path.read_text(encoding='utf-8')
  if path.suffix == '.jsonl':
    rows = []
    for number, line in enumerate(text.split('\n'), 1):
      if line.strip():
        rows.append(parse_json(line, f'{path.name}, line {number}'))
  else:
    rows = parse_json(text, path.name)
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f'{path.name}: expected a list of objects')
  return rows


def parse_json(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'{where} is not JSON: {error}') from error
