"""Attention over a tree's mask block by block, for any backend: memory linear in T, and blocks that
hold nothing skipped.

Forward and backward walk over the lists of tree_blocks.block_map with an online softmax (Milakov
and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), so that no [T, T] array
exists. The backward pass recomputes a block's probabilities from the log of its partition sum and
goes over each block once: five products a block. Letters: B rows, T tokens, N query heads, K key
heads, G = N / K, H head size, X query blocks of Q queries, Y key blocks of C = Q keys, R = G * Q.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dcore_jax.models.attention import tree_blocks
from dcore_jax.models.attention.reference import MASKED_SCORE
from dcore_jax.models.attention.tree_kernels import SAVED


def tree_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  end_BT: jax.Array,
  *,
  block: int | None = None,
) -> jax.Array:
  """softmax(q k / sqrt(H)) v over the keys j <= i < end[j] -> [B, T, N, H]; scores and softmax in
  float32.

  Rows are worked off one after the other. T need not be a multiple of the block: it is filled up
  with tokens that see only themselves. Blocks are squares of 256 tokens, in rows below 1,024 of
  128: on 2 cores, forward and backward at 640 tokens, 128 took 30 ms and 256 35 ms, at 4,096 tokens
  391 and 301.
  """
  T = q_BTNH.shape[1]
  block = min(block or (128 if T < 1024 else 256), -(-T // 8) * 8)
  fill = -T % block
  if fill:
    q_BTNH, k_BTKH, v_BTKH = (
      jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    alone = jnp.broadcast_to(
      jnp.arange(T, T + fill, dtype=end_BT.dtype)[None] + 1, (end_BT.shape[0], fill)
    )
    end_BT = jnp.concatenate([end_BT, alone], axis=1)
  lists = tree_blocks.block_map(end_BT, block, block)
  out_BTNH = jax.lax.map(lambda row: _row(block, *row), (q_BTNH, k_BTKH, v_BTKH, end_BT, lists))
  return out_BTNH[:, :T]


def _query_blocks(x_TNH: jax.Array, K: int, Q: int) -> jax.Array:
  """[T, N, H] -> [X, K, G * Q, H]: the query heads of a key head meet it in one product."""
  T, N, H = x_TNH.shape
  return (
    x_TNH.reshape(T // Q, Q, K, N // K, H)
    .transpose(0, 2, 3, 1, 4)
    .reshape(T // Q, K, N // K * Q, H)
  )


def _from_query_blocks(x_XKRH: jax.Array, Q: int) -> jax.Array:
  X, K, R, H = x_XKRH.shape
  return x_XKRH.reshape(X, K, R // Q, Q, H).transpose(0, 3, 1, 2, 4).reshape(X * Q, K * (R // Q), H)


def _key_blocks(x_TKH: jax.Array, Q: int) -> jax.Array:
  T, K, H = x_TKH.shape
  return x_TKH.reshape(T // Q, Q, K, H).swapaxes(1, 2)


def _from_key_blocks(x_YKCH: jax.Array) -> jax.Array:
  Y, K, C, H = x_YKCH.shape
  return x_YKCH.swapaxes(1, 2).reshape(Y * C, K, H)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _masked_scores(
  q_KRH: jax.Array, k_KCH: jax.Array, end_C: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
  """Scores [K, R, C] of query block x and key block y; masked ones are MASKED_SCORE."""
  (K, R, _) = q_KRH.shape
  C = k_KCH.shape[1]
  query_C = x * C + jnp.arange(C)
  key_C = y * C + jnp.arange(C)
  seen_CC = (key_C[None, :] <= query_C[:, None]) & (query_C[:, None] < end_C[None, :])
  scores = _dot('krh,kch->krc', q_KRH, k_KCH).reshape(K, R // C, C, C)
  return jnp.where(seen_CC[None, None], scores, MASKED_SCORE).reshape(K, R, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row(
  Q: int,
  q_TNH: jax.Array,
  k_TKH: jax.Array,
  v_TKH: jax.Array,
  end_T: jax.Array,
  lists: tree_blocks.BlockMap,
) -> jax.Array:
  return _row_forward(Q, q_TNH, k_TKH, v_TKH, end_T, lists)[0]


def _row_forward(Q, q_TNH, k_TKH, v_TKH, end_T, lists):
  K, H = k_TKH.shape[1:]
  q_XKRH = _query_blocks(q_TNH * H**-0.5, K, Q)
  k_YKCH = _key_blocks(k_TKH, Q)
  v_YKCH = _key_blocks(v_TKH, Q)
  end_YC = end_T.reshape(-1, Q)
  R = q_XKRH.shape[2]

  def query_block(args):
    x, q_KRH, keys_Y, count = args

    def key_block(place, carry):
      top_KR, total_KR, out_KRH = carry
      y = keys_Y[place]
      scores_KRC = _masked_scores(q_KRH, k_YKCH[y], end_YC[y], x, y)
      new_top_KR = jnp.maximum(top_KR, scores_KRC.max(axis=-1))
      keep_KR = jnp.exp(top_KR - new_top_KR)
      weights_KRC = jnp.exp(scores_KRC - new_top_KR[..., None])
      out_KRH = out_KRH * keep_KR[..., None] + _dot(
        'krc,kch->krh', weights_KRC.astype(v_YKCH.dtype), v_YKCH[y]
      )
      return new_top_KR, total_KR * keep_KR + weights_KRC.sum(axis=-1), out_KRH

    # A block in which a query sees nothing leaves weights of exp(0) = 1 behind, which the first
    # real key scales to 0.
    start = (jnp.full((K, R), MASKED_SCORE), jnp.zeros((K, R)), jnp.zeros((K, R, H)))
    top_KR, total_KR, out_KRH = jax.lax.fori_loop(0, count, key_block, start)
    return (out_KRH / total_KR[..., None]).astype(v_TKH.dtype), top_KR + jnp.log(total_KR)

  blocks = jnp.arange(q_XKRH.shape[0]), q_XKRH, lists.keys_BXY, lists.key_count_BX
  out_XKRH, partition_XKR = (checkpoint_name(x, SAVED) for x in jax.lax.map(query_block, blocks))
  return _from_query_blocks(out_XKRH, Q), (
    q_TNH,
    k_TKH,
    v_TKH,
    end_T,
    lists,
    out_XKRH,
    partition_XKR,
  )


def _row_backward(Q, residuals, out_bar_TNH):
  q_TNH, k_TKH, v_TKH, end_T, lists, out_XKRH, partition_XKR = residuals
  K, H = k_TKH.shape[1:]
  q_XKRH = _query_blocks(q_TNH * H**-0.5, K, Q)
  bar_XKRH = _query_blocks(out_bar_TNH, K, Q)
  delta_XKR = (bar_XKRH.astype(jnp.float32) * out_XKRH).sum(axis=-1)
  dtype = q_TNH.dtype

  def key_block(q_grad_XKRH, args):
    y, k_KCH, v_KCH, end_C, queries_X, count = args

    def query_block(place, carry):
      q_grad_XKRH, k_grad_KCH, v_grad_KCH = carry
      x = queries_X[place]
      q_KRH = q_XKRH[x]
      bar_KRH = bar_XKRH[x]
      weights_KRC = jnp.exp(_masked_scores(q_KRH, k_KCH, end_C, x, y) - partition_XKR[x][..., None])
      v_grad_KCH += _dot('krc,krh->kch', weights_KRC.astype(dtype), bar_KRH)
      pull_KRC = weights_KRC * (_dot('krh,kch->krc', bar_KRH, v_KCH) - delta_XKR[x][..., None])
      pull_KRC = pull_KRC.astype(dtype)
      k_grad_KCH += _dot('krc,krh->kch', pull_KRC, q_KRH)
      q_grad_XKRH = q_grad_XKRH.at[x].add(_dot('krc,kch->krh', pull_KRC, k_KCH))
      return q_grad_XKRH, k_grad_KCH, v_grad_KCH

    zero_KCH = jnp.zeros(k_KCH.shape, jnp.float32)
    q_grad_XKRH, k_grad_KCH, v_grad_KCH = jax.lax.fori_loop(
      0, count, query_block, (q_grad_XKRH, zero_KCH, zero_KCH)
    )
    return q_grad_XKRH, (k_grad_KCH, v_grad_KCH)

  keys = _key_blocks(k_TKH, Q), _key_blocks(v_TKH, Q), end_T.reshape(-1, Q)
  blocks = (jnp.arange(keys[0].shape[0]), *keys, lists.queries_BYX, lists.query_count_BY)
  q_grad_XKRH, (k_grad_YKCH, v_grad_YKCH) = jax.lax.scan(
    key_block, jnp.zeros(q_XKRH.shape, jnp.float32), blocks
  )
  q_grad_TNH = (_from_query_blocks(q_grad_XKRH, Q) * H**-0.5).astype(dtype)
  return (
    q_grad_TNH,
    *(_from_key_blocks(grad).astype(dtype) for grad in (k_grad_YKCH, v_grad_YKCH)),
    None,
    None,
  )


_row.defvjp(_row_forward, _row_backward)
