"""Analyses of results: lazy ratios by rule, distributions, files; of our records and of BFCL's."""

import csv
import json
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from dcore_jax.evaluate.behaviour.lazy_reasoning import RULES, count_reflections
from dcore_jax.evaluate.behaviour.reasonings import Reasoning, find_lazy, read_acted, read_bfcl
from dcore_jax.report.analysis import analyse, draw_analysis, format_lazy

ROOT = pathlib.Path(__file__).parents[2]


def test_whole_words_are_not_parts_of_others():
  text = 'Wait: an attribute, But distributed; waiting. However'
  assert count_reflections(text) == 6
  assert count_reflections(text, whole_words=True) == 3
  assert not RULES['released_words'].of('attribute ' * 5, 999, True)
  assert RULES['released'].of('attribute ' * 5, 999, True)


@pytest.mark.parametrize(
  'count, tokens, lazy',
  [
    (3, 201, {'released'}),
    (4, 301, {'released', 'paper'}),
    (4, 300, {'released'}),
    (2, 999, set()),
  ],
)
def test_rules(count, tokens, lazy):
  text = 'wait ' * count
  found = {name for name in ('released', 'paper') if RULES[name].of(text, tokens, True)}
  assert found == lazy
  assert not any(rule.of(text, tokens, False) for rule in RULES.values())


def some():
  return [
    Reasoning('single', 'a', 0, 'Therefore wait. but. however', 250, True),
    Reasoning('single', 'b', 0, 'So it is. I call f.', 10, False),
    Reasoning('parallel', 'a', 0, 'the request is: q\ni split it into subtasks:\n1. x', 400, True),
    Reasoning('parallel', 'a', 1, '', 0, True),
  ]


def test_figures_of_a_result(tmp_path):
  found = analyse(some(), tmp_path)
  assert found['n'] == {'reasonings': 4, 'tasks': 3, 'right': 1, 'wrong': 3}
  released = found['lazy']['released']
  assert (released['all']['lazy'], released['all']['ratio']) == (1, 0.25)
  assert released['all']['estimate']['n'] == 3
  assert released['kinds']['parallel']['lazy'] == found['lazy']['paper']['all']['lazy'] == 0
  # Half of the categories behind the published ratio.
  assert released['groups'] == {}
  assert found['lengths']['right'] | {'quantiles': 0} == {
    'n': 1,
    'mean': 10.0,
    'quantiles': 0,
    'counts': [1] + [0] * 24,
  }
  assert sum(found['lengths']['wrong']['counts']) == 3
  assert found['reflections']['wrong']['counts'][3] == 1
  assert found['thoughts']['right']['deduction'] == {'count': 1, 'share': 0.5}
  assert found['anatomy']['parallel']['forms']['sequential'] == 1
  assert found['anatomy']['all']['n'] == 4
  assert json.loads((tmp_path / 'analysis.json').read_text()) == found
  rows = list(csv.DictReader((tmp_path / 'analysis.csv').open()))
  assert [row['lazy_released'] for row in rows] == ['1', '0', '0', '0']
  assert (rows[2]['form'], rows[2]['subtasks'], rows[2]['right']) == ('sequential', '1', '0')
  drawn = (tmp_path / 'analysis.svg').read_text()
  assert xml.etree.ElementTree.fromstring(drawn).tag.endswith('svg')
  analyse(some(), tmp_path / 'again')
  assert (tmp_path / 'again/analysis.svg').read_text() == drawn
  with pytest.raises(ValueError, match='no reasonings'):
    analyse([], tmp_path)


def test_a_side_without_answers_has_no_mean(tmp_path):
  found = analyse([one for one in some() if one.wrong], tmp_path)
  assert found['lengths']['right']['mean'] is None
  assert found['thoughts']['right']['other'] == {'count': 0, 'share': None}
  assert found['behaviours']['right'] is None or not any(found['behaviours']['right'].values())


