"""Comparisons of two folders: what is paired, the figures, and a page on which text stays text."""

import csv
import json
import pathlib
import statistics
import subprocess
import sys

import pytest

from dcore_jax.report import compare as compare_lib
from dcore_jax.report.compare import compare
from tests.report.test_report import Page

ROOT = pathlib.Path(__file__).parents[2]
ATTACK = '</div><script>alert(1)</script>'


def record(place, correct, kind='single', **more):
  messages = [
    {'role': 'user', 'content': f'request {place}'},
    {'role': 'assistant', 'content': '<think>\nwait, but how\n</think>\n\n[f()]'},
  ]
  return {
    'id': f'{kind}-{place}',
    'kind': kind,
    'query': f'request {place}',
    'correct': correct,
    'messages': messages,
  } | more


def write(folder, records):
  folder.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(item) + '\n' for item in records)
  (folder / 'trajectories.jsonl').write_text(text)
  return folder


def test_common_tasks_are_paired_and_the_rest_is_counted(tmp_path):
  a = write(tmp_path / 'a', [record(place, place < 6) for place in range(10)])
  # In another order, one task fewer and two that A lacks. The last has an id of A, and is another
  # task.
  others = [record(place, place < 3 or place == 7) for place in reversed(range(1, 9))]
  others += [record(20, True), record(9, True) | {'query': 'another request'}]
  b = write(tmp_path / 'b', others)
  notes = []
  found = compare(a, b, tmp_path / 'out', note=notes.append)
  (shown,) = found['comparisons']
  assert (shown['common'], shown['only_a'], shown['only_b']) == (8, 2, 2)
  assert (shown['gained'], shown['lost']) == (['single-7'], ['single-3', 'single-4', 'single-5'])
  assert [note.split(' are in ')[0] for note in notes] == ['2 tasks', '2 tasks']
  accuracy = shown['kinds']['single']['accuracy']
  assert (accuracy['a']['mean'], accuracy['b']['mean']) == (5 / 8, 3 / 8)
  assert accuracy['difference']['difference'] == -0.25
  low, high = accuracy['difference']['interval']
  assert -1 < low < -0.25 < high < 1
  assert accuracy['p_value'] == pytest.approx(10 / 16)  # at most 1, or at least 3, of 4
  assert list(shown['kinds']) == ['single']
  rows = list(csv.DictReader((tmp_path / 'out/compare.csv').open()))
  assert len(rows) == 8
  assert [row['id'] for row in rows if row['flip'] == 'gained'] == ['single-7']
  assert (rows[0]['correct_a'], rows[0]['reflections_a'], rows[0]['lazy_a']) == ('1', '2.0', '')
  assert json.loads((tmp_path / 'out/compare.json').read_text()) == found


def test_kinds_have_their_own_rows_and_means_their_intervals(tmp_path):
  more = [{'lazy': place % 2 == 0, 'reasoning_tokens': [place, 3 * place]} for place in range(12)]
  fewer = [{'lazy': False, 'reasoning_tokens': [place]} for place in range(12)]
  kinds = ['single', 'parallel']
  a = [record(place, True, kinds[place % 2], **more[place]) for place in range(12)]
  b = [record(place, True, kinds[place % 2], **fewer[place]) for place in range(12)]
  found = compare(write(tmp_path / 'a', a), write(tmp_path / 'b', b), tmp_path / 'out')
  (shown,) = found['comparisons']
  assert {kind: figures['n'] for kind, figures in shown['kinds'].items()} == {
    'single': 6,
    'parallel': 6,
    'all': 12,
  }
  overall = shown['kinds']['all']
  assert (overall['lazy']['gained'], overall['lazy']['lost']) == (0, 6)
  tokens = overall['reasoning_tokens']
  assert (tokens['a'], tokens['b']) == (22.0, 5.5)
  low, high = tokens['difference']['interval']
  assert low < tokens['difference']['difference'] == -16.5 < high < 0
  assert overall['reflections']['difference']['difference'] == 0
  assert compare(tmp_path / 'a', tmp_path / 'b', tmp_path / 'again') == found


