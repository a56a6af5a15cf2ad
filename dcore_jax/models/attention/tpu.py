"""Tree attention on TPUs: Pallas-Mosaic programs whose grid is the list of visible blocks, forward
and backward.

The list is prefetched into scalar memory, where the index maps read which blocks a step is about. A
step of the grid costs about a third of a microsecond even where it has nothing to do (what 512 x
512 scores of 4 heads cost at least is 1.2 on a v5p) and a row of 16,384 tokens would have 1,024: so
the grid is only as long as the list of the fullest row. A step takes the G query heads of a key
head together, so that a block of keys is copied once for all of them.
    forward  grid (B, K, steps), by query block: out, log-sum-exp
    dQ       the same walk
    dK, dV   grid (B, K, steps), by key block, the G heads summed on the way
Letters as in `tree_kernels`; arrays are [B, K, G, T, H] and [B, K, T, H] inside, tokens and head
last as the tiles want. Two cores of a chip (v5p) share the rows and key heads: with one of each on
a device, one core works.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcore_jax.models.attention import tree_blocks, tree_kernels
from dcore_jax.models.attention.tree_kernels import dot

_LANES = 128  # of a register; what a query has one number of is kept in a whole row of them
_SCALAR_BYTES = 512 * 1024  # of the list; scalar memory has 1 MiB (v5, v6)

# The compiler gives a kernel 16 MiB of vector memory (v5) unless it asks for more: enough for
# bfloat16 and G = 8, too little for float32 and G = 4. v5p has the least, 64 MiB.
_VECTOR_BYTES = 48 * 1024 * 1024


def tree_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  end_BT: jax.Array,
  *,
  block_q: int = 512,
  block_k: int = 512,
  interpret: bool = False,
) -> jax.Array:
  """softmax(q k / sqrt(H)) v in [B, T, N, H] where query i sees key j iff j <= i < end[j];
  differentiable in q, k, v.

  Scores, softmax and sums are float32, products on the dtype of the inputs, probabilities in the
  dtype of v.

  Args:
    q_BTNH: queries; k_BTKH, v_BTKH: keys and values of the same dtype, N a multiple of K.
    end_BT: int32, at least i + 1 for token i (tokentree).
    block_q, block_k: tokens of a step; multiples of 128.
    interpret: run as plain JAX on whatever device there is, for tests; any block size will do then.

  Raises:
    ValueError: shapes, dtypes or blocks that do not fit, or a list of blocks that scalar memory
      does not hold.
  """
  if not interpret and (block_q % _LANES or block_k % _LANES):
    raise ValueError(f'blocks of {block_q} and {block_k} tokens: a TPU wants multiples of {_LANES}')
  return tree_kernels.call(
    _attend,
    q_BTNH,
    k_BTKH,
    v_BTKH,
    end_BT,
    block_q=block_q,
    block_k=block_k,
    head_size=q_BTNH.shape[-1],
    interpret=interpret,
  )


def _forward(launch: tree_kernels.Launch, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array):
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  block_q = launch.block_q
  visible_BXY = tree_blocks.visible_blocks(end, block_q, launch.block_k)
  specs = _specs(launch, q, k, visible_BXY.shape, queries_own=True)
  out, lse = _program(
    _forward_program,
    launch,
    visible_BXY,
    K,
    in_specs=[specs['end'], specs['q'], specs['k'], specs['k']],
    out_specs=[specs['q'], specs['row']],
    out_shape=[
      jax.ShapeDtypeStruct((B, K, G, T, H), q.dtype),
      jax.ShapeDtypeStruct((B, K, G, T), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((G, block_q, _LANES), jnp.float32),
      pltpu.VMEM((G, block_q, _LANES), jnp.float32),
      pltpu.VMEM((G, block_q, H), jnp.float32),
    ],
  )(end[:, None, :], _queries_inside(q, K), _keys_inside(k), _keys_inside(v))
  return _queries_outside(out), lse.reshape(B, N, T)


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
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  visible_BXY = tree_blocks.visible_blocks(end, launch.block_q, launch.block_k)
  visible_BYX = visible_BXY.swapaxes(1, 2)
  operands = (
    end[:, None, :],
    _queries_inside(q, K),
    _keys_inside(k),
    _keys_inside(v),
    _queries_inside(dout, K),
    lse.reshape(B, K, G, T),
    delta.reshape(B, K, G, T),
  )
  read = ('end', 'q', 'k', 'k', 'q', 'row', 'row')
  specs = _specs(launch, q, k, visible_BXY.shape, queries_own=True)
  dq = _program(
    _dq_program,
    launch,
    visible_BXY,
    K,
    in_specs=[specs[name] for name in read],
    out_specs=specs['q'],
    out_shape=jax.ShapeDtypeStruct((B, K, G, T, H), q.dtype),
    scratch_shapes=[pltpu.VMEM((G, launch.block_q, H), jnp.float32)],
  )(*operands)
  specs = _specs(launch, q, k, visible_BYX.shape, queries_own=False)
  dk, dv = _program(
    _dkv_program,
    launch,
    visible_BYX,
    K,
    in_specs=[specs[name] for name in read],
    out_specs=[specs['k'], specs['k']],
    out_shape=[
      jax.ShapeDtypeStruct((B, K, T, H), k.dtype),
      jax.ShapeDtypeStruct((B, K, T, H), v.dtype),
    ],
    scratch_shapes=[
      pltpu.VMEM((launch.block_k, H), jnp.float32),
      pltpu.VMEM((launch.block_k, H), jnp.float32),
    ],
  )(*operands)
  return _queries_outside(dq), _keys_inside(dk), _keys_inside(dv)


_attend = tree_kernels.differentiable(_forward, _backward)


def _queries_inside(x_BTNH, K):
  B, T, N, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _queries_outside(x_BKGTH):
  B, K, G, T, H = x_BKGTH.shape
  return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _keys_inside(x_BTKH):
  """Its own inverse."""
  return x_BTKH.swapaxes(1, 2)


def _program(body, launch, visible_BOS, K, *, in_specs, out_specs, out_shape, scratch_shapes):
  """Makes the call of one program.

  Each of the blocks O owns an accumulator and meets those of the blocks S that it sees.
  """
  B, owners, S = visible_BOS.shape
  if visible_BOS.size * 4 > _SCALAR_BYTES:
    raise ValueError(
      f'the list of {B} rows of {owners} x {S} blocks takes {visible_BOS.size * 4} bytes of '
      f'scalar memory, {_SCALAR_BYTES} are there: take larger blocks or fewer rows at a time'
    )
  list_BP, count_B = tree_blocks.flat_list(visible_BOS)
  call = pl.pallas_call(
    functools.partial(body, launch, S),
    interpret=launch.interpret,
    name=body.__name__.strip('_'),
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, K, count_B.max()),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch_shapes,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=_VECTOR_BYTES
    ),
  )
  # Flat, since scalar memory pads a last axis to 128 words.
  return functools.partial(call, list_BP.reshape(-1), count_B)


def _specs(launch, q, k, shape_BOS, queries_own):
  """Which block of each array a step reads or writes: entry o * S + s of the list is the block that
  owns and the one seen.
  """
  _, owners, S = shape_BOS
  G = q.shape[2] // k.shape[2]
  H = q.shape[3]

  def owner(b, step, list_ref):
    return jax.lax.div(list_ref[b * (owners * S) + step], S)

  def seen(b, step, list_ref):
    return jax.lax.rem(list_ref[b * (owners * S) + step], S)

  x, y = (owner, seen) if queries_own else (seen, owner)
  return {
    'end': pl.BlockSpec(
      (None, 1, launch.block_k), lambda b, k, step, blocks, _: (b, 0, y(b, step, blocks))
    ),
    'q': pl.BlockSpec(
      (None, None, G, launch.block_q, H),
      lambda b, k, step, blocks, _: (b, k, 0, x(b, step, blocks), 0),
    ),
    'k': pl.BlockSpec(
      (None, None, launch.block_k, H), lambda b, k, step, blocks, _: (b, k, y(b, step, blocks), 0)
    ),
    'row': pl.BlockSpec(
      (None, None, G, launch.block_q), lambda b, k, step, blocks, _: (b, k, 0, x(b, step, blocks))
    ),
  }


def _walk(S, list_ref, count_ref, start, meet, finish):
  """One step: `start` where a block begins to own, `meet(owner, seen)`, `finish` where it sees no
  more.

  Behind the end of a row's list, which a fuller row makes, nothing is done, and nothing copied as
  its last entry repeats.
  """
  row = pl.program_id(0)
  step = pl.program_id(2)
  first = row * (list_ref.shape[0] // pl.num_programs(0))
  count = count_ref[row]
  owner = jax.lax.div(list_ref[first + step], S)
  before = jax.lax.div(list_ref[first + jnp.maximum(step - 1, 0)], S)
  after = jax.lax.div(list_ref[first + jnp.minimum(step + 1, count - 1)], S)
  pl.when((step == 0) | (owner != before))(start)
  pl.when(step < count)(lambda: meet(owner, jax.lax.rem(list_ref[first + step], S)))
  pl.when((step == count - 1) | (owner != after))(finish)


def _forward_program(
  launch,
  S,
  list_ref,
  count_ref,
  end_ref,
  q_ref,
  k_ref,
  v_ref,
  out_ref,
  lse_ref,
  top_ref,
  total_ref,
  acc_ref,
):
  def start():
    top_ref[...] = jnp.full(top_ref.shape, tree_kernels.LEAST_TOP, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  def meet(x, y):
    k = k_ref[...]
    v = v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=1)
    for g in range(q_ref.shape[0]):
      scores = jnp.where(
        seen, dot(q_ref[g], k, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE
      )
      top = top_ref[g]
      new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
      weights = jnp.exp(scores - new_top[:, :1])
      shrink = jnp.exp(top - new_top)
      top_ref[g] = new_top
      total_ref[g] = total_ref[g] * shrink + weights.sum(axis=1, keepdims=True)
      acc_ref[g] = acc_ref[g] * shrink[:, :1] + dot(weights.astype(v.dtype), v)

  def finish():
    for g in range(q_ref.shape[0]):
      out_ref[g] = (acc_ref[g] / total_ref[g][:, :1]).astype(out_ref.dtype)
      lse_ref[g, :] = (top_ref[g] + jnp.log(total_ref[g]))[:, 0]

  _walk(S, list_ref, count_ref, start, meet, finish)


def _dq_program(
  launch,
  S,
  list_ref,
  count_ref,
  end_ref,
  q_ref,
  k_ref,
  v_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dq_ref,
  acc_ref,
):
  def start():
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  def meet(x, y):
    k = k_ref[...]
    v = v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=1)
    for g in range(q_ref.shape[0]):
      scores = jnp.where(
        seen, dot(q_ref[g], k, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE
      )
      weights = jnp.exp(scores - lse_ref[g, :][:, None])
      dscores = weights * (dot(dout_ref[g], v, transpose_b=True) - delta_ref[g, :][:, None])
      acc_ref[g] += dot(dscores.astype(k.dtype), k)

  def finish():
    dq_ref[...] = (acc_ref[...] * launch.scale).astype(dq_ref.dtype)

  _walk(S, list_ref, count_ref, start, meet, finish)


def _dkv_program(
  launch,
  S,
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
  dk_acc_ref,
  dv_acc_ref,
):
  """Scores with the keys as rows: what is summed over queries are then plain products, with nothing
  transposed.
  """

  def start():
    dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
    dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)

  def meet(y, x):
    k = k_ref[...]
    v = v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=0)
    for g in range(q_ref.shape[0]):
      q = q_ref[g]
      dout = dout_ref[g]
      scores = jnp.where(
        seen, dot(k, q, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE
      )
      weights = jnp.exp(scores - lse_ref[g : g + 1, :])
      dv_acc_ref[...] += dot(weights.astype(dout.dtype), dout)
      dscores = weights * (dot(v, dout, transpose_b=True) - delta_ref[g : g + 1, :])
      dk_acc_ref[...] += dot(dscores.astype(q.dtype), q)

  def finish():
    dk_ref[...] = (dk_acc_ref[...] * launch.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)

  _walk(S, list_ref, count_ref, start, meet, finish)


def _seen(launch, x, y, end, key_axis):
  """Bool: query of block x sees key of block y; keys along `key_axis`, `end` [1, keys of the
  block].
  """
  shape = (launch.block_q, launch.block_k) if key_axis == 1 else (launch.block_k, launch.block_q)
  i = x * launch.block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis)
  j = y * launch.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
  return (j <= i) & (i < (end if key_axis == 1 else end[0, :][:, None]))
