import json

import ml_collections
import pytest
from absl import flags

from dcore_jax.run import config


def defaults() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'name': 'nano',
      'limit': None,
      'model': {},
      'kinds': ('single',),
      'rl': {'alpha': 0.1, 'delta': 0.5, 'steps': 10, 'optimizer': {'learning_rate': 1e-5}},
    }
  )


def test_a_config_overlays_the_defaults_and_is_frozen():
  merged = config.check_config(
    ml_collections.ConfigDict(
      {'rl': {'alpha': 1, 'steps': 3}, 'limit': 5, 'model': {'hidden_size': 64}}
    ),
    defaults(),
  )
  assert (merged.rl.alpha, merged.rl.delta, merged.limit, merged.model.hidden_size) == (
    1,
    0.5,
    5,
    64,
  )
  with pytest.raises(AttributeError):
    merged.rl.alpha = 2.0


def test_all_wrong_fields_are_named_at_once_with_the_nearest_name():
  wrong = ml_collections.ConfigDict(
    {'sead': 1, 'rl': {'alhpa': 0.1, 'steps': 'many', 'optimizer': 3}, 'zzz': 0}
  )
  with pytest.raises(ValueError) as error:
    config.check_config(wrong, defaults())
  for part in (
    "unknown field 'sead' (did you mean 'seed'?)",
    "unknown field 'rl.alhpa' (did you mean 'rl.alpha'?)",
    "field 'rl.steps' must be a number, got 'many'",
    "field 'rl.optimizer' must be a section",
    "unknown field 'zzz'",
  ):
    assert part in str(error.value)


def test_to_json_is_plain_and_resolves_references():
  given = defaults()
  given.rl.total = given.rl.get_ref('steps')
  plain = config.to_json(ml_collections.FrozenConfigDict(given))
  assert json.loads(json.dumps(plain)) == plain
  assert plain['rl']['total'] == 10 and plain['kinds'] == ['single'] and plain['model'] == {}


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
