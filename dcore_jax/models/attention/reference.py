"""Grouped-query attention over a boolean mask, for training and for caches.

Everything runs in the layout [B, K, G, T, H] (keys [B, K, S, H]): with the batch axes first, both
products are plain batched matrix products, which on a CPU are 2 to 5 times faster than in the [B,
T, N, H] layout. The G query heads of a group meet their shared key head inside one product: keys
and values are never repeated.
"""

import jax
import jax.numpy as jnp

# Finite: with -inf, a padding query that sees nothing would give exp(-inf + inf) = NaN.
MASKED_SCORE = -1e30


def tree_mask(end_BT: jax.Array) -> jax.Array:
  """Returns [B, T, T] bool: query i sees key j iff j <= i < end[j].

  i and j are row indices; causal rows have end = T (see tokentree).
  """
  index = jnp.arange(end_BT.shape[1])
  causal_TT = index[None, :] <= index[:, None]
  # In depth-first order, the descendants of j are the tokens j .. end[j] - 1: one interval.
  return causal_TT[None, :, :] & (index[None, :, None] < end_BT[:, None, :])


def cache_mask(position_BT: jax.Array, span: int) -> jax.Array:
  """[B, T, S=span] bool: the query at cache position p sees the cache slots 0..p."""
  return jnp.arange(span)[None, None, :] <= position_BT[:, :, None]


def attend(
  q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """softmax(q k / sqrt(H)) v -> [B, T, N, H].

  Scores and softmax are float32, probabilities have the dtype of the values.
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  G = N // K
  # Batch axes and (G, T) are merged before the products, and the softmax is divided after them:
  # with the axes apart, XLA's CPU compiler copies operands of the gradient transposed (4 rows of
  # 576 tokens, forward and backward: 606 ms of CPU time against 478 ms).
  q_BTNH, rest = _scaled(q_BTNH)
  q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
  q = q_BKGTH.reshape(B * K, G * T, H)
  k = k_BKSH.reshape(B * K, S, H)
  v = v_BKSH.reshape(B * K, S, H)
  # With the few rows of a decode step, a matrix product takes a CPU four times as long as one
  # matrix-vector product a row.
  scores = (
    jax.lax.platform_dependent(q, k, cpu=_row_scores, default=_scores) if T == 1 else _scores(q, k)
  )
  # Masked after scaling, so that MASKED_SCORE keeps its size.
  scores = jnp.where(
    mask_BTS[:, None, None, :, :], scores.reshape(B, K, G, T, S) * rest, MASKED_SCORE
  )
  # The maximum cancels in the quotient, so that its derivative is 0 and need not be computed.
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1).reshape(B * K, G * T, 1)
  weights = weights.reshape(B * K, G * T, S).astype(v.dtype)
  # Dividing H sums of a row is cheaper than dividing its S weights.
  out = jnp.einsum('bts,bsh->bth', weights, v, preferred_element_type=jnp.float32) / total
  return out.astype(v.dtype).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _scaled(q: jax.Array) -> tuple[jax.Array, float]:
  """Returns (queries, remaining factor of their scores), which together make q / sqrt(H).

  16-bit queries stay as they are, as in the kernels: 128 ** -0.5 is 1e-4 too small in bfloat16, and
  the product would be rounded once more.
  """
  scale = q.shape[-1] ** -0.5
  return (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Scores [b, t, s] in float32, as one batched matrix product."""
  return jnp.einsum('bth,bsh->bts', q, k, preferred_element_type=jnp.float32)


def _row_scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """The same scores, as one matrix-vector product a query."""
  rows = [
    jnp.einsum('bh,bsh->bs', q[:, row], k, preferred_element_type=jnp.float32)
    for row in range(q.shape[1])
  ]
  return jnp.stack(rows, axis=1)
