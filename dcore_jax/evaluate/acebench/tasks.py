"""ACEBench's English tasks, and how a model is asked for them.

The prompts below are this project's own. They carry the information of ACEBench's prompts, whose
text is third-party: the form of a call list, the three sentences that its checker looks for where
nothing can be called, the time or the profile, and the functions. Scores with them are not
comparable with published ones to the last point. Where a checkout of ACEBench is named, its own
prompts are read from it.
"""

import ast
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import Message
from dcore_jax.files import decode_utf8, read_json_lines

ATOMS = ('bool', 'enum', 'number', 'list', 'object_deep', 'object_short')
# Judged by `score`.
SINGLE_TURN = (
  'normal_single_turn_single_function',
  'normal_single_turn_parallel_function',
  'normal_similar_api',
  'normal_preference',
  *(f'normal_atom_{kind}' for kind in ATOMS),
)
# Several calls of one dialogue, each behind what came before: right if all are.
MULTI_TURN = ('normal_multi_turn_user_adjust', 'normal_multi_turn_user_switch')
SPECIAL = ('special_incomplete', 'special_error_param', 'special_irrelevant')
AGENT = ('agent_multi_step', 'agent_multi_turn')
ASKED = (*SINGLE_TURN, *MULTI_TURN, *SPECIAL)

# Names of ACEBench's prompts in its own source.
_NORMAL = 'SYSTEM_PROMPT_FOR_NORMAL_DATA_EN'
_PREFERENCE = 'SYSTEM_PROMPT_FOR_PREFERENCE_DATA_EN'
_SPECIAL = 'SYSTEM_PROMPT_FOR_SPECIAL_DATA_EN'
_USER = 'USER_PROMPT_EN'
_PROMPT_FILES = ('model_inference/prompt_en.py', 'model_inference/prompt/prompt_en.py')

_CALLS = """You are the assistant of a conversation. Write the function calls that come next. In the
conversation 'system' and 'assistant' are you, and 'tool' is what a call gave back.

Write them as one list, [name(key='value', other=2), name(key='value')], with every argument by its
name, and nothing before or behind the list.
- Use only functions and parameters that are described. A function without parameters is called as
  [name()].
- Parameters are optional where their description does not say that they are required: give those
  that {source} speaks of, and leave out the others.
- Take values from {source} in the words that stand there, unless the description of the parameter
  asks for another form."""
_REFUSALS = """

If no such list can be written, answer with one of these sentences in a list instead. Look for a
reason in this order.
1. A value that the user gives does not have the type or form that the function asks for:
   ["There is incorrect value (VALUE) for the parameters (KEY)."]
2. The user does not give values that the function requires:
   ["Missing necessary parameters (KEY, KEY) for the api (NAME)."]
3. No function can do what the user wants:
   ["Due to the limitations of the function, this cannot be done."]"""
_FUNCTIONS = '\n\nFunctions:\n{function}'
_OWN = {
  _NORMAL: _CALLS.format(source='the user') + '\n\n{time}' + _FUNCTIONS,
  _PREFERENCE: _CALLS.format(source='the user or the profile')
  + '\n\nProfile of the user:\n{profile}'
  + _FUNCTIONS,
  _SPECIAL: _CALLS.format(source='the user') + _REFUSALS + '\n\n{time}' + _FUNCTIONS,
  _USER: 'Conversation:\n{question}',
}


@dataclasses.dataclass(frozen=True)
class Task:
  """A task with its reference.

  Attributes:
    category: e.g. 'normal_atom_bool'.
    record: the line of the category's file.
    reference: the line of the file of possible answers.
  """

  category: str
  record: Mapping[str, Any]
  reference: Mapping[str, Any]

  @property
  def id(self) -> str:
    """The id that ACEBench gives it."""
    return self.record['id']

  @property
  def unit(self) -> str:
    """What is right or wrong as a whole: the task, or the dialogue that it is a turn of."""
    return self.id.rpartition('_')[0] if self.category in MULTI_TURN else self.id


