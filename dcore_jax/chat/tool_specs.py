"""Tool specs as JSON, and the system message that lists them."""

import ast
import json
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import ToolSpec

CALL_FORMAT = 'Answer with the calls alone, as [name(parameter=value), ...]. Where no tool fits, answer in words.'
_JSON_TYPES = {
  'str': 'string',
  'int': 'integer',
  'float': 'number',
  'bool': 'boolean',
  'dict': 'object',
  'list': 'array',
}


def read_tools(value: Any) -> tuple[ToolSpec, ...]:
  """Specs from JSON or its text: bare or as {'type': 'function', 'function': spec}, parameters as a schema or by name."""
  value = _read_literal(value)
  specs = []
  for record in value if isinstance(value, list) else [value]:
    record = record.get('function', record) if isinstance(record, dict) else {}
    parameters = record.get('parameters') or {}
    if not isinstance(record.get('name'), str) or not isinstance(parameters, dict):
      raise ValueError(f'a tool needs a name and parameters, got {str(record)[:80]!r}')
    specs.append(
      ToolSpec(record['name'], record.get('description') or '', _json_schema(parameters))
    )
  return tuple(specs)


def _json_schema(parameters: dict[str, Any]) -> dict[str, Any]:
  """Parameters by name (xLAM: {'city': {'type': 'str, optional', ...}}) as a schema; schemas with JSON's names of types."""
  if not isinstance(parameters.get('properties'), dict):
    required = [
      name
      for name, spec in parameters.items()
      if isinstance(spec, dict)
      and 'optional' not in str(spec.get('type'))
      and 'default' not in spec
    ]
    parameters = {'type': 'object', 'properties': parameters, 'required': required}
  return _json_types(parameters)


def _json_types(value: Any) -> Any:
  if isinstance(value, list):
    return [_json_types(item) for item in value]
  if not isinstance(value, dict):
    return value
  plain = {name: _json_types(item) for name, item in value.items()}
  if isinstance(plain.get('type'), str):  # else a parameter that is called type
    word = plain['type'].replace(', optional', '')
    plain['type'] = _JSON_TYPES.get(word, word)
  return plain


def _read_literal(value: Any) -> Any:
  """The value of a JSON text or a Python literal; what is no text stays as it is."""
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value)
  except json.JSONDecodeError as error:
    try:
      return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      raise ValueError(f'neither JSON ({error}) nor a literal: {value.strip()[:80]!r}') from error


def system_text(policy: str, tools: Sequence[ToolSpec]) -> str:
  """System message of the Python style: policy, tools as JSON, and how to call them."""
  specs = '\n'.join(json.dumps(tool.to_json(), ensure_ascii=False) for tool in tools)
  shown = f'You may call these tools:\n<tools>\n{specs}\n</tools>\n\n{CALL_FORMAT}'
  return f'{policy}\n\n{shown}' if policy else shown
