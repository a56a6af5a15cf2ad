"""Reads Python-style calls, `[f(a=1, b='x'), g.h(c=[2])]`, as in BFCL and the paper.

A model's text is only ever *read*: Python's own parser makes a syntax tree, and a literal reader
turns the tree into JSON-like values. Nothing is evaluated, so that `9**9**9` or
`__import__('os')` is an error like any other. Text, nesting and integers are bounded.
"""

import ast
import keyword
import math
import re
import warnings
from typing import Any

from dcore_jax.chat.call_text import PYTHON_STRING
from dcore_jax.chat.messages import ToolCall

MAX_CHARS = 65_536  # characters of one call list; an answer of 16k tokens fits
MAX_DEPTH = 64  # levels of brackets
MAX_INT_BITS = 4_096  # bits of an integer; Python refuses to print more than 4,300 digits

# Models that were trained on JSON write these words inside Python-style calls too.
JSON_WORDS = {'true': True, 'false': False, 'null': None, 'none': None}

# A string, a comment, or one of Python's keywords where the name of an argument stands.
_MENDED = re.compile(
  PYTHON_STRING.pattern
  + r'|#[^\n]*|(?P<before>[(,]\s*)(?P<word>'
  + '|'.join(keyword.kwlist)
  + r')(?=\s*=(?!=))',
  re.DOTALL,
)


class ToolCallError(ValueError):
  """Text that has the outer form of a call list, and cannot be read as one."""


def parse_python(text: str) -> list[ToolCall]:
  """Reads the calls of `[f(a=1), g(2)]`.

  Tuples become lists and a bare name its string; JSON's true, false and null get their meaning.
  Arguments may be named by Python's keywords, `from='SFO'`.

  Raises:
    ToolCallError: anything else.
  """
  tree = parse_expression(text.strip())
  if not isinstance(tree, ast.List):
    raise ToolCallError(f'expected a bracketed list of calls, got {clip(text)}')
  return [_read_call(node) for node in tree.elts]


def parse_literal(text: str) -> Any:
  """Reads a Python literal, in which true, false and null are words as well.

  Raises:
    ToolCallError: anything else.
  """
  tree = parse_expression(text.strip())
  for node in ast.walk(tree):
    # `_read_value` would read these as their own text, which is right for a call's arguments and
    # wrong for a literal.
    if isinstance(node, ast.Attribute) or (
      isinstance(node, ast.Name) and node.id not in JSON_WORDS
    ):
      raise ToolCallError(f'expected a literal value, got {describe(node)}')
  return _read_value(tree, 0)


def parse_expression(text: str) -> ast.expr:
  """Parses one expression of bounded size into Python's syntax tree.

  Where Python cannot, the text is parsed with the two things mended that its readers can tell:
  keywords as names of arguments, and line breaks inside of quotes.

  Raises:
    ToolCallError: text that is no expression; no text raises anything else.
  """
  # Python's parser takes time and memory before anything else can say no.
  check_length(text)
  try:
    return _parse(text)
  except ToolCallError:
    # Longer than any run in the text, so that no name of the text begins in this way.
    marker = 'k' + '_' * (1 + max(map(len, re.findall('_+', text)), default=0))
    mended = _MENDED.sub(lambda match: _mend(match, marker), text)
    if mended == text:
      raise
    tree = _parse(mended)
  for node in ast.walk(tree):
    if isinstance(node, ast.keyword) and node.arg:
      node.arg = node.arg.removeprefix(marker)
  return tree


def _mend(match: re.Match, marker: str) -> str:
  if match['word']:
    # With the marker in front the keyword is a plain name, which `parse_expression` restores later.
    return match['before'] + marker + match['word']
  # In a raw string the escape would be two characters of its own.
  if match['end'] in ("'", '"') and 'r' not in (match['prefix'] or '').lower():
    return re.sub(
      r'\\.|[\r\n]',
      lambda found: {'\n': r'\n', '\r': r'\r'}.get(found[0], found[0]),
      match[0],
      flags=re.DOTALL,
    )
  return match[0]


