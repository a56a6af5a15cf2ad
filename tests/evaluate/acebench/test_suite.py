"""The suite of ACEBench: asked over HTTP, judged here and by a program in the place of its own."""

import collections
import json
import os
import pathlib
import sys

import pytest

from dcore_jax.evaluate.acebench import suite as acebench
from dcore_jax.evaluate.acebench import tasks as acebench_tasks
from dcore_jax.evaluate.suites import Served, SuiteSettings, accuracy, make_suite, write_result
from dcore_jax.files import read_json_lines
from tests.evaluate.scripted_server import scripted_server

DATA = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data'))
PHRASES = {
  'special_incomplete': ('f', ['a'], '["Missing necessary parameters (a) for the api (f)."]'),
  'special_error_param': ('a', ['b'], '["There is incorrect value (b) for the parameters (a)."]'),
}

# Reads and writes what ACEBench's program does, and takes a result for right if it says 'right'.
PROGRAM = """
import json, os, pathlib, sys
if '--help' in sys.argv:
  sys.exit()
assert sys.argv[1:6] == ['--language', 'en', '--model', 'model', '--category']
def rows(path):
  return [json.loads(line) for line in open(path, encoding='utf-8')]
for category in sys.argv[6:]:
  data = pathlib.Path('data_all/data_en')
  tasks = rows(data / f'data_{category}.json')
  references = rows(data / 'possible_answer' / f'data_{category}.json')
  results = rows(f'result_all/result_en/model/data_{category}_result.json')
  assert [row['id'] for row in tasks] == [row['id'] for row in references]
  assert [row['id'] for row in tasks] == [row['id'] for row in results]
  wrong, units = [], {}
  for place, row in enumerate(results):
    right = 'right' in str(row['result'])
    unit = row['id'].rsplit('_', 1)[0] if 'normal_multi_turn' in category else row['id']
    units[unit] = units.get(unit, True) and right
    if not right:
      wrong.append({'id': place if 'agent' in category else row['id'], 'valid': False})
  name = 'end_to_end_accuracy' if 'agent' in category else 'accuracy'
  head = {name: round(sum(units.values()) / len(units), 3)}
  with open(f'score_all/score_en/model/data_{category}_score.json', 'w') as file:
    file.write('\\n'.join(json.dumps(row) for row in [head, *wrong]))
sys.exit('an error behind the last score')
"""
PROMPTS = '''
SYSTEM_PROMPT_FOR_NORMAL_DATA_EN = """its own: {time} {function}"""
SYSTEM_PROMPT_FOR_PREFERENCE_DATA_EN = """its own: {profile} {function}"""
SYSTEM_PROMPT_FOR_SPECIAL_DATA_EN = """its own: {time} {function}"""
USER_PROMPT_EN = """asked: {question}"""
raise SystemExit('nobody runs this')
'''


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


@pytest.fixture
def data(tmp_path):
  """A folder of ACEBench's layout: two made-up tasks a category, of two turns in a dialogue."""
  folder = tmp_path / 'data' / 'acebench'
  properties = {'a': {'type': 'string', 'description': 'what'}}
  parameters = {'type': 'object', 'properties': properties, 'required': ['a']}
  function = {'name': 'f', 'description': 'does it', 'parameters': parameters}
  for category in (*acebench_tasks.ASKED, *acebench_tasks.AGENT):
    places = ['0_0', '0_1', '1_0'] if category in acebench_tasks.MULTI_TURN else ['0', '1']
    records = []
    references = []
    for place in places:
      name = f'{category}_{place}'
      record = {'id': name, 'question': f'user: {name}, right?\n', 'function': [function]}
      other = {'profile': 'likes x'} if 'preference' in category else {'time': 'It is noon.'}
      records.append(record | other)
      truth = {'f': {'a': 'right'}}
      if category in PHRASES:
        key, wanted, _ = PHRASES[category]
        truth = {key: wanted}
      references.append({'id': name, 'ground_truth': truth})
    root = folder / 'data_all' / 'data_en'
    write_lines(root / f'data_{category}.json', records)
    write_lines(root / 'possible_answer' / f'data_{category}.json', references)
  return folder.parent


@pytest.fixture
def checkout(data):
  folder = data / 'acebench'
  (folder / 'eval_main.py').write_text(PROGRAM, encoding='utf-8')
  (folder / 'model_inference').mkdir()
  (folder / 'model_inference' / 'prompt_en.py').write_text(PROMPTS, encoding='utf-8')
  return folder


