"""The stages as functions: a model in, a model, rows or figures out."""

import json

import jax
import numpy as np
import pytest

import dcore_jax
from configs import nano
from dcore_jax.data.seed_sources import load_seeds
from dcore_jax.run.config import default_config
from tests.train.tiny_rl import points

ROWS = [
  {
    'id': str(number),
    'conversations': [
      {'role': 'user', 'content': f'find the order of Karo {number}'},
      {'role': 'assistant', 'content': 'look up the file of Karo.'},
    ],
  }
  for number in range(6)
]
SFT = dict(capacity=64, rows=2, epochs=2, learning_rate=1e-2)
RL = dict(
  steps=1,
  prompts=2,
  group=4,
  wave=2,
  updates=1,
  max_tokens=12,
  capacity=128,
  rows=2,
  validation=0,
  learning_rate=1e-2,
)


@pytest.fixture
def small():
  """A config whose engine has few lanes."""
  config = default_config()
  config.engine.update(dict(lanes=8, max_len=96))
  return config


def leaves(model):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params())]


def same(one, other):
  return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def test_sft_gives_a_new_model(tiny, tmp_path):
  before = leaves(tiny)
  trained = dcore_jax.sft(tiny, ROWS, workdir=tmp_path, **SFT)
  losses = [json.loads(line)['loss'] for line in (tmp_path / 'metrics.jsonl').open()]
  assert losses[-1] < losses[0] and not same(trained, tiny)
  assert all(np.array_equal(a, b) for a, b in zip(before, leaves(tiny), strict=True))
  assert trained.tokenizer is tiny.tokenizer
  # What is kept in a folder is what the same call gives, and belongs to no other call.
  assert same(dcore_jax.sft(tiny, ROWS, workdir=tmp_path, **SFT), trained)
  with pytest.raises(ValueError, match='holds the stage sft with other options'):
    dcore_jax.sft(tiny, ROWS, workdir=tmp_path, **(SFT | {'epochs': 3}))


def test_sft_honours_what_options_say_of_rows(tiny):
  with pytest.raises(ValueError, match='system_prompt is empty'):
    dcore_jax.sft(tiny, ROWS, stock_system_prompts=('x',), **SFT)
  with pytest.raises(ValueError, match='leave one of them out'):
    dcore_jax.sft(tiny, ROWS, files=('rows.jsonl',), **SFT)
  with pytest.raises(ValueError, match='run the stage distill first'):
    dcore_jax.sft(tiny, **SFT)


def test_data_comes_from_one_place(tiny):
  with pytest.raises(ValueError, match='seeds are given, and tasks names others'):
    dcore_jax.distill_seeds(tiny, [], tasks={'single': 1})
  with pytest.raises(ValueError, match='points are given, and episodes names others'):
    dcore_jax.da_grpo(tiny, points(), episodes=True)
  with pytest.raises(ValueError, match='rl.reward = .* is for single prompts'):
    dcore_jax.da_grpo(tiny, episodes=True, reward='corrected')


@pytest.mark.parametrize('estimator', ['da_grpo', 'grpo'])
def test_da_grpo_gives_a_new_model(tiny, small, tmp_path, estimator):
  before = leaves(tiny)
  trained = dcore_jax.da_grpo(
    tiny, points(), config=small, workdir=tmp_path, estimator=estimator, seed=1, **RL
  )
  [row] = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').open()]
  assert row['stage'] == 'rl' and 'reward' in row
  assert all(np.array_equal(a, b) for a, b in zip(before, leaves(tiny), strict=True))
  if estimator == 'da_grpo':  # all rewards are the same, where plain GRPO has no gradient
    assert not same(trained, tiny)
  with pytest.raises(ValueError, match='holds the stage rl with other seed'):
    dcore_jax.da_grpo(
      tiny, points(), config=small, workdir=tmp_path, estimator=estimator, seed=2, **RL
    )


def test_seeds_are_distilled(organism, tmp_path):
  config = nano.get_config('tiny')
  config.engine.update(dict(lanes=8, max_len=512))
  seeds = [seed for seed in load_seeds('toolworld', count=4, seed=0).seeds if seed.kind == 'single']
  rows = dcore_jax.distill_seeds(organism, seeds[:4], config=config, workdir=tmp_path)
  assert rows and all(row['conversations'][-1]['role'] == 'assistant' for row in rows)
  assert json.loads((tmp_path / 'distill' / 'distill.json').read_text())['rows'] == len(rows)


def test_a_model_is_measured(tiny, small, tmp_path):
  small.engine.max_len = 256
  figures = dcore_jax.evaluate_model(tiny, config=small, tasks=1, max_tokens=8, workdir=tmp_path)
  assert len(figures['accuracy']) == 5 and set(figures['accuracy'].values()) == {0.0}
  assert len((tmp_path / 'trajectories.jsonl').read_text().splitlines()) == 5


@pytest.mark.parametrize(
  'call, named',
  [
    (lambda m: dcore_jax.sft(m, ROWS, learning_rat=1), "'sft.learning_rate'"),
    (lambda m: dcore_jax.da_grpo(m, alhpa=1), "'rl.alpha'"),
    (lambda m: dcore_jax.evaluate_model(m, task=1), "'evaluate.tasks'"),
    (lambda m: dcore_jax.distill_seeds(m, [], wordin='organism'), "'distill.wording'"),
  ],
)
def test_unknown_options_are_named_with_the_nearest(tiny, call, named):
  with pytest.raises(ValueError, match=f'did you mean {named}'):
    call(tiny)
