"""Scores of BFCL: what is left out, what is never evaluated, and the published counts."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.evaluate.bfcl import score as bfcl_score
from dcore_jax.evaluate.bfcl.checker import Evaluator, Refused
from dcore_jax.evaluate.confined.worker import Ended
from dcore_jax.worlds import bfcl

ROOT = pathlib.Path(__file__).parents[3]
PUBLISHED = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data')) / 'dcore_published'


@pytest.fixture
def package():
  try:
    return bfcl.package_folder()
  except ValueError as error:
    pytest.skip(str(error))


# --- what is computed in the place of eval ---


class Door:
  """An API with a public and a private method."""

  def __init__(self):
    self.opened = []

  def open_door(self, name, speed=1):
    self.opened.append((name, speed))
    return f'{name} is open'

  def _reset(self):
    raise AssertionError('private')


def evaluator():
  door = Door()
  refusals = []
  names = {'door_instance': door, 'json': json, 'spare': Door()}
  return Evaluator(names, refusals), door, refusals


@pytest.mark.parametrize(
  'text, value',
  [
    ('0.05 / 12', 0.05 / 12),
    ('-2 ** 3 + 7 % 4', -5),
    ("'a' + 'b' * 3", 'abbb'),
    ('[1] + [2, 3] * 2', [1, 2, 3, 2, 3]),
    ("{'a': (1, None)}", {'a': (1, None)}),
  ],
)
def test_literals_are_computed_as_python_does(text, value):
  evaluate, _, refusals = evaluator()
  assert evaluate(text) == value
  assert not refusals


numbers = st.integers(-1000, 1000) | st.floats(-1e6, 1e6)
sums = st.recursive(
  numbers.map(repr),
  lambda inner: st.builds(
    '({} {} {})'.format, inner, st.sampled_from('+ - * / // %'.split()), inner
  ),
  max_leaves=8,
)


@given(sums)
def test_any_sum_of_numbers_is_what_python_computes(text):
  evaluate, _, _ = evaluator()
  try:
    wanted = eval(text, {'__builtins__': {}})
  except (ArithmeticError, ValueError) as error:
    with pytest.raises(type(error)):
      evaluate(text)
  else:
    assert evaluate(text) == wanted


@pytest.mark.parametrize(
  'text',
  [
    "__import__('os').system('true') + 1",
    "open('/etc/hostname').read() + ''",
    "json.loads('1') + 1",
    'door_instance._reset()',
    'door_instance.open_door.__func__(1, 2)',
    'door_instance.opened',
    'spare.open_door(name=1)',
    "().__class__.__bases__[0] + ''",
    '[x for x in (1,)] + [2]',
    '(lambda: 1)() + 1',
    "f'{1}' + ''",
    '9 ** 9 ** 9',
    "'x' * 10 ** 9",
    "'%1000000000d' % 1",
    '1e308 * 10',
    '(' * 70 + '1' + ',)' * 70,
    '1 + ' * 40_000 + '1',
    'door_instance.open_door(**json)',
    '(x := 1) + 1',
  ],
)
def test_everything_else_is_refused_and_recorded(text):
  evaluate, door, refusals = evaluator()
  with pytest.raises(Refused):
    evaluate(text)
  assert len(refusals) == 1
  assert not door.opened


def test_unknown_names_are_the_errors_that_python_has():
  evaluate, _, refusals = evaluator()
  for text in ('foo(1)', 'math.pi * 2', 'foo[0].bar + open'):
    with pytest.raises(NameError, match='is not defined'):
      evaluate(text)
  with pytest.raises(SyntaxError):
    evaluate('1 +')
  with pytest.raises(TypeError):
    evaluate("'a' + 1")
  assert not refusals


def test_calls_of_public_methods_are_made_inside_out():
  evaluate, door, _ = evaluator()
  text = "door_instance.open_door(door_instance.open_door('in'), speed=-2.5)"
  assert evaluate(text) == 'in is open is open'
  assert door.opened == [('in', 1), ('in is open', -2.5)]


# --- what is left out ---


def answer(name, result='[f(a=1)]', **more):
  return {'id': name, 'result': result, 'reasoning_content': 'hm'} | more


def function(name='f'):
  properties = {'a': {'type': 'integer', 'description': 'a number'}}
  parameters = {'type': 'dict', 'properties': properties, 'required': ['a']}
  return {'name': name, 'description': 'a function', 'parameters': parameters}


def task(name):
  question = [[{'role': 'user', 'content': f'call f for {name}'}]]
  return {'id': name, 'question': question, 'function': [function()]}


def benchmark(folder, names, category='simple'):
  """A package with made-up tasks, whose right call is f(a=1)."""
  (folder / 'data/possible_answer').mkdir(parents=True)
  file = f'BFCL_v3_{category}.json'
  (folder / 'data' / file).write_text(''.join(json.dumps(task(name)) + '\n' for name in names))
  answers = [{'id': name, 'ground_truth': [{'f': {'a': [1]}}]} for name in names]
  (folder / 'data/possible_answer' / file).write_text(
    ''.join(json.dumps(row) + '\n' for row in answers)
  )
  return folder


def test_lines_that_cannot_be_scored_are_listed_and_the_rest_is_read(tmp_path):
  names = [f'simple_{place}' for place in range(8)]
  deep = json.dumps(answer('simple_6')).replace('"[f(a=1)]"', '[' * 80 + ']' * 80)
  lines = [
    json.dumps(answer('simple_0')),
    json.dumps(answer('simple_0', 'later')),
    json.dumps({'id': 'simple_1', 'result': 'Error during inference: no route'}),
    json.dumps(answer('simple_99')),
    json.dumps(answer(['simple_2'])),
    json.dumps(answer('simple_3', 7)),
    '[1]',
    '',
    json.dumps(answer('simple_4', 'the error of the day')),  # answered: it has thoughts
    deep,
    json.dumps(answer('simple_5', 'Grüße'), ensure_ascii=False)[:-27],
  ]
  path = tmp_path / 'results.json'
  path.write_bytes('\n'.join(lines).encode()[:-1])
  items, left_out = bfcl_score.read_items(path, 'simple', benchmark(tmp_path / 'package', names))
  assert [(item.row['id'], item.row['result']) for item in items] == [
    ('simple_0', '[f(a=1)]'),
    ('simple_4', 'the error of the day'),
  ]
  assert items[0].task['function'] == [function()]
  found = [(entry['line'], entry['id'], entry['reason'].split(':')[0]) for entry in left_out]
  assert found == [
    (2, 'simple_0', 'answered more than once; the first answer is scored'),
    (3, 'simple_1', 'its inference failed'),
    (4, 'simple_99', 'no such item in simple'),
    (5, "['simple_2']", 'no such item in simple'),
    (6, 'simple_3', 'its result is neither text nor a list'),
    (7, None, 'not a whole line'),
    (10, 'simple_6', 'its result has more than 64 levels of lists'),
    (11, None, 'not a whole line'),
    (None, 'simple_2', 'not in the result file'),
    (None, 'simple_5', 'not in the result file'),
    (None, 'simple_7', 'not in the result file'),
  ]


def test_an_id_that_the_benchmark_has_twice_may_be_answered_twice(tmp_path):
  package = benchmark(tmp_path / 'package', ['simple_0', 'simple_0'])
  path = tmp_path / 'results.json'
  path.write_text('\n'.join([json.dumps(answer('simple_0', str(place))) for place in range(3)]))
  items, left_out = bfcl_score.read_items(path, 'simple', package)
  assert [item.row['result'] for item in items] == ['0', '1']
  assert [entry['line'] for entry in left_out] == [3]


def test_files_of_other_versions_and_no_files_are_told(tmp_path, package):
  with pytest.raises(ValueError, match='no folder'):
    bfcl_score.score(tmp_path / 'none', None, tmp_path / 'out')
  (tmp_path / 'BFCL_v4_multiple_result.json').write_text('')
  with pytest.raises(ValueError, match='no result files BFCL_v3'):
    bfcl_score.score(tmp_path, None, tmp_path / 'out')
  (tmp_path / 'BFCL_v3_rest_result.json').write_text('')
  (tmp_path / 'BFCL_v3_live_parallel_result.json').write_text('')
  notes = []
  found = bfcl_score.score(tmp_path, None, tmp_path / 'out', note=notes.append)
  assert [entry['reason'] for entry in found['left_out']] == [
    "no category 'rest' in BFCL v3",
    'not of BFCL v3',
  ]
  empty = found['categories']['live_parallel']
  assert (empty['correct'], empty['total'], empty['accuracy']) == (0, 0, None)
  assert bfcl_score.count_left_out(found) == 2 + 16
  assert len(notes) == 3


def test_an_answer_that_ends_the_process_is_wrong_and_the_next_one_is_judged(monkeypatch):
  begun = []

  class Judging:
    """Ends over the answers 'too long' and 'too large', and by itself over 'broken'."""

    def __init__(self, module, arguments):
      begun.append(arguments)

    def __enter__(self):
      return self

    def __exit__(self, *details):
      pass

    def allow(self, seconds, patience):
      assert 0 < seconds <= patience

    def ask_json(self, job):
      ends = {'too long': 'limit', 'too large': 'signal_9', 'broken': 'exit'}
      if job['result'] in ends:
        raise Ended(ends[job['result']])
      return {'correct': True, 'reason': '', 'refused': []}

  monkeypatch.setattr(bfcl_score, 'Worker', Judging)

  def verdicts_on(results):
    items = [bfcl_score.Item({'result': result}, {'id': 'simple_0'}, None) for result in results]
    return bfcl_score.judge(items, 'simple', pathlib.Path('/there/bfcl_eval'))

  verdicts = verdicts_on(['right', 'too long', 'too large', 'right'])
  assert [verdict['correct'] for verdict in verdicts] == [True, False, False, True]
  assert verdicts[1]['refused'] == ['the checker was ended: limit']
  assert begun == [['/there']] * 3
  with pytest.raises(ValueError, match='ended over simple_0 of simple'):
    verdicts_on(['right', 'broken'])


# --- the checker itself ---


def judged(package, results, category='simple', name='f'):
  question = task('x') | {'function': [function(name)]}
  reference = [{name: {'a': [1]}}]
  items = [
    bfcl_score.Item({'id': 'x', 'result': result}, question, reference) for result in results
  ]
  return bfcl_score.judge(items, category, package)


def test_calls_are_judged_and_nothing_is_run(package, tmp_path):
  made = tmp_path / 'made'
  attack = f"__import__('pathlib').Path({str(made)!r}).touch()"
  results = ['[f(a=1)]', '[f(a=2)]', '[f(a=3-2)]', 'no call', f'[f(a={attack} or 1)]']
  results += [f'[f(a=1+{attack})]', '[f(a=9**9**9+1)]', [{'f': '{"a": 1}'}], [{'f': {'a': 2}}], [7]]
  verdicts = judged(package, results)
  assert [verdict['correct'] for verdict in verdicts] == [
    *(True, False, True, False, False),
    *(False, False, True, False, False),
  ]
  assert [bool(verdict['refused']) for verdict in verdicts] == [False] * 5 + [True] * 2 + [
    False
  ] * 3
  assert not made.exists()


def test_names_with_dots_are_those_of_the_prompt_or_of_the_interface(package):
  verdicts = judged(package, ['[g.f(a=1)]', [{'g_f': '{"a": 1}'}], '[g_f(a=1)]'], name='g.f')
  assert [verdict['correct'] for verdict in verdicts] == [True, True, False]


def test_a_call_that_is_not_evaluated_is_a_call_all_the_same(package):
  results = ['I cannot do that.', '[f(a=1)]', '[f(a=open("x").read()+1)]', '[]']
  found = [verdict['correct'] for verdict in judged(package, results, 'irrelevance')]
  assert found == [True, False, False, True]
  found = [verdict['correct'] for verdict in judged(package, results, 'live_relevance')]
  assert found == [False, True, True, False]


def test_turns_are_acted_out_by_the_apis_alone(package, tmp_path):
  made = tmp_path / 'made'
  attack = f"[open(file={str(made)!r}, mode='w')]"
  key = f"x': open({str(made)!r}, 'w'), 'y"
  hidden = '[echo(content={' + json.dumps(key) + ': 1})]'
  files = {'root': {'home': {'type': 'directory', 'contents': {}}}}
  question = {
    'id': 'multi_turn_base_0',
    'involved_classes': ['GorillaFileSystem'],
    'initial_config': {'GorillaFileSystem': files},
    'question': [[{'role': 'user', 'content': 'make a folder'}]],
  }
  results = [
    [["[mkdir(dir_name='a')]", 'Done.']],
    [['[mkdir(dir_name="b")]']],
    [["[mkdir(dir_name='a')]", attack, hidden]],
    [[[{'mkdir': '{"dir_name": "a"}'}]]],
    [["[mkdir(dir_name='a')]"], []],
    [['nothing']],
    'gave up',
  ]
  items = [
    bfcl_score.Item({'id': question['id'], 'result': result}, question, [["mkdir(dir_name='a')"]])
    for result in results
  ]
  verdicts = bfcl_score.judge(items, 'multi_turn_base', package)
  correct = [verdict['correct'] for verdict in verdicts]
  assert correct == [True, False, True, True, False, False, False]
  assert len(verdicts[2]['refused']) == 2
  assert not made.exists()


def run_program(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.bfcl_score', *map(str, arguments)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )


def test_the_program_tells_what_is_left_out_by_its_status(package, tmp_path):
  results = tmp_path / 'results'
  results.mkdir()
  (results / 'BFCL_v3_live_relevance_result.json').write_text(
    json.dumps(answer('live_relevance_0-0-0', '[f(a="\ud800")]')) + '\n{"id": "live_rel'
  )
  done = run_program(f'--results={results}', f'--out={tmp_path}/out')
  assert done.returncode == 1
  assert json.loads(done.stdout) == {
    'live_relevance': {'correct': 0, 'total': 1, 'accuracy': 0.0, 'published': None}
  }
  assert '18 left out' in done.stderr
  record = json.loads((tmp_path / 'out/trajectories.jsonl').read_text())
  assert record['messages'][-1]['content'] == '<think>\nhm\n</think>\n\n[f(a="\ud800")]'
  done = run_program(f'--results={tmp_path}/none', f'--out={tmp_path}/out')
  assert (done.returncode, done.stderr.count('\n')) == (1, 1)


@pytest.mark.parametrize('category', ['simple', 'parallel', 'live_parallel'])
def test_the_published_counts_come_out(package, tmp_path, category):
  folder = PUBLISHED / 'result/D-CORE-14B'
  if not folder.is_dir():
    pytest.skip(f'no published results in {folder}')
  (tmp_path / 'results').mkdir()
  name = f'BFCL_v3_{category}_result.json'
  (tmp_path / 'results' / name).write_bytes((folder / name).read_bytes())
  scores = PUBLISHED / 'score/D-CORE-14B'
  found = bfcl_score.score(tmp_path / 'results', scores, tmp_path / 'out')
  counts = found['categories'][category]
  published = counts['published']
  assert (counts['correct'], counts['total']) == (published['correct'], published['total'])
  assert counts['differs'] == {'right': [], 'wrong': []}
  assert not counts['left_out'] and not counts['refused']


@pytest.mark.slow  # half a minute on a busy machine: 3,641 items
def test_the_counts_of_all_single_turn_categories_are_those_of_the_official_program(
  package, tmp_path
):
  folder = PUBLISHED / 'result/Qwen3-8B'
  if not folder.is_dir():
    pytest.skip(f'no published results in {folder}')
  found = bfcl_score.score(folder, None, tmp_path)['categories']
  wanted = {
    'simple': 382,
    'multiple': 192,
    'parallel': 187,
    'parallel_multiple': 178,
    'java': 65,
    'javascript': 36,
    'irrelevance': 206,
    'live_simple': 220,
    'live_multiple': 832,
    'live_parallel': 13,
    'live_parallel_multiple': 18,
    'live_irrelevance': 705,
    'live_relevance': 14,
  }
  for category in ('java', 'javascript'):
    # An installation without the parsers of these languages leaves them out.
    if not found[category]['total']:
      del wanted[category]
  assert {category: found[category]['correct'] for category in wanted} == wanted
  assert not any(found[category]['left_out'] for category in wanted)