def read_tasks(folder: pathlib.Path, category: str, limit: int) -> list[Task]:
  """Reads the tasks of a category.

  Args:
    folder: holds data_all/data_en, as a checkout does.
    category: e.g. 'normal_atom_bool'.
    limit: takes the first so many tasks or dialogues; 0 takes all.

  Raises:
    ValueError: a file is missing, or is not what it should be.
  """
  data = folder / 'data_all' / 'data_en'
  name = f'data_{category}.json'
  pairs = []
  for path in (data / name, data / 'possible_answer' / name):
    if not path.is_file():
      raise ValueError(
        f'{str(path)!r} is missing; it is a file of github.com/ACEBench/ACEBench, whose checkout '
        'is named with acebench=DIR'
      )
    pairs.append(_read_lines(path))
  records, references = pairs
  if [row.get('id') for row in records] != [row.get('id') for row in references]:
    raise ValueError(f'{name}: tasks and possible answers have different ids')
  wanted = {'id', 'question', 'function'}
  tasks = []
  units = set()
  for record, reference in zip(records, references, strict=True):
    if not wanted <= record.keys() or 'ground_truth' not in reference:
      raise ValueError(f'{name}: task {record.get("id")!r} lacks a field')
    task = Task(category, record, reference)
    units.add(task.unit)
    if limit and len(units) > limit:
      break
    tasks.append(task)
  return tasks


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  rows = read_json_lines(path)
  for row in rows:
    if not isinstance(row, dict) or not isinstance(row.get('id'), str):
      raise ValueError(f'{path.name} holds something else than tasks: {str(row)[:80]!r}')
  return rows


def read_prompts(checkout: pathlib.Path | None) -> dict[str, str]:
  """Returns the prompts: those of a checkout, or of this project.

  Raises:
    ValueError: the checkout has no such prompts.
  """
  if checkout is None:
    return dict(_OWN)
  for name in _PROMPT_FILES:
    path = checkout / name
    if not path.is_file():
      continue
    found = _constants(path)
    if found.keys() >= _OWN.keys():
      return {key: found[key] for key in _OWN}
  raise ValueError(f'{str(checkout)!r} has no prompts {sorted(_OWN)} in any of {_PROMPT_FILES}')


def _constants(path: pathlib.Path) -> dict[str, str]:
  """Reads the texts that a Python file assigns to names, without running it."""
  try:
    body = ast.parse(decode_utf8(path.read_bytes(), str(path))).body
  except (SyntaxError, RecursionError) as error:
    raise ValueError(f'{str(path)!r} is no Python: {error}') from error
  found = {}
  for node in body:
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
      continue
    if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
      found[node.targets[0].id] = node.value.value
  return found


def write_messages(task: Task, prompts: Mapping[str, str], own: bool) -> tuple[Message, ...]:
  """Writes the chat that asks a task.

  Args:
    task: of one of ASKED.
    prompts: see `read_prompts`.
    own: the prompts are this project's, which take a function a line as JSON.

  Raises:
    ValueError: a prompt with another field.
  """
  if task.category in SPECIAL:
    name = _SPECIAL
  else:
    name = _PREFERENCE if task.category == 'normal_preference' else _NORMAL
  functions = task.record['function']
  values = {
    'time': task.record.get('time') or '',
    'profile': task.record.get('profile') or '',
    'function': _write_functions(functions) if own else functions,
    'question': task.record['question'],
  }
  try:
    system = prompts[name].format(**values)
    user = prompts[_USER].format(**values)
  except (KeyError, IndexError, AttributeError) as error:
    raise ValueError(f'the prompt {name} has a field that is not known: {error}') from error
  return Message('system', system), Message('user', user)


def _write_functions(functions: Sequence[Mapping[str, Any]]) -> str:
  return '\n'.join(json.dumps(function, ensure_ascii=False) for function in functions)
