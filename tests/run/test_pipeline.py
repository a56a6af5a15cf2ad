"""The pipeline's bookkeeping: bad input is named before anything is written, and results are tied to their config."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from configs import nano, nano_base, qwen3_smoke
from dcore_jax.data.seed_sources import DISTILL, RL, load_seeds
from dcore_jax.rollout.policy import local_backend
from dcore_jax.run.pipeline import Pipeline
from dcore_jax.worlds.toolworld.world import ToolWorld

ROOT = pathlib.Path(__file__).parents[2]


def test_unknown_fields_and_stages_are_named_and_nothing_is_written(tmp_path):
  config = nano.get_config('quick')
  config.unlock()
  config.rl.alhpa = 0.2
  with pytest.raises(ValueError, match='rl.alhpa.*rl.alpha'):
    Pipeline(config, tmp_path / 'w')
  config = nano.get_config('quick')
  config.stages = ('distil',)
  with pytest.raises(ValueError, match='distil'):
    Pipeline(config, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


def test_a_work_directory_belongs_to_one_config(tmp_path):
  Pipeline(nano.get_config('quick'), tmp_path)
  config = nano.get_config('quick')
  config.stages = ('export',)  # which stages are run may change
  Pipeline(config, tmp_path)
  config.rl.alpha = 0.4
  with pytest.raises(ValueError, match='differs in rl'):
    Pipeline(config, tmp_path)


def test_stages_say_what_they_need(tmp_path):
  for stage, message in (
    ('sft', 'run the stage distill first'),
    ('rl', "stage 'sft' has no result"),
  ):
    config = nano.get_config('quick')
    config.stages = (stage,)
    with pytest.raises(ValueError, match=message):
      Pipeline(config, tmp_path / stage).run()
    assert not list((tmp_path / stage).glob('*/result.json'))


@pytest.mark.parametrize('field, value', [('reward', 'corrected'), ('files', ('rows.parquet',))])
def test_what_is_for_single_prompts_is_refused_beside_episodes(tmp_path, field, value):
  config = nano.get_config('agentic')
  config.rl[field] = value
  with pytest.raises(ValueError, match=f'rl.{field} = .* is for single prompts'):
    Pipeline(config, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


def test_stages_are_compared_task_by_task(tmp_path):
  pipeline = Pipeline(nano.get_config('quick'), tmp_path)
  for name, right in (('base', (0, 0, 1, 1)), ('sft', (1, 0, 1, 1)), ('da_grpo', (1, 1, 1, 0))):
    folder = tmp_path / f'evaluate_{name}'
    folder.mkdir()
    (folder / 'result.json').write_text('{"seconds": 1.0}')
    records = [
      {'kind': kind, 'correct': bool(r)}
      for kind, r in zip(('single', 'single', 'single', 'parallel'), right)
    ]
    (folder / 'trajectories.jsonl').write_text(
      ''.join(json.dumps(record) + '\n' for record in records)
    )
  first, second = pipeline.summary()['changes']
  assert (first['from'], first['to'], second['from'], second['to']) == (
    'base',
    'sft',
    'sft',
    'da_grpo',
  )
  assert first['accuracy'] == {
    'single': {'difference': pytest.approx(1 / 3), 'standard_error': pytest.approx(1 / 3), 'n': 3},
    'parallel': {'difference': 0, 'standard_error': None, 'n': 1},
  }
  assert second['accuracy']['parallel']['difference'] == -1
  shutil.rmtree(tmp_path / 'evaluate_sft')
  assert [(change['from'], change['to']) for change in pipeline.summary()['changes']] == [
    ('base', 'da_grpo')
  ]


def test_only_groups_share_trunks(tmp_path):
  """Every task that is measured or distilled has a prompt of its own: with a trunk for four lanes, three of them would be idle."""
  config = nano.get_config('quick')
  config.engine.update(dict(lanes=16, trunks=4))
  pipeline = Pipeline(config, tmp_path)
  params = pipeline.params('base')
  trunks = lambda **options: len(pipeline.engine(params, **options)._trunks.length_P)
  measured = pipeline.engine(params)
  assert trunks() == 16 and pipeline.engine(params) is measured
  assert trunks(groups=True) == 4 and trunks() == 16
  assert (
    len(local_backend(pipeline.config, tmp_path / 'replies.jsonl').engine._trunks.length_P) == 16
  )


def test_distillation_is_the_work_of_one_host(tmp_path, monkeypatch):
  pipeline = Pipeline(nano.get_config('quick'), tmp_path)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='the work of one host'):
    pipeline.distill()


def test_export_alone_copies_the_organism(tmp_path):
  config = nano.get_config('quick')
  config.stages = ('export', 'report')
  summary = Pipeline(config, tmp_path).run()
  assert (tmp_path / 'export' / 'model.safetensors').exists() and (
    tmp_path / 'report.html'
  ).exists()
  assert (
    summary['export'] == str(tmp_path / 'export')
    and json.loads((tmp_path / 'summary.json').read_text()) == summary
  )


def test_an_export_follows_the_last_trained_stage(tmp_path):
  config = nano.get_config('quick')
  config.stages = ('export',)
  pipeline = Pipeline(config, tmp_path)
  pipeline.run()
  assert json.loads((tmp_path / 'export_result' / 'result.json').read_text())['stage'] == 'base'
  shutil.copytree(tmp_path / 'export', tmp_path / 'sft')
  pipeline.run()
  assert json.loads((tmp_path / 'export_result' / 'result.json').read_text())['stage'] == 'sft'


def test_tasks_of_training_are_not_those_of_pretraining():
  """Those of `experiments.seeds` neither; its default is the seed that pretraining begins with."""
  pretraining = {
    t.id
    for number in range(len(nano_base.get_config().stages))
    for t in ToolWorld().tasks(
      'single', 5, seed=nano_base.get_config().seed + number, split='train'
    )
  }
  assert not pretraining & {
    t.id
    for purpose in (DISTILL, RL)
    for t in ToolWorld().tasks('single', 5, seed=purpose, split='train')
  }
  seeds = [
    seed for number in range(3) for seed in load_seeds('toolworld', count=5, seed=number).seeds
  ]
  made = {seed.id.partition('/')[0] for seed in seeds if '-single-' in seed.id}
  assert len(made) == 15 and not made & pretraining


def test_variants():
  assert nano.get_config('grpo').rl.estimator == 'grpo'
  assert qwen3_smoke.get_config('quick').model.init.vocab_size == 151936
  for module in (nano, qwen3_smoke):
    with pytest.raises(ValueError, match='nope'):
      module.get_config('nope')


@pytest.mark.parametrize(
  'flags', [['--config=configs/nano.py:nope'], ['--config=configs/nano.py', '--config.rl.nope=1']]
)
def test_the_program_fails_with_one_message(tmp_path, flags):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.train', *flags, f'--workdir={tmp_path / "w"}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode != 0 and 'nope' in done.stderr and not (tmp_path / 'w').exists()
