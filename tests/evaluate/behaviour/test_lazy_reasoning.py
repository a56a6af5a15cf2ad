"""Lazy reasoning: the rule, BFCL's files, and the published ratios from the published outputs."""

import json
import pathlib
import subprocess
import sys

import pytest

from dcore_jax.evaluate.behaviour import lazy_reasoning
from dcore_jax.evaluate.behaviour.lazy_reasoning import count_reflections, is_lazy, lazy_ratio
from experiments import analyze

ROOT = pathlib.Path(__file__).parents[3]


def test_reflections_are_substrings_in_any_case():
  assert count_reflections('Wait, BUT the attribute... However, alternatively') == 5
  assert count_reflections('perhaps because') == 0
  assert count_reflections('perhaps because, wait', lazy_reasoning.LOGGED_WORDS) == 3


@pytest.mark.parametrize(
  'reflections, n_tokens, wrong, lazy',
  [(3, 201, True, True), (3, 200, True, False), (2, 201, True, False), (3, 201, False, False)],
)
def test_lazy_edges(reflections, n_tokens, wrong, lazy):
  assert is_lazy('wait ' * reflections, n_tokens, wrong) == lazy


def test_ratio():
  reasonings = ['wait ' * 4, 'wait ' * 3, '', 'wait ' * 9]
  tokens = [301, 301, 999, 301]
  assert lazy_ratio(reasonings, tokens, [True, True, True, False]) == {
    'lazy': 2,
    'total': 4,
    'ratio': 0.5,
  }
  stricter = lazy_ratio(reasonings, tokens, [True] * 4, min_reflections=4, min_tokens=300)
  assert stricter == {'lazy': 2, 'total': 4, 'ratio': 0.5}
  assert lazy_ratio([], [], []) == {'lazy': 0, 'total': 0, 'ratio': 0.0}
  with pytest.raises(ValueError, match='1 token counts'):
    lazy_ratio(['a', 'b'], [1], [True, False])


def write(folder: pathlib.Path, category: str, kind: str, rows: list):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f'BFCL_v3_{category}_{kind}.json').write_text('\n'.join(map(json.dumps, rows)) + '\n')


def multi_turn_files(folder: pathlib.Path):
  for category in lazy_reasoning.GROUPS['multi_turn']:
    rows = [
      {'id': f'{category}_0', 'reasoning_content': [['wait ' * 3, 'no'], [], ['but ' * 4]]},
      {'id': f'{category}_1', 'reasoning_content': [['wait ' * 3]]},
    ]
    write(folder / 'result', category, 'result', rows)
    write(folder / 'score', category, 'score', [{'accuracy': 0.5}, {'id': f'{category}_0'}])


def group(folder: pathlib.Path, notes: list, **thresholds):
  return lazy_reasoning.group_ratio(
    folder / 'result',
    folder / 'score',
    lazy_reasoning.GROUPS['multi_turn'],
    lambda texts: [len(text.split()) for text in texts],
    note=notes.append,
    **thresholds,
  )


def test_an_empty_score_file_is_refused(tmp_path):
  (tmp_path / 'score.json').write_text('')
  with pytest.raises(ValueError, match='empty'):
    lazy_reasoning.read_failures(tmp_path / 'score.json')


def test_multi_turn_counts_steps(tmp_path):
  multi_turn_files(tmp_path)
  notes = []
  assert group(tmp_path, notes, min_tokens=2) == {'lazy': 6, 'total': 12, 'ratio': 0.5}
  assert group(tmp_path, notes, min_tokens=3) == {'lazy': 3, 'total': 12, 'ratio': 0.25}
  assert not notes
  (tmp_path / 'result' / 'BFCL_v3_multi_turn_miss_func_result.json').unlink()
  assert group(tmp_path, notes) is None
  assert notes == ['no file for multi_turn_miss_func result']


@pytest.mark.parametrize(
  'kind, line, reason',
  [
    ('result', '{"id": "a"', r'result\.json:3: not JSON'),
    ('result', '[]', r'result\.json:3: expected an object'),
    (
      'result',
      '{"id": "a", "answer": "x"}',
      r'result\.json:3: a result row needs id and result',
    ),
    (
      'result',
      '{"id": ["a"], "result": "x"}',
      r'result\.json:3: a result row needs id and result',
    ),
    (
      'result',
      '{"id": "a", "reasoning_content": [[1]]}',
      r'result\.json:3: reasoning_content is neither',
    ),
    ('score', '{"valid": false}', r'score\.json:3: a failing item needs an id'),
  ],
)
def test_bad_rows_are_named(tmp_path, kind, line, reason):
  multi_turn_files(tmp_path)
  path = tmp_path / kind / f'BFCL_v3_multi_turn_base_{kind}.json'
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(ValueError, match=reason):
    group(tmp_path, [])


def test_failed_and_missing_items_are_left_out_and_counted(tmp_path):
  multi_turn_files(tmp_path)
  whole = group(tmp_path, [])
  path = tmp_path / 'result' / 'BFCL_v3_multi_turn_base_result.json'
  lines = [
    {'id': 'a', 'result': 'Error during inference: timed out', 'traceback': '...'},
    {'id': 'b', 'result': 'Error during inference: timed out', 'reasoning_content': None},
    {'id': 'c', 'result': None},
  ]
  path.write_text('\ufeff' + path.read_text() + '\n'.join(map(json.dumps, lines)))
  score = tmp_path / 'score' / 'BFCL_v3_multi_turn_base_score.json'
  score.write_text(score.read_text() + '{"id": "a"}\n{"id": "missing"}\n')
  notes = []
  assert group(tmp_path, notes) == whole | {'left_out': 4}
  assert notes == ['multi_turn_base: 3 failed inferences and 1 missing items left out']


