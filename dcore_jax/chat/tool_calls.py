"""Tool calls as data, and the two syntaxes in which they stand in a text.

Python style, as in BFCL and the paper: `[f(a=1, b='x'), g.h(c=[2])]` (python_calls.py).
Hermes/Qwen JSON: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (tagged_calls.py).

These readers keep everything that a call says; what they do not understand is an error.
`lenient_calls` holds a second reader of the Python style, which forgives and drops what the
reference implementation does.
"""

import json
import keyword
import re
import unicodedata
from typing import Any, Callable, Iterator, Sequence

from dcore_jax.chat.call_text import OPEN_CALL
from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.python_calls import (
  MAX_CHARS,
  ToolCallError,
  check_depth,
  checked_constant,
  clip,
  parse_python,
)
from dcore_jax.chat.tagged_calls import parse_hermes, read_calls

__all__ = [
  'MAX_CHARS',
  'ToolCallError',
  'calls_equal',
  'leaf_values',
  'parse_calls',
  'parse_hermes',
  'parse_python',
  'parse_reference',
  'print_calls',
  'tool_response',
]

_OUTPUT_TAGS = re.compile('<(?=/?tool_response>)')

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
  # The Python style comes first: a tag inside of its strings is text.
  if stripped[:1] == '[' and stripped[-1:] == ']':
    try:
      return parse_python(stripped)
    except ToolCallError:
      # Words in brackets may stand around tagged calls.
      if OPEN_CALL not in stripped:
        raise
  return parse_hermes(stripped) if OPEN_CALL in stripped else None


def parse_reference(calls: Sequence[str]) -> list[ToolCall]:
  """Reads the calls of a record's reference, a list of strings like `f(a=1)`.

  Strings with brackets around the call are read too.

  Raises:
    ValueError: one string instead of a list (ToolCallError: a string that is no call).
  """
  if isinstance(calls, str):
    raise ValueError(f'a reference is a list of call strings, got one string: {clip(calls)}')
  parsed = []
  for i, call in enumerate(calls):
    text = call.strip()
    try:
      # BFCL's references are bare calls; other records put brackets around them.
      parsed.extend(parse_python(text if text[:1] == '[' else f'[{text}]'))
    except ToolCallError as error:
      raise ToolCallError(f'reference call {i}: {error}') from error
  return parsed


# --- writing and comparing ------------------------------------------------------------------------


def print_calls(calls: Sequence[ToolCall], style: str = 'python') -> str:
  """Writes calls as text that `parse_calls` reads back to equal calls; style 'python' or 'hermes'.

  No tag of thoughts stands in the text, so that it can follow a block of them.

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
  parts = call.name.split('.')
  if not all(map(_is_identifier, parts)) or any(map(keyword.iskeyword, parts)):
    raise ValueError(f'{call.name!r} is no name that a Python-style call can have')
  # Python's keywords are written as other names are, `from='SFO'`: that is how models write them.
  plain = {key: value for key, value in call.arguments.items() if _is_identifier(key)}
  # Names such as 'two words' can only stand in a dict behind `**`.
  other = {key: value for key, value in call.arguments.items() if key not in plain}
  parts = [_print_value(value, 0) for value in call.positional]
  parts += [f'{key}={_print_value(value, 0)}' for key, value in plain.items()]
  if other:
    # The braces are those of the syntax: values in them are as deep as those beside them.
    parts.append(f'**{_print_value(other, 0)}')
  return f'{call.name}({", ".join(parts)})'


def _print_value(value: Any, depth: int) -> str:
  check_depth(depth)
  if isinstance(value, dict):
    items = [
      f'{_print_value(key, depth + 1)}: {_print_value(item, depth + 1)}'
      for key, item in value.items()
    ]
    return '{' + ', '.join(items) + '}'
  if isinstance(value, (list, tuple)):
    return '[' + ', '.join(_print_value(item, depth + 1) for item in value) + ']'
  text = repr(checked_constant(value))
  # Readers of whole answers look for this tag before they read a call.
  return re.sub('<(?=/?think>)', r'\\x3c', text) if isinstance(value, str) else text


def _print_hermes(calls: Sequence[ToolCall]) -> str:
  return '\n'.join(f'<tool_call>\n{_hermes_json(call)}\n</tool_call>' for call in calls)


def _hermes_json(call: ToolCall) -> str:
  # JSON has no place for them, and dropping them would change the call.
  if call.positional:
    raise ValueError(f'{call.name}: a JSON call has no positional arguments')
  _check_keys(call.arguments)
  record = {'name': call.name, 'arguments': call.arguments}
  # Readers of others end a call at the first closing tag. Inside a value the last character of a
  # tag is therefore written as a JSON escape.
  text = re.sub('(tool_call|think)>', r'\1\\u003e', json_text(record))
  # What could not be read again is not written.
  read_calls(text)
  return text


def json_text(value: Any) -> str:
  """Writes a value as JSON that can be encoded as UTF-8.

  Raises:
    ValueError: a number that is not finite.
  """
  # Letters of all scripts stay as they are, because models were trained on such text.
  text = json.dumps(value, ensure_ascii=False, allow_nan=False)
  # Half of a surrogate pair is no character: it can only be written as an escape.
  return re.sub('[\ud800-\udfff]', lambda match: f'\\u{ord(match[0]):04x}', text)


def _check_keys(value: Any) -> None:
  # `json.dumps` would turn the key 1 into '1', and the call would come back as another one.
  if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
    raise ValueError(f'a JSON call has text keys only, got {clip(repr(value))}')
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, (list, tuple)):
    for item in value:
      _check_keys(item)


def _is_identifier(name: str) -> bool:
  # Python's parser folds identifiers to NFKC: a name that changes would not come back as it was.
  return name.isidentifier() and unicodedata.normalize('NFKC', name) == name


_PRINTERS: dict[str, Callable[[Sequence[ToolCall]], str]] = {
  'python': _print_python,
  'hermes': _print_hermes,
}


def calls_equal(a: Sequence[ToolCall], b: Sequence[ToolCall], ordered: bool = True) -> bool:
  """Says whether two lists call the same tools with the same arguments, in any order of arguments.

  Values compare as in Python: 1 == 1.0 == True. With `ordered=False` the lists compare as
  multisets, for calls that do not depend on each other.
  """
  # Tuples and lists are the same value in JSON, and compare as equal here.
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

  See docs/method.md, section 0. An output that holds these tags gets their first character as a
  JSON escape, so that it cannot end itself and begin another one.
  """
  text = _OUTPUT_TAGS.sub(r'\\u003c', text)
  return f'<tool_response>\n{text}\n</tool_response>'
