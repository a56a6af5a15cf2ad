"""What is fuzzed: each target reads bytes, and raises nothing, or the error that it documents."""

import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dcore_jax.chat.call_text import closing_tags, split_answer
from dcore_jax.chat.lenient_calls import parse_lenient
from dcore_jax.chat.tagged_calls import read_text, tagged_blocks
from dcore_jax.chat.thoughts import take_thoughts
from dcore_jax.chat.tool_calls import parse_calls, parse_hermes, parse_python, print_calls
from dcore_jax.chat.tool_specs import python_name, read_tools
from dcore_jax.data.record_files import parse_strictly, read_records
from dcore_jax.data.row_schemas import recognise, to_rows
from dcore_jax.distill.decompose import parse_subtasks
from dcore_jax.models.gguf_file import GgufFile
from dcore_jax.models.tensor_files import MappedFile
from dcore_jax.serve.requests import ChatCompletionRequest, CompletionRequest, read_request


class Target(NamedTuple):
  """A reader with inputs to begin from and words that its format has."""

  read: Callable[[bytes], None]
  seeds: Sequence[bytes]
  words: Sequence[bytes]


def _text(data: bytes) -> str:
  return data.decode('utf-8', 'replace')


def _calls(data: bytes) -> None:
  text = _text(data)
  # These two give an answer for every text.
  parse_lenient(text)
  closing_tags(text)
  split_answer(text)
  for read in (parse_calls, parse_python, parse_hermes, read_text, take_thoughts):
    _documented(read, text)
  _documented(lambda text: list(tagged_blocks(text)), text)
  try:
    calls = parse_calls(text)
  except ValueError:
    return
  # What was read and can be written reads the same. Names of one style may be none of the other's.
  for style in ('python', 'hermes') if calls else ():
    try:
      printed = print_calls(calls, style)
    except ValueError:
      continue
    assert parse_calls(printed) == calls


def _documented(read: Callable, given: object) -> None:
  try:
    read(given)
  except ValueError:
    pass


def _subtasks(data: bytes) -> None:
  parse_subtasks(_text(data))


def _tools(data: bytes) -> None:
  text = _text(data)
  python_name(text)
  _documented(read_tools, text)


def _rows(data: bytes) -> None:
  try:
    record = parse_strictly(_text(data))
  except ValueError:
    return
  if not isinstance(record, dict):
    return
  schema = recognise(record)
  if schema is not None:
    for style in ('python', 'hermes'):
      _documented(functools.partial(to_rows, schema=schema, name='row', style=style), record)


def _bodies(data: bytes) -> None:
  _documented(functools.partial(read_request, CompletionRequest), data)
  try:
    asked = read_request(ChatCompletionRequest, data)
    for message in asked.messages:
      message.record()
    json.dumps([spec.to_json() for spec in asked.specs])
  except ValueError:
    pass


def _file(name: str, read: Callable[[pathlib.Path], object]) -> Callable[[bytes], None]:
  folder = tempfile.TemporaryDirectory()
  path = pathlib.Path(folder.name, name)

  def write_and_read(data: bytes) -> None:
    path.write_bytes(data)
    _documented(read, path)

  # The folder lives as long as the target does.
  write_and_read.folder = folder
  return write_and_read


def _tensors(path: pathlib.Path) -> None:
  file = MappedFile(path)
  for name, entry in file.entries.items():
    if entry.dtype in ('F32', 'F16', 'BF16'):
      file.view(name)


def _gguf(path: pathlib.Path) -> None:
  file = GgufFile(path)
  for name in file.tensors:
    file.dequantized(name)


def _seed(value: object) -> bytes:
  return json.dumps(value).encode()


def _safetensors_seed() -> bytes:
  header = _seed({'a': {'dtype': 'F32', 'shape': [2, 1], 'data_offsets': [0, 8]}})
  return len(header).to_bytes(8, 'little') + header + bytes(8)


def _gguf_seed() -> bytes:
  def text(word: bytes) -> bytes:
    return len(word).to_bytes(8, 'little') + word

  def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, 'little')

  head = b'GGUF' + number(3) + number(1, 8) + number(2, 8)
  head += text(b'general.architecture') + number(8) + text(b'llama')
  head += text(b'list') + number(9) + number(8) + number(2, 8) + text(b'a') + text(b'bc')
  head += text(b't') + number(1) + number(4, 8) + number(0) + number(0, 8)
  return head + bytes(-len(head) % 32) + bytes(16)


_CHAT = [
  {'role': 'user', 'content': 'Weather?'},
  {'role': 'assistant', 'content': '<think>\nso\n</think>\n\n[weather(city="Rome")]'},
]
_SHARED = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': '[f(a=1)]'}]
_LISTED = 'These are functions:\n[{"name": "f", "description": "", "parameters": {}}]'
_JSON = [b'{', b'}', b'[', b']', b'"', b'\\', b',', b':', b'null', b'1e999', b'-1', b'0.5', b'true']
_TAGS = [b'<tool_call>', b'</tool_call>', b'<think>', b'</think>', b'"name": ', b'"arguments": ']
_PYTHON = [b'[f(', b'a=', b')]', b"'", b'"""', b'(', b')', b'0x', b'**', b'lambda:', b'\n', b'#']
_FIELDS = [b'"role"', b'"from"', b'"value"', b'"tool"', b'"tools"', b'<tools>', b'</tools>']
_FIELDS += [b'<tool_response>', b'</tool_response>', b'"function_call"', b'"gpt"', b'"human"']

TARGETS = {
  'calls': Target(
    _calls,
    [
      b"[f(a=1, b='x'), g.h(c=[2, {'d': None}])]",
      b'<think>\nso\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
      b'[f(a=g(1 + 2), b=(1, 2), **{"c d": -1})]',
    ],
    [*_PYTHON, *_TAGS, *_JSON],
  ),
  'subtasks': Target(
    _subtasks, [b'Here: [{"description": "a", "index": [0, 1]}, {"description": "b"},]'], _JSON
  ),
  'tools': Target(
    _tools,
    [_seed([{'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}])],
    [*_JSON, b'"type"', b'"properties"', b"'"],
  ),
  'rows': Target(
    _rows,
    [
      _seed({'messages': _CHAT, 'tools': []}),
      _seed({'conversations': _SHARED, 'system': _LISTED}),
      _seed(
        {'instruction': 'a', 'input': 'b', 'output': '<think> c </think> <response> d </response>'}
      ),
      _seed({'query': 'a', 'tools': '[{"name": "f", "parameters": {}}]', 'answers': '[]'}),
    ],
    [*_JSON, *_FIELDS, *_TAGS],
  ),
  'bodies': Target(
    _bodies,
    [
      _seed({'model': 'm', 'messages': _CHAT, 'tools': [], 'max_tokens': 5, 'stop': ['a']}),
      _seed({'model': 'm', 'prompt': ['a'], 'logprobs': 1, 'n': 2, 'echo': True}),
    ],
    [*_JSON, *_TAGS, b'"role"', b'"tool_calls"', b'"prompt"', b'"temperature"', b'"tool"'],
  ),
  'records': Target(
    _file('rows.json', read_records),
    [_seed([{'a': 1}, {'b': [2]}]), b'{"a": 1}\n{"b": 2}\n'],
    _JSON,
  ),
  'safetensors': Target(
    _file('x.safetensors', _tensors),
    [_safetensors_seed()],
    [*_JSON, b'"dtype"', b'"shape"', b'"data_offsets"'],
  ),
  'gguf': Target(_file('x.gguf', _gguf), [_gguf_seed()], [b'\xff' * 8, bytes(8), b'\x09\0\0\0']),
}
