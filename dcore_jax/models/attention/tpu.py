"""Tree attention on TPUs: Pallas-Mosaic programs whose grid is the list of visible blocks.

The list is prefetched into scalar memory, where the index maps look up the blocks of each step. A
step of the grid costs about a third of a microsecond even where it does nothing (the 512 x 512
scores of 4 heads take at least 1.2 on a v5p), and all blocks of a row of 16,384 tokens are 1,024
steps. So the grid is only as long as the list of the fullest row. A step takes the G query heads of
a key head together, so that a block of keys is copied once for all of them.
    forward  grid (B, K, steps), by query block: out, log-sum-exp
    dQ       the same walk
    dK, dV   grid (B, K, steps), by key block, summed over the G heads

Letters as in `tree_kernels`. Besides, O blocks own an accumulator, S blocks are seen by them, and P
entries make the list. Inside, arrays are [B, K, G, T, H] and [B, K, T, H], with tokens and head
last, as the tiles of a TPU need them. The two cores of a chip (v5p) share the rows and key heads: a
device with one row and one key head uses one core.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcore_jax.models.attention import tree_blocks, tree_kernels
from dcore_jax.models.attention.tree_kernels import dot

# A register has 128 lanes. One number a query is kept as a whole row of 128 equal ones.
_LANES = 128
# The list may take half of the 1 MiB of scalar memory (v5, v6).
_SCALAR_BYTES = 512 * 1024

# The compiler gives a kernel 16 MiB of vector memory (v5) unless it asks for more. That is enough
# for bfloat16 and G = 8, and too little for float32 and G = 4. Of these chips v5p has the least, 64
# MiB.
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
  """softmax(q k / sqrt(H)) v in [B, T, N, H], differentiable in q, k and v.

  Query i sees key j iff j <= i < end[j]. Scores, softmax and sums are float32, products run in the
  dtype of the inputs, probabilities have the dtype of v.

  Args:
    q_BTNH: queries; k_BTKH, v_BTKH: keys and values of the same dtype, N a multiple of K.
    end_BT: int32, at least i + 1 for token i (tokentree).
    block_q, block_k: tokens of a step; multiples of 128.
    interpret: run as plain JAX on any device, for tests; it takes any block size.

  Raises:
    ValueError: shapes, dtypes or blocks that do not fit, or a list of blocks that scalar memory
      cannot hold.
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
  """The output and the natural log-sum-exp of each query."""
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  block_q = launch.block_q
  # The mask of blocks is computed on the device, since the ends are data: one program serves all
  # trees of a shape.
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
    # Accumulators live in vector memory from the first to the last step of a query block.
    scratch_shapes=[
      # The running maximum and the sum, each repeated over the lanes of a register.
      pltpu.VMEM((G, block_q, _LANES), jnp.float32),
      pltpu.VMEM((G, block_q, _LANES), jnp.float32),
      pltpu.VMEM((G, block_q, H), jnp.float32),
    ],
    # `end` gets an axis of size 1: a block's last two axes must be tiles or whole.
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
  """Gradients of q, k and v, by one walk over query blocks and one over key blocks."""
  B, T, N, H = q.shape
  K = k.shape[2]
  G = N // K
  visible_BXY = tree_blocks.visible_blocks(end, launch.block_q, launch.block_k)
  visible_BYX = visible_BXY.swapaxes(1, 2)
  # Both programs read the same arrays in the same order.
  operands = (
    end[:, None, :],
    _queries_inside(q, K),
    _keys_inside(k),
    _keys_inside(v),
    _queries_inside(dout, K),
    lse.reshape(B, K, G, T),
    delta.reshape(B, K, G, T),
  )
  # By the name of its spec: `dout` lies like q, the log-sum-exp and delta are rows.
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
  # Now the key blocks own, and the query blocks are seen.
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
    # dK and dV sum over G heads and many queries, in float32 until the key block is finished.
    scratch_shapes=[
      pltpu.VMEM((launch.block_k, H), jnp.float32),
      pltpu.VMEM((launch.block_k, H), jnp.float32),
    ],
  )(*operands)
  return _queries_outside(dq), _keys_inside(dk), _keys_inside(dv)


# One function with its own derivative; padding stays outside of it.
_attend = tree_kernels.differentiable(_forward, _backward)


# Tokens and head must be the last two axes: a TPU's tiles are 8 x 128 of them.
def _queries_inside(x_BTNH, K):
  """[B, T, N, H] -> [B, K, G, T, H]."""
  B, T, N, H = x_BTNH.shape
  return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _queries_outside(x_BKGTH):
  """[B, K, G, T, H] -> [B, T, N, H]."""
  B, K, G, T, H = x_BKGTH.shape
  return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _keys_inside(x_BTKH):
  """[B, T, K, H] <-> [B, K, T, H]; it is its own inverse."""
  return x_BTKH.swapaxes(1, 2)


def _program(body, launch, visible_BOS, K, *, in_specs, out_specs, out_shape, scratch_shapes):
  """Makes the call of one program.

  Each of the blocks O owns an accumulator, and meets those of the blocks S that it sees.

  Raises:
    ValueError: the list of blocks does not fit into scalar memory.
  """
  B, owners, S = visible_BOS.shape
  # Checked here, to name rows and blocks in the error. An entry takes 4 bytes.
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
      # A grid size that depends on data: rows with shorter lists idle at the end.
      grid=(B, K, count_B.max()),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch_shapes,
    ),
    compiler_params=pltpu.CompilerParams(
      # Rows and key heads are independent, steps of one list are not: the accumulators stay.
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=_VECTOR_BYTES,
    ),
  )
  # Flat, because scalar memory pads a last axis to 128 words.
  return functools.partial(call, list_BP.reshape(-1), count_B)