def run(suite, folder, answer):
  """Does all steps -> (result, {(category, metric): mean}, trajectories, what was told)."""
  told = []
  suite.prepare()
  with scripted_server(answer) as url:
    suite.answer(Served(url, 'scripted'), folder, lambda done, total: told.append((done, total)))
  result, trajectories = suite.score(folder)
  figures = {(score.category, score.metric): score.estimate['mean'] for score in result.scores}
  write_result(folder, result, trajectories)
  return result, figures, trajectories, told


def test_references_get_all_and_nothing_gets_nothing(data, tmp_path):
  suite = make_suite('acebench', SuiteSettings(data=data), {})
  asked = []

  def answer(body):
    asked.append(body['messages'])
    return '<think>\nhm\n</think>\n\n[f(a="right")]'

  result, figures, trajectories, told = run(suite, tmp_path / 'right', answer)
  categories = [score.category for score in result.scores]
  assert categories == [*acebench_tasks.SINGLE_TURN, 'overall']
  assert list(figures.values()) == pytest.approx([1.0] * len(figures))
  assert ('overall', 'accuracy of 10 of 17 categories') in figures
  assert result.scores[-1].estimate['n'] == 20 and result.scores[-1].floor == 0.0
  assert 0.7 < result.scores[-1].estimate['interval'][0] < 1.0
  assert told[-1] == (32, 32) and len(asked) == 32
  # Dialogues and special tasks were asked and have no verdict.
  assert len(trajectories) == 20 and len(result.left_out) == 12
  assert trajectories[0]['messages'][-1]['content'].startswith('<think>')
  [special] = [m for m in asked if m[1]['content'].startswith('Conv') and 'incomplete_0' in str(m)]
  assert 'Missing necessary parameters' in special[0]['content'] and 'noon' in special[0]['content']
  [profile] = [m for m in asked if 'preference_0' in str(m)]
  assert 'likes x' in profile[0]['content'] and 'Missing' not in profile[0]['content']
  suite = make_suite('acebench', SuiteSettings(data=data, limit=1), {})
  _, figures, _, _ = run(suite, tmp_path / 'wrong', lambda body: '')
  assert set(figures.values()) == {0.0}


def test_an_interrupted_evaluation_goes_on(data, tmp_path):
  suite = make_suite('acebench', SuiteSettings(data=data, concurrency=1, limit=1), {})
  folder = tmp_path / 'out'

  def broken(done, total):
    if done == 5:
      raise KeyboardInterrupt

  with scripted_server(lambda body: '[f(a="right")]') as url:
    with pytest.raises(KeyboardInterrupt):
      suite.answer(Served(url, 'scripted'), folder, broken)
  with pytest.raises(ValueError, match='no answers'):
    suite.score(folder)
  asked = []
  _, figures, _, told = run(suite, folder, lambda body: asked.append(1) or '[f(a="right")]')
  # One task of each category, and one dialogue of two turns in two of them.
  assert told[-1] == (17, 17) and len(asked) == 12
  assert list(figures.values()) == pytest.approx([1.0] * len(figures))


def test_a_checkout_judges_the_rest(data, checkout, tmp_path):
  agent = tmp_path / 'agent'
  for category in acebench_tasks.AGENT:
    rows = []
    for place in range(2):
      result = [{'Api': 'right' if place else 'not'}]
      rows.append({'id': f'{category}_{place}', 'result': result, 'process': ['[f()]']})
    write_lines(agent / f'data_{category}_result.json', rows)
  options = {'acebench': str(checkout), 'agent': str(agent)}
  suite = make_suite('acebench', SuiteSettings(data=tmp_path / 'nowhere'), options)
  asked = []

  def answer(body):
    asked.append(body['messages'])
    text = body['messages'][1]['content']
    # A second turn of a dialogue is wrong, and a prediction that only Python could compute.
    return '[f(a=right*2)]' if '_0_1' in text or 'bool_1' in text else '[f(a="right")]'

  result, figures, trajectories, _ = run(suite, tmp_path / 'out', answer)
  assert all(messages[0]['content'].startswith('its own: ') for messages in asked)
  assert figures['normal_multi_turn_user_adjust', 'accuracy'] == 0.5
  assert figures['normal_atom_bool', 'accuracy'] == 0.5
  assert figures['special', 'accuracy'] == 1.0 and figures['agent', 'accuracy'] == 0.5
  assert figures['normal', 'accuracy'] == pytest.approx(1 - 1.5 / 12)
  wanted = 0.578 * (1 - 1.5 / 12) + 0.2676 + 0.1545 * 0.5
  assert figures['overall', 'accuracy'] == pytest.approx(wanted)
  assert not result.left_out and not result.notes
  assert collections.Counter(row['correct'] for row in trajectories) == {True: 31, False: 5}
  layout = tmp_path / 'out' / 'acebench' / 'result_all' / 'result_en' / 'model'
  handed = read_json_lines(layout / 'data_normal_atom_bool_result.json')
  assert [row['result'] for row in handed] == ['[f(a="right")]', '']
  # Nothing was written into the checkout.
  assert not (checkout / 'score_all').exists() and not list(checkout.rglob('__pycache__'))


