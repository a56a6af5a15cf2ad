"""Tree attention on NVIDIA GPUs: Pallas-Triton programs that walk over the visible blocks.

There are three programs; none of them holds more of the T x T scores than one block. They read the
layout [B, T, heads, H] as it comes: one head of a token is 2 H contiguous bytes (256 at H = 128,
two cache lines), so that nothing need be transposed.
    forward  owns block_q queries of a head; a step takes block_k of the keys that they see: out,
    log-sum-exp
    dQ       the same walk
    dK, dV   owns block_q keys of a key head; a step takes block_k of the queries that see them, of
    one of its G heads

The owned block is the larger one, since it and its accumulators stay in registers, while the other
one passes through shared memory. Letters as in `tree_kernels`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dcore_jax.models.attention import tree_blocks, tree_kernels
from dcore_jax.models.attention.tree_kernels import dot

_LOG2_E = math.log2(math.e)  # e^x is computed as 2^(x log2 e): the hardware has 2^x only


def tree_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  end_BT: jax.Array,
  *,
  block_q: int | None = None,
  block_k: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """softmax(q k / sqrt(H)) v in [B, T, N, H], differentiable in q, k and v.

  Query i sees key j iff j <= i < end[j]. Scores, softmax and sums are float32, products run in the
  dtype of the inputs, probabilities have the dtype of v.

  Args:
    q_BTNH: queries; k_BTKH, v_BTKH: keys and values of the same dtype, N a multiple of K. A head
      size that is no power of two is padded to the next, which costs a copy.
    end_BT: int32, at least i + 1 for token i (tokentree).
    block_q, block_k: tokens that a program owns, and tokens that it takes at a step; powers of two
      from 16. By default 128 and 64 for 16-bit inputs up to H = 128, else 64 and 32.
    interpret: run as plain JAX on whatever device there is, for tests.

  Raises:
    ValueError: shapes, dtypes or blocks that do not fit.
  """
  # Triton's blocks have power-of-two sizes, and a tensor core multiplies at least 16 components.
  head_size = max(16, 1 << (q_BTNH.shape[-1] - 1).bit_length())
  # Compiled for an A100 (163 KiB of shared memory, 255 registers a thread), bf16 at H = 128 takes
  # 96 KiB and 255 registers, with 20 bytes spilled. At these sizes float32 would take 225 KiB; at
  # half of them it takes 104 KiB and spills nothing.
  small = q_BTNH.dtype.itemsize <= 2 and head_size <= 128
  block_q = block_q or (128 if small else 64)
  block_k = block_k or (64 if small else 32)
  if min(block_q, block_k) < 16 or block_q & (block_q - 1) or block_k & (block_k - 1):
    raise ValueError(
      f'blocks of {block_q} and {block_k} tokens: a tensor core wants powers of two from 16'
    )
  return tree_kernels.call(
    _attend,
    q_BTNH,
    k_BTKH,
    v_BTKH,
    end_BT,
    block_q=block_q,
    block_k=block_k,
    head_size=head_size,
    interpret=interpret,
  )


def _forward(launch: tree_kernels.Launch, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array):
  """The output, and the log-sum-exp of each query in units of log 2."""
  B, T, N, H = q.shape
  lists = tree_blocks.block_map(end, launch.block_q, launch.block_k)
  specs = _query_owner_specs(launch, q, k)
  # Four warps read a block of keys from shared memory half as often as eight do, as long as their
  # registers hold the accumulators.
  return _program(
    _forward_program,
    launch,
    # Heads are the fastest axis of the grid: programs that share a key head then run together.
    grid=(N, T // launch.block_q, B),
    warps=4 if H * q.dtype.itemsize <= 128 else 8,
    in_specs=[specs['list'], specs['count'], specs['end'], specs['q'], specs['k'], specs['k']],
    out_specs=[specs['q'], specs['row']],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ],
  )(lists.keys_BXY, lists.key_count_BX, end, q, k, v)


def _backward(
  launch: tree_kernels.Launch,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  end: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  dout: jax.Array,
):
  """Gradients of q, k and v, by two programs that each write every result once."""
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  lists = tree_blocks.block_map(end, launch.block_q, launch.block_k)
  specs = _query_owner_specs(launch, q, k)
  # dQ is summed over keys and dK over queries. Two walks cost the scores twice; one walk would need
  # atomic additions, whose order changes from run to run.
  dq = _program(
    _dq_program,
    launch,
    grid=(N, T // launch.block_q, B),
    warps=8,
    in_specs=[
      # `dout` lies like q; the log-sum-exp and delta are one number a query.
      specs['list'],
      specs['count'],
      specs['end'],
      specs['q'],
      specs['k'],
      specs['k'],
      specs['q'],
      specs['row'],
      specs['row'],
    ],
    out_specs=specs['q'],
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
  )(lists.keys_BXY, lists.key_count_BX, end, q, k, v, dout, lse, delta)
  # Now the keys own, so that the two sizes are exchanged. The first keys go first: most queries see
  # them, so that theirs are the longest programs.
  owned = launch.block_q
  taken = launch.block_k
  lists = tree_blocks.block_map(end, taken, owned)
  own = pl.BlockSpec((None, owned, None, H), lambda head, y, b: (b, y, head, 0))
  # A program reads the queries of all G heads: it sums their gradients in registers, where one
  # program a query head would have to add them up in memory.
  heads = pl.BlockSpec((None, T, G, H), lambda head, y, b: (b, 0, head, 0))
  rows = pl.BlockSpec((None, G, T), lambda head, y, b: (b, head, 0))
  dk, dv = _program(
    _dkv_program,
    launch,
    grid=(K, T // owned, B),
    warps=8,
    in_specs=[
      pl.BlockSpec((None, None, T // taken), lambda head, y, b: (b, y, 0)),
      pl.BlockSpec((None, None), lambda head, y, b: (b, y)),
      pl.BlockSpec((None, owned), lambda head, y, b: (b, y)),
      heads,
      own,
      own,
      heads,
      rows,
      rows,
    ],
    out_specs=[own, own],
    out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
  )(lists.queries_BYX, lists.query_count_BY, end, q, k, v, dout, lse, delta)
  return dq, dk, dv


_attend = tree_kernels.differentiable(_forward, _backward)


def _program(body, launch, *, grid, warps, **call):
  """Makes the call of one program."""
  # Two stages: the next block is copied while this one is computed. A third would fit an A100, but
  # no card with 99 KiB of shared memory (sm_86).
  return pl.pallas_call(
    functools.partial(body, launch),
    grid=grid,
    interpret=launch.interpret,
    name=body.__name__.strip('_'),
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
    **call,
  )


def _query_owner_specs(launch, q, k):
  """Describes what a program of the grid (N, X, B) reads and writes.

  Query blocks go last to first: the last ones see most keys, and a long program that starts late
  leaves the rest of the device idle.
  """
  T, N, H = q.shape[1:]
  G = N // k.shape[2]
  X = T // launch.block_q
  Y = T // launch.block_k
  # None drops an axis of size one from what the program sees.
  return {
    'list': pl.BlockSpec((None, None, Y), lambda n, x, b: (b, X - 1 - x, 0)),
    'count': pl.BlockSpec((None, None), lambda n, x, b: (b, X - 1 - x)),
    'end': pl.BlockSpec((None, T), lambda n, x, b: (b, 0)),
    'q': pl.BlockSpec((None, launch.block_q, None, H), lambda n, x, b: (b, X - 1 - x, n, 0)),
    # n // G: the G heads of a key head run side by side, and find its keys in the cache.
    'k': pl.BlockSpec((None, T, None, H), lambda n, x, b: (b, 0, n // G, 0)),
    'row': pl.BlockSpec((None, None, launch.block_q), lambda n, x, b: (b, n, X - 1 - x)),
  }


def _forward_program(launch, list_ref, count_ref, end_ref, q_ref, k_ref, v_ref, out_ref, lse_ref):
  """The online softmax over the key blocks that a query block sees."""
  q = q_ref[:, :]
  # Scores are scaled inside the exponential, in base 2: one multiplication does both.
  factor = launch.scale * _LOG2_E
  # The grid runs backwards over query blocks, see `_query_owner_specs`.
  first_q = (pl.num_programs(1) - 1 - pl.program_id(1)) * launch.block_q

  def step(place, carry):
    """Takes one block of keys into the running maximum, sum and output."""
    top, total, acc = carry
    first_k = list_ref[place] * launch.block_k
    tokens = pl.ds(first_k, launch.block_k)
    # `list_ref` names blocks; the keys of the row are read from memory by their tokens.
    v = v_ref[tokens, :]
    scores = _hide(
      dot(q, k_ref[tokens, :], transpose_b=True), first_q, first_k, end_ref[tokens], key_axis=1
    )
    new_top = jnp.maximum(top, scores.max(axis=1))
    weights = jax.lax.exp2(scores * factor - (new_top * factor)[:, None])
    # What has been summed so far refers to the old maximum.
    shrink = jax.lax.exp2((top - new_top) * factor)
    return (
      new_top,
      total * shrink + weights.sum(axis=1),
      acc * shrink[:, None] + dot(weights.astype(v.dtype), v),
      # The tensor cores take probabilities in the dtype of v; the sum above has them in float32.
    )

  start = (
    jnp.full(q.shape[:1], tree_kernels.LEAST_TOP, jnp.float32),
    jnp.zeros(q.shape[:1], jnp.float32),
    jnp.zeros(q.shape, jnp.float32),
  )
  # A token sees at least itself, so that `total` is never 0.
  top, total, acc = jax.lax.fori_loop(0, count_ref[...], step, start)
  out_ref[:, :] = (acc / total[:, None]).astype(out_ref.dtype)
  lse_ref[:] = top * factor + jnp.log2(total)


def _dq_program(
  launch, list_ref, count_ref, end_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref
):
  """dQ of the query block that a program owns."""
  q = q_ref[:, :]
  dout = dout_ref[:, :]
  lse = lse_ref[:]
  delta = delta_ref[:]
  first_q = (pl.num_programs(1) - 1 - pl.program_id(1)) * launch.block_q

  def step(place, dq):
    """Adds what one block of keys contributes."""
    first_k = list_ref[place] * launch.block_k
    tokens = pl.ds(first_k, launch.block_k)
    k = k_ref[tokens, :]
    scores = _hide(dot(q, k, transpose_b=True), first_q, first_k, end_ref[tokens], key_axis=1)
    # exp2(score - lse) is the probability itself, recomputed instead of read.
    weights = jax.lax.exp2(scores * (launch.scale * _LOG2_E) - lse[:, None])
    # The derivative of softmax: dS = P (dP - delta), with delta = out . dout.
    dscores = weights * (dot(dout, v_ref[tokens, :], transpose_b=True) - delta[:, None])
    return dq + dot(dscores.astype(k.dtype), k)

  dq = jax.lax.fori_loop(0, count_ref[...], step, jnp.zeros(q.shape, jnp.float32))
  # The scale of q k enters dQ once, after the sum.
  dq_ref[:, :] = (dq * launch.scale).astype(dq_ref.dtype)


def _dkv_program(
  launch,
  list_ref,
  count_ref,
  end_ref,
  q_ref,
  k_ref,
  v_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dk_ref,
  dv_ref,
):
  """dK and dV of the key block that a program owns.

  The scores have the keys as rows: sums over queries are then plain products, and nothing is
  transposed.
  """
  k = k_ref[:, :]
  v = v_ref[:, :]
  end = end_ref[:]
  G = q_ref.shape[1]
  taken = launch.block_k
  first_k = pl.program_id(1) * launch.block_q

  def step(place, carry):
    """Adds what one query block of one head contributes."""
    dk, dv = carry
    # Heads run fastest: the G heads of a query block share the ends and the mask's tokens.
    head = jax.lax.rem(place, G)
    first_q = list_ref[jax.lax.div(place, G)] * taken
    tokens = pl.ds(first_q, taken)
    q = q_ref[tokens, head, :]
    dout = dout_ref[tokens, head, :]
    scores = _hide(dot(k, q, transpose_b=True), first_q, first_k, end, key_axis=0)
    weights = jax.lax.exp2(scores * (launch.scale * _LOG2_E) - lse_ref[head, tokens][None, :])
    dv += dot(weights.astype(dout.dtype), dout)
    dscores = weights * (dot(v, dout, transpose_b=True) - delta_ref[head, tokens][None, :])
    return dk + dot(dscores.astype(q.dtype), q), dv

  zeros = jnp.zeros(k.shape, jnp.float32)
  # One loop over blocks and heads, so that a head's block is copied while the last is computed.
  dk, dv = jax.lax.fori_loop(0, count_ref[...] * G, step, (zeros, zeros))
  dk_ref[:, :] = (dk * launch.scale).astype(dk_ref.dtype)
  dv_ref[:, :] = dv.astype(dv_ref.dtype)


def _hide(scores, first_q, first_k, end, key_axis):
  """Replaces the score by HIDDEN_SCORE where query i does not see key j.

  Keys lie along `key_axis`; `end` holds the ends of the block's keys.
  """
  k_size = scores.shape[key_axis]
  q_size = scores.shape[1 - key_axis]
  i = first_q + jnp.arange(q_size, dtype=jnp.int32)
  j = first_k + jnp.arange(k_size, dtype=jnp.int32)
  i = jnp.expand_dims(i, key_axis)
  seen = (jnp.expand_dims(j, 1 - key_axis) <= i) & (i < jnp.expand_dims(end, 1 - key_axis))
  return jnp.where(seen, scores, tree_kernels.HIDDEN_SCORE)
