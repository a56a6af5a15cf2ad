"""Grouped-query attention over a boolean mask, and the two masks the project needs.

Everything runs in the layout [B, K, G, T, H] (keys [B, K, S, H]): batch axes first, so that both dots are plain
batched matrix products; on a CPU this is 2 to 5 times faster than the [B, T, N, H] layout. The G query heads of a
group meet their shared key head inside one product: keys and values are never repeated.
"""
import jax
import jax.numpy as jnp

# Finite, so that a query that may see nothing (padding) gives numbers and not NaN.
MASKED_SCORE = -1e30


def tree_mask(end_BT: jax.Array) -> jax.Array:
  """[B, T, T] bool: query i sees key j iff j <= i < end[j] (row indices; causal rows have end = T, see tokentree)."""
  index = jnp.arange(end_BT.shape[1])
  causal_TT = index[None, :] <= index[:, None]
  return causal_TT[None, :, :] & (index[None, :, None] < end_BT[:, None, :])


def cache_mask(position_BT: jax.Array, span: int) -> jax.Array:
  """[B, T, S=span] bool: the query at cache position p sees the cache slots 0..p."""
  return jnp.arange(span)[None, None, :] <= position_BT[:, :, None]


def attend(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """softmax(q k / sqrt(H)) v in [B, T, N, H]; scores and softmax in float32, probabilities in the dtype of the values.

  Batch axes and (G, T) are merged before the products and the softmax is divided after them: with them apart, XLA's CPU
  compiler copies operands of the gradient transposed (4 rows of 576 tokens, forward and backward: 606 ms of CPU time
  against 478 ms).
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  G = N // K
  q_BKGTH = (q_BTNH * H ** -0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
  q, k, v = q_BKGTH.reshape(B * K, G * T, H), k_BKSH.reshape(B * K, S, H), v_BKSH.reshape(B * K, S, H)
  # A product with the few rows of a decode step is four times slower on a CPU than a matrix-vector product for each.
  scores = jax.lax.platform_dependent(q, k, cpu=_row_scores, default=_scores) if T == 1 else _scores(q, k)
  scores = jnp.where(mask_BTS[:, None, None, :, :], scores.reshape(B, K, G, T, S), MASKED_SCORE)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1).reshape(B * K, G * T, 1)
  weights = weights.reshape(B * K, G * T, S).astype(v.dtype)
  out = jnp.einsum('bts,bsh->bth', weights, v, preferred_element_type=jnp.float32) / total
  return out.astype(v.dtype).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.einsum('bth,bsh->bts', q, k, preferred_element_type=jnp.float32)


def _row_scores(q: jax.Array, k: jax.Array) -> jax.Array:
  rows = [jnp.einsum('bh,bsh->bs', q[:, row], k, preferred_element_type=jnp.float32) for row in range(q.shape[1])]
  return jnp.stack(rows, axis=1)
