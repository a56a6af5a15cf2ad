"""Reads trajectories.jsonl: tasks as models acted them out, one record a line.

A record is what `held_out` and the suites write: {'id', 'kind', 'query', 'correct', 'reason',
'lazy', 'reasoning_tokens', 'messages': [{'role', 'content'}]}. `id` and `kind`, two texts, must be
there, and `correct` where verdicts are needed. `task`, a text, is in records of which several are
trials of one task.
"""

import pathlib
from typing import Any

from dcore_jax.evaluate.suites import TRAJECTORIES_FILE
from dcore_jax.files import read_json_lines
from dcore_jax.progress import SLOW, progress

_EVALUATED = 'evaluate_'


def model_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns where the file that `find_trajectories` calls `name` lies; '' is the folder itself."""
  if not name:
    return folder
  evaluated = folder / (_EVALUATED + name)
  return evaluated if evaluated.is_dir() else folder / name


def find_trajectories(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Finds the files of a folder, by the name of the model or of the suite.

  A folder holds a file itself, whose name is '' then, or it is a run's work directory with a folder
  evaluate_NAME for each model, or it has a folder for each suite.

  Raises:
    ValueError: there is no file.
  """
  if (folder / TRAJECTORIES_FILE).exists():
    return {'': folder / TRAJECTORIES_FILE}
  paths = sorted(folder.glob(f'{_EVALUATED}*/{TRAJECTORIES_FILE}'))
  found = {path.parent.name.removeprefix(_EVALUATED): path for path in paths}
  if not found:
    found = {path.parent.name: path for path in sorted(folder.glob(f'*/{TRAJECTORIES_FILE}'))}
  if not found:
    raise ValueError(f'no {TRAJECTORIES_FILE} in {folder} or in a folder of it')
  return found


def read_trajectories(path: pathlib.Path, *, scored: bool = True) -> list[dict[str, Any]]:
  """Reads the records of a file; one without `messages` gets an empty list.

  Args:
    path: the file.
    scored: every record must have a verdict, `correct`.

  Raises:
    ValueError: a record that cannot be shown or has no verdict, with file, number and field.
  """
  required = [('id', str), ('kind', str)]
  if scored:
    required.append(('correct', bool))
  records = []
  lines = read_json_lines(path)
  bar = progress(lines, description='read traces', unit='trace', delay=SLOW)
  for number, record in enumerate(bar, 1):
    where = f'{path}, record {number}'
    if not isinstance(record, dict):
      raise ValueError(f'{where}: expected an object, got {type(record).__name__}')
    for field, kind in required:
      if not isinstance(record.get(field), kind):
        raise ValueError(f'{where}: {field} = {record.get(field)!r:.80} is no {kind.__name__}')
    if not isinstance(record.get('task', ''), str):
      raise ValueError(f'{where}: task = {record["task"]!r:.80} is no str')
    messages = record.setdefault('messages', [])
    # Pages show role and text of each.
    if not isinstance(messages, list) or not all(
      isinstance(message, dict) and {'role', 'content'} <= message.keys() for message in messages
    ):
      raise ValueError(f'{where}: messages are no list of objects with role and content')
    records.append(whole_letters(record))
  return records


def whole_letters(value: Any) -> Any:
  """Returns JSON data without halves of letters, which no file of UTF-8 text can hold."""
  if isinstance(value, str):
    return value.encode('utf-8', 'backslashreplace').decode()
  if isinstance(value, list):
    return [whole_letters(item) for item in value]
  if isinstance(value, dict):
    return {whole_letters(key): whole_letters(item) for key, item in value.items()}
  return value
