"""The tolerant call reader of the reference implementation (method 4.2), without its `eval`.

Published rewards and verification rates depend on what this reader forgives, and forgets: reproduce those with it, and
use `tool_calls.parse_calls` for everything else.
"""

import ast
import operator
from typing import Any

from dcore_jax.chat.tool_calls import (
  MAX_DEPTH,
  MAX_INT_BITS,
  ToolCallError,
  describe,
  parse_expression,
)


def parse_lenient(text: str) -> Any:
  """What the reference's parser makes of a call list (method 4.2): a list of `{name: {argument: value}}`, or something
  weaker.

  Positional arguments are dropped; a bare name equals the string of it, `true` == 'true'; arithmetic on numbers is
  worked out (bounded); a call as a value is `{name: {...}}`, or its source text when it has no keywords. Text that is
  no call list is read as one literal list (JSON-like lists); where that fails too the text itself comes back, and can
  still equal another text.
  """
  inner = text.strip("[]'")
  try:
    tree = parse_expression(inner)
    calls = getattr(tree, 'elts', [tree])
    if all(isinstance(call, ast.Call) for call in calls):
      return [_lenient_call(call, 0) for call in calls]
  except (ToolCallError, TypeError, RecursionError):
    pass
  bracketed = text if text.startswith('[') else '[' + text
  bracketed = bracketed if bracketed.endswith(']') else bracketed + ']'
  try:
    return ast.literal_eval(parse_expression(bracketed))
  except (ToolCallError, ValueError, TypeError, RecursionError, MemoryError):
    return text


def _lenient_call(node: ast.Call, depth: int) -> dict[str, dict[str | None, Any]]:
  parts, func = [], node.func
  while isinstance(func, ast.Attribute):
    parts.append(func.attr)
    func = func.value
  parts += [func.id] if isinstance(func, ast.Name) else []
  return {
    '.'.join(reversed(parts)): {
      item.arg: _lenient_value(item.value, depth + 1) for item in node.keywords
    }
  }


def _lenient_value(node: ast.expr, depth: int) -> Any:
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} levels of brackets')
  match node:
    case ast.Constant():
      return '...' if node.value is Ellipsis else node.value
    case ast.UnaryOp(operand=ast.Constant(value=value)):
      return -value  # whatever the operator: `not 1` is -1 there
    case ast.BinOp():
      return _arithmetic(node, depth)
    case ast.Name():
      return node.id
    case ast.List():
      return [_lenient_value(item, depth + 1) for item in node.elts]
    case ast.Tuple():
      return tuple(_lenient_value(item, depth + 1) for item in node.elts)
    case ast.Dict() if None not in node.keys:
      return {
        _lenient_value(k, depth + 1): _lenient_value(v, depth + 1)
        for k, v in zip(node.keys, node.values)
      }
    case ast.Call():
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
  """Value of an expression over numbers. Sizes are bounded before anything is computed, powers most of all."""
  if depth > MAX_DEPTH:
    raise ToolCallError(f'more than {MAX_DEPTH} operations')
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return node.value
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
    value = _arithmetic(node.operand, depth + 1)
    return -value if isinstance(node.op, ast.USub) else value
  if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
    raise ToolCallError(f'unsupported value: {describe(node)}')
  left, right = _arithmetic(node.left, depth + 1), _arithmetic(node.right, depth + 1)
  is_power = isinstance(node.op, ast.Pow)
  bits = sum(value.bit_length() for value in (left, right) if isinstance(value, int))
  if bits > MAX_INT_BITS or (
    is_power and (abs(right) > 64 or bits * max(abs(right), 1) > MAX_INT_BITS)
  ):
    raise ToolCallError('arithmetic on numbers too large')
  try:
    value = _OPERATORS[type(node.op)](left, right)
  except (ArithmeticError, ValueError) as error:
    raise ToolCallError(f'arithmetic fails: {error}') from error
  if isinstance(value, complex):
    raise ToolCallError('arithmetic leaves the real numbers')
  return value