def _specs(launch, q, k, shape_BOS, queries_own):
  """Describes the block of each array that a step reads or writes.

  Entry o * S + s of the list is the block o that owns and the block s that it sees.
  """
  _, owners, S = shape_BOS
  G = q.shape[2] // k.shape[2]
  H = q.shape[3]

  def owner(b, step, list_ref):
    """The block that owns in this step."""
    return jax.lax.div(list_ref[b * (owners * S) + step], S)

  def seen(b, step, list_ref):
    """The block that is seen in this step."""
    return jax.lax.rem(list_ref[b * (owners * S) + step], S)

  # x is always a block of queries, y one of keys, whichever of the two owns.
  x, y = (owner, seen) if queries_own else (seen, owner)
  return {
    'end': pl.BlockSpec(
      (None, 1, launch.block_k), lambda b, k, step, blocks, _: (b, 0, y(b, step, blocks))
    ),
    # All G heads of a key head in one block: its keys are copied once for them.
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
  """Runs one step of the grid.

  `start` runs where a block begins to own, `meet(owner, seen)` for each pair of blocks, and
  `finish` where the owner sees no more. A row whose list is shorter than the grid does nothing in
  the steps behind its end. They copy nothing either, since the last entry repeats.
  """
  row = pl.program_id(0)
  step = pl.program_id(2)
  # The list of all rows is flat; this row's part begins here.
  first = row * (list_ref.shape[0] // pl.num_programs(0))
  count = count_ref[row]
  owner = jax.lax.div(list_ref[first + step], S)
  # Clamped, so that no step reads outside the row's list.
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
    """Empties the accumulators of a query block."""
    # Above HIDDEN_SCORE, so that a block that hides all keys adds nothing (tree_kernels).
    top_ref[...] = jnp.full(top_ref.shape, tree_kernels.LEAST_TOP, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  def meet(x, y):
    """One step of the online softmax, for the G heads of the key head."""
    k = k_ref[...]
    v = v_ref[...]
    # The mask is the same for all heads, and is computed once.
    seen = _seen(launch, x, y, end_ref[...], key_axis=1)
    # A Python loop, unrolled: G is small and known when the program is compiled.
    for g in range(q_ref.shape[0]):
      scores = jnp.where(
        seen, dot(q_ref[g], k, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE
      )
      top = top_ref[g]
      new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
      # All lanes hold the same number, so that one column of them broadcasts over the keys.
      weights = jnp.exp(scores - new_top[:, :1])
      # What has been summed so far refers to the old maximum.
      shrink = jnp.exp(top - new_top)
      top_ref[g] = new_top
      total_ref[g] = total_ref[g] * shrink + weights.sum(axis=1, keepdims=True)
      acc_ref[g] = acc_ref[g] * shrink[:, :1] + dot(weights.astype(v.dtype), v)

  def finish():
    """Divides by the sums and writes the results of a query block."""
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
    """Empties the accumulator of a query block."""
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  def meet(x, y):
    """Adds what one block of keys contributes to dQ."""
    k = k_ref[...]
    v = v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=1)
    for g in range(q_ref.shape[0]):
      scores = jnp.where(
        seen, dot(q_ref[g], k, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE
      )
      # exp(score - lse) is the probability itself, recomputed instead of read.
      weights = jnp.exp(scores - lse_ref[g, :][:, None])
      # The derivative of softmax: dS = P (dP - delta), with delta = out . dout.
      dscores = weights * (dot(dout_ref[g], v, transpose_b=True) - delta_ref[g, :][:, None])
      acc_ref[g] += dot(dscores.astype(k.dtype), k)

  def finish():
    """Writes dQ; the scale of q k enters once, after the sum."""
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
  """dK and dV of the key block that owns.

  The scores have the keys as rows: sums over queries are then plain products, and nothing is
  transposed.
  """

  def start():
    """Empties the accumulators of a key block."""
    dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
    dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)

  def meet(y, x):
    """Adds what one query block contributes, over the G heads."""
    k = k_ref[...]
    v = v_ref[...]
    seen = _seen(launch, x, y, end_ref[...], key_axis=0)
    for g in range(q_ref.shape[0]):
      q = q_ref[g]
      dout = dout_ref[g]
      scores = jnp.where(
        seen, dot(k, q, transpose_b=True) * launch.scale, tree_kernels.HIDDEN_SCORE
      )
      # [1, queries]: a query is a column here, so that its log-sum-exp broadcasts over rows.
      weights = jnp.exp(scores - lse_ref[g : g + 1, :])
      dv_acc_ref[...] += dot(weights.astype(dout.dtype), dout)
      dscores = weights * (dot(v, dout, transpose_b=True) - delta_ref[g : g + 1, :])
      dk_acc_ref[...] += dot(dscores.astype(q.dtype), q)

  def finish():
    """Writes dK and dV; dV has no scale, since values do not enter the scores."""
    dk_ref[...] = (dk_acc_ref[...] * launch.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)

  _walk(S, list_ref, count_ref, start, meet, finish)


def _seen(launch, x, y, end, key_axis):
  """Returns bool: the query of block x sees the key of block y.

  Keys lie along `key_axis`; `end` [1, keys] holds the ends of the block's keys.
  """
  shape = (launch.block_q, launch.block_k) if key_axis == 1 else (launch.block_k, launch.block_q)
  # Token indices of the row; broadcasted_iota, since a TPU has no arrays of one axis.
  i = x * launch.block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis)
  j = y * launch.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
  return (j <= i) & (i < (end if key_axis == 1 else end[0, :][:, None]))
