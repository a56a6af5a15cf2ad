"""ACEBench's verdicts: those of its own checker, and each of its rules that nobody would guess."""

import json
import os
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.evaluate.acebench.score import judge, read_calls
from dcore_jax.files import read_json_lines

DATA = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data')) / 'acebench'


def function(name='f', required=(), **types):
  properties = {key: {'type': kind} for key, kind in types.items()}
  parameters = {'type': 'object', 'properties': properties, 'required': list(required)}
  return {'name': name, 'parameters': parameters}


def reason(text, reference, *functions):
  verdict = judge(text, functions, reference)
  assert verdict.valid == (not verdict.reason)
  return verdict.reason


def one(value, wanted, kind):
  """The verdict on one argument of a declared type."""
  return reason(f'[f(a={value!r})]', {'f': {'a': wanted}}, function(a=kind))


def test_every_verdict_of_the_official_checker():
  golden = DATA / 'golden_normal.jsonl'
  if not golden.exists():
    pytest.skip(f'{golden} is not there')
  tasks = {}
  rows = read_json_lines(golden)
  for category in {row['category'] for row in rows}:
    data = DATA / 'data_all' / 'data_en'
    records = read_json_lines(data / f'data_{category}.json')
    references = read_json_lines(data / 'possible_answer' / f'data_{category}.json')
    for record, reference in zip(records, references, strict=True):
      tasks[record['id']] = record['function'], reference['ground_truth']
  assert len(rows) == 2450
  for row in rows:
    verdict = judge(row['text'], *tasks[row['id']])
    assert (verdict.valid, verdict.reason) == (row['valid'], row['error_type']), row


def test_white_space_leaves_a_prediction_and_not_a_reference():
  assert one('New York', 'New York', 'string') == ''
  assert one(['New York'], ['New York'], 'list(string)') == ''
  # Inside of an object the prediction is changed, and the reference is made plain, too ...
  assert one({'city': 'New York'}, {'city': 'New York'}, 'object') == ''
  # ... but not where a list stands between them.
  assert one({'city': ['New York']}, {'city': ['New York']}, 'object') == 'value_error'
  # Of white space, only the space leaves a reference.
  text = "[f(a='New\tYork')]"
  assert reason(text, {'f': {'a': 'New\tYork'}}, function(a='string')) == 'value_error:string'


def test_texts_are_compared_by_parts_and_in_lists_as_wholes():
  assert one("say: THE-END, it's", 'the end', 'string') == ''
  assert one('end', 'the end', 'string') == 'value_error:string'
  assert one(['the-end'], ['The end'], 'list(string)') == ''
  assert one(['the ends'], ['the end'], 'list(string)') == 'value_error:list/tuple'


@pytest.mark.parametrize('kind,value,wanted', [('number', 1, 2), ('boolean', True, False)])
def test_numbers_and_truth_values_are_not_compared(kind, value, wanted):
  assert one(value, wanted, kind) == ''
  assert one('1', wanted, kind) == 'type_error'


def test_a_reference_of_another_type_takes_all_of_its_type():
  assert one(0.25, 0.5, 'number') == ''
  assert one('anything', '2 weeks', 'integer') == ''
  assert one('blue', 'red', 'enum') == ''
  assert one(3, 'red', 'enum') == 'type_error'


@pytest.mark.parametrize('kind,empty', [('array', []), ('object', {})])
def test_an_empty_reference_fails_everything(kind, empty):
  assert one(empty, empty, kind) == 'type_error'


def test_a_list_without_a_declared_element_must_hold_objects():
  assert one(['a'], ['a'], 'array') == 'value_error'
  assert one([{'a': 1}], [{'a': 1}], 'array') == ''


def test_values_of_objects_are_compared_as_python_prints_them():
  assert one({'a': 12}, {'a': 1}, 'object') == ''
  assert one({'a': 'true'}, {'a': True}, 'object') == ''
  assert one({'a': {'b': 1}}, {'a': {'b': 2}}, 'object') == 'value_error'
  assert one({'a': 1, 'b': 2}, {'a': 1}, 'object') == 'value_error'
  assert one([{'a': 1}], [{'a': 1}, {'a': 2}], 'array') == 'value_error:list_dict_count'
  assert one([3], [{'a': 1}], 'array') == 'value_error'


def test_required_arguments_must_be_there_and_others_may_be_missing():
  reference = {'f': {'a': 'x', 'b': 'y'}}
  declared = function(required=['a'], a='string', b='string', c='string')
  assert reason("[f(a='x')]", reference, declared) == ''
  assert reason("[f(b='y')]", reference, declared) == 'lack_args'
  assert reason("[f(a='x', c='z')]", reference, declared) == 'addition_args'


