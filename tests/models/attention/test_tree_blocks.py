"""The block lists against the mask itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models.attention import reference, tree_blocks


def random_ends(rng: np.random.Generator, T: int) -> np.ndarray:
  """Ends of a random forest in depth-first order."""
  ends = np.zeros(T, np.int32)
  open_ = []
  for i in range(T):
    while open_ and rng.random() < (0.02 if rng.random() < 0.9 else 0.6):
      ends[open_.pop()] = i
    open_.append(i)
  ends[open_] = T
  return ends


@pytest.mark.parametrize('block_q,block_k', [(8, 8), (16, 8), (8, 32)])
def test_block_map_lists_exactly_the_blocks_with_something_to_see(block_q, block_k):
  rng = np.random.default_rng(0)
  end = np.stack([random_ends(rng, 96), np.arange(1, 97), np.full(96, 96)]).astype(np.int32)
  mask = np.asarray(reference.tree_mask(jnp.asarray(end)))
  B = 3
  X = 96 // block_q
  Y = 96 // block_k
  holds = mask.reshape(B, X, block_q, Y, block_k).any(axis=(2, 4))
  visible = np.asarray(tree_blocks.visible_blocks(jnp.asarray(end), block_q, block_k))
  assert (visible >= holds).all()
  overlap = (np.arange(X)[:, None] * block_q < (np.arange(Y) + 1) * block_k) & (
    np.arange(Y) * block_k < (np.arange(X)[:, None] + 1) * block_q
  )
  np.testing.assert_array_equal(visible & ~overlap, holds & ~overlap)
  lists = tree_blocks.block_map(jnp.asarray(end), block_q, block_k)
  flat, flat_count = (np.asarray(x) for x in tree_blocks.flat_list(jnp.asarray(visible)))
  for b in range(B):
    np.testing.assert_array_equal(flat[b, : flat_count[b]], np.flatnonzero(visible[b]))
    assert (flat[b, flat_count[b] :] == flat[b, flat_count[b] - 1]).all()
    for x in range(X):
      count = int(lists.key_count_BX[b, x])
      row = np.asarray(lists.keys_BXY[b, x])
      np.testing.assert_array_equal(row[:count], np.flatnonzero(visible[b, x]))
      assert (row[count:] == row[count - 1]).all()
    for y in range(Y):
      count = int(lists.query_count_BY[b, y])
      np.testing.assert_array_equal(
        np.asarray(lists.queries_BYX[b, y])[:count], np.flatnonzero(visible[b, :, y])
      )


def test_sizes_that_do_not_divide_are_an_error():
  with pytest.raises(ValueError, match='100 tokens do not divide into blocks of 16'):
    tree_blocks.visible_blocks(jnp.full((1, 100), 100), 16, 16)
