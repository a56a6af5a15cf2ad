import numpy as np

from dcore_jax import tokentree
from dcore_jax.models.config import DecoderConfig
from dcore_jax.train.throughput import forward_flops

CONFIG = DecoderConfig(
  vocab_size=100,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
)


def test_a_row_without_branches_costs_what_the_config_says():
  T = 40
  trained = 12
  row = tokentree.TokenSequence(np.arange(T), (np.arange(T) >= T - trained).astype(np.float32), T)
  head = 2 * CONFIG.vocab_size * CONFIG.hidden_size
  for capacity in (T, 64):  # padding is not counted
    tree = tokentree.pack([row], capacity)
    np.testing.assert_allclose(
      forward_flops(CONFIG, tree), T * (CONFIG.flops_per_token(T) - head) + trained * head
    )


def test_shared_tokens_are_counted_once_and_seen_by_every_branch():
  prompt = np.arange(32)
  rows = []
  for branch in range(4):
    tokens = np.r_[prompt, 40 + branch, 50, 51]
    rows.append(tokentree.TokenSequence(tokens, (np.arange(35) >= 32).astype(np.float32), 32))
  merged, flat = (tokentree.pack(rows, 256, merge=merge) for merge in (True, False))
  one_key = 4 * CONFIG.num_hidden_layers * CONFIG.num_attention_heads * CONFIG.head_dim
  matmul = CONFIG.flops_per_token(1) - 2 * CONFIG.vocab_size * CONFIG.hidden_size
  saved = forward_flops(CONFIG, flat) - forward_flops(CONFIG, merged)
  np.testing.assert_allclose(saved, 3 * (32 * matmul + one_key * 31 * 32 / 2))
