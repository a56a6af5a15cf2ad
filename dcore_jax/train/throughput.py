"""Operations that a step needs, and the rate at which this device can do them."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax import tokentree
from dcore_jax.models.config import DecoderConfig

_SIZES = {'cpu': 2048}  # of the matrices; larger ones, to fill an accelerator, elsewhere


def forward_flops(config: DecoderConfig, tree: tokentree.TokenTree) -> float:
  """Operations of one forward pass over a tree, two a multiply-add: what is computed, without padding.

  Layers on every token, attention on the position + 1 keys that a token sees, the head on loss tokens.
  """
  head = 2.0 * config.vocab_size * config.hidden_size
  one_key = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
  return (
    tree.live * (config.flops_per_token(1) - head)
    + one_key * float(tree.position.sum(dtype=np.int64))
    + head * np.count_nonzero(tree.weight)
  )


@functools.cache
def matmul_rate(dtype: str) -> float:
  """Operations a second that a large matrix product of this type reaches here, over all devices: the peak that MFU refers to."""
  size = _SIZES.get(jax.default_backend(), 8192)
  a = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  jax.block_until_ready(product(a))
  seconds = []
  for _ in range(3):
    began = time.perf_counter()
    jax.block_until_ready(product(a))
    seconds.append(time.perf_counter() - began)
  return jax.device_count() * 2 * size**3 / min(seconds)
