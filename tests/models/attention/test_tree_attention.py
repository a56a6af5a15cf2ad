"""Every implementation of the attention of packed rows against the reference: values, gradients,
what is skipped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models.attention import blockwise, tree_attention, tree_blocks
from tests.models.attention.test_tree_blocks import random_ends


def inputs(T, N=4, K=2, H=16, B=2, seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)

  def draw(heads):
    return jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype)

  ends = [
    random_ends(rng, T),
    np.where(np.arange(T) < T // 2, T // 2, np.arange(T) + 1),
  ]  # the second ends in padding
  return draw(N), draw(K), draw(K), jnp.asarray(np.stack(ends[:B]), jnp.int32), draw(N)


def value_and_gradients(attend, q, k, v, end, bar):
  out, pull = jax.vjp(lambda *qkv: attend(*qkv, end), q, k, v)
  return out, *pull(bar)


REFERENCE = tree_attention.IMPLEMENTATIONS['reference']


@pytest.mark.parametrize(
  'T,N,K,block',
  [
    (96, 4, 2, 16),
    (100, 2, 2, 16),
    (37, 4, 1, 16),
    (5, 2, 1, 16),
    (300, 5, 1, None),
    (1300, 5, 1, None),
  ],
)  # its own: 128, and 256 from 1,024 tokens on
def test_blockwise_equals_the_reference(T, N, K, block):
  arguments = inputs(T, N, K)
  want = jax.jit(functools.partial(value_and_gradients, REFERENCE))(*arguments)
  got = jax.jit(
    functools.partial(value_and_gradients, functools.partial(blockwise.tree_attention, block=block))
  )(*arguments)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_blockwise_in_bfloat16_stays_within_its_rounding():
  """Inputs, probabilities and output have 8 bits: errors of 2^-9 relative each, on sums of |value|
  up to 4.
  """
  q, k, v, end, bar = inputs(256, seed=1)
  narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  want = value_and_gradients(REFERENCE, *(x.astype(jnp.float32) for x in narrow), end, bar)
  got = value_and_gradients(blockwise.tree_attention, *narrow, end, bar.astype(jnp.bfloat16))
  for a, b in zip(got, want, strict=True):
    assert a.dtype == jnp.bfloat16
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a.astype(jnp.float32) / scale, b / scale, atol=0.01)


def test_blocks_that_nothing_sees_are_never_read():
  """A trunk of 16 tokens and branches of 16.

  NaNs in a sibling's keys and values would reach every sum they enter.
  """
  T = 64
  block = 16
  q, k, v, _, _ = inputs(T, B=1)
  end = jnp.asarray(np.concatenate([np.full(16, T), np.repeat([32, 48, 64], 16)])[None], jnp.int32)
  poisoned = [x.at[:, 16:32].set(jnp.nan) for x in (k, v)]
  want = REFERENCE(q, k, v, end)
  got = blockwise.tree_attention(q, *poisoned, end, block=block)
  np.testing.assert_allclose(got[:, 32:], want[:, 32:], atol=1e-5)
  assert np.isnan(got[:, 16:32]).all()
  assert (
    int(tree_blocks.block_map(end, block, block).key_count_BX.sum()) == 1 + 2 + 2 + 2
  )  # of 10 causal ones


def test_memory_is_linear_in_the_row():
  def temporaries(T):
    shapes = [jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (4, 2, 2)]
    end = jax.ShapeDtypeStruct((1, T), jnp.int32)
    bar = shapes[0]
    step = jax.jit(functools.partial(value_and_gradients, blockwise.tree_attention))
    return step.lower(*shapes, end, bar).compile().memory_analysis().temp_size_in_bytes

  small = temporaries(2048)
  large = temporaries(16384)
  assert large < 9 * small
  assert large < 4 * 16384**2 / 4  # a quarter of one head's scores alone


def test_auto_names_an_implementation_and_unknown_ones_are_refused():
  assert tree_attention.resolve('auto') == 'blockwise'  # tests run on a CPU
  with pytest.raises(ValueError, match="attention = 'flash'"):
    tree_attention.resolve('flash')
