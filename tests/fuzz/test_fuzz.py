"""Readers of what others wrote: no error but the documented one, and no input takes minutes."""

import pathlib

import pytest

from dcore_jax.chat.call_text import closing_tags
from dcore_jax.chat.lenient_calls import parse_lenient
from dcore_jax.chat.tagged_calls import read_text
from dcore_jax.chat.tool_specs import read_tools
from dcore_jax.data.record_files import parse_strictly, read_records
from dcore_jax.data.row_schemas import to_rows
from dcore_jax.distill.decompose import parse_subtasks
from dcore_jax.models.tensor_files import MappedFile
from tests.fuzz.engine import SECONDS, attempt, fuzz, save
from tests.fuzz.targets import TARGETS, Target

CASES = sorted(path for path in pathlib.Path(__file__).parent.glob('cases/*'))


@pytest.mark.parametrize('name', TARGETS)
def test_mutated_inputs(name):
  failures, _ = fuzz(TARGETS[name], 20_000 // len(TARGETS), seed=0)
  assert failures == []


@pytest.mark.parametrize('path', CASES, ids=lambda path: path.name)
def test_inputs_that_once_broke_a_reader(path):
  assert attempt(TARGETS[path.name.partition('-')[0]], path.read_bytes()) is None


def test_what_breaks_is_found_saved_and_found_again(tmp_path):
  def read(data):
    if b'!!' in data:
      raise TypeError('broken')

  target = Target(read, [b'ab'], [b'!', b'x'])
  failures, speed = fuzz(target, 500, seed=1)
  assert [failure.error for failure in failures] == ["TypeError('broken')"] and speed > 0
  assert failures == fuzz(target, 500, seed=1)[0]
  path = save(failures[0], tmp_path / 'cases', 'x')
  assert attempt(target, path.read_bytes()) == failures[0]


def test_an_endless_reader_is_stopped(monkeypatch):
  monkeypatch.setattr('tests.fuzz.engine.SECONDS', 1)

  def endless(data):
    while True:
      pass

  assert attempt(Target(endless, [], []), b'').error == 'takes more than 1 s'


# --- long inputs, which took quadratic time ---

_UNCLOSED = '"' + '\\"' * 300_000


def _row(value):
  turns = [{'from': 'human', 'value': 'a'}, {'from': 'tool', 'value': value}]
  return {'conversations': [*turns, {'from': 'gpt', 'value': 'b'}], 'tools': '[]'}


LONG = {
  'a far end of thoughts behind many calls': lambda: closing_tags(
    '</think>' + '<tool_call>' * 90_000 + '</think>'
  ),
  'a key given twice behind many': lambda: read_text(
    '{' + ''.join(f'"{i}":1,' for i in range(60_000)) + '"x":1,"x":2}'
  ),
  'the same in a row': lambda: parse_strictly(
    '{' + ''.join(f'"{i}":1,' for i in range(60_000)) + '"x":1,"x":2}'
  ),
  'quotes in an array': lambda: parse_subtasks('[{' + _UNCLOSED),
  'outputs that are never closed': lambda: to_rows(
    _row('</tool_response>' * 30_000 + '<tool_response>' * 30_000), 'hermes', 'row'
  ),
  'a long sentence before a list of tools': lambda: to_rows(
    {'system': 'a' * 500_000 + '[{}]', 'conversations': _row('')['conversations']}, 'toolace', 'row'
  ),
}


@pytest.mark.parametrize('name', LONG)
def test_long_inputs_end(name):
  def read(_):
    try:
      LONG[name]()
    except ValueError:
      pass

  assert attempt(Target(read, [], []), b'') is None, f'more than {SECONDS} s'


def test_a_list_with_a_string_that_never_ends(tmp_path):
  path = tmp_path / 'rows.json'
  path.write_text('[{"a": 1}, {' + _UNCLOSED + ']')
  assert attempt(Target(lambda _: _found(path), [], []), b'') is None


def _found(path):
  try:
    read_records(path)
  except ValueError:
    pass


# --- values that raised errors of their own kind ---


def test_an_integer_that_python_cannot_print_is_no_error():
  text = '[f(a=g(0x' + 'f' * 5000 + '))]'
  assert parse_lenient(text) == text


@pytest.mark.parametrize(
  'tools',
  [
    '[' * 20_000,
    '9' * 5000,
    '[{"name": "f", "parameters": ' + '{"a":' * 200 + '1' + '}' * 201 + ']',
  ],
)
def test_deep_or_long_specs_are_refused(tools):
  with pytest.raises(ValueError):
    read_tools(tools)


@pytest.mark.parametrize(
  'header',
  [
    '[' * 50_000,
    '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    '{"a": [1]}',
  ],
)
def test_headers_of_tensors_hold_sizes(tmp_path, header):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(len(header).to_bytes(8, 'little') + header.encode() + bytes(4))
  with pytest.raises(ValueError, match='x.safetensors cannot be read'):
    MappedFile(path)
