"""Judges BFCL answers with the checker of bfcl-eval 2025.6.16, in a process of its own.

`score` starts it as `python -m dcore_jax.evaluate.bfcl.checker FOLDER` with one job a line on
stdin, and reads one verdict a line from stdout. FOLDER is the one that holds the package.

The checker passes text that a model wrote to `eval` in two places: sums inside of arguments, and
the calls of multi-turn tasks. Both get `evaluate` of this file in its place, which computes
literals and calls public methods of the task's APIs. Everything else is refused and recorded.
"""

import ast
import builtins
import importlib
import inspect
import json
import operator
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dcore_jax.chat import python_calls
from dcore_jax.evaluate.confined.confinement import confine

_SECONDS = 3600  # of processor time; the parent ends it after less for a single answer
_BYTES = 2 << 30  # address space: the checker with all tasks needs a quarter of it
_MAX_ELEMENTS = 65_536  # of a text or list that a multiplication makes
_MAX_EXPONENT = 1_024
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Pow: operator.pow,
}
# As the harness has it: tags on the lines of the call, or without them, are none.
_TAGGED = re.compile(r'<tool_call>\n(.*?)\n</tool_call>', re.DOTALL)
_LANGUAGES = {'java': 'Java', 'javascript': 'JavaScript'}


class Refused(Exception):
  """An expression that only Python itself could evaluate."""