def test_answers_without_thoughts_count_as_those_with_empty_ones(tmp_path):
  multi_turn_files(tmp_path)
  whole = group(tmp_path, [])
  path = tmp_path / 'result' / 'BFCL_v3_multi_turn_base_result.json'
  before = path.read_text()
  lines = [
    {'id': 'a', 'result': [['f()', 'g()'], ['h()']]},
    {'id': 'b', 'result': 'yes', 'reasoning_content': None},
    {'id': 'c', 'result': [{'f': '{}'}]},
    {'id': 'd', 'result': [['f()'], ['g()']], 'reasoning_content': [['no', None], []]},
  ]
  path.write_text(before + '\n'.join(map(json.dumps, lines)))
  notes = []
  total = whole['total'] + 3 + 1 + 1 + 2
  assert group(tmp_path, notes) == {
    'lazy': whole['lazy'],
    'total': total,
    'ratio': whole['lazy'] / total,
  }
  assert notes == ['multi_turn_base: 3 answers without thoughts, which are not lazy']
  for path in (tmp_path / 'result').rglob('*.json'):
    path.write_text(json.dumps({'id': 'multi_turn_base_0', 'result': 'x'}) + '\n')
  for path in (tmp_path / 'score').rglob('*.json'):
    path.write_text('{"accuracy": 1}\n')
  assert group(tmp_path, notes) is None and 'no answer with thoughts' in notes[-1]


def test_files_of_which_nothing_is_left(tmp_path):
  multi_turn_files(tmp_path)
  for path in (tmp_path / 'result').rglob('*.json'):
    path.write_text('{"id": "a", "result": "Error during inference: x"}\n')
  for path in (tmp_path / 'score').rglob('*.json'):
    path.write_text('{"accuracy": 0}\n{"id": "a"}\n')
  notes = []
  assert group(tmp_path, notes) is None and 'no answer with thoughts in' in notes[-1]
  path.write_text('{"accuracy": 0}\n{"id": "stranger"}\n')
  with pytest.raises(ValueError, match="judges 1 items that .* lacks, such as 'stranger'"):
    group(tmp_path, [])


def test_headless_score_file_and_ambiguous_files(tmp_path):
  multi_turn_files(tmp_path)
  write(tmp_path / 'result' / 'again', 'multi_turn_base', 'result', [])
  with pytest.raises(ValueError, match='more than one result file of multi_turn_base'):
    group(tmp_path, [])
  write(tmp_path / 'score', 'multi_turn_base', 'score', [{'id': 'multi_turn_base_0'}])
  with pytest.raises(ValueError, match='begins with its accuracy'):
    lazy_reasoning.read_failures(tmp_path / 'score' / 'BFCL_v3_multi_turn_base_score.json')


def analyze_published(data_dir: pathlib.Path, model: str, capsys):
  published = data_dir / 'dcore_published'
  ratios = analyze.lazy(
    published / 'result' / model, published / 'score' / model, data_dir / 'qwen3-tokenizer'
  )
  return ratios, capsys.readouterr().err


def counts(ratio: dict) -> tuple[int, int]:
  assert ratio['ratio'] == ratio['lazy'] / ratio['total']
  return ratio['lazy'], ratio['total']


def test_published_qwen3_8b(data_dir, capsys):
  ratios, notes = analyze_published(data_dir, 'Qwen3-8B', capsys)
  assert counts(ratios['parallel']) == (8, 216)
  assert counts(ratios['irrelevance']) == (102, 1122)
  assert ratios['multi_turn'] is None and 'multi_turn: no file for multi_turn_base result' in notes


def test_published_d_core_14b(data_dir, capsys):
  ratios, notes = analyze_published(data_dir, 'D-CORE-14B', capsys)
  assert counts(ratios['parallel']) == (11, 216)
  assert ratios['irrelevance'] is None and ratios['multi_turn'] is None
  # Its multi_turn_base score file is there, its result file is not: present in part is absent.
  assert 'multi_turn: no file for multi_turn_base result, multi_turn_miss_func result' in notes


def test_thresholds_reach_the_rule(tmp_path, monkeypatch):
  multi_turn_files(tmp_path)

  def count_words(texts, add_special_tokens):
    assert not add_special_tokens
    return {'input_ids': [text.split() for text in texts]}

  monkeypatch.setattr('transformers.AutoTokenizer.from_pretrained', lambda folder: count_words)
  for options, lazy in (
    ({}, 0),
    ({'min_tokens': 2}, 6),
    ({'min_tokens': 2, 'min_reflections': 4}, 3),
  ):
    ratios = analyze.lazy(tmp_path / 'result', tmp_path / 'score', tmp_path, **options)
    assert ratios['parallel'] is None and counts(ratios['multi_turn']) == (lazy, 12)


def run_program(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.analyze', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_program(tmp_path, data_dir):
  multi_turn_files(tmp_path)
  folders = [f'--scores={tmp_path / "score"}', f'--tokenizer={data_dir / "qwen3-tokenizer"}']
  done = run_program('lazy', f'--results={tmp_path / "result"}', *folders, '--min_tokens=2')
  assert done.returncode == 0, done.stderr
  ratios = json.loads(done.stdout)
  assert ratios['parallel'] is None and ratios['multi_turn']['total'] == 12
  assert 'parallel: no file for' in done.stderr

  absent = run_program('lazy', f'--results={tmp_path / "absent"}', *folders)
  assert (absent.returncode, absent.stdout) == (1, '')
  assert absent.stderr == f'error: no folder {tmp_path / "absent"}\n'
  other = run_program('busy', f'--results={tmp_path}', *folders)
  assert other.returncode != 0 and "['busy']" in other.stdout + other.stderr
