"""The tolerant call reader of the reference implementation, without its `eval`.

docs/method.md, section 4.2, describes it. Published rewards and verification rates depend on what
this reader forgives and what it drops. Use it to reproduce those figures, and
`tool_calls.parse_calls` for everything else.
"""

import ast
import operator
from typing import Any

from dcore_jax.chat.python_calls import (
  MAX_DEPTH,
  MAX_INT_BITS,
  ToolCallError,
  describe,
  parse_expression,
)


def parse_lenient(text: str) -> Any:
  """Returns what the reference's parser makes of a call list: `[{name: {argument: value}}, ...]`.

  Positional arguments are dropped. A bare name equals its string, so that `true` == 'true'.
  Arithmetic on numbers is worked out within bounds. A call as a value is `{name: {...}}`, or its
  source text where it has no keywords. Text that is no call list is read as one literal list
  (JSON-like lists). Where that fails too, the text itself is returned, which
  can still equal another text.
  """
  # The reference strips these characters from both ends, however many there are: brackets and
  # quotes around the list do not matter.
  inner = text.strip("[]'")
  try:
    tree = parse_expression(inner)
    # `f(a=1), g()` without brackets is a tuple, and a single call is no sequence.
    calls = getattr(tree, 'elts', [tree])
    if all(isinstance(call, ast.Call) for call in calls):
      return [_lenient_call(call, 0) for call in calls]
  # ValueError: Python cannot write down every tree that it reads (an integer of 20,000 bits).
  except (ValueError, TypeError, RecursionError):
    pass
  # The reference adds a missing bracket on either side before it tries a literal.
  bracketed = text
  if not bracketed.startswith('['):
    bracketed = '[' + bracketed
  if not bracketed.endswith(']'):
    bracketed += ']'
  try:
    # `literal_eval` of a syntax tree builds constants and containers alone, and runs nothing.
    return ast.literal_eval(parse_expression(bracketed))
  except (ToolCallError, ValueError, TypeError, RecursionError, MemoryError):
    return text


def _lenient_call(node: ast.Call, depth: int) -> dict[str, dict[str | None, Any]]:
  parts = []
  function = node.func
  # A dotted name is a chain of attributes, the last part outermost.
  while isinstance(function, ast.Attribute):
    parts.append(function.attr)
    function = function.value
  if isinstance(function, ast.Name):
    parts.append(function.id)
  name = '.'.join(reversed(parts))
  arguments: dict[str | None, Any] = {}
  for item in node.keywords:
    value = _lenient_value(item.value, depth + 1)
    # `**{'from': 1}` is the older form in which this project wrote the argument `from=1`.
    arguments |= value if item.arg is None and isinstance(value, dict) else {item.arg: value}
  return {name: arguments}


def _lenient_value(node: ast.expr, depth: int) -> Any:
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} levels of brackets')
  match node:
    case ast.Constant():
      # Models write `...` as a placeholder; it equals its own text here.
      return '...' if node.value is Ellipsis else node.value
    case ast.UnaryOp(operand=ast.Constant(value=value)):
      # The reference negates whatever the operator is: its value of `not 1` is -1.
      return -value
    case ast.BinOp():
      return _arithmetic(node, depth)
    case ast.Name():
      return node.id
    case ast.List():
      return [_lenient_value(item, depth + 1) for item in node.elts]
    case ast.Tuple():
      # A tuple stays a tuple: in the reference `(1, 2)` does not equal `[1, 2]`.
      return tuple(_lenient_value(item, depth + 1) for item in node.elts)
    case ast.Dict() if None not in node.keys:
      return {
        _lenient_value(k, depth + 1): _lenient_value(v, depth + 1)
        for k, v in zip(node.keys, node.values, strict=True)
      }
    case ast.Call():
      # Two calls with the same source text are equal, and nothing is called.
      return _lenient_call(node, depth) if node.keywords else ast.unparse(node)
    case ast.Subscript():
      return f'{ast.unparse(node.value)}[{ast.unparse(node.slice)}]'
  raise ToolCallError(f'unsupported value: {describe(node)}')


_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Pow: operator.pow,
}


def _arithmetic(node: ast.expr, depth: int) -> int | float:
  """Computes an expression over numbers.

  Sizes are bounded before anything is computed: `9**9**9` would otherwise take all memory.
  """
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} operations')
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return node.value
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
    value = _arithmetic(node.operand, depth + 1)
    return -value if isinstance(node.op, ast.USub) else value
  if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
    raise ToolCallError(f'unsupported value: {describe(node)}')
  left = _arithmetic(node.left, depth + 1)
  right = _arithmetic(node.right, depth + 1)
  bits = sum(value.bit_length() for value in (left, right) if isinstance(value, int))
  too_large = bits > MAX_INT_BITS
  if isinstance(node.op, ast.Pow):
    # A power has about `right` times as many bits as its base.
    too_large = too_large or abs(right) > 64 or bits * max(abs(right), 1) > MAX_INT_BITS
  if too_large:
    raise ToolCallError('arithmetic on numbers too large')
  try:
    value = _OPERATORS[type(node.op)](left, right)
  except (ArithmeticError, ValueError) as error:
    raise ToolCallError(f'arithmetic fails: {error}') from error
  # A negative base with a fractional exponent gives a complex number, which JSON does not have.
  if isinstance(value, complex):
    raise ToolCallError('arithmetic leaves the real numbers')
  return value
