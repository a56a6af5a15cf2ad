"""Presets against what is published of the models."""

import dataclasses
import json

import pytest

from dcore_jax.models import presets

# Parameters in thousands of millions, as the model cards state them, and whether the head is tied.
PUBLISHED = {
  'qwen3_0_6b': (0.6, True),
  'qwen3_1_7b': (1.7, True),
  'qwen3_4b': (4.0, True),
  'qwen3_8b': (8.2, False),
  'qwen3_14b': (14.8, False),
  'qwen3_32b': (32.8, False),
  'qwen2_5_14b': (14.8, False),
  'llama3_1_8b': (8.0, False),
  'deepseek_coder_6_7b': (6.7, False),
}


@pytest.mark.parametrize('name', sorted(presets.RECORDS))
def test_parameters_are_as_many_as_published(name):
  config = presets.config(name)
  billions, tied = PUBLISHED[name]
  assert abs(config.param_count / 1e9 - billions) < 0.051 and config.tie_word_embeddings == tied


def test_the_8b_preset_is_the_published_file(data_dir):
  published = json.loads((data_dir / 'qwen3-tokenizer' / 'config.json').read_text())
  record = presets.record('qwen3_8b')
  assert {name: published.get(name) for name in record} == record


def test_unknown_presets_are_named():
  with pytest.raises(ValueError, match="unknown model preset 'qwen4'.*qwen3_8b"):
    presets.config('qwen4')


def test_models_differ_in_what_they_compute_only():
  one = presets.config('qwen3_8b')
  assert presets.same_model(
    one, dataclasses.replace(one, eos_token_id=(1, 2), initializer_range=0.1)
  )
  assert not presets.same_model(one, dataclasses.replace(one, rope_theta=1e4))
