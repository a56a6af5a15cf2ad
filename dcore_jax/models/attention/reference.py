"""Grouped-query attention over a boolean mask: for training, for caches, behind shared trunks.

Everything runs in the layout [B, K, G, T, H] (keys [B, K, S, H]): with the batch axes first, both
products are plain batched matrix products, which on a CPU are 2 to 5 times faster than in the [B,
T, N, H] layout. The G query heads of a group meet their shared key head inside one product: keys
and values are never repeated.
"""

from typing import NamedTuple

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


class Sharing(NamedTuple):
  """Which of B lanes reads which of R trunks.

  Each trunk has W places for lanes; with W = 1 lane b reads trunk b.
  """

  length_R: jax.Array  # tokens of each trunk
  # The lane at each place; the entry of an empty place is arbitrary and its result unused.
  lane_RW: jax.Array
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
  """Attends with one query a lane over its trunk and the first `seen_B` slots of its branch.

  The result is [B, 1, N, H]. The queries of all lanes of a trunk meet it in one product, and the
  two parts are merged by their log-sum-exp (Juravsky et al. 2024, arXiv:2402.05099). On 2 cores, 4
  trunks of 1,024 tokens with 8 lanes each take 0.45 ms a layer, where a copy of the trunk for every
  lane takes 2.7 ms.
  """
  B, _, N, H = q_B1NH.shape
  (R, W) = sharing.lane_RW.shape
  K = k_BKZH.shape[1]
  G = N // K
  q_B1NH, rest = _scaled(q_B1NH)
  q_BKGH = q_B1NH.reshape(B, K, G, H)
  # Trunks have different lengths in slots of one size: slots behind a trunk's end are stale.
  held_RS = jnp.arange(trunk_k_RKSH.shape[2])[None, :] < sharing.length_R[:, None]
  held_BZ = jnp.arange(k_BKZH.shape[2])[None, :] < seen_B[:, None]
  # With one lane a trunk, the queries lie as the trunks do, and nothing is gathered.
  if W == 1:
    trunk = _partial(q_BKGH, trunk_k_RKSH, trunk_v_RKSH, held_RS, rest)
  else:
    # Queries are gathered by trunk: W * G of them share each read of the trunk's keys, which is
    # what decoding waits for.
    q_RKWGH = q_BKGH[sharing.lane_RW].swapaxes(1, 2)
    parts = _partial(q_RKWGH.reshape(R, K, W * G, H), trunk_k_RKSH, trunk_v_RKSH, held_RS, rest)

    def by_place(x):
      """Puts places in order of trunk and place: [R, K, W * G, x] -> [R * W, K, G, x]."""
      return x.reshape(R, K, W, G, -1).swapaxes(1, 2).reshape(R * W, K, G, -1)

    # Back from places to lanes.
    trunk = tuple(by_place(part)[sharing.place_B] for part in parts)
  branch = _partial(q_BKGH, k_BKZH, v_BKZH, held_BZ, rest)
  # The log-sum-exp merge: both parts are brought to the larger maximum, then added.
  trunk_top, trunk_total, trunk_out = trunk
  branch_top, branch_total, branch_out = branch
  top = jnp.maximum(trunk_top, branch_top)
  trunk_weight = jnp.exp(trunk_top - top)
  branch_weight = jnp.exp(branch_top - top)
  total = trunk_total * trunk_weight + branch_total * branch_weight
  out = trunk_out * trunk_weight + branch_out * branch_weight
  return (out / total).astype(q_B1NH.dtype).reshape(B, 1, N, H)


def _partial(
  q_BKTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BS: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attention before its division, in float32; B rows of trunks or of branches, T queries each.

  Returns (largest score, sum of exp(score - largest), sum of exp(score - largest) * value).
  """
  B, K, T, H = q_BKTH.shape
  S = k_BKSH.shape[2]
  q = q_BKTH.reshape(B * K, T, H)
  k = k_BKSH.reshape(B * K, S, H)
  v = v_BKSH.reshape(B * K, S, H)
  # Up to some four queries, matrix-vector products are faster on a CPU, as in `attend`.
  scores = (
    jax.lax.platform_dependent(q, k, cpu=_row_scores, default=_scores) if T <= 4 else _scores(q, k)
  )
  scores = jnp.where(mask_BS[:, None, None, :], scores.reshape(B, K, T, S) * scale, MASKED_SCORE)
  top = scores.max(axis=-1, keepdims=True)
  weights = jnp.exp(scores - top)
  out = jnp.einsum(
    'bts,bsh->bth',
    weights.reshape(B * K, T, S).astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return top, weights.sum(axis=-1, keepdims=True), out.reshape(B, K, T, H)
