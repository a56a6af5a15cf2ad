"""The configs of real models: complete, with the paper's geometry and hyperparameters.

See docs/method.md, sections 2.4 and 3.2 to 3.5.
"""

import importlib

import pytest

from configs.paper import SFT_ONLY
from dcore_jax.data.recipe import choose, read_sources
from dcore_jax.data.seed_sources import load_seeds
from dcore_jax.data.seeds import decision_points
from dcore_jax.models import presets
from dcore_jax.run.config import read_config

SFT_ROWS = {'qwen3_8b': 16, 'llama3_1_8b': 16, 'qwen3_14b': 8, 'qwen2_5_14b': 8}


@pytest.mark.parametrize('name', sorted(presets.RECORDS))
def test_a_config_for_every_preset(name):
  module = importlib.import_module(f'configs.{name}')
  config = read_config(module.get_config())
  assert config.model.preset == name and f'--config=configs/{name}.py' in module.__doc__
  with pytest.raises(ValueError, match='nope'):
    module.get_config('nope')
  sft = config.sft
  assert (sft.capacity, sft.epochs, sft.learning_rate) == (16384, 3, 1e-5)
  assert (sft.warmup, sft.weight_decay) == (0.05, 0.0)
  assert sft.rows == SFT_ROWS.get(name, sft.rows)
  rl = config.rl
  assert (rl.prompts, rl.group, rl.updates, rl.steps) == (32, 8, 4, 468)
  assert (rl.learning_rate, rl.weight_decay, rl.kl_coefficient) == (1e-6, 0.01, 0.001)
  assert (rl.alpha, rl.delta) == (0.1, 0.5)
  assert (rl.clip_low, rl.clip_high, rl.dual_clip) == (0.2, 0.2, 3.0)
  assert (rl.max_prompt_tokens, rl.max_tokens, rl.temperature) == (8192, 4096, 1.0)
  assert rl.checkpoint_every == (50 if name == 'qwen3_14b' else 25)
  assert config.engine.max_len == 12288
  if not name.startswith('qwen3'):
    assert config.stages == SFT_ONLY
    # Distillation writes shards.
    assert 'runs/qwen3_8b/distill/rows-*.jsonl' in module.__doc__


def test_the_recipe_gives_about_as_much_as_the_paper_has():
  config = read_config(importlib.import_module('configs.qwen3_8b').get_config())
  seeds = {source.name: source.counts for source in read_sources(config.recipe.seeds, 'seeds')}
  rows = 0
  for counts in seeds.values():
    # Sequential seeds have 2.5 calls in the mean, and a report.
    rows += sum(count * (3.5 if kind == 'sequential' else 1) for kind, count in counts.items())
  assert 40_000 <= rows < 48_000  # some 91 % of the seeds are kept
  # ToolRL's rows are one prompt each; ToolWorld's steps are counted.
  *_, toolrl, world = read_sources(config.recipe.prompts, 'prompts')
  assert toolrl.counts == {'count': 4000} and world.place == 'toolworld'
  found = load_seeds('toolworld', count=max(world.counts.values()), seed=1).seeds
  points = 0
  for seed in choose(found, world.counts, 0):
    points += len(list(decision_points(seed)))
  prompts = 4000 + points - config.rl.validation
  assert 5000 <= prompts < 5100 and config.rl.steps == 3 * (prompts // config.rl.prompts)
  assert config.evaluate.suites == ('bfcl', 'tau2')


@pytest.mark.parametrize('name', ['qwen3_8b', 'qwen3_14b'])
def test_adapters_change_the_rates_and_the_devices_alone(name):
  full = read_config(importlib.import_module(f'configs.{name}').get_config())
  module = importlib.import_module(f'configs.{name}_lora')
  config = read_config(module.get_config())
  assert config.model == full.model and f'--config=configs/{name}_lora.py' in module.__doc__
  with pytest.raises(ValueError, match='nope'):
    module.get_config('nope')
  assert config.lora.rank == 64 and config.lora.rollouts == 'unmerged'
  for field in ('prompts', 'group', 'updates', 'steps', 'kl_coefficient', 'alpha', 'delta'):
    assert getattr(config.rl, field) == getattr(full.rl, field)
  assert (config.sft.capacity, config.sft.epochs) == (full.sft.capacity, full.sft.epochs)