class Evaluator:
  """Stands in for `eval` in one module of the checker.

  Args:
    known: the names of the module. One that is neither here nor builtin is an error in Python, too.
    refusals: takes a text for every expression that was refused.
  """

  def __init__(self, known: Mapping[str, Any], refusals: list[str]):
    self._known = known
    self._refusals = refusals

  def __call__(self, text: str) -> Any:
    """Computes an expression of literals and whitelisted calls.

    Raises:
      Refused: any other expression that means something in Python.
      Exception: what Python raises for an expression that is wrong.
    """
    try:
      python_calls.check_length(text)
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tree = ast.parse(text, mode='eval')
      return self._compute(tree.body, 0)
    except (Refused, python_calls.ToolCallError) as error:
      self._refusals.append(f'{error}: {python_calls.clip(text)}')
      raise Refused(str(error)) from error

  def _compute(self, node: ast.expr, depth: int) -> Any:
    """Computes in Python's own order, so that the first fault is the one that Python finds."""
    python_calls.check_depth(depth)
    if isinstance(node, ast.Constant):
      return python_calls.checked_constant(node.value)
    if isinstance(node, (ast.List, ast.Tuple)):
      made = [self._compute(item, depth + 1) for item in node.elts]
      return made if isinstance(node, ast.List) else tuple(made)
    if isinstance(node, ast.Dict) and None not in node.keys:
      pairs = zip(node.keys, node.values, strict=True)
      return {self._compute(key, depth + 1): self._compute(item, depth + 1) for key, item in pairs}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
      value = self._compute(node.operand, depth + 1)
      return -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
      # Sums of many terms lean to the left, and are deep without a bracket.
      left = self._compute(node.left, depth + 1)
      right = self._compute(node.right, depth + 1)
      _check_operands(node.op, left, right)
      value = _OPERATORS[type(node.op)](left, right)
      return value if isinstance(value, (list, tuple)) else python_calls.checked_constant(value)
    if isinstance(node, ast.Call):
      return self._call(node, depth)
    raise self._refusal(node)

  def _call(self, node: ast.Call, depth: int) -> Any:
    method = self._method(node.func)
    if method is None:
      raise self._refusal(node.func)
    positional = [self._compute(item, depth + 1) for item in node.args]
    named = {}
    for item in node.keywords:
      if item.arg is None:
        raise self._refusal(item.value)
      named[item.arg] = self._compute(item.value, depth + 1)
    return method(*positional, **named)

  def _method(self, node: ast.expr) -> Callable[..., Any] | None:
    """Returns the public method of an API's instance that `instance.method` names, if it does."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
      return None
    # The checker keeps instances among the names of its module, under names with this ending.
    if node.attr.startswith('_') or not node.value.id.endswith('_instance'):
      return None
    instance = self._known.get(node.value.id)
    method = getattr(instance, node.attr, None)
    return method if inspect.ismethod(method) else None

  def _refusal(self, node: ast.expr) -> Exception:
    """Returns the error of an expression that is not computed."""
    root = node
    # Python looks at the innermost name first, and ends where there is none.
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
      root = root.func if isinstance(root, ast.Call) else root.value
    if isinstance(root, ast.Name) and not (root.id in self._known or hasattr(builtins, root.id)):
      return NameError(f"name '{root.id}' is not defined")
    return Refused(f'not evaluated: {python_calls.describe(node)}')


def _check_operands(kind: ast.operator, left: Any, right: Any) -> None:
  """Refuses operations whose result is large, or takes long."""
  sizes = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
  numbers = [value for value in (left, right) if isinstance(value, (int, float))]
  if isinstance(kind, ast.Mult) and sizes and numbers:
    if max(sizes) * max(numbers) > _MAX_ELEMENTS:
      raise Refused('not evaluated: a repetition of too many elements')
  # The format of a text may ask for a billion digits.
  if isinstance(kind, ast.Mod) and isinstance(left, str):
    raise Refused('not evaluated: a format')
  if isinstance(kind, ast.Pow) and len(numbers) == 2:
    if abs(right) > _MAX_EXPONENT:
      raise Refused('not evaluated: an exponent that is too large')


# --- the checker ---


class _AnyModel:
  """Stands in for the table of models, which imports the clients of twenty services.

  The checker asks it one thing: whether a model's functions are named with _ in place of a dot.
  """

  def __getitem__(self, name: str) -> Any:
    return types.SimpleNamespace(underscore_to_dot=name == 'underscores')


class Checker:
  """The parts of bfcl-eval that judge one item.

  Args:
    folder: holds the package.
  """

  def __init__(self, folder: str):
    sys.path.append(folder)
    _stand_in('bfcl_eval.constants.model_config', MODEL_CONFIG_MAPPING=_AnyModel())
    # Decorators of the clients' requests, of which none is sent.
    nothing = dict.fromkeys(
      ('retry_if_exception_message', 'retry_if_exception_type', 'wait_random_exponential')
    )
    _stand_in('tenacity', retry=None, **nothing)
    self.lacks: str | None = None
    try:
      importlib.import_module('bfcl_eval.model_handler.parser.java_parser')
      importlib.import_module('bfcl_eval.model_handler.parser.js_parser')
    except ModuleNotFoundError as error:
      self.lacks = error.name
      _stand_in('bfcl_eval.model_handler.parser.java_parser', parse_java_function_call=None)
      _stand_in('bfcl_eval.model_handler.parser.js_parser', parse_javascript_function_call=None)
    self.decoding = importlib.import_module('bfcl_eval.model_handler.utils')
    self.formats = importlib.import_module('bfcl_eval.utils')
    self.trees = importlib.import_module('bfcl_eval.eval_checker.ast_eval.ast_checker')
    turns = 'bfcl_eval.eval_checker.multi_turn_eval'
    self.turns = importlib.import_module(f'{turns}.multi_turn_checker')
    self.calling = importlib.import_module(f'{turns}.multi_turn_utils')
    for name in self.calling.CLASS_FILE_PATH_MAPPING.values():
      importlib.import_module(name)
    self.refusals: list[str] = []
    for module in (self.decoding, self.calling):
      # A name of the module is found before the builtin one of the same name.
      module.eval = Evaluator(vars(module), self.refusals)

  def judge(self, job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {'correct': bool | None, 'reason', 'refused': [text]}; None: it cannot be judged."""
    category = job['category']
    if category in _LANGUAGES and self.lacks:
      reason = f'needs the package {self.lacks}, which `make harnesses` installs'
      return {'correct': None, 'reason': reason, 'refused': []}
    self.refusals.clear()
    try:
      if category.startswith('multi_turn'):
        reason = self._turns(job)
      elif 'relevance' in category:
        reason = self._relevance(job)
      else:
        reason = self._calls(job)
    # The checker was written for answers of well-known models, and raises over others.
    except Exception as error:  # pylint: disable=broad-except
      reason = 'checker_failed'
      self.refusals.append(f'the checker raised {type(error).__name__}: {str(error)[:200]}')
    # An instance that is left would be the state in which the same task begins next time.
    for name in [name for name in vars(self.calling) if name.endswith('_instance')]:
      delattr(self.calling, name)
    return {'correct': not reason, 'reason': reason, 'refused': list(self.refusals)}

  def _calls(self, job: Mapping[str, Any]) -> str:
    language = _LANGUAGES.get(job['category'], 'Python')
    try:
      calls = self._decode(job, language)
    except Exception:  # pylint: disable=broad-except
      return 'ast_decoder:decoder_failed'
    if not self.formats.is_function_calling_format_output(calls):
      return 'ast_decoder:decoder_wrong_output_format'
    # Interfaces for calls as data allow no dot in a name, so that it was replaced in the prompt.
    names = [name for call in calls for name in call]
    as_data = isinstance(job['result'], list) and not any('.' in name for name in names)
    model = 'underscores' if as_data else 'dots'
    task = job['task']
    found = self.trees.ast_checker(
      task['function'], calls, job['answer'], language, job['category'], model
    )
    return '' if found['valid'] else found['error_type']

  def _relevance(self, job: Mapping[str, Any]) -> str:
    wanted = 'irrelevance' not in job['category']
    try:
      called = not self.formats.is_empty_output(self._decode(job, 'Python'))
    except Refused:
      # The text is a call, only the value of an argument is not known.
      called = True
    except Exception:  # pylint: disable=broad-except
      called = False
    if called == wanted:
      return ''
    return 'relevance_error:decoder_failed' if wanted else 'irrelevance_error:decoder_success'

  def _turns(self, job: Mapping[str, Any]) -> str:
    given = job['result']
    if not isinstance(given, list):
      return 'multi_turn:inference_error'
    if len(given) != len(job['answer']):
      return 'multi_turn:force_terminated'
    decoded = []
    for turn in given:
      steps = []
      for step in turn:
        try:
          calls = self._decode_for_execution(step, job.get('fc', False))
        # What is no call is a message to the user, and ends nothing.
        except Exception:  # pylint: disable=broad-except
          continue
        if not self.calling.is_empty_execute_response(calls):
          steps.append(calls)
      decoded.append(steps)
    found = self.turns.multi_turn_checker(
      decoded, job['answer'], job['task'], job['category'], 'model'
    )
    return '' if found['valid'] else found['error_type']

  def _decode(self, job: Mapping[str, Any], language: str) -> Any:
    result = job['result']
    if isinstance(result, str) and job.get('fc'):
      return [{call['name']: dict(call['arguments'].items())} for call in _tagged_calls(result)]
    if isinstance(result, str):
      return self.decoding.default_decode_ast_prompting(result, language)
    # An interface for calls as data: [{name: arguments}], arguments as JSON text.
    return [{name: _arguments(call[name])} for call in result for name in list(call)[:1]]

  def _decode_for_execution(self, step: Any, fc: bool) -> list[str]:
    if isinstance(step, str) and fc:
      step = [{call['name']: call['arguments']} for call in _tagged_calls(step)]
    elif isinstance(step, str):
      return self.decoding.default_decode_execute_prompting(step)
    return self.decoding.convert_to_function_call(step)


def _tagged_calls(text: str) -> list[dict[str, Any]]:
  """Reads calls between tags as the harness's handler of Qwen3 does.

  One that is not JSON, or no object, leaves no calls at all.
  """
  calls = []
  for found in _TAGGED.findall(text):
    try:
      call = json.loads(found)
    except ValueError:
      return []
    if not isinstance(call, dict):
      return []
    calls.append(call)
  return calls


def _arguments(given: Any) -> Any:
  return json.loads(given) if isinstance(given, str) else given


def _stand_in(name: str, **attributes: Any) -> None:
  module = types.ModuleType(name)
  vars(module).update(attributes)
  sys.modules[name] = module


# --- the process ---


def main(folder: str) -> None:
  """Judges the jobs of stdin."""
  # bfcl-eval makes folders for results when it is imported. This one goes with the process.
  os.environ['BFCL_PROJECT_ROOT'] = os.getcwd()
  checker = Checker(folder)
  answers = sys.stdout
  # What the APIs print would stand between the verdicts.
  sys.stdout = open(os.devnull, 'w', encoding='utf-8')
  confine(seconds=_SECONDS, memory=_BYTES, folders=[folder, *sys.path])
  print('{"ready": true}', file=answers, flush=True)
  for line in sys.stdin:
    print(json.dumps(checker.judge(json.loads(line))), file=answers, flush=True)


if __name__ == '__main__':
  main(sys.argv[1])
