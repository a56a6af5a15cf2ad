"""A tokenizer of ToolWorld's words and the configuration of a decoder of a few thousand parameters that reads it."""
import pytest

from dcore_jax.models.config import DecoderConfig
from dcore_jax.worlds.toolworld.tokenizer import build_tokenizer
from dcore_jax.worlds.toolworld.vocabulary import sample_texts


@pytest.fixture(scope='session')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


@pytest.fixture(scope='session')
def model(tokenizer):
  return DecoderConfig.from_hf(dict(
      model_type='qwen3', vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
      num_key_value_heads=1, head_dim=16, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=256,
      eos_token_id=tokenizer.eos_token_id))
