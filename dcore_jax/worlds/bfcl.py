"""The executable APIs of BFCL v3's multi-turn tasks, run from an installed bfcl-eval 2025.6.16.

That package pins dozens of others. Only the plain Python classes of its APIs are imported here, and
they need one other package, so both can be installed into a folder of their own (`make harnesses`):
`pip install --no-deps --target .bfcl bfcl-eval==2025.6.16 mpmath==1.3.0`.

A call names a public method of one of the listed classes and has literal arguments. Nothing is
evaluated, whereas BFCL's own harness passes the text that a model wrote to `eval`.
"""

import copy
import functools
import importlib
import importlib.util
import inspect
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import parse_reference

INSTALL = 'pip install --no-deps --target .bfcl bfcl-eval==2025.6.16 mpmath==1.3.0'
# Class -> its module, and its file of function docs.
CLASSES = {
  'GorillaFileSystem': ('gorilla_file_system', 'gorilla_file_system'),
  'MathAPI': ('math_api', 'math_api'),
  'MessageAPI': ('message_api', 'message_api'),
  'TicketAPI': ('ticket_api', 'ticket_api'),
  'TradingBot': ('trading_bot', 'trading_bot'),
  'TravelAPI': ('travel_booking', 'travel_booking'),
  'TwitterAPI': ('posting_api', 'posting_api'),
  'VehicleControlAPI': ('vehicle_control', 'vehicle_control'),
}
_SOURCES = 'bfcl_eval.eval_checker.multi_turn_eval.func_source_code'
# Largest arguments of the calculator. It would compute as many digits as a model asks for, and
# everything else would wait for it.
_LARGEST = {'exponent': 1_000, 'precision': 1_000, 'decimal_places': 1_000}
# Values of a state that are looked at. A folder that was copied into itself has no end.
_NODES = 20_000
_OUTPUT = 500  # characters of an error that a model is shown


def package_folder() -> pathlib.Path:
  """The folder of the package `bfcl_eval`: importable, or in `.bfcl` below the current folder.

  Raises:
    ValueError: it is in neither place.
  """
  spec = importlib.util.find_spec('bfcl_eval')
  places = [pathlib.Path(place) for place in spec.submodule_search_locations] if spec else []
  for folder in (*places, pathlib.Path('.bfcl/bfcl_eval').resolve()):
    if (folder / 'data').is_dir():
      return folder
  raise ValueError(f'BFCL is not installed: {INSTALL} (make harnesses does this)')


@functools.cache
def _class(name: str) -> type:
  if name not in CLASSES:
    raise ValueError(f'no API {name!r}; expected one of {sorted(CLASSES)}')
  folder = str(package_folder().parent)
  sys.path.append(folder)  # at the end, so that nothing of the folder hides another module
  try:
    return getattr(importlib.import_module(f'{_SOURCES}.{CLASSES[name][0]}'), name)
  except ModuleNotFoundError as error:
    raise ValueError(f"BFCL's {name} lacks {error.name}: {INSTALL}") from error
  finally:
    sys.path.remove(folder)


def function_docs(name: str) -> list[dict[str, Any]]:
  """The functions of an API as BFCL describes them: {name, description, parameters, response}."""
  # One JSON object a line, although the file's name ends in .json.
  path = package_folder() / 'data' / 'multi_turn_func_doc' / f'{CLASSES[name][1]}.json'
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


class BfclSandbox:
  """APIs over a scenario of their own; see `worlds.environment.Sandbox`.

  Args:
    classes: names of CLASSES.
    config: class -> scenario, as in BFCL's `initial_config`.
    done: calls that have been made before, as text.

  Raises:
    ValueError: an unknown class, a call that is no call, or BFCL is not installed.
  """

  def __init__(self, classes: Sequence[str], config: Mapping[str, Any], done: Sequence[str] = ()):
    self.instances: dict[str, Any] = {}
    self._methods: dict[str, Any] = {}
    for name in classes:
      instance = _class(name)()
      if hasattr(instance, '_load_scenario'):  # the calculator has no state
        # A copy, since the API keeps and changes what it is given.
        scenario = copy.deepcopy(config.get(name, {}))
        instance._load_scenario(scenario)  # pylint: disable=protected-access
      self.instances[name] = instance
      for method_name, method in inspect.getmembers(instance, inspect.ismethod):
        # Only public methods can be called: private ones load scenarios and reset state.
        if not method_name.startswith('_'):
          self._methods[method_name] = method
    for call in parse_reference(list(done)):
      self.run(call)

  @property
  def state(self) -> Any:
    """What BFCL compares: the public attributes of each API.

    A state that is too large to look at equals no other.
    """
    # A list, so that the recursion shares one count.
    budget = [_NODES]
    try:
      return {name: _plain(instance, budget) for name, instance in self.instances.items()}
    except (OverflowError, RecursionError):
      return object()

  def run(self, call: ToolCall) -> str:
    """See `Sandbox.run`; outputs are those that BFCL shows."""
    method = self._methods.get(call.name)
    # The name is text that a model wrote, and may be of any length.
    if method is None:
      return json.dumps({'error': f'there is no function {call.name[:80]}'})
    try:
      given = inspect.signature(method).bind(
        *copy.deepcopy(call.positional), **copy.deepcopy(call.arguments)
      )
      # `mention` changes a list that is a default value of `post_tweet`. The default belongs to the
      # class, so without a copy one sandbox would reach into all others.
      for name, parameter in given.signature.parameters.items():
        if isinstance(parameter.default, (list, dict)):
          given.arguments.setdefault(name, copy.deepcopy(parameter.default))
      for parameter, largest in _LARGEST.items():
        if abs(given.arguments.get(parameter, 0)) > largest:
          raise ValueError(f'{parameter} is beyond {largest}')
      return _text(method(*given.args, **given.kwargs))
    # The APIs do not check their arguments, and a model may write any: what they raise is shown.
    except Exception as error:  # pylint: disable=broad-except
      return f'Error during execution: {error}'[:_OUTPUT]


def _text(result: Any) -> str:
  """An output as BFCL shows it: a dict as JSON, unless it holds a number of mpmath or decimal."""
  if isinstance(result, dict):
    try:
      return json.dumps(result)
    except TypeError:
      pass
  return str(result)


def _plain(value: Any, budget: list[int]) -> Any:
  """Attributes of attributes as data.

  Names that begin with _ and references back to the parent are left out, as in BFCL's own
  comparison. `budget` holds the number of values that may still be looked at.
  """
  budget[0] -= 1
  if budget[0] < 0:
    raise OverflowError
  if isinstance(value, dict):
    return {key: _plain(item, budget) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, budget) for item in value]
  if hasattr(value, '__dict__'):
    return {
      name: _plain(item, budget)
      for name, item in vars(value).items()
      if not name.startswith('_') and name != 'parent'
    }
  return value