def test_intervals_that_take_their_time_show_how_far_they_are(tmp_path, monkeypatch, capsys):
  # As if every figure were slow.
  monkeypatch.setattr(compare_lib, 'SLOW', 1e-9)
  records = [record(place, place % 2 == 0, kind) for place in range(4) for kind in 'ab']
  a = write(tmp_path / 'a', records)
  compare(a, a, tmp_path / 'out')
  # Four measures of two kinds and of both together, whether the records have them or not.
  assert 'compare: 100%' in (told := capsys.readouterr().err) and '12/12' in told


def test_an_id_that_occurs_twice_is_two_tasks_of_one_unit(tmp_path):
  a = write(tmp_path / 'a', [record(0, True), record(0, False), record(1, True)])
  b = write(tmp_path / 'b', [record(0, False), record(0, False)])
  (shown,) = compare(a, b, tmp_path / 'out')['comparisons']
  assert (shown['common'], shown['only_a'], shown['lost']) == (2, 1, ['single-0'])
  assert shown['kinds']['single']['accuracy']['difference']['n'] == 1


def test_a_task_with_several_trials_is_one_unit(tmp_path):
  """Four trials that all went alike are no four tasks: figures are those of the means."""

  def trials(side, *shares):
    records = []
    for task, right in enumerate(shares):
      for trial in range(4):
        more = {'task': str(task), 'query': f'{side} asks in words of its own'}
        records.append(record(f'{task}-{trial}', trial < right, 'retail', **more))
    return write(tmp_path / side, records)

  found = compare(trials('a', 4, 4, 2, 0), trials('b', 4, 0, 3, 0), tmp_path / 'out')
  (shown,) = found['comparisons']
  assert (shown['common'], shown['only_a'], shown['only_b']) == (16, 0, 0)
  figures = shown['kinds']['retail']
  accuracy = figures['accuracy']
  assert figures['n'] == accuracy['a']['n'] == accuracy['difference']['n'] == 4
  assert (accuracy['a']['mean'], accuracy['b']['mean']) == (0.625, 0.4375)
  # One task each way, and not one trial against four.
  assert (accuracy['gained'], accuracy['lost'], accuracy['p_value']) == (1, 1, 1.0)
  differences = [0, -1, 0.25, 0]
  error = statistics.stdev(differences) / 2
  assert accuracy['difference']['difference'] == statistics.mean(differences)
  assert accuracy['difference']['standard_error'] == pytest.approx(error)
  assert shown['lost'] == [f'retail-1-{trial}' for trial in range(4)]
  # A trial that one side lacks is not compared, and its task is still one unit.
  one = write(tmp_path / 'one', [record('1-0', True, 'retail', task='1')])
  (shown,) = compare(tmp_path / 'a', one, tmp_path / 'out')['comparisons']
  assert (shown['common'], shown['only_a'], shown['kinds']['retail']['n']) == (1, 15, 1)


def test_models_of_work_directories_belong_together_by_name(tmp_path):
  for run, models in (('a', ('base', 'sft', 'grpo')), ('b', ('sft', 'da_grpo', 'base'))):
    for model in models:
      write(tmp_path / run / f'evaluate_{model}', [record(0, run == 'b')])
  summary = {'run': {'config': 'nano', 'seed': 3}}
  (tmp_path / 'a/summary.json').write_text(json.dumps(summary))
  found = compare(tmp_path / 'a', tmp_path / 'b', tmp_path / 'out')
  models = [shown['models'] for shown in found['comparisons']]
  assert models == [['base', 'base'], ['sft', 'sft'], ['grpo', 'da_grpo']]
  assert found['a']['run'] == summary['run']
  assert 'grpo → da_grpo' in Page((tmp_path / 'out/compare.html').read_text()).text
  # Two stages of one run.
  inside = compare(tmp_path / 'a/evaluate_base', tmp_path / 'a/evaluate_sft', tmp_path / 'out')
  assert inside['comparisons'][0]['common'] == 1
  with pytest.raises(ValueError, match='name one, such as .*/a/evaluate_base'):
    compare(tmp_path / 'a', tmp_path / 'b/evaluate_base', tmp_path / 'out')
  notes = []
  write(tmp_path / 'b/evaluate_rloo', [record(0, True)])
  compare(tmp_path / 'a', tmp_path / 'b', tmp_path / 'out', note=notes.append)
  assert [note.split(' is in ')[0] for note in notes] == [
    'the model grpo',
    'the model da_grpo',
    'the model rloo',
  ]


