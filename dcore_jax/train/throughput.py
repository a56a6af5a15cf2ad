"""Operations that a step needs, and the rate at which this device can do them."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax import tokentree
from dcore_jax.models.config import DecoderConfig

# Rows of the square matrices. An accelerator is not filled by what a CPU can multiply in time.
_CPU_SIZE = 2048
_ACCELERATOR_SIZE = 8192


def forward_flops(config: DecoderConfig, tree: tokentree.TokenTree) -> float:
  """Operations of one forward pass over a tree, two for each multiply-add, without padding.

  Layers run on every token, attention on the position + 1 keys that a token sees, and the head on
  loss tokens.
  """
  # Two products, q k and p v, of two operations a component.
  one_key = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
  # The key that a token always sees, itself, is counted among the products.
  return product_flops(config, tree) + one_key * float(tree.position.sum(dtype=np.int64))


def product_flops(config: DecoderConfig, tree: tokentree.TokenTree) -> float:
  """Operations of the products with matrices of the model in a forward pass over a tree.

  A gradient of the matrices takes as many, and is left out where they are frozen. A token's own key
  is counted, too.
  """
  head = 2.0 * config.vocab_size * config.hidden_size
  layers = tree.live * (config.flops_per_token(1) - head)
  return layers + head * np.count_nonzero(tree.weight)


@functools.cache
def matmul_rate(dtype: str) -> float:
  """Operations a second that a large matrix product reaches here, over all devices.

  It is the peak that MFU (model FLOPs utilisation) refers to: measured, since data sheets are not
  reached. The best of three runs counts.
  """
  size = _CPU_SIZE if jax.default_backend() == 'cpu' else _ACCELERATOR_SIZE
  a = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  # The first call is not timed.
  jax.block_until_ready(product(a))  # compiles
  seconds = []
  for _ in range(3):
    began = time.perf_counter()
    jax.block_until_ready(product(a))
    seconds.append(time.perf_counter() - began)
  # Measured on one device; all devices are taken to be alike.
  return jax.device_count() * 2 * size**3 / min(seconds)
