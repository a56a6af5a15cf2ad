"""The configs of real models: complete, with the paper's geometry and hyperparameters (method 2.4, 3.2-3.5)."""

import importlib

import pytest

from configs.paper import SFT_ONLY
from dcore_jax.data.seed_sources import RL, toolworld_seeds
from dcore_jax.data.seeds import decision_points
from dcore_jax.models import presets
from dcore_jax.run.config import check_config
from dcore_jax.run.defaults import default_config

SFT_ROWS = {'qwen3_8b': 16, 'llama3_1_8b': 16, 'qwen3_14b': 8, 'qwen2_5_14b': 8}


@pytest.mark.parametrize('name', sorted(presets.RECORDS))
def test_a_config_for_every_preset(name):
  module = importlib.import_module(f'configs.{name}')
  config = check_config(module.get_config(), default_config())
  assert config.model.preset == name and f'--config=configs/{name}.py' in module.__doc__
  with pytest.raises(ValueError, match='nope'):
    module.get_config('nope')
  sft, rl = config.sft, config.rl
  assert (sft.capacity, sft.learning_rate, sft.epochs, sft.warmup, sft.weight_decay) == (
    16384,
    1e-5,
    3,
    0.05,
    0.0,
  )
  assert (rl.prompts, rl.group, rl.updates, rl.steps, rl.learning_rate, rl.weight_decay) == (
    32,
    8,
    4,
    468,
    1e-6,
    0.01,
  )
  assert (rl.alpha, rl.delta, rl.clip_low, rl.clip_high, rl.dual_clip, rl.kl_coefficient) == (
    0.1,
    0.5,
    0.2,
    0.2,
    3.0,
    0.001,
  )
  assert (rl.max_prompt_tokens, rl.max_tokens, rl.temperature) == (8192, 4096, 1.0)
  assert sft.rows == SFT_ROWS.get(name, sft.rows) and rl.checkpoint_every == (
    50 if name == 'qwen3_14b' else 25
  )
  assert config.engine.max_len == 12288 and config.engine.lanes % config.engine.tile == 0
  if not name.startswith('qwen3'):
    assert (
      config.stages == SFT_ONLY and 'runs/qwen3_8b/distill/rows-*.jsonl' in module.__doc__
    )  # distillation writes shards


def test_three_epochs_of_five_thousand_prompts():
  config = importlib.import_module('configs.qwen3_8b').get_config()
  seeds = toolworld_seeds(config, config.rl.tasks, RL)
  prompts = sum(1 for seed in seeds for _ in decision_points(seed)) - config.rl.validation
  assert 5000 <= prompts < 5100 and config.rl.steps == 3 * (prompts // config.rl.prompts)
