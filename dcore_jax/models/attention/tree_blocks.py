"""Which blocks of a tree's attention matrix hold anything: what blockwise attention and the kernels
walk over.

Query i sees key j iff j <= i < end[j] (tokentree). In depth-first order a branch does not see its
siblings, so that of the blocks below the diagonal many hold nothing; what is left of a row is its
trunk and its own branch. Letters: B rows, T tokens, X query blocks, Y key blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class BlockMap(NamedTuple):
  """For each query block the key blocks that it sees something of, and the other way round, as
  lists with counts.

  keys_BXY[b, x, :key_count_BX[b, x]] are ascending key blocks, queries_BYX[b, y, :query_count_BY[b,
  y]] ascending query blocks; behind them the last one is repeated, so that a kernel which
  prefetches fetches nothing new there.
  """

  keys_BXY: jax.Array
  key_count_BX: jax.Array
  queries_BYX: jax.Array
  query_count_BY: jax.Array


def visible_blocks(end_BT: jax.Array | np.ndarray, block_q: int, block_k: int) -> jax.Array:
  """[B, X, Y] bool: some query of block x may see some key of block y.

  T must be a multiple of both sizes.

  Exact where the blocks do not overlap; one on the diagonal always counts, since each token sees
  itself.
  """
  B, T = end_BT.shape
  if T % block_q or T % block_k:
    raise ValueError(
      f'{T} tokens do not divide into blocks of {block_q} queries and {block_k} keys'
    )
  last_end_BY = end_BT.reshape(B, T // block_k, block_k).max(axis=2)
  first_q_X = np.arange(0, T, block_q)
  first_k_Y = np.arange(0, T, block_k)
  causal_XY = first_k_Y[None, :] < first_q_X[:, None] + block_q
  diagonal_XY = causal_XY & (first_q_X[:, None] < first_k_Y[None, :] + block_k)
  return diagonal_XY[None] | causal_XY[None] & (last_end_BY[:, None, :] > first_q_X[None, :, None])


def block_map(end_BT: jax.Array, block_q: int, block_k: int) -> BlockMap:
  """The lists of `visible_blocks`, int32, computed where the ends are."""
  visible_BXY = visible_blocks(end_BT, block_q, block_k)
  return BlockMap(*_lists(visible_BXY), *_lists(visible_BXY.swapaxes(1, 2)))


def flat_list(visible_BXY: jax.Array) -> tuple[jax.Array, jax.Array]:
  """All visible blocks of a row as one list, int32 [B, X * Y] and its count [B]: x * Y + y,
  ascending, the last repeated.
  """
  list_B1P, count_B1 = _lists(visible_BXY.reshape(len(visible_BXY), 1, -1))
  return list_B1P[:, 0], count_B1[:, 0]


def _lists(visible: jax.Array) -> tuple[jax.Array, jax.Array]:
  count = visible.sum(axis=-1, dtype=jnp.int32)
  order = jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32)
  place = jnp.minimum(jnp.arange(order.shape[-1])[None, None, :], count[..., None] - 1)
  return jnp.take_along_axis(order, place, axis=-1), count
