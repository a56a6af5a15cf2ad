"""Tool specs as JSON, and the system message that lists them."""

import ast
import json
import keyword
import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

from dcore_jax.chat.messages import BOOKKEEPING, ToolSpec, refuse_unknown

CALL_FORMAT = (
  'Answer with the calls alone, as [name(parameter=value), ...]. '
  'Where no tool fits, answer in words.'
)
_MAX_DEPTH = 100  # levels of brackets of a spec
# `strict` says how an endpoint samples, and not what the model sees.
_FREE = BOOKKEEPING | {'strict'}
# Data sets that were made from Python functions name their types as Python does.
_JSON_TYPES = {
  'str': 'string',
  'int': 'integer',
  'float': 'number',
  'bool': 'boolean',
  'dict': 'object',
  'list': 'array',
}


def read_tools(value: Any, *, left_out: Collection[str] = ()) -> tuple[ToolSpec, ...]:
  """Reads specs from JSON values or from their text.

  A spec may be bare or wrapped as {'type': 'function', 'function': spec}, and its parameters may be
  a JSON schema or stand by name. The fields `left_out` of a spec are not shown to a model.

  Raises:
    ValueError: text that is no literal, a tool without a name or with parameters of no kind, or one
      that says something in another field.
  """
  # Data sets write '' for no tools.
  value = read_literal(value) if value not in (None, '') else []
  records = value if isinstance(value, list) else [value]
  specs = []
  for record in records:
    # Deeper ones could be read here and not be written again.
    _check_depth(record)
    if not isinstance(record, dict):
      raise ValueError(f'a tool needs a name and parameters, got {str(record)[:80]!r}')
    if isinstance(record.get('function'), dict):
      refuse_unknown(record, ('type', 'function'), 'a tool', _FREE)
      record = record['function']
    parameters = record.get('parameters') or {}
    if not isinstance(record.get('name'), str) or not isinstance(parameters, dict):
      raise ValueError(f'a tool needs a name and parameters, got {str(record)[:80]!r}')
    known = ('type', 'name', 'description', 'parameters', *left_out)
    refuse_unknown(record, known, f'the tool {record["name"]!r}', _FREE)
    description = record.get('description') or ''
    specs.append(ToolSpec(record['name'], description, _json_schema(parameters)))
  return tuple(specs)


def _check_depth(value: Any) -> None:
  level = [value]
  # Level by level and not recursively, because deep values are what this check is for.
  for _ in range(_MAX_DEPTH):
    inner: list[Any] = []
    for item in level:
      if isinstance(item, dict):
        inner += item.values()
      elif isinstance(item, list):
        inner += item
    if not inner:
      return
    level = inner
  raise ValueError(f'a tool of more than {_MAX_DEPTH} levels of brackets')


def _json_schema(parameters: dict[str, Any]) -> dict[str, Any]:
  """Makes a JSON schema of parameters by name (xLAM: {'city': {'type': 'str, optional', ...}}).

  A schema stays one; its types get JSON's names.
  """
  if not isinstance(parameters.get('properties'), dict):
    # xLAM marks optional parameters in the text of their type or by a default.
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
  # At every depth: items of arrays and nested objects name their types as well.
  plain = {name: _json_types(item) for name, item in value.items()}
  # A `type` that is no text is not a schema's keyword but a parameter of that name.
  if isinstance(plain.get('type'), str):
    word = plain['type'].replace(', optional', '')
    plain['type'] = _JSON_TYPES.get(word, word)
  return plain


def python_name(name: str) -> str:
  """Makes a dotted identifier of a tool name that may hold any characters."""
  parts = []
  # Python's parser folds identifiers to NFKC, and a name that it changes would not be found again.
  # Dots are kept, because BFCL's tools have names such as `math.factorial`.
  for word in unicodedata.normalize('NFKC', name).split('.'):
    part = re.sub(r'\W+', '_', word).strip('_')
    # Some letters of other scripts' numerals count as word characters, and no name may hold them.
    part = ''.join(letter if f'_{letter}'.isidentifier() else '_' for letter in part)
    # An identifier may not begin with a digit.
    if part and not part.isidentifier():
      part = '_' + part
    # `import(...)` is no call to Python's parser.
    if keyword.iskeyword(part):
      part += '_'
    if part:
      parts.append(part)
  # A name of punctuation alone leaves nothing, and a call needs a name.
  return '.'.join(parts) or 'unnamed'


def read_literal(value: Any) -> Any:
  """Returns the value of a JSON text or a Python literal; what is no text stays as it is.

  Raises:
    ValueError: text that is neither.
  """
  if not isinstance(value, str):
    return value
  try:
    # Descriptions may break lines inside of a JSON string.
    return json.loads(value, strict=False)
  # Besides text that is no JSON: an integer of too many digits, or lists a thousand levels deep.
  except (ValueError, RecursionError) as error:
    try:
      # Data sets made by `str(list)` hold Python's quotes. Only literals are built, nothing runs.
      return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      raise ValueError(f'neither JSON ({error}) nor a literal: {value.strip()[:80]!r}') from error


def system_text(policy: str, tools: Sequence[ToolSpec]) -> str:
  """Writes the system message of the Python style: policy, tools as JSON, how to call them."""
  # One spec a line, with letters of all scripts as they are: escapes would cost more tokens.
  specs = '\n'.join(json.dumps(tool.to_json(), ensure_ascii=False) for tool in tools)
  shown = f'You may call these tools:\n<tools>\n{specs}\n</tools>\n\n{CALL_FORMAT}'
  return f'{policy}\n\n{shown}' if policy else shown
