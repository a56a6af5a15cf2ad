"""The TPU kernel in interpret mode, against the attention that holds every score."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dcore_jax.models.attention.tpu import tree_attention
from tests.models.attention import kernel_contract


# 75 tokens: in no case whole blocks.
@pytest.mark.parametrize(
  'N,K,H,block_q,block_k', [(2, 2, 16, 16, 16), (4, 2, 16, 32, 16), (4, 1, 12, 16, 32)]
)
def test_values_and_gradients_equal_the_reference(N, K, H, block_q, block_k):
  kernel_contract.check_equals_the_reference(
    tree_attention, N, K, H, T=75, block_q=block_q, block_k=block_k
  )


def test_default_blocks_equal_the_reference():
  kernel_contract.check_equals_the_reference(tree_attention, N=2, K=1, H=64, T=600)


def test_bfloat16_is_near_the_float32_reference():
  kernel_contract.check_bfloat16_is_near_the_float32_reference(
    tree_attention, block_q=32, block_k=16
  )


def test_blocks_that_no_query_sees_are_never_read():
  kernel_contract.check_skips_invisible_blocks(tree_attention, block=32, block_q=32, block_k=16)


def test_what_does_not_fit_is_named():
  q = jnp.zeros((1, 16, 4, 16))
  k = jnp.zeros((1, 16, 3, 16))
  end = jnp.full((1, 16), 16)
  with pytest.raises(ValueError, match='N a multiple of K'):
    tree_attention(q, k, k, end)
  with pytest.raises(ValueError, match='differ in dtype: float32, bfloat16'):
    tree_attention(q, q.astype(jnp.bfloat16), q, end)
  with pytest.raises(ValueError, match='blocks of 512 and 64 tokens: a TPU wants multiples of 128'):
    tree_attention(q, q, q, end, block_k=64)
  long = jax.ShapeDtypeStruct((16, 16384, 1, 16), jnp.float32)
  long_end = jax.ShapeDtypeStruct((16, 16384), jnp.int32)
  with pytest.raises(
    ValueError, match='16 rows of 128 x 128 blocks takes 1048576 bytes of scalar memory'
  ):
    jax.eval_shape(
      functools.partial(tree_attention, block_q=128, block_k=128), long, long, long, long_end
    )


@pytest.mark.slow
def test_compiles_for_a_tpu_in_memory_linear_in_the_tokens():
  short, long = kernel_contract.compiled_footprints('tpu', 'v5p:2x2x2', 'libtpu', [16384, 32768])
  # Transposed queries and gradients: 326 and 641 MiB with jax 0.10.2. A boolean mask would add 256
  # and 1024.
  assert short['temporary'] < short['arguments'] + short['outputs']
  assert long['temporary'] < 2.5 * short['temporary']
