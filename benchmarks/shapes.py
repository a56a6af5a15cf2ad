"""Shapes of real models that benchmarks fill with random weights."""

from dcore_jax.models.config import DecoderConfig

# SmolLM2-135M: small enough for a CPU, and as deep as models are.
SMOLLM2 = DecoderConfig(
  vocab_size=49152,
  hidden_size=576,
  intermediate_size=1536,
  num_hidden_layers=30,
  num_attention_heads=9,
  num_key_value_heads=3,
  head_dim=64,
  tie_word_embeddings=True,
  max_position_embeddings=8192,
)
