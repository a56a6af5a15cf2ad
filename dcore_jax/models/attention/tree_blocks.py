"""Which blocks of a tree's attention matrix hold visible keys: what attention walks over.

Query i sees key j iff j <= i < end[j] (tokentree). In depth-first order a branch does not see its
siblings, so that many blocks below the diagonal are empty; what is left of a row is its trunk and
its own branch. Letters: B rows, T tokens, X query blocks, Y key blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class BlockMap(NamedTuple):
  """The visible blocks as lists with counts, by query block and by key block.

  keys_BXY[b, x, :key_count_BX[b, x]] are the key blocks that query block x sees, ascending.
  queries_BYX[b, y, :query_count_BY[b, y]] are the query blocks that see key block y, ascending.
  Behind its count a list repeats its last entry, so that a kernel which prefetches fetches nothing
  new there.
  """

  keys_BXY: jax.Array
  key_count_BX: jax.Array
  queries_BYX: jax.Array
  query_count_BY: jax.Array


def visible_blocks(end_BT: jax.Array | np.ndarray, block_q: int, block_k: int) -> jax.Array:
  """Returns [B, X, Y] bool: some query of block x may see some key of block y.

  It is exact where the blocks do not overlap. A block on the diagonal always counts, since each
  token sees itself. T must be a multiple of both sizes.
  """
  B, T = end_BT.shape
  if T % block_q or T % block_k:
    raise ValueError(
      f'{T} tokens do not divide into blocks of {block_q} queries and {block_k} keys'
    )
  # The latest queries see the key whose subtree ends last; it stands for its whole block.
  last_end_BY = end_BT.reshape(B, T // block_k, block_k).max(axis=2)
  # numpy, since block indices are constants of the compiled program.
  first_q_X = np.arange(0, T, block_q)
  first_k_Y = np.arange(0, T, block_k)
  causal_XY = first_k_Y[None, :] < first_q_X[:, None] + block_q
  # The two sizes may differ: a block touches the diagonal if both intervals of tokens overlap.
  diagonal_XY = causal_XY & (first_q_X[:, None] < first_k_Y[None, :] + block_k)
  return diagonal_XY[None] | causal_XY[None] & (last_end_BY[:, None, :] > first_q_X[None, :, None])


def block_map(end_BT: jax.Array, block_q: int, block_k: int) -> BlockMap:
  """Returns the lists of `visible_blocks` in int32, computed on the device that holds the ends."""
  visible_BXY = visible_blocks(end_BT, block_q, block_k)
  keys_BXY, key_count_BX = _lists(visible_BXY)
  queries_BYX, query_count_BY = _lists(visible_BXY.swapaxes(1, 2))
  return BlockMap(
    keys_BXY=keys_BXY,
    key_count_BX=key_count_BX,
    queries_BYX=queries_BYX,
    query_count_BY=query_count_BY,
  )


def flat_list(visible_BXY: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns all visible blocks of a row as one list, int32 [B, X * Y], and its count [B].

  An entry is x * Y + y; entries ascend, and the last one is repeated.
  """
  # One list of all blocks is a list with a single owner.
  list_B1P, count_B1 = _lists(visible_BXY.reshape(len(visible_BXY), 1, -1))
  return list_B1P[:, 0], count_B1[:, 0]


def _lists(visible: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Lists the true entries of the last axis in front, ascending, and counts them."""
  # Counts are int32, which is what scalar memory and loop bounds of the kernels take.
  count = visible.sum(axis=-1, dtype=jnp.int32)
  # A stable sort of "not visible" puts visible blocks first and keeps their order; shapes stay
  # static, which `nonzero` would not allow.
  order = jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32)
  # Behind the count, the index stays at the last visible block: its entry repeats.
  place = jnp.minimum(jnp.arange(order.shape[-1])[None, None, :], count[..., None] - 1)
  return jnp.take_along_axis(order, place, axis=-1), count
