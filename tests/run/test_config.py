import copy
import dataclasses
import json
import math
import re
import sys

import ml_collections
import pytest
from absl import flags

from dcore_jax import overrides
from dcore_jax.chat.examples import LOSS_MASKS
from dcore_jax.config import RL_PRESETS, RunConfig
from dcore_jax.data.dialogues import CALL_STYLES
from dcore_jax.distill.solve import VERIFY
from dcore_jax.distill.stage import BACKENDS, REFERENCES
from dcore_jax.run import config
from dcore_jax.run import help as help_lib
from dcore_jax.run.checks import check_fields


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
  assert any(line.startswith('distill.concurrency = 64 (may change): ') for line in lines)
  assert 'rl.alpha = 0.1: ' in help_lib._fields('rl')


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


def test_every_number_has_a_range_and_its_default_is_inside():
  def numbers(section):
    for field in dataclasses.fields(section):
      value = getattr(section, field.name)
      if dataclasses.is_dataclass(value):
        yield from numbers(value)
      elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield field, value

  found = list(numbers(RunConfig()))
  assert len(found) > 80
  for field, value in found:
    limits = field.metadata['range']
    assert not limits.problem(value), field.name
    if field.name != 'right_above':  # a reward, which may be anything
      assert limits.problem(-1e9), field.name
    assert limits.problem(math.nan) and limits.problem(math.inf)


