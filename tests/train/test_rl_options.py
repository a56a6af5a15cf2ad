"""What the section `rl` may say: what cannot work, what belongs together, presets, schedules."""

import dataclasses
import warnings

import numpy as np
import pytest

from dcore_jax.config import RL_PRESETS, RunConfig
from dcore_jax.learn.optimizer import Schedule
from dcore_jax.overrides import with_fields
from dcore_jax.train.rl_options import check_section, optimizer_options
from tests.train.tiny_rl import make_engine, rl_config, train


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(prompts=7), 'too few'),
    (dict(validation=9), 'rl.validation = 9'),
    (dict(updates=3), 'does not divide'),
    (dict(estimator='nope'), 'nope'),
    (dict(reward='nope'), 'nope'),
    (dict(wave=0), 'rl.wave'),
    (dict(objective='nope'), 'nope'),
    (dict(alpha_measure='nope'), 'nope'),
    (dict(alpha_measure='psi_share'), "is called 'norm_share' now"),
    (dict(estimator='rl_zvp', entropy_of='current'), "rl.entropy_of = 'current'"),
    (dict(psi_when_wrong='punish', entropy_of='current'), "rl.entropy_of = 'current'"),
    (dict(estimator='grpo', psi_words=('wait',)), 'psi_words'),
    (dict(updates=0), 'rl.updates = 0'),
    (dict(group=0), 'rl.group = 0'),
    (dict(checkpoint_every=0), 'rl.checkpoint_every = 0'),
    (dict(dynamic_rounds=-1), 'rl.dynamic_rounds = -1'),
    (dict(zero_test='nope'), 'nope'),
    (dict(psi_when_wrong='nope'), 'nope'),
    (dict(alpha=-1.0), 'alpha = -1.0'),
    (dict(uniform_share=2.0), 'uniform_share'),
    (dict(overlong_buffer=13), 'rl.overlong_buffer = 13 exceeds rl.max_tokens = 12'),
    (dict(clip=-1.0), 'rl.clip = -1.0 must be at least 0'),
    (dict(learning_rate=-1e-3), 'rl.learning_rate = -0.001'),
    (dict(temperature=0.0), 'rl.temperature = 0.0'),
    (dict(warmup_steps=4), 'rl.warmup_steps = 4 exceeds rl.steps = 3'),
    (dict(objective='gspo'), 'rl.clip_low = 0.0003 .here 0.2., rl.clip_high = 0.0004'),
  ],
)
def test_configs_that_cannot_work(tmp_path, changes, message):
  """Before anything is sampled."""

  class Idle:
    def __init__(self, engine):
      self.params = engine.params
      self.max_len = engine.max_len
      self.max_new = engine.max_new

  with pytest.raises((ValueError, KeyError), match=message):
    train(tmp_path, rl_config(**changes), engine=lambda params: Idle(make_engine(params)))
  assert not list((tmp_path / 'checkpoints').rglob('[0-9]*'))


@pytest.mark.parametrize(
  'changes, said',
  [
    (dict(objective='cispo'), 'rl.clip_low = 1.0 .here 0.2.'),
    (dict(estimator='dr_grpo'), 'rl.aggregation = dr .here token., rl.kl_coefficient = 0.0'),
    (dict(objective='gspo', clip_low=3e-4, clip_high=4e-4), 'rl.aggregation = sequence'),
  ],
)
def test_what_belongs_to_a_method_is_named(changes, said):
  with pytest.warns(UserWarning, match=said):
    check_section(rl_config(**changes))


@pytest.mark.parametrize('preset', RL_PRESETS)
def test_a_preset_is_complete(preset):
  section = with_fields(RunConfig(), rl__preset=preset).rl
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    check_section(section)
    # Nor does it lack anything where its values are written out.
    check_section(dataclasses.replace(section, preset=''))


def test_the_learning_rate_rises_over_the_first_rollout_batches():
  section = rl_config(steps=5, updates=2, warmup_steps=2, learning_rate=1.0)
  rate = optimizer_options(section).schedule.rate(1.0)
  np.testing.assert_allclose(
    [rate(step) for step in range(10)], [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1], rtol=1e-6
  )
  assert optimizer_options(rl_config()).schedule == Schedule()
