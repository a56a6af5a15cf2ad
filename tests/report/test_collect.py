"""What the stages have left, as the summary and the report show it."""

import json
import shutil

import pytest

from configs import nano
from dcore_jax.models.hf_checkpoint import load_config
from dcore_jax.report.collect import collect_summary, collect_traces
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.train.metrics import Metrics

KINDS = ('single', 'sequential', 'sequential', 'parallel')


@pytest.fixture
def workdir(tmp_path):
  """Three measured models on four tasks."""
  for name, right in (('base', (0, 0, 1, 1)), ('sft', (1, 0, 1, 1)), ('da_grpo', (1, 1, 1, 0))):
    folder = tmp_path / f'evaluate_{name}'
    folder.mkdir()
    (folder / 'result.json').write_text('{"seconds": 1.0}')
    lines = []
    for number, (kind, correct) in enumerate(zip(KINDS, right, strict=True)):
      record = {'kind': kind, 'correct': bool(correct), 'lazy': name == 'base'}
      record |= {'query': f'task {number}', 'messages': [name]}
      lines.append(json.dumps(record) + '\n')
    (folder / 'trajectories.jsonl').write_text(''.join(lines))
  return tmp_path


def summary(workdir):
  return collect_summary(workdir, nano.get_config('quick'), load_config(ORGANISM))


def test_models_are_compared_task_by_task(workdir):
  first, second = summary(workdir)['changes']
  assert (first['from'], first['to']) == ('base', 'sft')
  assert (second['from'], second['to']) == ('sft', 'da_grpo')
  alone = {'standard_error': None, 'interval': None, 'n': 1, 'unit': 'tasks'}
  assert first['accuracy']['single'] == {'difference': 1} | alone
  assert first['accuracy']['parallel'] == {'difference': 0} | alone
  # Two tasks that stay as they are do not show that all do.
  unchanged = first['accuracy']['sequential']
  assert (unchanged['difference'], unchanged['standard_error'], unchanged['n']) == (0, None, 2)
  assert unchanged['interval'][0] < -0.5 and unchanged['interval'][1] > 0.5
  changed = second['accuracy']['sequential']
  assert (changed['difference'], changed['standard_error']) == pytest.approx((1 / 2, 1 / 2))
  assert second['accuracy']['parallel']['difference'] == -1
  shutil.rmtree(workdir / 'evaluate_sft')
  [change] = summary(workdir)['changes']
  assert (change['from'], change['to']) == ('base', 'da_grpo')


def test_a_summary_holds_the_figures_of_the_stages_that_have_ended(workdir):
  (workdir / 'da_grpo').mkdir()
  (workdir / 'da_grpo' / 'result.json').write_text('{"seconds": 2.0, "prompts": 8}')
  with Metrics(workdir) as metrics:
    metrics.write('rl', 0, reward=1.0)
    metrics.write('rl', 1, reward=2.0, kl=0.1)
  found = summary(workdir)
  assert list(found['stages']) == ['base', 'sft', 'da_grpo']
  assert list(found['seconds']) == ['evaluate_base', 'evaluate_sft', 'rl', 'evaluate_rl']
  assert found['rl'] == {'reward': [1.0, 2.0], 'kl': [None, 0.1], 'prompts': 8}
  assert found['export'] is None and 'sft' not in found


def test_traces_show_each_kind_before_a_second_task_of_one(workdir):
  shown = collect_traces(workdir, 'da_grpo', 2)
  assert [trace['query'] for trace in shown] == ['task 1', 'task 3']
  assert [column['stage'] for column in shown[0]['columns']] == ['base', 'sft', 'da_grpo']
  assert [column['correct'] for column in shown[0]['columns']] == [False, False, True]
  assert [trace['query'] for trace in collect_traces(workdir, 'da_grpo', 5)] == [
    'task 1',
    'task 3',
    'task 2',
  ]
  assert collect_traces(workdir / 'nowhere', 'da_grpo', 2) == []
