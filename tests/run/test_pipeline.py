"""The pipeline's bookkeeping: bad input is named before anything is written."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import nano, nano_base, qwen3_smoke
from dcore_jax.data.seed_sources import DISTILL, RL, load_seeds
from dcore_jax.models.hf_checkpoint import load_params
from dcore_jax.rollout.policy import local_backend
from dcore_jax.run.config import default_config
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
  # Where and how fast may change, too.
  config.distill.update(dict(base_url='http://other:8000/v1', prompt_price=2.0, timeout=5.0))
  config.engine.lanes = 16
  Pipeline(config, tmp_path)
  record = json.loads((tmp_path / 'config.json').read_text())
  assert record['engine']['lanes'] == 16
  # An earlier program had no such fields.
  for section, name in (('rl', 'preset'), ('rl', 'warmup_steps'), ('distill', 'prompt_price')):
    del record[section][name]
  (tmp_path / 'config.json').write_text(json.dumps(record))
  Pipeline(config, tmp_path)
  config.rl.alpha = 0.4
  with pytest.raises(ValueError, match='differs in rl.alpha: was 0.1, is 0.4; name another'):
    Pipeline(config, tmp_path)


@pytest.mark.parametrize(
  ('section', 'name', 'value', 'said'),
  [
    ('rl', 'objective', 'gpso', 'gpso'),
    ('rl', 'estimator', 'da_gpro', 'da_gpro'),
    ('rl', 'updates', 3, 'rl.prompts = 8 does not divide into rl.updates = 3'),
    ('sft', 'optimizer', 'adam', "section sft: unknown optimizer 'adam'"),
    ('sft', 'clip', -1.0, 'sft.clip = -1.0'),
  ],
)
def test_a_later_stage_is_checked_before_anything_is_loaded(tmp_path, section, name, value, said):
  config = nano.get_config('quick')
  config[section][name] = value
  with pytest.raises(ValueError, match=said):
    Pipeline(config, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


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


def test_only_groups_share_trunks(tmp_path):
  """A task that is measured or distilled has a prompt of its own.

  With a trunk for four lanes, three of them would be idle.
  """
  config = nano.get_config('quick')
  config.engine.update(dict(lanes=16, trunks=4))
  pipeline = Pipeline(config, tmp_path)
  params = pipeline.models.params('base')

  def trunks(**options):
    return pipeline.models.engine(params, **options).sizes.trunks

  measured = pipeline.models.engine(params)
  assert trunks() == 16 and pipeline.models.engine(params) is measured
  assert trunks(groups=True) == 4 and trunks() == 16
  backend = local_backend(pipeline.config, tmp_path / 'replies.jsonl')
  assert backend.engine.sizes.trunks == 16


def test_export_alone_copies_the_organism(tmp_path):
  config = nano.get_config('quick')
  config.stages = ('export', 'report')
  summary = Pipeline(config, tmp_path).run()
  assert (tmp_path / 'export' / 'model.safetensors').exists()
  assert (tmp_path / 'report.html').exists()
  assert summary['export'] == str(tmp_path / 'export')
  assert json.loads((tmp_path / 'summary.json').read_text()) == summary


def test_an_export_follows_the_last_trained_stage(tmp_path):
  def exported():
    return json.loads((tmp_path / 'export_result' / 'result.json').read_text())['stage']

  config = nano.get_config('quick')
  config.stages = ('export',)
  pipeline = Pipeline(config, tmp_path)
  pipeline.run()
  assert exported() == 'base'
  shutil.copytree(tmp_path / 'export', tmp_path / 'sft')
  pipeline.run()
  assert exported() == 'sft'
  shutil.copytree(tmp_path / 'export', tmp_path / 'da_grpo')
  config.stages = ()
  summary = Pipeline(config, tmp_path).run()
  assert summary['export'] is None  # what is there is not the model that was trained last


def test_stages_hand_their_models_on(tmp_path, model, tokenizer):
  """Random weights are fine-tuned, reinforced and exported; a second call runs nothing again."""
  tokenizer.save_pretrained(tmp_path / 'tokenizer')
  messages = [{'role': 'user', 'content': 'find the order of Karo'}]
  messages.append({'role': 'assistant', 'content': 'look up the file of Karo.'})
  rows = [{'id': str(number), 'conversations': messages} for number in range(4)]
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  asked = {'instruction': 'tools', 'input': 'find Karo', 'output': '<response>Karo</response>'}
  (tmp_path / 'asked.json').write_text(json.dumps([asked] * 4))
  config = default_config()
  config.stages = ('sft', 'rl', 'export')
  config.model.init.update(model.to_hf())
  config.model.tokenizer = str(tmp_path / 'tokenizer')
  config.engine.update(dict(lanes=8, max_len=192))
  sft = dict(capacity=64, rows=2, epochs=2, learning_rate=1e-2)
  config.sft.update(sft | dict(files=(str(tmp_path / 'rows.json'),)))
  config.rl.update(dict(steps=1, prompts=2, group=4, wave=2, updates=1, max_tokens=12))
  config.rl.update(dict(capacity=256, rows=2, validation=0, learning_rate=1e-2))
  config.rl.files = (str(tmp_path / 'asked.json'),)
  summary = Pipeline(config, tmp_path / 'w').run()
  assert summary['sft']['last_loss'] < summary['sft']['first_loss']
  assert len(summary['rl']['reward']) == 1 and summary['rl']['prompts'] == 4
  weights = []
  for name in ('sft', 'da_grpo', 'export'):
    weights.append(load_params(tmp_path / 'w' / name)[1]['embed'])
  assert not np.array_equal(weights[0], weights[1])
  np.testing.assert_allclose(weights[2], weights[1], rtol=1e-2)
  assert 'after the stage `da_grpo`' in (tmp_path / 'w' / 'export' / 'README.md').read_text()
  assert Pipeline(config, tmp_path / 'w').run() == summary


def test_tasks_of_training_are_not_those_of_pretraining():
  """Those of `experiments.seeds` neither; its default is the seed that pretraining begins with."""

  def ids(seed):
    return {task.id for task in ToolWorld().tasks('single', 5, seed=seed, split='train')}

  pretraining = set()
  for number in range(len(nano_base.get_config().stages)):
    pretraining |= ids(nano_base.get_config().seed + number)
  assert not pretraining & ids(DISTILL)
  assert not pretraining & ids(RL)
  made = set()
  for number in range(3):
    for seed in load_seeds('toolworld', count=5, seed=number).seeds:
      if '-single-' in seed.id:
        made.add(seed.id.partition('/')[0])
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


@pytest.mark.parametrize(
  ('field', 'value', 'said'),
  [
    ('suites', ('world', 'gsm9k'), "unknown suites \\['gsm9k'\\]"),
    ('suites', (), 'names nothing to measure'),
    ('suite_options', 'gsm8k.shots=1', 'unknown option'),
    ('suite_options', 'math500.seconds=1', 'not among evaluate.suites'),
    ('limit', 3, 'evaluate.limit is for suites'),
  ],
)
def test_suites_are_checked_before_anything_is_loaded(tmp_path, field, value, said):
  config = nano.get_config('quick')
  config.evaluate[field] = value
  with pytest.raises(ValueError, match=said):
    Pipeline(config, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


def test_data_of_a_suite_is_looked_for_where_a_stage_runs_it(tmp_path, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(tmp_path))
  config = nano.get_config('quick')
  config.evaluate.suites = ('world', 'gsm8k')
  config.stages = ('export',)
  Pipeline(config, tmp_path / 'w')
  config.stages = ('evaluate_base',)
  with pytest.raises(ValueError, match='gsm8k_test.jsonl'):
    Pipeline(config, tmp_path / 'w')


@pytest.mark.slow
def test_a_stage_runs_suites_with_its_own_engine(tmp_path, monkeypatch):
  """The world's tasks, then a suite through a server, then the engine is the pipeline's again."""
  (tmp_path / 'transfer').mkdir()
  rows = [{'question': f'What is {n}?', 'answer': f'#### {n}'} for n in range(3)]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / 'transfer' / 'gsm8k_test.jsonl').write_text(text)
  monkeypatch.setenv('DCORE_DATA', str(tmp_path))
  config = nano.get_config('quick')
  config.stages = ('evaluate_base', 'report')
  config.evaluate.update(dict(tasks=1, max_tokens=4, suites=('world', 'gsm8k'), limit=2))
  config.engine.update(dict(lanes=4, trunks=0))
  pipeline = Pipeline(config, tmp_path / 'w')
  summary = pipeline.run()
  stage = summary['stages']['base']
  [score] = stage['suites']['gsm8k']['scores']
  assert score['estimate']['n'] == 2 and stage['n']['single'] == 1
  folder = tmp_path / 'w' / 'evaluate_base'
  assert (folder / 'suites' / 'gsm8k' / 'trajectories.jsonl').exists()
  assert 'Evaluation suites' in (tmp_path / 'w' / 'report.html').read_text()
  # Begun again without its result, the stage takes everything from its files.
  before = (folder / 'suites' / 'gsm8k' / 'replies.jsonl').read_bytes()
  (folder / 'result.json').unlink()
  again = pipeline.run()
  assert again['stages']['base']['suites'] == stage['suites']
  assert (folder / 'suites' / 'gsm8k' / 'replies.jsonl').read_bytes() == before
  # Suites alone.
  config.evaluate.suites = ('gsm8k',)
  alone = Pipeline(config, tmp_path / 'alone').run()['stages']['base']
  assert alone['accuracy'] == {} and alone['suites']['gsm8k']['scores'][0]['estimate']['n'] == 2
