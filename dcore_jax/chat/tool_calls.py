"""Tool calls as data, and the two syntaxes in which they stand in a text.

Python style, as in BFCL and the paper: `[f(a=1, b='x'), g.h(c=[2])]`. Hermes/Qwen JSON:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. A model's text is only ever *read*:
Python's own parser makes a syntax tree, and a literal reader turns the tree into JSON-like values.
Nothing is evaluated, so that `9**9**9` or `__import__('os')` is an error like any other. Text,
nesting and integers are bounded.

This reader keeps everything that a call says. `lenient_calls` holds a second reader of the same
tree, which forgives and drops what the reference implementation does.
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

MAX_CHARS = 65_536  # characters of one call list; an answer of 16k tokens fits
MAX_DEPTH = 64  # levels of brackets
MAX_INT_BITS = 4_096  # bits of an integer; Python refuses to print more than 4,300 digits

# Models that were trained on JSON write these words inside Python-style calls too.
JSON_WORDS = {'true': True, 'false': False, 'null': None, 'none': None}

_HERMES_CALL = re.compile(r'<tool_call>(.*?)</tool_call>', re.DOTALL)


class ToolCallError(ValueError):
  """Text that has the outer form of a call list, and cannot be read as one."""


# --- reading --------------------------------------------------------------------------------------


def parse_calls(text: str) -> list[ToolCall] | None:
  """Reads the calls that an answer makes, in order; None where it is plain text and no call list.

  Call lists are texts that begin with `[` and end with `]`, and texts that hold a `<tool_call>`.
  Words around the tags are allowed, because Qwen models speak before they call. A list cut short,
  `[f(a=`, is plain text, as it is for BFCL.

  Raises:
    ToolCallError: a call list that cannot be read, with the reason.
  """
  stripped = text.strip()
  if stripped[:1] == '[' and stripped[-1:] == ']':
    return parse_python(stripped)
  return parse_hermes(stripped) if '<tool_call>' in stripped else None


def parse_python(text: str) -> list[ToolCall]:
  """Reads the calls of `[f(a=1), g(2)]`.

  Tuples become lists and a bare name its string; JSON's true, false and null get their meaning.

  Raises:
    ToolCallError: anything else.
  """
  tree = parse_expression(text.strip())
  if not isinstance(tree, ast.List):
    raise ToolCallError(f'expected a bracketed list of calls, got {_clip(text)}')
  return [_read_call(node) for node in tree.elts]


def parse_hermes(text: str) -> list[ToolCall]:
  """Reads every `<tool_call>{...}</tool_call>` in `text`.

  Arguments may be an object or the JSON text of one.

  Raises:
    ToolCallError: no call, one that is never closed, or one that is not JSON of the right form.
  """
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
  """Reads the calls of a record's reference, a list of strings like `f(a=1)`.

  Strings with brackets around the call are read too.

  Raises:
    ValueError: one string instead of a list (ToolCallError: a string that is no call).
  """
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
  """Parses one expression of bounded size into Python's syntax tree.

  Raises:
    ToolCallError: text that is no expression; no text raises anything else.
  """
  _check_length(text)
  try:
    with warnings.catch_warnings():
      # The parser warns of strings like '\d'. That helps programmers; here a model wrote the text.
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
    # An argument whose name is no Python identifier is written as `**{'from': 1}`.
    if item.arg is not None:
      given = {item.arg: value}
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
      given = value
    else:
      raise ToolCallError(f'{name}: ** needs a dict with text keys')
    for key, inner in given.items():
      if key in arguments:
        raise ToolCallError(f'{name}: argument {key!r} is given twice')
      arguments[key] = inner
  positional = tuple(_read_value(item, 0) for item in node.args)
  return ToolCall(name, arguments, positional)


def _read_value(node: ast.expr, depth: int) -> Any:
  """Returns the JSON-like value of a literal; whatever would have to be computed is an error."""
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} levels of brackets')
  if isinstance(node, ast.Constant):
    return _checked_constant(node.value)
  if isinstance(node, ast.Name):
    return JSON_WORDS.get(node.id, node.id)
  if isinstance(node, ast.Attribute):
    name = _dotted_name(node)
    if name:
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
      values = [_read_value(value, depth + 1) for value in node.values]
      return dict(zip(keys, values, strict=True))
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
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, list):
    for item in value:
      _check_json(item, depth + 1)
  else:
    _checked_constant(value)


def _dotted_name(node: ast.expr) -> str | None:
  """Returns 'a.b.c' for a name or a chain of attributes, None for anything else."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  if not isinstance(node, ast.Name):
    return None
  return '.'.join([node.id, *reversed(parts)])


