"""config.json in and out, what is refused, and the derived numbers against counts by hand."""
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import abstract_params

# The published Qwen3-8B config.json, the fields of which all must be understood.
QWEN3_8B = json.loads("""{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
  "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""")


def test_qwen3_8b_numbers():
  config = DecoderConfig.from_hf(QWEN3_8B)
  assert config.param_count == 8_190_735_360
  assert config.param_count == sum(math.prod(spec.shape) for spec in jax.tree.leaves(abstract_params(config)))
  assert config.kv_bytes_per_token(jnp.bfloat16) == 147_456
  # 2 flops per matrix parameter (the embedding is a lookup, the norms are vectors), attention on top.
  norms = 36 * (2 * 4096 + 2 * 128) + 4096
  assert config.flops_per_token(1) - 36 * 4 * 32 * 128 == 2 * (config.param_count - 151936 * 4096 - norms)
  assert config.flops_per_token(4097) - config.flops_per_token(1) == 36 * 4 * 32 * 128 * 2048


def test_round_trip_and_both_places_of_rope_theta():
  config = DecoderConfig.from_hf(QWEN3_8B)
  assert DecoderConfig.from_hf(config.to_hf()) == config
  new_style = {name: value for name, value in QWEN3_8B.items() if name != 'rope_theta'}
  new_style['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 1e6}
  assert DecoderConfig.from_hf(new_style) == config
  with pytest.raises(ValueError, match='disagree'):
    DecoderConfig.from_hf(QWEN3_8B | {'rope_parameters': {'rope_theta': 5.0}})
  several = DecoderConfig.from_hf(QWEN3_8B | {'eos_token_id': [1, 2]})
  assert several.stop_token_ids == (1, 2) and several.to_hf()['eos_token_id'] == [1, 2]
  assert hash(several) != hash(config) and config.stop_token_ids == (151645,)


def test_transformers_reads_what_we_write():
  transformers = pytest.importorskip('transformers')
  config = dataclasses.replace(DecoderConfig.from_hf(QWEN3_8B), rope_theta=4321.0, tie_word_embeddings=True)
  written = {name: value for name, value in config.to_hf().items() if name not in ('model_type', 'architectures')}
  assert DecoderConfig.from_hf(transformers.Qwen3Config(**written).to_dict()) == config


@pytest.mark.parametrize('change, match', [
    ({'model_type': 'llama'}, 'llama'), ({'use_sliding_window': True, 'sliding_window': 4096}, 'sliding_window=4096'),
    ({'attention_bias': True}, 'attention_bias'), ({'rope_scaling': {'type': 'yarn'}}, 'rope_scaling'),
    ({'hidden_act': 'gelu'}, 'hidden_act'), ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e6, 'factor': 4.0}}, 'rope_parameters'),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types'), ({'num_experts': 8}, 'num_experts'),
    ({'attention_dropout': 0.1}, 'attention_dropout'), ({'num_key_value_heads': 5}, 'num_key_value_heads'),
    ({'head_dim': 7}, 'head_dim'), ({'hidden_size': 0}, 'hidden_size'), ({'vocab_size': '61'}, 'vocab_size'),
])
def test_what_would_be_ignored_is_refused(change, match):
  with pytest.raises(ValueError, match=match):
    DecoderConfig.from_hf(QWEN3_8B | change)


def test_all_problems_are_named_at_once():
  broken = {name: value for name, value in QWEN3_8B.items() if name != 'hidden_size'}
  with pytest.raises(ValueError, match='(?s)attention_bias.*mystery.*hidden_size is missing'):
    DecoderConfig.from_hf(broken | {'attention_bias': True, 'mystery': 1})
