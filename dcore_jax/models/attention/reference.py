"""Grouped-query attention over a boolean mask, the two masks the project needs, and decoding behind
shared trunks.

Everything runs in the layout [B, K, G, T, H] (keys [B, K, S, H]): batch axes first, so that both
dots are plain batched matrix products; on a CPU this is 2 to 5 times faster than the [B, T, N, H]
layout. The G query heads of a group meet their shared key head inside one product: keys and values
are never repeated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a query that may see nothing (padding) gives numbers and not NaN.
MASKED_SCORE = -1e30


def tree_mask(end_BT: jax.Array) -> jax.Array:
  """[B, T, T] bool: query i sees key j iff j <= i < end[j] (row indices; causal rows have end = T,
  see tokentree).
  """
  index = jnp.arange(end_BT.shape[1])
  causal_TT = index[None, :] <= index[:, None]
  return causal_TT[None, :, :] & (index[None, :, None] < end_BT[:, None, :])


def cache_mask(position_BT: jax.Array, span: int) -> jax.Array:
  """[B, T, S=span] bool: the query at cache position p sees the cache slots 0..p."""
  return jnp.arange(span)[None, None, :] <= position_BT[:, :, None]


def attend(
  q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """softmax(q k / sqrt(H)) v in [B, T, N, H]; scores and softmax in float32, probabilities in the
  dtype of the values.

  Batch axes and (G, T) are merged before the products and the softmax is divided after them: with
  them apart, XLA's CPU compiler copies operands of the gradient transposed (4 rows of 576 tokens,
  forward and backward: 606 ms of CPU time against 478 ms).
  """
  B, T, N, H = q_BTNH.shape
  K, S = k_BKSH.shape[1:3]
  G = N // K
  q_BTNH, rest = _scaled(q_BTNH)
  q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
  q = q_BKGTH.reshape(B * K, G * T, H)
  k = k_BKSH.reshape(B * K, S, H)
  v = v_BKSH.reshape(B * K, S, H)
  # A product with the few rows of a decode step is four times slower on a CPU than a matrix-vector
  # product for each.
  scores = (
    jax.lax.platform_dependent(q, k, cpu=_row_scores, default=_scores) if T == 1 else _scores(q, k)
  )
  scores = jnp.where(
    mask_BTS[:, None, None, :, :], scores.reshape(B, K, G, T, S) * rest, MASKED_SCORE
  )
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1).reshape(B * K, G * T, 1)
  weights = weights.reshape(B * K, G * T, S).astype(v.dtype)
  out = jnp.einsum('bts,bsh->bth', weights, v, preferred_element_type=jnp.float32) / total
  return out.astype(v.dtype).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _scaled(q: jax.Array) -> tuple[jax.Array, float]:
  """(queries, what their scores are still to be multiplied by), together q / sqrt(H).

  Queries of 16 bits stay as they are, as in the kernels: 128 ** -0.5 is 1e-4 too small in bfloat16,
  and the product would be rounded once more.
  """
  scale = q.shape[-1] ** -0.5
  return (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  return jnp.einsum('bth,bsh->bts', q, k, preferred_element_type=jnp.float32)


def _row_scores(q: jax.Array, k: jax.Array) -> jax.Array:
  rows = [
    jnp.einsum('bh,bsh->bs', q[:, row], k, preferred_element_type=jnp.float32)
    for row in range(q.shape[1])
  ]
  return jnp.stack(rows, axis=1)


class Sharing(NamedTuple):
  """Which of B lanes reads which of R trunks.

  Each trunk has W places for lanes; with W = 1 lane b reads trunk b.
  """

  length_R: jax.Array  # tokens of each trunk
  lane_RW: (
    jax.Array
  )  # the lane at each place; whatever stands at a place that nobody has is not used
  place_B: jax.Array  # r * W + w of each lane


def attend_branches(
  q_B1NH: jax.Array,
  trunk_k_RKSH: jax.Array,
  trunk_v_RKSH: jax.Array,
  k_BKZH: jax.Array,
  v_BKZH: jax.Array,
  sharing: Sharing,
  seen_B: jax.Array,
) -> jax.Array:
  """One query a lane over the lane's trunk and the first `seen_B` slots of its own branch -> [B, 1,
  N, H].

  The queries of all lanes of a trunk meet it in one product, and the two parts are merged by their
  log-sum-exp (Juravsky et al. 2024, arXiv:2402.05099). On 2 cores, 4 trunks of 1,024 tokens with 8
  lanes each: 0.45 ms a layer, where a copy of the trunk for every lane takes 2.7 ms.
  """
  B, _, N, H = q_B1NH.shape
  (R, W) = sharing.lane_RW.shape
  K = k_BKZH.shape[1]
  G = N // K
  q_B1NH, rest = _scaled(q_B1NH)
  q_BKGH = q_B1NH.reshape(B, K, G, H)
  held_RS = jnp.arange(trunk_k_RKSH.shape[2])[None, :] < sharing.length_R[:, None]
  held_BZ = jnp.arange(k_BKZH.shape[2])[None, :] < seen_B[:, None]
  if W == 1:
    trunk = _partial(q_BKGH, trunk_k_RKSH, trunk_v_RKSH, held_RS, rest)
  else:
    q_RKWGH = q_BKGH[sharing.lane_RW].swapaxes(1, 2)
    parts = _partial(q_RKWGH.reshape(R, K, W * G, H), trunk_k_RKSH, trunk_v_RKSH, held_RS, rest)

    def by_place(x):
      return x.reshape(R, K, W, G, -1).swapaxes(1, 2).reshape(R * W, K, G, -1)

    trunk = tuple(by_place(part)[sharing.place_B] for part in parts)
  branch = _partial(q_BKGH, k_BKZH, v_BKZH, held_BZ, rest)
  top = jnp.maximum(trunk[0], branch[0])
  total, out = (sum(part[i] * jnp.exp(part[0] - top) for part in (trunk, branch)) for i in (1, 2))
  return (out / total).astype(q_B1NH.dtype).reshape(B, 1, N, H)


def _partial(
  q_MKTH: jax.Array, k_MKSH: jax.Array, v_MKSH: jax.Array, mask_MS: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attention before its division, float32:

  (largest score, sum of exp(score - largest), that sum over values).
  """
  M, K, T, H = q_MKTH.shape
  S = k_MKSH.shape[2]
  q = q_MKTH.reshape(M * K, T, H)
  k = k_MKSH.reshape(M * K, S, H)
  v = v_MKSH.reshape(M * K, S, H)
  scores = (
    jax.lax.platform_dependent(q, k, cpu=_row_scores, default=_scores) if T <= 4 else _scores(q, k)
  )
  scores = jnp.where(mask_MS[:, None, None, :], scores.reshape(M, K, T, S) * scale, MASKED_SCORE)
  top = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  out = jnp.einsum(
    'bts,bsh->bth',
    weights.reshape(M * K, T, S).astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return top, weights.sum(axis=-1, keepdims=True), out.reshape(M, K, T, H)
