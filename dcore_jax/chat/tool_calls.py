"""Tool calls as data, and the two surface syntaxes they travel in.

Python style, of BFCL and the paper: `[f(a=1, b='x'), g.h(c=[2])]`; Hermes/Qwen JSON: `<tool_call>{"name": ...,
"arguments": {...}}</tool_call>`. What a model wrote is only ever *read*: Python's own parser makes a tree, and a
literal evaluator turns the tree into JSON-like values. Nothing is evaluated, so `9**9**9` or `__import__('os')` is an
error like any other, and text, nesting and integers are bounded.

This reader keeps everything a call says. `lenient_calls` holds a second one, on the same tree, that forgives and
forgets what the reference implementation does.
"""

import ast
import json
import keyword
import math
import re
import unicodedata
import warnings
from typing import Any, Callable, Iterator, Sequence

from dcore_jax.chat.messages import ToolCall

MAX_CHARS = 65_536  # of one call list; an answer of 16k tokens fits
MAX_DEPTH = 64  # brackets inside brackets
MAX_INT_BITS = 4_096  # below the 4,300 digits that Python itself agrees to print

# What a model that thinks in JSON writes inside a Python-style call.
JSON_WORDS = {'true': True, 'false': False, 'null': None, 'none': None}

_HERMES_CALL = re.compile(r'<tool_call>(.*?)</tool_call>', re.DOTALL)


class ToolCallError(ValueError):
  """Text that has the outer form of a call list, and cannot be read as one."""


# -- reading ----------------------------------------------------------------------------------------------------------


def parse_calls(text: str) -> list[ToolCall] | None:
  """The calls an answer makes, in order; None where it is no call list but plain text.

  Call lists are texts that begin with `[` and end with `]`, and texts that hold a `<tool_call>` (words around the tags
  are let pass, as Qwen models speak before they call). A list cut short, `[f(a=`, is plain text, as it is for BFCL.

  Raises:
    ToolCallError: a call list that cannot be read, with the reason.
  """
  stripped = text.strip()
  if stripped[:1] == '[' and stripped[-1:] == ']':
    return parse_python(stripped)
  return parse_hermes(stripped) if '<tool_call>' in stripped else None


def parse_python(text: str) -> list[ToolCall]:
  """Calls of `[f(a=1), g(2)]`.

  Tuples come back as lists, a bare name as its string, JSON's true, false and null as what they mean.
  """
  tree = parse_expression(text.strip())
  if not isinstance(tree, ast.List):
    raise ToolCallError(f'expected a bracketed list of calls, got {_clip(text)}')
  return [_read_call(node) for node in tree.elts]


def parse_hermes(text: str) -> list[ToolCall]:
  """Calls of every `<tool_call>{...}</tool_call>` in `text`; arguments may be an object or the JSON text of one."""
  _check_length(text)
  bodies = _HERMES_CALL.findall(text)
  if not bodies or text.count('<tool_call>') != len(bodies):
    raise ToolCallError(f'a <tool_call> is never closed in {_clip(text)}')
  calls = []
  for body in bodies:
    record = _read_json(body)
    arguments = record.get('arguments', {}) if isinstance(record, dict) else None
    if isinstance(arguments, str):
      arguments = _read_json(arguments)
    if not isinstance(arguments, dict) or not isinstance(record.get('name'), str):
      raise ToolCallError(f'expected {{"name": ..., "arguments": {{...}}}}, got {_clip(body)}')
    calls.append(ToolCall(record['name'], arguments))
  return calls


def parse_reference(calls: Sequence[str]) -> list[ToolCall]:
  """Calls of a record's reference: a list of call strings, each `f(a=1)` without brackets (with them is read too)."""
  if isinstance(calls, str):
    raise ValueError(f'a reference is a list of call strings, got one string: {_clip(calls)}')
  parsed = []
  for i, call in enumerate(calls):
    text = call.strip()
    try:
      parsed.extend(parse_python(text if text[:1] == '[' else f'[{text}]'))
    except ToolCallError as error:
      raise ToolCallError(f'reference call {i}: {error}') from error
  return parsed