def test_a_name_with_a_number_at_its_end_cannot_be_called():
  assert reason('[f_2(a=1)]', {'f_2': {'a': 1}}, function('f_2', a='number')) == 'function_mismatch'


def test_the_first_function_counts_whose_name_is_a_part_of_the_name():
  reference = {'find_all': {'a': 1}}
  declared = function('find', b='number'), function('find_all', a='number')
  assert reason('[find_all(a=1)]', reference, *declared) == 'wrong_function_name'
  assert reason('[find_all(a=1)]', reference, *declared[::-1]) == ''


def test_repeated_calls_are_numbered_and_one_may_answer_two():
  reference = {'f_1': {'a': 'x'}, 'f_2': {'a': 'xy'}}
  assert reason("[f(a='xy'), f(a='-')]", reference, function(a='string')) == ''
  assert reason("[f(a='xy')]", reference, function(a='string')) == 'wrong functions number'
  other = {'f': {'a': 'x'}, 'g': {'a': 'y'}}
  declared = function(a='string'), function('g', a='string')
  assert reason("[g(a='y'), f(a='x')]", other, *declared) == ''
  # The verdict on the last call is told, also where it is of another function.
  assert reason("[f(a='z'), g(a='y')]", other, *declared) == 'simple_function_checker:unclear'
  assert reason("[g(a='y'), f(a='z')]", other, *declared) == 'value_error:string'


def test_calls_without_arguments():
  nothing = {'name': 'f', 'parameters': {}}
  assert reason('[f()]', {'f': {}}, nothing) == ''
  assert reason('[f(a=1)]', {'f': {}}, nothing) == 'wrong_param'
  # It has parameters, and that there are none of them is not seen.
  assert reason('[f()]', {'f': {}}, function()) == 'wrong_param'
  assert reason('[f(a=1)]', {'f': {}}, function()) == ''


def test_words_for_truth_values_fail_as_text():
  assert one('true', 'true', 'string') == 'type_error'
  assert one('true', True, 'boolean') == ''


def test_what_is_a_call_list():
  assert read_calls("f(a=1),\n g.h(b='x y')") == [('f', {'a': 1}), ('g.h', {'b': 'xy'})]
  assert read_calls('[f(1, a=+2, b=true, c=g(d=3), e=x[1])]') == [
    ('f', {'a': -2, 'b': 'true', 'c': {'g': {'d': 3}}, 'e': 'x[1]'})
  ]
  assert read_calls("[f(a='x' + 'y', b=1 + 2 - +3)]") == [('f', {'a': 'xy', 'b': 0})]
  for text in (
    '',
    'no',
    'f(a=1)',
    '["a"]',
    '[f(',
    '[f(a=lambda: 1)]',
    '[f(a={1, 2})]',
    "[f(a=-'x')]",
  ):
    assert reason(text, {'f': {}}, function()) == 'wrong_output_format', text
  assert reason('[]', {'f': {}}, function()) == 'wrong functions number'


@pytest.mark.parametrize(
  'value',
  [
    "__import__('os').system('x')+1",
    '9**9**9',
    "'a'*10**10",
    'f(a=1)+1',
    'x+1',
    "'a'+ +x[g()]",
    '1+~1',
    '-' * 9999,
  ],
)
def test_a_prediction_is_never_evaluated(value):
  assert reason(f'[f(a={value})]', {'f': {'a': 1}}, function(a='number')) == 'wrong_output_format'


def test_one_of_several_references_is_enough():
  references = [{'f': {'a': 'x'}}, {'f': {'a': 'y'}}]
  assert reason("[f(a='y')]", references, function(a='string')) == ''
  assert reason("[f(a='z')]", references, function(a='string')) == 'value_error:string'


def test_where_the_official_program_would_stop():
  assert reason('[f(a=1)]', {'f': {'a': 1}}, {'name': 'f'}) == 'checker_error'
  assert reason('[f(a=1)]', {'f': {'a': 1}}, function('other', a='number')) == 'checker_error'
  assert reason('[f(a=1)]', {'f': {'a': 1}}, function(a='unheard')) == 'checker_error'
  assert one([{'a': 1}], [{'a': 1}], 'objectArray') == 'checker_error'


@settings(max_examples=30)
@given(st.text(alphabet='[](){}f=,:\'"+-*.0123x _\n'))
def test_any_text_gets_a_verdict(text):
  assert not judge(f'{text}(', [function(a='object')], {'f': {'a': {'b': 1}}}).valid


values = st.recursive(
  st.integers() | st.booleans() | st.text(alphabet='abc-._'),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='abc'), inner),
  max_leaves=6,
)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from('abc'), values))
def test_values_without_white_space_are_read_as_they_are_written(arguments):
  written = ', '.join(f'{name}={value!r}' for name, value in arguments.items())
  assert read_calls(f'[f({written})]') == [('f', json.loads(json.dumps(arguments)))]
