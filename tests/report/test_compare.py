"""Comparisons of two folders: what is paired, the figures, and a page on which text stays text."""

import csv
import json
import pathlib
import subprocess
import sys

import pytest

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


def test_an_id_that_occurs_twice_is_two_tasks_of_one_unit(tmp_path):
  a = write(tmp_path / 'a', [record(0, True), record(0, False), record(1, True)])
  b = write(tmp_path / 'b', [record(0, False), record(0, False)])
  (shown,) = compare(a, b, tmp_path / 'out')['comparisons']
  assert (shown['common'], shown['only_a'], shown['lost']) == (2, 1, ['single-0'])
  assert shown['kinds']['single']['accuracy']['difference']['n'] == 1


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
    (None, 'no trajectories.jsonl in .*/b or in a folder evaluate_'),
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
