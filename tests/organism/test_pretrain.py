"""Pretraining on a tiny model: stages are resumed, and a work directory belongs to one config."""

import shutil

import pytest
import transformers

from configs import nano_base
from dcore_jax.organism.pretrain import pretrain
from dcore_jax.train.metrics import read_metrics


def tiny(**changes):
  config = nano_base.get_config('smoke')
  config.held_out_every = 100
  config.model.update(
    dict(
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=1,
      num_attention_heads=2,
      num_key_value_heads=1,
      head_dim=16,
    )
  )
  config.stages = tuple({**stage, 'steps': 2, 'rows': 1} for stage in config.stages)
  config.update(changes)
  return config


def test_an_organism_is_written_and_stages_are_resumed(tmp_path):
  pretrain(tiny(), tmp_path / 'w', tmp_path / 'whole')
  assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / 'whole')) <= 640
  rows = read_metrics(tmp_path / 'w')
  assert {row['stage'] for row in rows} == {'pretrain_short', 'pretrain_full'}
  assert all(0 <= row['exact_single'] <= 1 for row in rows if 'exact_single' in row)
  # As if killed in the second stage: it starts from the checkpoint of the first and ends with the
  # same weights.
  newest = max((tmp_path / 'w' / 'checkpoints').glob('[0-9]*'), key=lambda path: int(path.name))
  shutil.rmtree(newest)
  pretrain(tiny(), tmp_path / 'w', tmp_path / 'resumed')
  assert (tmp_path / 'whole' / 'model.safetensors').read_bytes() == (
    tmp_path / 'resumed' / 'model.safetensors'
  ).read_bytes()
  assert read_metrics(tmp_path / 'w') == rows
  with pytest.raises(ValueError, match='of a config that differs in seed'):
    pretrain(tiny(seed=1), tmp_path / 'w', tmp_path / 'other')
  assert not (tmp_path / 'other').exists()
