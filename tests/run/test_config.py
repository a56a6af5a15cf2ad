import dataclasses
import json

import ml_collections
import pytest
from absl import flags

from dcore_jax import overrides
from dcore_jax.config import RunConfig
from dcore_jax.run import config


def test_a_config_overlays_the_defaults_and_is_frozen():
  given = ml_collections.ConfigDict({'rl': {'alpha': 1, 'steps': 3.0}, 'stages': ['sft']})
  made = config.read_config(given)
  assert made.rl == dataclasses.replace(RunConfig().rl, alpha=1.0, steps=3)
  assert isinstance(made.rl.alpha, float) and isinstance(made.rl.steps, int)
  assert made.stages == ('sft',)
  assert made.sft == RunConfig().sft
  with pytest.raises(dataclasses.FrozenInstanceError):
    made.rl.alpha = 2.0


def test_none_leaves_a_default_and_mappings_are_replaced_as_a_whole():
  given = ml_collections.ConfigDict({'name': None, 'rl': {'tasks': {'toy': 3}}})
  made = config.read_config(given)
  assert made.name == RunConfig().name
  assert made.rl.tasks == {'toy': 3}


def test_all_wrong_fields_are_named_at_once_with_the_nearest_name():
  wrong = ml_collections.ConfigDict(
    {
      'sead': 1,
      'rl': {'alhpa': 0.1, 'steps': 'many', 'group': 1.5, 'episodes': 1, 'reward': 3},
      'sft': 3,
      'stages': 'sft',
      'model': {'init': 4},
      'distill': {'labels': {'sample': 1}},
      'zzz': 0,
    }
  )
  with pytest.raises(ValueError) as error:
    config.read_config(wrong)
  for part in (
    "unknown field 'sead' (did you mean 'seed'?)",
    "unknown field 'rl.alhpa' (did you mean 'rl.alpha'?)",
    "field 'rl.steps' must be a whole number, got 'many'",
    "field 'rl.group' must be a whole number, got 1.5",
    "field 'rl.episodes' must be a boolean, got 1",
    "field 'rl.reward' must be text, got 3",
    "field 'sft' must be a section, got 3",
    "field 'stages' must be a list, got 'sft'",
    "field 'model.init' must be a section, got 4",
    "unknown field 'distill.labels.sample' (did you mean 'distill.labels.samples'?)",
    "unknown field 'zzz'",
  ):
    assert part in str(error.value)


def test_plain_data_and_configs_are_the_same_thing():
  made = overrides.with_fields(RunConfig(), rl__alpha=0.4, distill__labels__samples=7, seed=3)
  assert (made.rl.alpha, made.distill.labels.samples, made.seed) == (0.4, 7, 3)
  plain = overrides.to_json(made)
  assert json.loads(json.dumps(plain)) == plain
  assert overrides.overlay(RunConfig(), plain) == made
  assert config.read_config(config.default_config()) == RunConfig()


def test_references_of_a_config_file_are_resolved():
  given = config.default_config()
  given.evaluate.max_tokens = given.rl.get_ref('max_tokens')
  given.rl.max_tokens = 77
  assert config.read_config(given).evaluate.max_tokens == 77


def test_every_field_is_described():
  lines = list(overrides.describe(RunConfig()))
  assert sum(line.startswith('rl.alpha = 0.1: ') for line in lines) == 1
  assert all(line.rpartition(': ')[2] and 'None' not in line for line in lines)
  assert 'rl.alpha = 0.1: ' in config._help()


def test_the_flag_takes_a_file_a_variant_and_overrides(tmp_path, monkeypatch):
  path = tmp_path / 'small.py'
  path.write_text(
    'import ml_collections\n\n\ndef get_config(variant="full"):\n'
    '  return ml_collections.ConfigDict({"variant": variant, "steps": 5})\n'
  )
  command = ['train', f'--config={path}:quick', '--config.steps=7']
  monkeypatch.setattr('sys.argv', command)  # where ml_collections looks for the overrides
  values = flags.FlagValues()
  holder = config.define_config(flag_values=values)
  values(command)
  assert (holder.value.variant, holder.value.steps) == ('quick', 7)
  with pytest.raises(AttributeError):
    holder.value.stepz = 1
  assert config.define_config(flag_values=values).value is holder.value