def _check_length(text: str) -> None:
  if len(text) > MAX_CHARS:
    raise ToolCallError(f'{len(text)} characters; a call list has at most {MAX_CHARS}')


def _clip(text: str) -> str:
  return repr(text if len(text) <= 80 else text[:77] + '...')


def describe(node: ast.AST) -> str:
  """Says what a node is and where it stands, for error messages."""
  return f'{type(node).__name__} at column {getattr(node, "col_offset", 0)}'


# --- writing and comparing ------------------------------------------------------------------------


def print_calls(calls: Sequence[ToolCall], style: str = 'python') -> str:
  """Writes calls as text that `parse_calls` reads back to equal calls; style 'python' or 'hermes'.

  Raises:
    ValueError: another style, or a name or value that the syntax cannot carry (Hermes has no
      positional arguments and text keys only).
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
  if other:
    parts.append(f'**{_print_value(other)}')
  return f'{call.name}({", ".join(parts)})'


def _print_value(value: Any) -> str:
  if isinstance(value, dict):
    items = [f'{_print_value(key)}: {_print_value(item)}' for key, item in value.items()]
    return '{' + ', '.join(items) + '}'
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
  # Readers end a call at the first closing tag. Inside a value the tag's last character is
  # therefore written as a JSON escape.
  return text.replace('tool_call>', 'tool_call\\u003e')


def _check_keys(value: Any) -> None:
  if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
    raise ValueError(f'a JSON call has text keys only, got {_clip(repr(value))}')
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    for item in value:
      _check_keys(item)


def _is_identifier(name: str) -> bool:
  if not name.isidentifier() or keyword.iskeyword(name):
    return False
  # Python's parser folds identifiers to NFKC: a name that changes would not come back as it was.
  return unicodedata.normalize('NFKC', name) == name


_PRINTERS: dict[str, Callable[[Sequence[ToolCall]], str]] = {
  'python': _print_python,
  'hermes': _print_hermes,
}


def calls_equal(a: Sequence[ToolCall], b: Sequence[ToolCall], ordered: bool = True) -> bool:
  """Says whether two lists call the same tools with the same arguments, in any order of arguments.

  Values compare as in Python: 1 == 1.0 == True. With `ordered=False` the lists compare as
  multisets, for calls that do not depend on each other.
  """
  keys_a = [_comparable(call) for call in a]
  keys_b = [_comparable(call) for call in b]
  if ordered or len(keys_a) != len(keys_b):
    return keys_a == keys_b
  # Values need not be hashable, so that a Counter cannot compare them.
  for key in keys_a:
    if key not in keys_b:
      return False
    keys_b.remove(key)
  return True


def _comparable(call: ToolCall) -> tuple[str, Any, Any]:
  return call.name, _as_lists(call.arguments), _as_lists(call.positional)


def _as_lists(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _as_lists(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_as_lists(item) for item in value]
  return value


def leaf_values(value: Any) -> Iterator[Any]:
  """Yields what an argument's lists and dicts hold at any depth: texts, numbers, booleans, None."""
  if isinstance(value, dict):
    value = value.values()
  elif not isinstance(value, (list, tuple)):
    yield value
    return
  for item in value:
    yield from leaf_values(item)


def tool_response(text: str) -> str:
  """Wraps a tool's answer as the *user* message in which it goes back to the model.

  See docs/method.md, section 0.
  """
  return f'<tool_response>\n{text}\n</tool_response>'
