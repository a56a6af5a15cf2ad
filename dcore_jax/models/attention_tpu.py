"""Tree attention on TPUs: Pallas-Mosaic programs whose grid walks over the lists of visible blocks, forward and backward.

The lists are prefetched into scalar memory, where the index maps read them: the copy of step j is that of the j-th
visible block, and behind the end of a list, where its last block is repeated, nothing is copied and nothing computed.
A program step takes the G query heads of a key head together, so that a block of keys is copied once for all of them.
    forward  grid (B, K, X, Y): out, log-sum-exp
    dQ       the same walk
    dK, dV   grid (B, K, Y, X), the G heads summed on the way
Letters as in `tree_kernels`; arrays are [B, K, G, T, H] and [B, K, T, H] inside, tokens and head last as the tiles want.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcore_jax.models import tree_blocks
from dcore_jax.models import tree_kernels
from dcore_jax.models.tree_kernels import dot

_LANES = 128  # of a register; what a query has one number of is kept in a whole row of them
_SCALAR_BYTES = 512 * 1024  # of the lists; scalar memory has 1 MiB (v4, v5, v6)


def tree_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, end_BT: jax.Array, *, block_q: int = 512,
                   block_k: int = 512, interpret: bool = False) -> jax.Array:
  """softmax(q k / sqrt(H)) v in [B, T, N, H] where query i sees key j iff j <= i < end[j]; differentiable in q, k, v.

  Scores, softmax and sums are float32, products on the dtype of the inputs, probabilities in the dtype of v.

  Args:
    q_BTNH: queries; k_BTKH, v_BTKH: keys and values of the same dtype, N a multiple of K.
    end_BT: int32, at least i + 1 for token i (tokentree).
    block_q, block_k: tokens of a step; multiples of 128.
    interpret: run as plain JAX on whatever device there is, for tests; any block size will do then.

  Raises:
    ValueError: shapes, dtypes or blocks that do not fit, or lists of blocks that scalar memory does not hold.
  """
  if not interpret and (block_q % _LANES or block_k % _LANES):
    raise ValueError(f'blocks of {block_q} and {block_k} tokens: a TPU wants multiples of {_LANES}')
  return tree_kernels.call(_attend, q_BTNH, k_BTKH, v_BTKH, end_BT, block_q=block_q, block_k=block_k,
                           head_size=q_BTNH.shape[-1], interpret=interpret)


def _forward(launch: tree_kernels.Launch, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array):
  B, T, N, H = q.shape
  K = k.shape[2]
  G, block_q = N // K, launch.block_q
  lists = tree_blocks.block_map(end, block_q, launch.block_k)
  specs = _specs(launch, q, k, lists.keys_BXY.shape, queries_own=True)
  out, lse = _program(
      _forward_program, launch, lists.keys_BXY, lists.key_count_BX, K,
      in_specs=[specs['end'], specs['q'], specs['k'], specs['k']], out_specs=[specs['q'], specs['row']],
      out_shape=[jax.ShapeDtypeStruct((B, K, G, T, H), q.dtype), jax.ShapeDtypeStruct((B, K, G, T), jnp.float32)],
      scratch_shapes=[pltpu.VMEM((G, block_q, _LANES), jnp.float32), pltpu.VMEM((G, block_q, _LANES), jnp.float32),
                      pltpu.VMEM((G, block_q, H), jnp.float32)],
  )(end[:, None, :], _queries_inside(q, K), _keys_inside(k), _keys_inside(v))
  return _queries_outside(out), lse.reshape(B, N, T)


def _backward(launch: tree_kernels.Launch, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, lse: jax.Array,
              delta: jax.Array, dout: jax.Array):
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  lists = tree_blocks.block_map(end, launch.block_q, launch.block_k)
  operands = (end[:, None, :], _queries_inside(q, K), _keys_inside(k), _keys_inside(v), _queries_inside(dout, K),
              lse.reshape(B, K, G, T), delta.reshape(B, K, G, T))
  specs = _specs(launch, q, k, lists.keys_BXY.shape, queries_own=True)
  dq = _program(
      _dq_program, launch, lists.keys_BXY, lists.key_count_BX, K,
      in_specs=[specs[name] for name in ('end', 'q', 'k', 'k', 'q', 'row', 'row')], out_specs=specs['q'],
      out_shape=jax.ShapeDtypeStruct((B, K, G, T, H), q.dtype),
      scratch_shapes=[pltpu.VMEM((G, launch.block_q, H), jnp.float32)],
  )(*operands)
  specs = _specs(launch, q, k, lists.queries_BYX.shape, queries_own=False)
  dk, dv = _program(
      _dkv_program, launch, lists.queries_BYX, lists.query_count_BY, K,
      in_specs=[specs[name] for name in ('end', 'q', 'k', 'k', 'q', 'row', 'row')], out_specs=[specs['k'], specs['k']],
      out_shape=[jax.ShapeDtypeStruct((B, K, T, H), k.dtype), jax.ShapeDtypeStruct((B, K, T, H), v.dtype)],
      scratch_shapes=[pltpu.VMEM((launch.block_k, H), jnp.float32), pltpu.VMEM((launch.block_k, H), jnp.float32)],
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


def _program(body, launch, list_BOS, count_BO, K, *, in_specs, out_specs, out_shape, scratch_shapes):
  """The call of one program: O blocks that own an accumulator, S steps for each at most."""
  B, O, S = list_BOS.shape
  if list_BOS.size * 4 > _SCALAR_BYTES:
    raise ValueError(f'the lists of {B} rows of {O} x {S} blocks take {list_BOS.size * 4} bytes of scalar memory, '
                     f'{_SCALAR_BYTES} are there: take larger blocks or fewer rows at a time')
  call = pl.pallas_call(
      functools.partial(body, launch), interpret=launch.interpret, name=body.__name__.strip('_'), out_shape=out_shape,
      grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=2, grid=(B, K, O, S), in_specs=in_specs,
                                             out_specs=out_specs, scratch_shapes=scratch_shapes),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')))
  # Flat: scalar memory pads the last axis of an array to 128 words.
  return functools.partial(call, list_BOS.reshape(-1), count_BO.reshape(-1))


def _specs(launch, q, k, list_shape, queries_own):
  """Which block of each array a step reads. The side that owns takes the grid's third index, the other one the list's."""
  _, O, S = list_shape
  G, H = q.shape[2] // k.shape[2], q.shape[3]

  def place(own):
    return (lambda b, o, s, lists: o) if own else (lambda b, o, s, lists: lists[(b * O + o) * S + s])

  x, y = place(queries_own), place(not queries_own)
  return {
      'end': pl.BlockSpec((None, 1, launch.block_k), lambda b, k, o, s, lists, _: (b, 0, y(b, o, s, lists))),
      'q': pl.BlockSpec((None, None, G, launch.block_q, H), lambda b, k, o, s, lists, _: (b, k, 0, x(b, o, s, lists), 0)),
      'k': pl.BlockSpec((None, None, launch.block_k, H), lambda b, k, o, s, lists, _: (b, k, y(b, o, s, lists), 0)),
      'row': pl.BlockSpec((None, None, G, launch.block_q), lambda b, k, o, s, lists, _: (b, k, 0, x(b, o, s, lists))),
  }


def _walk(list_ref, count_ref, start, step, finish):
  """`start`, `step(own block, listed block)` for each listed block, `finish`, at their places in the grid (B, K, O, S)."""
  own, place, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
  row = pl.program_id(0) * pl.num_programs(2) + own
  pl.when(place == 0)(start)
  pl.when(place < count_ref[row])(lambda: step(own, list_ref[row * steps + place]))
  pl.when(place == steps - 1)(finish)


def _forward_program(launch, list_ref, count_ref, end_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, top_ref, total_ref, acc_ref):
  def start():
    top_ref[...] = jnp.full(top_ref.shape, tree_kernels.LEAST_TOP, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  def step(x, y):
    k, v = k_ref[...], v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=1)
    for g in range(q_ref.shape[0]):
      scores = jnp.where(seen, dot(q_ref[g], k, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE)
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

  _walk(list_ref, count_ref, start, step, finish)


def _dq_program(launch, list_ref, count_ref, end_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, acc_ref):
  def start():
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  def step(x, y):
    k, v = k_ref[...], v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=1)
    for g in range(q_ref.shape[0]):
      scores = jnp.where(seen, dot(q_ref[g], k, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE)
      weights = jnp.exp(scores - lse_ref[g, :][:, None])
      dscores = weights * (dot(dout_ref[g], v, transpose_b=True) - delta_ref[g, :][:, None])
      acc_ref[g] += dot(dscores.astype(k.dtype), k)

  def finish():
    dq_ref[...] = (acc_ref[...] * launch.scale).astype(dq_ref.dtype)

  _walk(list_ref, count_ref, start, step, finish)


def _dkv_program(launch, list_ref, count_ref, end_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref,
                 dk_acc_ref, dv_acc_ref):
  """Scores with the keys as rows: what is summed over queries are then plain products, with nothing transposed."""
  def start():
    dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
    dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)

  def step(y, x):
    k, v = k_ref[...], v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=0)
    for g in range(q_ref.shape[0]):
      q, dout = q_ref[g], dout_ref[g]
      scores = jnp.where(seen, dot(k, q, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE)
      weights = jnp.exp(scores - lse_ref[g:g + 1, :])
      dv_acc_ref[...] += dot(weights.astype(dout.dtype), dout)
      dscores = weights * (dot(v, dout, transpose_b=True) - delta_ref[g:g + 1, :])
      dk_acc_ref[...] += dot(dscores.astype(q.dtype), q)

  def finish():
    dk_ref[...] = (dk_acc_ref[...] * launch.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)

  _walk(list_ref, count_ref, start, step, finish)


def _seen(launch, x, y, end, key_axis):
  """Bool: query of block x sees key of block y; keys along `key_axis`, `end` [1, keys of the block]."""
  shape = (launch.block_q, launch.block_k) if key_axis == 1 else (launch.block_k, launch.block_q)
  i = x * launch.block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis)
  j = y * launch.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
  return (j <= i) & (i < (end if key_axis == 1 else end[0, :][:, None]))