def test_another_verdict_of_the_checkout_is_told(checkout, tmp_path):
  suite = make_suite('acebench', SuiteSettings(limit=1), {'acebench': str(checkout)})
  # Right for the program in the place of ACEBench's, and a wrong number of calls for us.
  result, figures, _, _ = run(suite, tmp_path / 'out', lambda body: '[f(a="right"), g()]')
  assert figures['normal_atom_bool', 'accuracy'] == 0.0
  assert 'normal_atom_bool is 0.000 here and 1.000 by ACEBench.' in result.notes
  assert ('overall', 'accuracy of 15 of 17 categories') in figures


def test_overall_is_the_papers():
  """Table 2, Qwen3-8B and D-CORE-14B: normal, special, agent, overall in per cent."""
  for row in ((71.4, 75.3, 29.1, 65.9), (77.1, 88.7, 55.8, 76.9)):
    parts = []
    for (group, weight), share in zip(acebench.WEIGHTS.items(), row, strict=False):
      verdicts = [place < 10 * share for place in range(1000)]
      parts.append((weight, accuracy(group, verdicts)))
    assert 100 * acebench.combine('overall', 'accuracy', parts).estimate['mean'] == pytest.approx(
      row[-1], abs=0.06
    )


def test_what_is_missing_is_named(data, tmp_path):
  settings = SuiteSettings(data=tmp_path)
  with pytest.raises(ValueError, match='is missing; it is a file of github.com/ACEBench'):
    make_suite('acebench', settings, {}).prepare()
  with pytest.raises(ValueError, match='needs acebench=DIR'):
    make_suite('acebench', settings, {'agent': 'x'})
  there = {'acebench': str(data / 'acebench')}
  with pytest.raises(ValueError, match='has no prompts'):
    make_suite('acebench', settings, there).prepare()
  prompts = data / 'acebench' / 'model_inference' / 'prompt_en.py'
  prompts.parent.mkdir()
  prompts.write_text(PROMPTS, encoding='utf-8')
  with pytest.raises(ValueError, match='no eval_main.py'):
    make_suite('acebench', settings, there).prepare()
  (data / 'acebench' / 'eval_main.py').write_text('import not_there\n', encoding='utf-8')
  with pytest.raises(ValueError, match="No module named 'not_there'; name a Python"):
    make_suite('acebench', settings, there | {'python': sys.executable}).prepare()
  with pytest.raises(ValueError, match='data_agent_multi_step_result.json'):
    make_suite('acebench', settings, there | {'agent': str(tmp_path)}).prepare()


def test_references_get_what_the_official_checker_gives_them(tmp_path):
  """Kind 'truth' of golden_normal.jsonl, of which 487 of 600 are right."""
  golden = DATA / 'acebench' / 'golden_normal.jsonl'
  if not golden.exists():
    pytest.skip(f'{golden} is not there')
  settings = SuiteSettings(data=DATA, limit=3)
  suite = make_suite('acebench', settings, {})
  truths = {row['id']: row for row in read_json_lines(golden) if row['kind'] == 'truth'}
  texts = {}
  wanted = collections.defaultdict(list)
  for category in acebench_tasks.ASKED:
    for task in acebench_tasks.read_tasks(DATA / 'acebench', category, settings.limit):
      if row := truths.get(task.id):
        system, user = acebench_tasks.write_messages(task, suite._prompts(), own=True)
        texts[system.content, user.content] = row['text']
        wanted[category].append(row['valid'])

  def answer(body):
    return texts.get(tuple(message['content'] for message in body['messages']), '')

  _, figures, _, _ = run(suite, tmp_path, answer)
  assert len(wanted) == 10
  for category, verdicts in wanted.items():
    assert figures[category, 'accuracy'] == sum(verdicts) / len(verdicts)
  assert 0 < figures['normal_atom_object_deep', 'accuracy'] < 1
