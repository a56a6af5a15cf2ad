"""A folder of results belongs to what they were made from."""

import json

import pytest

from dcore_jax.claims import claim
from dcore_jax.config import RunConfig
from dcore_jax.overrides import overlay, to_json


def test_a_folder_is_claimed_once(tmp_path):
  path = tmp_path / 'runs' / 'config.json'
  claim(path, {'rates': (1, 2), 'seed': 0}, 'was begun with other')
  assert json.loads(path.read_text()) == {'rates': [1, 2], 'seed': 0}
  claim(path, {'rates': (1, 2), 'seed': 0}, 'was begun with other')
  with pytest.raises(
    ValueError,
    match=r'runs. was begun with other rates: was \[1, 2\], is \[1, 3\]; seed: was 0, is 1; name',
  ):
    claim(path, {'rates': (1, 3), 'seed': 1}, 'was begun with other')
  assert json.loads(path.read_text()) == {'rates': [1, 2], 'seed': 0}


def test_free_fields_may_change_and_forgotten_ones_are_ignored(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"seed": 0, "stages": ["sft"], "dropped": 1}')
  claim(path, {'seed': 0, 'stages': ['rl']}, 'was begun with other', free=('stages',))
  assert json.loads(path.read_text()) == {'seed': 0, 'stages': ['rl']}


def test_fields_that_an_older_record_lacks_have_their_defaults(tmp_path):
  path = tmp_path / 'config.json'
  config = overlay(RunConfig(), {'distill': {'tasks': {'single': 5}}})
  record = to_json(config)
  del record['world']['name']
  del record['rl']
  path.write_text(json.dumps(record))
  claim(path, to_json(config), 'holds results of a config that differs in', defaults=RunConfig())
  # The record is complete now, and a mapping keeps the keys that it has.
  claim(path, to_json(config), 'holds results of a config that differs in', defaults=RunConfig())
  changed = overlay(config, {'world': {'name': 'bfcl'}})
  with pytest.raises(
    ValueError, match="differs in world.name: was 'toolworld', is 'bfcl'; name another"
  ):
    claim(path, to_json(changed), 'holds results of a config that differs in', defaults=RunConfig())