def _parse(text: str) -> ast.expr:
  try:
    with warnings.catch_warnings():
      # The parser warns of strings like '\d'. That helps programmers; here a model wrote the text.
      warnings.simplefilter('ignore')
      return ast.parse(text, mode='eval').body
  # A null character raises ValueError and deep nesting the last two; all of them mean unreadable
  # text.
  except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
    reason = getattr(error, 'msg', None) or str(error) or type(error).__name__
    raise ToolCallError(f'not an expression ({reason}): {clip(text)}') from error


def _read_call(node: ast.expr) -> ToolCall:
  if not isinstance(node, ast.Call):
    raise ToolCallError(f'expected a call, got {describe(node)}')
  name = _dotted_name(node.func)
  if name is None:
    raise ToolCallError(f'a tool is called by its name, got {describe(node.func)}')
  # Python forbids a name given twice; with `**` it can still happen, so that it is checked here.
  arguments: dict[str, Any] = {}
  for item in node.keywords:
    value = _read_value(item.value, 0)
    # An argument whose name is no Python identifier is written as `**{'two words': 1}`.
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
  check_depth(depth)
  if isinstance(node, ast.Constant):
    return checked_constant(node.value)
  if isinstance(node, ast.Name):
    return JSON_WORDS.get(node.id, node.id)
  if isinstance(node, ast.Attribute):
    name = _dotted_name(node)
    if name:
      return name
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
    # A sign is no bracket, but a thousand of them would be too deep for Python.
    signs = isinstance(node.operand, ast.UnaryOp)
    value = _read_value(node.operand, depth + signs)
    # -True would be the number -1 in Python, which no model means.
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      return -value
  if isinstance(node, (ast.List, ast.Tuple)):
    return [_read_value(item, depth + 1) for item in node.elts]
  if isinstance(node, ast.Dict) and None not in node.keys:
    return _read_dict(node, depth)
  raise ToolCallError(f'expected a literal value, got {describe(node)}')


def _read_dict(node: ast.Dict, depth: int) -> dict[Any, Any]:
  record: dict[Any, Any] = {}
  for key_node, value_node in zip(node.keys, node.values, strict=True):
    key = _read_value(key_node, depth + 1)
    # Lists cannot be keys of a dict; without this, the line below would raise a TypeError.
    if isinstance(key, (list, dict)):
      raise ToolCallError(f'expected a literal value, got {describe(node)}')
    if key in record:
      raise ToolCallError(f'the key {clip(str(key))} is given twice')
    record[key] = _read_value(value_node, depth + 1)
  return record


def _dotted_name(node: ast.expr) -> str | None:
  """Returns 'a.b.c' for a name or a chain of attributes, None for anything else."""
  parts = []
  while isinstance(node, ast.Attribute):
    parts.append(node.attr)
    node = node.value
  # A call of a call or of an index, such as `f()()`, has no name that a tool could have.
  if not isinstance(node, ast.Name):
    return None
  return '.'.join([node.id, *reversed(parts)])


# --- bounds, which hold for calls in every syntax -------------------------------------------------


def checked_constant(value: Any) -> Any:
  """Returns a text, number, truth value or None; raises ToolCallError for any other value."""
  # `1e999` reads as infinity, which no JSON can carry.
  if isinstance(value, float) and not math.isfinite(value):
    raise ToolCallError('numbers must be finite')
  if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
    raise ToolCallError(f'an integer of more than {MAX_INT_BITS} bits')
  if not isinstance(value, (str, int, float, bool, type(None))):
    raise ToolCallError(f'expected a JSON-like value, got a {type(value).__name__}')
  return value


def check_depth(depth: int) -> None:
  """Raises ToolCallError for a value inside of more brackets than MAX_DEPTH."""
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} levels of brackets')


def check_length(text: str) -> None:
  """Raises ToolCallError for a text of more characters than MAX_CHARS."""
  if len(text) > MAX_CHARS:
    raise ToolCallError(f'{len(text)} characters; a call list has at most {MAX_CHARS}')


def clip(text: str) -> str:
  """Returns the beginning of a text in quotes, for error messages."""
  return repr(text if len(text) <= 80 else text[:77] + '...')


def describe(node: ast.AST) -> str:
  """Says what a node is and where it stands, for error messages."""
  return f'{type(node).__name__} at column {getattr(node, "col_offset", 0)}'