def test_suites_belong_together_by_name(tmp_path):
  for run, suites in (('a', ('bfcl', 'gsm8k', 'tau2')), ('b', ('gsm8k', 'bfcl', 'acebench'))):
    for suite in suites:
      write(tmp_path / run / suite, [record(0, run == 'b', suite)])
  notes = []
  a, b = tmp_path / 'a', tmp_path / 'b'
  # One of each is left, and they have nothing in common.
  found = compare(a, b, tmp_path / 'out', note=notes.append)
  assert [shown['models'] for shown in found['comparisons']] == [['bfcl'] * 2, ['gsm8k'] * 2]
  assert [note.split(' in ')[1].split(' alone')[0] for note in notes] == [
    str(a / 'tau2'),
    str(b / 'acebench'),
  ]


def test_rewards_are_compared_by_task(tmp_path):
  """Prompts that RL sets aside have several answers, and tasks several prompts."""
  a = [record(place, False, task=f't{place // 2}', reward=-3.0, format=0.0) for place in range(8)]
  b = [{**item, 'reward': -3.0 + 2 * (place % 2), 'format': 1.0} for place, item in enumerate(a)]
  folders = (write(tmp_path / 'a', a), write(tmp_path / 'b', b))
  figures = compare(*folders, tmp_path / 'out')['comparisons'][0]['kinds']['single']
  assert (figures['reward']['a'], figures['reward']['b']) == (-3, -2)
  assert (figures['reward']['difference']['difference'], figures['n']) == (1, 4)
  assert figures['format']['difference']['difference'] == 1


def test_items_without_a_score_are_told(tmp_path):
  a = write(tmp_path / 'a', [record(0, True)])
  counts = {'left_out': [{'id': 'simple_1', 'line': 2, 'reason': 'cut off'}]}
  scores = {'checker': 'bfcl-eval 1', 'categories': {'simple': counts, 'java': {'left_out': []}}}
  (a / 'bfcl_scores.json').write_text(json.dumps(scores))
  found = compare(a, write(tmp_path / 'b', [record(0, True)]), tmp_path / 'out')
  assert found['notes'] == [f'1 items of simple in {a} were not scored']
  assert found['a']['run'] == {'checker': 'bfcl-eval 1'}


def test_text_of_models_stays_text(tmp_path):
  messages = [{'role': ATTACK, 'content': f'<think>{ATTACK} wait \ud800</think>{ATTACK}'}]
  item = record(0, True, messages=messages, query=ATTACK, reason=ATTACK, id=ATTACK + '\ud800')
  a = write(tmp_path / 'a', [item])
  b = write(tmp_path / 'b', [item | {'correct': False}])
  compare(a, b, tmp_path / 'out')
  text = (tmp_path / 'out/compare.html').read_text()
  page = Page(text)
  assert 'script' not in page.tags and not page.references
  assert page.text.count('alert(1)') >= 8
  assert 'right → wrong' in page.text
  assert "default-src 'none'" in text
  assert page.tags.count('details') == 1


@pytest.mark.parametrize(
  'records, said',
  [
    ([record(5, True)], 'no task in common'),
    ([], 'no task in common'),
    ([record(0, 'yes')], r"b/trajectories.jsonl, record 1: correct = 'yes' is no bool"),
    ([record(0, True), [1]], 'record 2: expected an object, got list'),
    ([record(0, True, messages=['text'])], 'record 1: messages are no list of objects'),
    (None, 'no trajectories.jsonl in .*/b or in a folder of it'),
  ],
)
def test_what_cannot_be_compared_is_one_error(tmp_path, records, said):
  a = write(tmp_path / 'a', [record(0, True)])
  if records is None:
    (tmp_path / 'b').mkdir()
  else:
    write(tmp_path / 'b', records)
  with pytest.raises(ValueError, match=said):
    compare(a, tmp_path / 'b', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_the_program(tmp_path):
  write(tmp_path / 'a', [record(place, False) for place in range(4)])
  write(tmp_path / 'b', [record(place, place < 3) for place in range(4)])
  command = [sys.executable, '-m', 'experiments.compare', str(tmp_path / 'a')]
  out = f'--out={tmp_path}/out'
  done = subprocess.run(
    [*command, str(tmp_path / 'b'), out], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert done.stdout.startswith('single: +75.0 [')
  assert '3 gained, 0 lost, p = 0.250' in done.stdout
  done = subprocess.run([*command, out], capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 1
  assert 'expected A B and flags' in done.stderr + done.stdout
