"""What the Pallas kernels of tree attention share: padding, and the derivative around the programs.

A backend gives two functions. Both read q, dout [B, T, N, H], k, v [B, T, K, H] and end [B, T],
where T is a multiple of the blocks, and walk over the lists of `tree_blocks`. Only the backend
reads the log-sum-exp, so that its unit is the backend's choice.
    forward(launch, q, k, v, end) -> out_BTNH, lse_BNT
    backward(launch, q, k, v, end, lse_BNT, delta_BNT, dout) -> dq_BTNH, dk_BTKH, dv_BTKH

Letters: B rows, T tokens, N query heads, K key heads, G = N / K, H head size, X query blocks, Y key
blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# The score of a key that a query does not see, and the running maximum of a query that has seen no
# key yet. The maximum starts above the hidden score: the weight of a hidden key is then exp(-1e30 +
# 1e29) = 0 and not exp(0) = 1, even in a block that hides all keys.
HIDDEN_SCORE = -1e30
LEAST_TOP = -1e29

# The name under which the output and its log-sum-exp may be kept for the backward pass
# (jax.checkpoint policies).
SAVED = 'attention'


class Launch(NamedTuple):
  """What a kernel is compiled for.

  Its two block sizes in tokens, the factor on q k, and whether it runs as plain JAX.
  """

  block_q: int
  block_k: int
  scale: float
  interpret: bool


def call(
  attend: Callable[..., jax.Array],
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  end_BT: jax.Array,
  *,
  block_q: int,
  block_k: int,
  head_size: int,
  interpret: bool,
) -> jax.Array:
  """Pads tokens to whole blocks and heads to `head_size`, calls `attend`, and cuts the padding off.

  Raises:
    ValueError: shapes or dtypes that do not belong together.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  if (
    k_BTKH.shape != (B, T, K, H) or v_BTKH.shape != k_BTKH.shape or N % K or end_BT.shape != (B, T)
  ):
    raise ValueError(
      f'q {q_BTNH.shape}, k {k_BTKH.shape}, v {v_BTKH.shape} and end {end_BT.shape} do not make '
      '[B, T, N, H], [B, T, K, H] twice and [B, T] with N a multiple of K'
    )
  if not q_BTNH.dtype == k_BTKH.dtype == v_BTKH.dtype:
    raise ValueError(f'q, k and v differ in dtype: {q_BTNH.dtype}, {k_BTKH.dtype}, {v_BTKH.dtype}')
  # Both sizes must divide T: dK and dV are computed with the two blocks in each other's role.
  tail = -T % math.lcm(block_q, block_k)
  pads = ((0, 0), (0, tail), (0, 0), (0, head_size - H))
  # A token of the tail sees itself alone, so that its softmax is finite; nobody sees it.
  itself_BT = jnp.broadcast_to(jnp.arange(T + 1, T + tail + 1, dtype=end_BT.dtype), (B, tail))
  out = attend(
    Launch(block_q=block_q, block_k=block_k, scale=H**-0.5, interpret=interpret),
    # Zeros in padded head components add nothing to a score, hence the scale of the true H.
    *(jnp.pad(x, pads) for x in (q_BTNH, k_BTKH, v_BTKH)),
    jnp.concatenate([end_BT, itself_BT], axis=1),
  )
  return out[:, :T, :, :H]


def differentiable(
  forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., jax.Array]:
  """Makes (launch, q, k, v, end) -> out, whose derivative is `backward`.

  It keeps the output and the log-sum-exp, which takes 4 bytes a token and head.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def attend(launch, q, k, v, end):
    """Attention without a gradient."""
    return forward(launch, q, k, v, end)[0]

  def keep(launch, q, k, v, end):
    """The forward pass of a gradient: the output, and what the backward pass reads."""
    out, lse = (checkpoint_name(x, SAVED) for x in forward(launch, q, k, v, end))
    return out, (q, k, v, end, out, lse)

  def pull_back(launch, kept, dout):
    """Gradients of q, k and v from that of the output."""
    q, k, v, end, out, lse = kept
    # The derivative of softmax takes sum_j p_ij dp_ij off each row; that sum equals out_i . dout_i.
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
    # `end` holds integers, whose gradients jax represents by the dtype float0.
    return *backward(launch, q, k, v, end, lse, delta, dout), np.zeros(end.shape, jax.dtypes.float0)

  attend.defvjp(keep, pull_back)
  return attend


def dot(a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
  """a b or a b^T, summed in float32.

  The matrix units take the operands in their own dtype.
  """
  # By default a float32 product is rounded to TF32 on a GPU and to bfloat16 on a TPU.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  dimensions = (((1,), (1 if transpose_b else 0,)), ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )
