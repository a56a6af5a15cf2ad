"""Judges call lists as ACEBench's checker does, for the ten single-turn normal categories.

    verdict = judge("[f(a=1)]", functions, reference)

It gives all 2,450 verdicts, and their reasons, that the official checker (commit e6db74b) gave to
the predictions of acebench/golden_normal.jsonl. That checker has rules that nobody would guess. A
score can be compared with published ones only if they hold here, too:

- All white space leaves a prediction before it is parsed, also inside of texts. References keep
  theirs. Texts that are arguments themselves are compared without white space (see next), those in
  lists of lists or of records inside of arguments are not: there a right answer may fail.
- Texts are compared in lower case, without ` ,./-_*^` and with one kind of quotes. The reference
  has only to be a part of the prediction, except in a plain list, where both must be equal.
- Numbers and truth values that are arguments themselves are compared by their type alone.
- Where the reference has another type than the function declares, or the declared type is an enum,
  a prediction of the reference's type passes, whatever it says.
- An empty list or object as a reference fails everything. A list whose elements have no declared
  type is right only if they are objects.
- In objects all values are compared as Python prints them, again as parts: 1 is in 12.
- What the function requires must be there; of the rest of a reference, arguments may be missing.
- A function whose name ends in an underscore and digits cannot be called: the end is taken for the
  number of a repeated call, in the reference and not in the prediction.
- Of the functions, the first counts whose name is a part of the name in the reference.
- One call of a prediction may answer two equal-named calls of the reference.
- A call without arguments is right only for a function that declares no parameters.
- The text 'true' or 'false' fails as a text argument: it is taken for a truth value.
- Positional arguments are dropped, and any sign in front of a constant is a minus.

A prediction is parsed and never evaluated. Of arithmetic, which the official parser evaluates, only
sums of constants are taken; anything else is no call list. Where the official program would stop
with an error, the prediction is wrong for the reason `checker_error`.
"""

import ast
import collections
import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

# Types as functions declare them -> how a value of that type arrives.
_TYPES: dict[str, type | None] = {
  'string': str,
  'any': str,
  'integer': int,
  'int': int,
  'number': int,
  'float': float,
  'boolean': bool,
  'array': list,
  'list': list,
  'tuple': list,
  'list(string)': list,
  'list(enum)': list,
  'objectArray': list,
  'object': dict,
  'dict': dict,
  'enum': None,  # no value has it
}
# Types whose references must have an element.
_NESTED = ('array', 'tuple', 'list(string)', 'list(enum)', 'object', 'objectArray')
_IGNORED = re.compile(r'[ ,./\-_*^]')
_NUMBERED = re.compile(r'_\d+$')
# What `read_calls` raises.
UNREADABLE = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)
_UNCLEAR = 'simple_function_checker:unclear'


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the checker says of a prediction.

  Attributes:
    valid: it is right.
    reason: the checker's name of what is wrong; '' if nothing is.
  """

  valid: bool
  reason: str = ''


_RIGHT = Verdict(True)

# A call: its name, and its arguments by name.
Call = tuple[str, dict[Any, Any]]


def judge(text: str, functions: Sequence[Mapping[str, Any]], reference: Any) -> Verdict:
  """Returns the verdict on a prediction.

  Args:
    text: the prediction without thoughts, e.g. "[name(key='value')]".
    functions: what could be called, as the data has it: 'name' and 'parameters'.
    reference: {name: arguments}, where the name of a repeated call ends in _1, _2, ...; or a list
      of such, of which one has to be met. The reason is then that of the first.
  """
  try:
    calls = read_calls(text)
  # The checker takes whatever goes wrong here for a wrong form.
  except UNREADABLE:
    return Verdict(False, 'wrong_output_format')
  alternatives = reference if isinstance(reference, list) else [reference]
  verdicts = []
  for alternative in alternatives:
    try:
      verdicts.append(_judge_calls(calls, functions, alternative))
    # Tasks whose records lack what the checker reads.
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
      verdicts.append(Verdict(False, 'checker_error'))
  if any(verdict.valid for verdict in verdicts):
    return _RIGHT
  return verdicts[0] if verdicts else Verdict(False, 'checker_error')


# --- reading ---


def read_calls(text: str) -> list[Call]:
  """Reads a call list, from which all white space is taken first.

  Raises:
    ValueError, TypeError, SyntaxError, RecursionError, MemoryError: it is no call list.
  """
  with warnings.catch_warnings():
    # Of escapes in texts that Python does not know: nobody is to mend them.
    warnings.simplefilter('ignore')
    body = ast.parse(''.join(text.split()), mode='eval').body
  # Without brackets a comma makes a tuple.
  if not isinstance(body, (ast.List, ast.Tuple, ast.Set)):
    raise ValueError('no list')
  calls = []
  for element in body.elts:
    if not isinstance(element, ast.Call):
      raise ValueError('no call')
    calls.append(_read_call(element))
  return calls


def _read_call(node: ast.Call) -> Call:
  parts = []
  callee = node.func
  while isinstance(callee, ast.Attribute):
    parts.append(callee.attr)
    callee = callee.value
  if isinstance(callee, ast.Name):
    parts.append(callee.id)
  arguments = {keyword.arg: _read_value(keyword.value) for keyword in node.keywords}
  return '.'.join(reversed(parts)), arguments


def _read_value(node: ast.expr | None) -> Any:
  match node:
    case ast.Constant(value=value):
      return '...' if value is Ellipsis else value
    case ast.UnaryOp(operand=ast.Constant(value=value)):
      return -value
    case ast.List(elts=elements):
      return [_read_value(element) for element in elements]
    case ast.Tuple(elts=elements):
      return tuple(_read_value(element) for element in elements)
    case ast.Dict(keys=keys, values=values):
      pairs = zip(keys, values, strict=True)
      return {_read_value(key): _read_value(value) for key, value in pairs}
    case ast.Name(id=name):
      return name
    case ast.Call():
      name, arguments = _read_call(node)
      return {name: arguments}
    case ast.Subscript(value=value, slice=index):
      return f'{ast.unparse(value)}[{ast.unparse(index)}]'
    case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as operator, right=right):
      return _add(left, operator, right)
  raise ValueError(f'no value: {type(node).__name__}')


def _add(left: ast.expr, operator: ast.operator, right: ast.expr) -> Any:
  """Returns a sum of constants, as texts are written that are put together."""
  terms = []
  for side in (left, right):
    match side:
      case ast.Constant() | ast.BinOp() | ast.UnaryOp(op=ast.USub()):
        terms.append(_read_value(side))
      # Here a sign is a sign: the official parser lets Python compute.
      case ast.UnaryOp(op=ast.UAdd(), operand=ast.Constant(value=value)):
        terms.append(+value)
      case _:
        raise ValueError('no sum of constants')
  return terms[0] + terms[1] if isinstance(operator, ast.Add) else terms[0] - terms[1]


# --- calls ---


def _judge_calls(
  calls: Sequence[Call], functions: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]
) -> Verdict:
  if len(calls) != len(reference):
    return Verdict(False, 'wrong functions number')
  expected = [(_NUMBERED.sub('', name), name, wanted) for name, wanted in reference.items()]
  counts = collections.Counter(name for name, _ in calls)
  if counts != collections.Counter(name for name, _, _ in expected):
    return Verdict(False, 'function_mismatch')
  verdict = _RIGHT
  for name, numbered, wanted in expected:
    declared = _find_function(functions, numbered)
    for called, arguments in calls:
      # The verdict on the last call is what is told, also if it is of another function.
      same = called == name
      verdict = _judge_call(called, arguments, declared, wanted) if same else _wrong(_UNCLEAR)
      if verdict.valid:
        break
    if not verdict.valid:
      return verdict
  return verdict


def _wrong(reason: str) -> Verdict:
  return Verdict(False, reason)


def _find_function(functions: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
  for function in functions:
    if function['name'] in name:
      return function
  raise KeyError(name)


def _judge_call(
  called: str,
  arguments: Mapping[Any, Any],
  declared: Mapping[str, Any],
  wanted: Mapping[str, Any],
) -> Verdict:
  parameters = declared['parameters']
  if not arguments or not parameters:
    return _RIGHT if not arguments and not parameters else _wrong('wrong_param')
  # So that a function without parameters takes any.
  if wanted == parameters['properties']:
    return _RIGHT
  if not wanted:
    return _wrong('wrong_param')
  if declared['name'] != called:
    return _wrong('wrong_function_name')
  for name in parameters['required']:
    if name not in arguments:
      return _wrong('lack_args')
  for name, value in arguments.items():
    if name not in parameters['properties'] or name not in wanted:
      return _wrong('addition_args')
    verdict = _judge_argument(value, wanted[name], parameters['properties'][name])
    if not verdict.valid:
      return verdict
  return _RIGHT


# --- arguments ---


def _judge_argument(value: Any, wanted: Any, declared: Mapping[str, Any]) -> Verdict:
  kind = declared['type']
  expected = _TYPES[kind]
  inner = _inner_type(declared) if kind in _NESTED else None
  if kind == 'tuple' and type(value) is tuple:
    value = list(value)
  if kind == 'float' and type(value) is int:
    value = float(value)
  fits, as_wanted = _check_type(value, wanted, expected, kind in _NESTED, inner)
  if not fits:
    return _wrong('type_error')
  if as_wanted:
    return _RIGHT
  if expected is dict:
    return _judge_record(value, wanted)
  if expected is list and inner is dict:
    return _judge_records(value, wanted, kind)
  if expected is str:
    return _RIGHT if _plain(wanted) in _plain(value) else _wrong('value_error:string')
  if expected is list:
    equal = [_plain(one) for one in value] == [_plain(one) for one in wanted]
    return _RIGHT if equal else _wrong('value_error:list/tuple')
  # Numbers and truth values are not compared.
  return _RIGHT


def _inner_type(declared: Mapping[str, Any]) -> type | None:
  items = declared.get('items')
  if isinstance(items, Mapping) and 'type' in items:
    return _TYPES[items['type']]
  kind = declared['type']
  if 'string' in kind:
    return str
  return None if 'enum' in kind else dict


def _check_type(
  value: Any, wanted: Any, expected: type | None, nested: bool, inner: type | None
) -> tuple[bool, bool]:
  """Tells whether the type fits, and whether that is all that is asked of the value."""
  wanted_type = None if wanted == '' else type(wanted)
  as_wanted = wanted_type is not None and wanted_type is not expected
  if isinstance(value, str) and value in ('true', 'false'):
    value = value == 'true'
  fits = True
  if type(value) is expected:
    if not nested or any(_check_elements(value, one, inner) for one in wanted):
      return True, as_wanted
    fits = False
  if wanted_type is not None and (type(value) is wanted_type or wanted == value):
    return fits, True
  return False, as_wanted


def _check_elements(value: Any, wanted: Any, inner: type | None) -> bool:
  """Tells whether the elements of a value have the types that an element of the reference asks."""
  if not isinstance(wanted, list):
    return True
  return all(_check_type(one, wanted, inner, False, None)[0] for one in value)


def _judge_records(value: Sequence[Any], wanted: Sequence[Any], kind: str) -> Verdict:
  if kind == 'objectArray':
    # The official checker calls a function of its own with too few arguments here.
    raise TypeError('objectArray')
  if len(value) != len(wanted):
    return _wrong('value_error:list_dict_count')
  for one, expected in zip(value, wanted, strict=True):
    verdict = _judge_record(one, expected)
    if not verdict.valid:
      return verdict
  return _RIGHT


def _judge_record(value: Any, wanted: Mapping[str, Any]) -> Verdict:
  if not isinstance(value, dict) or len(value) != len(wanted.keys()):
    return _wrong('value_error')
  for key, one in value.items():
    if key not in wanted:
      return _wrong('value_error')
    if isinstance(one, str) and one in ('true', 'false'):
      one = one == 'true'
    if isinstance(wanted[key], dict):
      verdict = _judge_record(one, wanted[key])
      if not verdict.valid:
        return verdict
    elif str(_plain(wanted[key])) not in str(_plain(one)):
      return _wrong('value_error')
  return _RIGHT


def _plain(value: Any) -> Any:
  """Returns a text without what does not count, and anything else as it is."""
  if type(value) is not str:
    return value
  return _IGNORED.sub('', value).lower().replace("'", '"')
