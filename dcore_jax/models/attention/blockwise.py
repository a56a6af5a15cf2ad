"""Attention over a tree's mask block by block, in plain JAX for any backend.

Memory is linear in T, and blocks that no query sees are skipped. Forward and backward walk over the
lists of tree_blocks.block_map with an online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), so that no [T, T] array exists. The backward
pass recomputes a block's probabilities from the log of its partition sum and visits each block
once, with five products.

Letters: B rows, T tokens, N query heads, K key heads, G = N / K, H head size, X query blocks of Q
queries, Y key blocks of C = Q keys, R = G * Q.
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
  """softmax(q k / sqrt(H)) v over the keys j <= i < end[j] -> [B, T, N, H].

  Scores and softmax are float32. Rows are processed one after the other. T need not be a multiple
  of the block: it is padded with tokens that see only themselves. Blocks are squares of 256 tokens,
  or of 128 in rows below 1,024: on 2 cores, forward and backward at 640 tokens took 30 ms with 128
  and 35 ms with 256; at 4,096 tokens they took 391 ms and 301 ms.
  """
  T = q_BTNH.shape[1]
  # A row shorter than one block makes a single block, rounded up to a multiple of 8 tokens.
  block = min(block or (128 if T < 1024 else 256), -(-T // 8) * 8)
  fill = -T % block
  if fill:
    q_BTNH, k_BTKH, v_BTKH = (
      jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    # A padding token that saw nothing would divide 0 by 0, and NaN in the output makes NaN
    # gradients.
    alone = jnp.broadcast_to(
      jnp.arange(T, T + fill, dtype=end_BT.dtype)[None] + 1, (end_BT.shape[0], fill)
    )
    end_BT = jnp.concatenate([end_BT, alone], axis=1)
  lists = tree_blocks.block_map(end_BT, block, block)
  # `map`, not `vmap`: the lists differ in length by row, and a batched loop would run to the
  # longest.
  out_BTNH = jax.lax.map(lambda row: _row(block, *row), (q_BTNH, k_BTKH, v_BTKH, end_BT, lists))
  return out_BTNH[:, :T]


def _query_blocks(x_TNH: jax.Array, K: int, Q: int) -> jax.Array:
  """[T, N, H] -> [X, K, G * Q, H]: the query heads of a key head meet it in one product."""
  T, N, H = x_TNH.shape
  # Head n reads key head n // G, so that N splits into (K, G), in this order.
  return (
    x_TNH.reshape(T // Q, Q, K, N // K, H)
    .transpose(0, 2, 3, 1, 4)
    .reshape(T // Q, K, N // K * Q, H)
  )


def _from_query_blocks(x_XKRH: jax.Array, Q: int) -> jax.Array:
  """Undoes `_query_blocks`: [X, K, R, H] -> [T, N, H]."""
  X, K, R, H = x_XKRH.shape
  return x_XKRH.reshape(X, K, R // Q, Q, H).transpose(0, 3, 1, 2, 4).reshape(X * Q, K * (R // Q), H)


def _key_blocks(x_TKH: jax.Array, Q: int) -> jax.Array:
  # Heads come first, so that a block's product is batched over key heads without a copy.
  """[T, K, H] -> [Y, K, C, H]."""
  T, K, H = x_TKH.shape
  return x_TKH.reshape(T // Q, Q, K, H).swapaxes(1, 2)


def _from_key_blocks(x_YKCH: jax.Array) -> jax.Array:
  """Undoes `_key_blocks`."""
  Y, K, C, H = x_YKCH.shape
  return x_YKCH.swapaxes(1, 2).reshape(Y * C, K, H)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """A product of 16-bit operands is summed in float32: sums over T keys need more than 8 bits."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _masked_scores(
  q_KRH: jax.Array, k_KCH: jax.Array, end_C: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
  """Scores [K, R, C] of query block x and key block y; masked ones are MASKED_SCORE."""
  (K, R, _) = q_KRH.shape
  C = k_KCH.shape[1]
  query_C = x * C + jnp.arange(C)
  key_C = y * C + jnp.arange(C)
  # All G heads of a group share one mask, [C, C], which broadcasts over R = (G, Q).
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
  """Attention of one row; its gradient is `_row_backward`."""
  return _row_forward(Q, q_TNH, k_TKH, v_TKH, end_T, lists)[0]


def _row_forward(Q, q_TNH, k_TKH, v_TKH, end_T, lists):
  K, H = k_TKH.shape[1:]
  # Queries are scaled once here, which costs T * N * H products instead of T * T * N.
  q_XKRH = _query_blocks(q_TNH * H**-0.5, K, Q)
  k_YKCH = _key_blocks(k_TKH, Q)
  v_YKCH = _key_blocks(v_TKH, Q)
  end_YC = end_T.reshape(-1, Q)
  R = q_XKRH.shape[2]

  def query_block(args):
    """Attention of query block x over the key blocks that it sees."""
    x, q_KRH, keys_Y, count = args

    def key_block(place, carry):
      """One step of the online softmax: rescales what is summed, and adds key block y."""
      top_KR, total_KR, out_KRH = carry
      y = keys_Y[place]
      scores_KRC = _masked_scores(q_KRH, k_YKCH[y], end_YC[y], x, y)
      new_top_KR = jnp.maximum(top_KR, scores_KRC.max(axis=-1))
      # What has been summed so far refers to the old maximum.
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

  # Only these two are named for rematerialisation: with them, the backward pass need not run the
  # forward loop again.
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
  # The derivative of softmax takes sum_j p_ij dp_ij off each row; that sum equals out_i . dout_i.
  delta_XKR = (bar_XKRH.astype(jnp.float32) * out_XKRH).sum(axis=-1)
  dtype = q_TNH.dtype

  def key_block(q_grad_XKRH, args):
    """Gradients of key block y, which its queries contribute to; dq is collected in the carry."""
    y, k_KCH, v_KCH, end_C, queries_X, count = args

    def query_block(place, carry):
      """Adds what query block x contributes, from recomputed probabilities."""
      q_grad_XKRH, k_grad_KCH, v_grad_KCH = carry
      x = queries_X[place]
      q_KRH = q_XKRH[x]
      bar_KRH = bar_XKRH[x]
      # exp(score - log partition sum) is the probability itself: no second pass over the keys.
      weights_KRC = jnp.exp(_masked_scores(q_KRH, k_KCH, end_C, x, y) - partition_XKR[x][..., None])
      v_grad_KCH += _dot('krc,krh->kch', weights_KRC.astype(dtype), bar_KRH)
      pull_KRC = weights_KRC * (_dot('krh,kch->krc', bar_KRH, v_KCH) - delta_XKR[x][..., None])
      # Products run in the dtype of the inputs, as in the forward pass; the sums stay float32.
      pull_KRC = pull_KRC.astype(dtype)
      k_grad_KCH += _dot('krc,krh->kch', pull_KRC, q_KRH)
      # dq belongs to the query block, which several key blocks visit one after the other.
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
  # The scaled queries were the input of the products, so that the chain rule scales once more.
  q_grad_TNH = (_from_query_blocks(q_grad_XKRH, Q) * H**-0.5).astype(dtype)
  # `end` and the lists are integers and have no gradient.
  return (
    q_grad_TNH,
    *(_from_key_blocks(grad).astype(dtype) for grad in (k_grad_YKCH, v_grad_YKCH)),
    None,
    None,
  )


_row.defvjp(_row_forward, _row_backward)
