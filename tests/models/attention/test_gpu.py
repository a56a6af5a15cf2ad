"""The Triton kernel in interpret mode, against the attention that holds every score."""

import jax.numpy as jnp
import pytest

from dcore_jax.models.attention.gpu import tree_attention
from tests.models.attention import kernel_contract


# 75 tokens: in no case whole blocks. A head of 12 is padded to 16, where a tensor core's products
# begin.
@pytest.mark.parametrize(
  'N,K,H,block_q,block_k', [(2, 2, 16, 16, 16), (4, 2, 16, 32, 16), (4, 1, 12, 16, 32)]
)
def test_values_and_gradients_equal_the_reference(N, K, H, block_q, block_k):
  kernel_contract.check_equals_the_reference(
    tree_attention, N, K, H, T=75, block_q=block_q, block_k=block_k
  )


def test_default_blocks_equal_the_reference():
  kernel_contract.check_equals_the_reference(tree_attention, N=2, K=1, H=64, T=300)


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
  with pytest.raises(ValueError, match='blocks of 48 and 32 tokens'):
    tree_attention(q, q, q, end, block_q=48)


def test_compiles_for_an_a100_and_keeps_two_numbers_a_token_and_head():
  [footprint] = kernel_contract.compiled_footprints('gpu', 'a100:8', 'jax_cuda12_plugin', [16384])
  # Log-sum-exp and delta of 32 heads: 4 MiB. The rest are lists of blocks; scores of one head alone
  # would be 1 GiB.
  assert 2 * 4 * 32 * 16384 <= footprint['temporary'] < 5 << 20
