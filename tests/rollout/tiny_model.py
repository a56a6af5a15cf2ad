"""The decoder of the engine's tests, a few thousand parameters."""

from dcore_jax.models.config import DecoderConfig

CONFIG = DecoderConfig(
  vocab_size=37,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  rope_theta=1000.0,
  initializer_range=0.3,
  max_position_embeddings=512,
)