def parse_expression(text: str) -> ast.expr:
  """Python's syntax tree of one expression, of bounded size. Raises ToolCallError, whatever the text is."""
  _check_length(text)
  try:
    with (
      warnings.catch_warnings()
    ):  # '\d' in a string is worth a warning in a program, not in an answer
      warnings.simplefilter('ignore')
      return ast.parse(text, mode='eval').body
  except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
    reason = getattr(error, 'msg', None) or str(error) or type(error).__name__
    raise ToolCallError(f'not an expression ({reason}): {_clip(text)}') from error


def _read_call(node: ast.expr) -> ToolCall:
  if not isinstance(node, ast.Call):
    raise ToolCallError(f'expected a call, got {describe(node)}')
  name = _dotted_name(node.func)
  if name is None:
    raise ToolCallError(f'a tool is called by its name, got {describe(node.func)}')
  arguments: dict[str, Any] = {}
  for item in node.keywords:
    value = _read_value(item.value, 0)
    # `**{'from': 1}` is how an argument is written whose name is no Python identifier.
    if item.arg is None and not (
      isinstance(value, dict) and all(isinstance(key, str) for key in value)
    ):
      raise ToolCallError(f'{name}: ** needs a dict with text keys')
    for key, inner in value.items() if item.arg is None else [(item.arg, value)]:
      if key in arguments:
        raise ToolCallError(f'{name}: argument {key!r} is given twice')
      arguments[key] = inner
  return ToolCall(name, arguments, tuple(_read_value(item, 0) for item in node.args))


def _read_value(node: ast.expr, depth: int) -> Any:
  """JSON-like value of a literal; everything that would have to be computed is an error."""
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} levels of brackets')
  if isinstance(node, ast.Constant):
    return _checked_constant(node.value)
  if isinstance(node, ast.Name):
    return JSON_WORDS.get(node.id, node.id)
  if isinstance(node, ast.Attribute) and (name := _dotted_name(node)):
    return name
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    value = _read_value(node.operand, depth + 1)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return -value
  if isinstance(node, (ast.List, ast.Tuple)):
    return [_read_value(item, depth + 1) for item in node.elts]
  if isinstance(node, ast.Dict) and None not in node.keys:
    keys = [_read_value(key, depth + 1) for key in node.keys]
    if not any(isinstance(key, (list, dict)) for key in keys):
      return dict(zip(keys, (_read_value(value, depth + 1) for value in node.values)))
  raise ToolCallError(f'expected a literal value, got {describe(node)}')


def _checked_constant(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    raise ToolCallError('numbers must be finite')
  if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
    raise ToolCallError(f'an integer of more than {MAX_INT_BITS} bits')
  if not isinstance(value, (str, int, float, bool, type(None))):
    raise ToolCallError(f'expected a JSON-like value, got a {type(value).__name__}')
  return value


def _read_json(text: str) -> Any:
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ToolCallError(f'not JSON ({error}): {_clip(text)}') from error
  _check_json(record, 0)
  return record


def _check_json(value: Any, depth: int) -> None:
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} levels of brackets')
  if isinstance(value, (list, dict)):
    for item in value.values() if isinstance(value, dict) else value:
      _check_json(item, depth + 1)
  else:
    _checked_constant(value)