def acted(**more):
  messages = [
    {'role': 'user', 'content': 'go'},
    {'role': 'assistant', 'content': '<think>\nwait\n</think>\n\n[f()]'},
    {'role': 'tool', 'content': '1'},
    {'role': 'assistant', 'content': '<think>\ncut off'},
  ]
  return {'id': 'a', 'kind': 'single', 'correct': False, 'messages': messages} | more


def test_records_give_thoughts_and_lengths(tmp_path):
  path = tmp_path / 'trajectories.jsonl'
  path.write_text(json.dumps(acted(reasoning_tokens=[7, 8])) + '\n')
  first, second = read_acted(tmp_path)
  assert (first.text, first.tokens, first.step, first.wrong) == ('wait', 7, 0, True)
  assert (second.text, second.tokens, second.unit) == ('cut off', 8, 'single a')
  path.write_text(json.dumps(acted()) + '\n')
  with pytest.raises(ValueError, match='2 reasonings have no reasoning_tokens; a tokenizer'):
    read_acted(path)
  assert [one.tokens for one in read_acted(path, lambda texts: list(map(len, texts)))] == [4, 7]
  for name in ('base', 'sft'):
    (tmp_path / f'W/evaluate_{name}').mkdir(parents=True)
    (tmp_path / f'W/evaluate_{name}/trajectories.jsonl').write_text('')
  with pytest.raises(ValueError, match='W holds the models base, sft'):
    read_acted(tmp_path / 'W')


@pytest.mark.parametrize(
  'model, group, released, paper',
  [
    ('Qwen3-8B', 'parallel', (8, 216), 8),
    ('Qwen3-8B', 'irrelevance', (102, 1122), 84),
    ('D-CORE-14B', 'parallel', (11, 216), 8),
  ],
)
@pytest.mark.slow
def test_published_ratios(data_dir, tmp_path, model, group, released, paper):
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(data_dir / 'qwen3-tokenizer')

  def count_tokens(texts):
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)['input_ids']]

  folder = data_dir / 'dcore_published'
  found = read_bfcl(folder / 'result' / model, folder / 'score' / model, count_tokens)
  figures = analyse(found, tmp_path)
  ratio = figures['lazy']['released']['groups'][group]
  assert (ratio['lazy'], ratio['total']) == released
  assert figures['lazy']['paper']['groups'][group]['lazy'] == paper
  assert figures['lazy']['released_words']['groups'][group]['lazy'] <= released[0]


def test_score_files_hold_failing_dialogues(data_dir):
  scores = data_dir / 'dcore_published/score/D-CORE-14B'
  found = read_bfcl(None, scores, lambda texts: [0] * len(texts))
  assert (len(found), len({one.unit for one in found})) == (432, 44)
  assert {one.kind for one in found} == {'multi_turn_base'} and all(one.wrong for one in found)
  notes = []
  results = data_dir / 'dcore_published/result/D-CORE-14B'
  found = read_bfcl(results, scores, lambda texts: [0] * len(texts), note=notes.append)
  assert len(found) == 616
  assert notes == ['multi_turn_base has no result file and is left out']


def test_the_program(tmp_path):
  (tmp_path / 'trajectories.jsonl').write_text(json.dumps(acted(reasoning_tokens=[7, 8])) + '\n')
  command = [sys.executable, '-m', 'experiments.analyze', 'reasonings', f'--results={tmp_path}']
  done = subprocess.run(
    [*command, f'--out={tmp_path}/out'], capture_output=True, text=True, cwd=ROOT, check=False
  )
  assert done.stdout.startswith('lazy, released: 0.0 %'), done.stderr
  assert (tmp_path / 'out/analysis.svg').exists()


def test_what_a_notebook_shows(tmp_path):
  found = analyse(some(), tmp_path)
  head, every, *kinds = format_lazy(found).split('\n')
  assert head.split()[2:] == list(RULES)
  assert [line.split()[0] for line in kinds] == ['single', 'parallel']
  ratios = found['lazy']['released']
  assert every.split()[:2] == ['all', f'{100 * ratios["all"]["ratio"]:.1f}']
  assert len(draw_analysis(found).axes) == 3
  assert len(find_lazy(some())) == ratios['all']['lazy'] == 1
  assert find_lazy(some(), 'paper') == []