@pytest.mark.parametrize(
  ('field', 'value', 'said'),
  [
    ('seed', -1, 'seed = -1 must be in 0..4294967295'),
    ('seed', 2**32, 'seed = 4294967296 must be in'),
    ('sft__clip', -1, 'sft.clip = -1.0 must be at least 0'),
    ('rl__clip', -0.5, 'rl.clip = -0.5 must be at least 0'),
    ('rl__learning_rate', -1e-6, 'rl.learning_rate = -1e-06 must be at least 0'),
    ('sft__learning_rate', math.inf, 'sft.learning_rate = inf must be finite'),
    ('rl__alpha', math.nan, 'rl.alpha = nan must be finite'),
    ('rl__temperature', 0, 'rl.temperature = 0.0 must be at least 1e-05'),
    ('evaluate__temperature', -1, 'evaluate.temperature = -1.0 must be at least 1e-05 or 0'),
    ('distill__temperature', 1e-30, 'distill.temperature = 1e-30 must be at least 1e-05 or 0'),
    ('engine__max_len', 2**31, 'engine.max_len = 2147483648 must be at most 2147483647'),
    ('mesh__data', 10**12, 'mesh.data = 1000000000000 must be at most 2147483647'),
    ('rl__tasks', {'single': 10**12}, 'rl.tasks.single = 1000000000000 must be at most'),
    ('distill__top_p', 0, 'distill.top_p = 0.0 must be above 0 and at most 1'),
    ('distill__timeout', 0, 'distill.timeout = 0.0 must be above 0'),
    ('distill__labels__samples', 0, 'distill.labels.samples = 0 must be at least 1'),
    ('mesh__fsdp', 0, 'mesh.fsdp = 0 must be at least 1 or -1'),
    ('sft__warmup', 1.5, 'sft.warmup = 1.5 must be in 0..1'),
    ('rl__tasks', {'single': -1}, 'rl.tasks.single = -1 must be at least 0'),
    ('rl__tasks', {'single': 'x'}, "field 'rl.tasks.single' must be a whole number"),
    ('rl__psi_words', (1,), "field 'rl.psi_words' must be a list of texts"),
    ('sft__loss_mask', 'all', "sft.loss_mask = 'all'; expected one of ('final', "),
    ('export__dtype', 'float16', "export.dtype = 'float16'; expected one of ('bfloat16', "),
    ('rl__unreadable', 'skip', "rl.unreadable = 'skip'; expected one of ('error', 'drop')"),
    ('rl__preset', 'dpao', "field 'rl.preset' must be one of"),
  ],
)
def test_numbers_outside_their_range_are_named(field, value, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    overrides.with_fields(RunConfig(), **{field: value})


def test_a_config_made_past_the_checks_is_checked():
  with pytest.raises(ValueError, match='seed = -3'):
    config.read_config(dataclasses.replace(RunConfig(), seed=-3))


@pytest.mark.parametrize('preset', RL_PRESETS)
def test_a_preset_sets_what_nobody_has_set(preset):
  given = config.default_config()
  given.rl.preset = preset
  given.rl.alpha = 0.3
  made = config.read_config(given).rl
  for name, value in RL_PRESETS[preset].items():
    assert getattr(made, name) == value
  assert made.alpha == 0.3 and made.steps == RunConfig().rl.steps
  # A field is set also where it is set to what it was.
  default = RunConfig().rl
  for name in RL_PRESETS[preset]:
    own = config.default_config()
    own.rl.preset = preset
    own.rl[name] = getattr(default, name)
    for copied in (own, copy.deepcopy(own)):
      assert getattr(config.read_config(copied).rl, name) == getattr(default, name)
    explicit = {'rl__preset': preset, f'rl__{name}': getattr(default, name)}
    assert (
      getattr(overrides.with_fields(RunConfig(), **explicit).rl, name) == explicit[f'rl__{name}']
    )


def test_a_preset_takes_the_place_of_another():
  one = overrides.with_fields(RunConfig(), rl__preset='dapo', rl__clip=0.5)
  other = overrides.with_fields(one, rl__preset='gspo')
  assert other == overrides.with_fields(RunConfig(), rl__preset='gspo', rl__clip=0.5)
  # A record of the run has all values, and is read as it stands.
  assert overrides.overlay(RunConfig(), overrides.to_json(one)) == one


def test_differences_name_fields_and_both_values():
  before = overrides.to_json(overrides.with_fields(RunConfig(), rl__alpha=0.4, rl__rows=2))
  now = overrides.with_fields(
    RunConfig(),
    rl__rows=8,
    distill__prompt_price=2.0,
    distill__base_url='http://other:8000/v1',
    engine__lanes=8,
    report__traces=1,
    sft__files=('a.jsonl',),
  )
  assert overrides.differences(RunConfig(), before, overrides.to_json(now)) == [
    "sft.files: was [], is ['a.jsonl']",
    'rl.alpha: was 0.4, is 0.1',
  ]


def test_an_override_of_an_entry_that_there_is_not_is_named_by_its_path(monkeypatch):
  arguments = ['train', '--config.sft.epochs=2', '--config.distill.tasks.singel=3']
  monkeypatch.setattr(sys, 'argv', arguments)
  with pytest.raises(SystemExit) as ended, config.one_line_errors():
    config.default_config().lock().distill.tasks.singel = 3
  assert str(ended.value).startswith("error: config: unknown field 'distill.tasks.singel'; known")


def test_choices_are_those_of_the_code_that_reads_them():
  read = {
    ('sft', 'loss_mask'): LOSS_MASKS,
    ('sft', 'call_style'): CALL_STYLES,
    ('distill', 'reference'): REFERENCES,
    ('distill', 'backend'): BACKENDS,
    ('distill', 'verify'): VERIFY,
  }
  for (section, name), choices in read.items():
    fields = {field.name: field for field in dataclasses.fields(getattr(RunConfig(), section))}
    assert fields[name].metadata['choices'] == choices, name


def test_a_reward_that_there_is_not_is_named_before_anything_runs():
  with pytest.raises(ValueError, match="unknown rl.reward 'toolr1'; expected one of .*toolrl"):
    check_fields(overrides.with_fields(RunConfig(), rl__reward='toolr1'))


def test_a_wording_that_there_is_not_is_named_before_anything_runs():
  wrong = overrides.with_fields(RunConfig(), distill__wording='nope.json')
  with pytest.raises(ValueError, match='nope.json'):
    check_fields(wrong)
  check_fields(overrides.with_fields(wrong, stages=('rl',)))