def _dotted_name(node: ast.expr) -> str | None:
  """'a.b.c' of a name or a chain of attributes, None of anything else."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  return '.'.join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _check_length(text: str) -> None:
  if len(text) > MAX_CHARS:
    raise ToolCallError(f'{len(text)} characters; a call list has at most {MAX_CHARS}')


def _clip(text: str) -> str:
  return repr(text if len(text) <= 80 else text[:77] + '...')


def describe(node: ast.AST) -> str:
  """What and where a node is, for error messages."""
  return f'{type(node).__name__} at column {getattr(node, "col_offset", 0)}'


# -- writing and comparing --------------------------------------------------------------------------------------------


def print_calls(calls: Sequence[ToolCall], style: str = 'python') -> str:
  """Surface text that `parse_calls` reads back to equal calls; style 'python' or 'hermes'.

  Raises:
    ValueError: a name or value that the syntax cannot carry (Hermes has no positional arguments and only text keys).
  """
  if style not in _PRINTERS:
    raise ValueError(f'unknown call style {style!r}; expected one of {sorted(_PRINTERS)}')
  return _PRINTERS[style](calls)


def _print_python(calls: Sequence[ToolCall]) -> str:
  return '[' + ', '.join(map(_print_call, calls)) + ']'


def _print_call(call: ToolCall) -> str:
  if not all(map(_is_identifier, call.name.split('.'))):
    raise ValueError(f'{call.name!r} is no name that a Python-style call can have')
  plain = {key: value for key, value in call.arguments.items() if _is_identifier(key)}
  other = {key: value for key, value in call.arguments.items() if key not in plain}
  parts = [_print_value(value) for value in call.positional]
  parts += [f'{key}={_print_value(value)}' for key, value in plain.items()]
  parts += [f'**{_print_value(other)}'] if other else []
  return f'{call.name}({", ".join(parts)})'


def _print_value(value: Any) -> str:
  if isinstance(value, dict):
    return (
      '{'
      + ', '.join(f'{_print_value(key)}: {_print_value(item)}' for key, item in value.items())
      + '}'
    )
  if isinstance(value, (list, tuple)):
    return '[' + ', '.join(map(_print_value, value)) + ']'
  return repr(_checked_constant(value))


def _print_hermes(calls: Sequence[ToolCall]) -> str:
  return '\n'.join(f'<tool_call>\n{_hermes_json(call)}\n</tool_call>' for call in calls)


def _hermes_json(call: ToolCall) -> str:
  if call.positional:
    raise ValueError(f'{call.name}: a JSON call has no positional arguments')
  _check_keys(call.arguments)
  text = json.dumps(
    {'name': call.name, 'arguments': call.arguments}, ensure_ascii=False, allow_nan=False
  )
  # A tag ends the call wherever it stands, so inside a value its last character is written as a JSON escape.
  return text.replace('tool_call>', 'tool_call\\u003e')


def _check_keys(value: Any) -> None:
  if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
    raise ValueError(f'a JSON call has text keys only, got {_clip(repr(value))}')
  if isinstance(value, (dict, list, tuple)):
    for item in value.values() if isinstance(value, dict) else value:
      _check_keys(item)


def _is_identifier(name: str) -> bool:
  # Python's parser folds identifiers to NFKC: a name that changes would not come back as it was.
  return (
    name.isidentifier()
    and not keyword.iskeyword(name)
    and unicodedata.normalize('NFKC', name) == name
  )


_PRINTERS: dict[str, Callable[[Sequence[ToolCall]], str]] = {
  'python': _print_python,
  'hermes': _print_hermes,
}


def calls_equal(a: Sequence[ToolCall], b: Sequence[ToolCall], ordered: bool = True) -> bool:
  """Same tools with the same arguments (the order of arguments is free). Values compare as in Python: 1 == 1.0 == True.

  ordered=False compares as multisets, for calls that do not depend on each other.
  """
  keys_a, keys_b = [list(map(_comparable, calls)) for calls in (a, b)]
  if ordered or len(keys_a) != len(keys_b):
    return keys_a == keys_b
  for key in keys_a:  # values need not be hashable, so cross off one by one
    if key not in keys_b:
      return False
    keys_b.remove(key)
  return True


def _comparable(call: ToolCall) -> tuple[str, Any, Any]:
  return call.name, _as_lists(call.arguments), _as_lists(call.positional)


def _as_lists(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _as_lists(item) for key, item in value.items()}
  return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def leaf_values(value: Any) -> Iterator[Any]:
  """What an argument's lists and dicts hold, however deep: texts, numbers, booleans and None."""
  if isinstance(value, dict):
    value = value.values()
  elif not isinstance(value, (list, tuple)):
    yield value
    return
  for item in value:
    yield from leaf_values(item)


def tool_response(text: str) -> str:
  """A tool's answer as the *user* message in which it goes back to the model (method 0)."""
  return f'<tool_response>\n{text}\n</tool_response>'
