"""Attention over pages on TPUs: a Pallas-Mosaic program whose grid is the list of pages to read.

A step of the grid takes n pages of a row, each an operand of its own: the pipeline copies the pages
of the next step meanwhile, by ids that lie in scalar memory. The list has the steps of all rows one
after the other, so that rows of different lengths cost what they read. Where a row's last step has
fewer than n pages, the ids of the step before are repeated, and nothing is copied for them.
    grid (K / heads, steps), the steps of a row in order

A decode step waits for memory: each number that is copied takes part in 2 T operations, where a v5p
could do some 330 for each bfloat16 number of its 2.8 TB/s. The least time of a call is 2 K C H
numbers a page, times their bytes, divided by the bandwidth. Besides, a step of the grid costs about
a third of a microsecond, in which a v5p reads 0.9 MB: n pages are about 1 MiB of keys and values.
The two cores of a v5p share the key heads; a device with one key head uses one core.

Memory tiles are 128 lanes wide, and XLA lays an array out so that an axis of 128 fills them, if any
does: that is H at H = 128, else C at C = 128. The program reads either; another cache would be
copied whole into a padded layout, and is refused. Letters as in `page_reads`; I steps of the list,
O blocks of queries of all rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcore_jax.models.attention import page_reads, tree_kernels
from dcore_jax.models.attention.page_reads import PageReads, Partial, Steps
from dcore_jax.models.attention.reference import MASKED_SCORE
from dcore_jax.models.attention.tree_kernels import dot

# A register has 128 lanes. One number a query is kept as a whole row of 128 equal ones.
_LANES = 128
# Queries of a block are a multiple of a tile's rows, which are 8 for float32 and 16 for bfloat16.
_ROWS = 16
_MOST_QUERIES = 256  # of a block
_STEP_BYTES = 1 << 20  # of keys and values that a step copies
_MOST_PAGES = 16  # of a step: each is an operand
_MOST_HEADS = 8  # of a step: the program is written out for each
# The list may take half of the 1 MiB of scalar memory (v5, v6).
_SCALAR_BYTES = 512 * 1024
_VECTOR_BYTES = 48 * 1024 * 1024  # of 64 MiB, the least that these chips have (v5p)


def partial_pages(
  q_RKTH: jax.Array,
  k_LNKCH: jax.Array,
  v_LNKCH: jax.Array,
  layer: jax.Array,
  reads: PageReads,
  k_scale_LNKC: jax.Array | None = None,
  v_scale_LNKC: jax.Array | None = None,
  *,
  block_q: int | None = None,
  step_pages: int | None = None,
  interpret: bool = False,
) -> Partial:
  """`pages.partial_pages` on a TPU.

  Args:
    q_RKTH: queries.
    k_LNKCH, v_LNKCH: the cache; H or C is a multiple of 128, for int8 C is.
    layer: int32 scalar.
    reads: pages and positions of each row.
    k_scale_LNKC, v_scale_LNKC: scales of a cache of int8.
    block_q: queries of a block: all T of them, or a multiple of 128. By default up to 256.
    step_pages: n, pages of a step of the grid; by default about 1 MiB of keys and values.
    interpret: run as plain JAX on any device, for tests; it takes any block size.

  Raises:
    ValueError: shapes or dtypes that do not fit, or lists of pages that scalar memory cannot hold.
  """
  page_reads.check(q_RKTH, k_LNKCH, v_LNKCH, reads, k_scale_LNKC, v_scale_LNKC)
  R, K, T, H = q_RKTH.shape
  C = k_LNKCH.shape[3]
  quantized = k_scale_LNKC is not None
  if not interpret and C % _LANES and (H % _LANES or quantized):
    raise ValueError(
      f'pages of {C} slots with heads of {H} {k_LNKCH.dtype}: a TPU wants {_LANES} slots, unless '
      f'heads have {_LANES} numbers and no scales'
    )
  slots_last = H % _LANES != 0 and C % _LANES == 0
  heads = _heads(K)
  block_q = block_q or _block(T)
  if reads.steps is None:
    reads = prepare(reads, K, k_LNKCH, block_q=block_q, step_pages=step_pages)
  steps = reads.steps
  n = len(steps.page_I) // len(steps.owner_I)
  padded = steps.last_R1T.shape[2]
  # Where slots fill the lanes, the axes are exchanged in name alone.
  cache = [x.swapaxes(3, 4) if slots_last else x for x in (k_LNKCH, v_LNKCH)]
  scales = [k_scale_LNKC, v_scale_LNKC] if quantized else []
  specs = _specs(padded // block_q, n, heads, block_q, q_RKTH.shape, cache[0].shape, C)
  top, total, out = pl.pallas_call(
    functools.partial(_program, n, slots_last, H**-0.5),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      # A grid size that depends on data.
      grid=(K // heads, steps.count),
      # An array for each of the n pages: the same one, copied nowhere.
      in_specs=[specs['last'], specs['q'], *specs['pages'] * 2]
      + ([*specs['scales'] * 2] if scales else []),
      out_specs=[specs['row'], specs['row'], specs['q']],
      # Accumulators live in vector memory from the first to the last step of a block of queries.
      scratch_shapes=[
        pltpu.VMEM((heads, block_q, _LANES), jnp.float32),
        pltpu.VMEM((heads, block_q, _LANES), jnp.float32),
        pltpu.VMEM((heads, block_q, H), jnp.float32),
      ],
    ),
    out_shape=[
      # Key heads on two axes: a block's last two axes must be tiles or whole.
      *[jax.ShapeDtypeStruct((R, K // heads, heads, padded), jnp.float32)] * 2,
      jax.ShapeDtypeStruct((R, K, padded, H), jnp.float32),
    ],
    interpret=interpret,
    name='page_attention',
    compiler_params=pltpu.CompilerParams(
      # Key heads are independent; the steps of a row are not, since its accumulators stay.
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=_VECTOR_BYTES,
    ),
  )(
    layer.reshape(1),
    steps.owner_I,
    steps.slot_I,
    steps.page_I,
    steps.last_R1T,
    jnp.pad(q_RKTH, ((0, 0), (0, 0), (0, padded - T), (0, 0))),
    *[array for array in (*cache, *scales) for _ in range(n)],
  )
  return Partial(
    top_RKT=top.reshape(R, K, padded)[:, :, :T],
    total_RKT=total.reshape(R, K, padded)[:, :, :T],
    out_RKTH=out[:, :, :T],
  )


def _heads(K: int) -> int:
  """Returns the key heads of a step: at most 8, and at most half, so that two cores share them."""
  most = min(_MOST_HEADS, K if K % 2 else K // 2)
  return max(heads for heads in range(1, most + 1) if K % heads == 0)


def _block(T: int) -> int:
  """Returns the queries of a block: all of them, or equal multiples of 128 up to 256."""
  if T <= _MOST_QUERIES:
    return _ROWS * pl.cdiv(T, _ROWS)
  return _LANES * pl.cdiv(pl.cdiv(T, pl.cdiv(T, _MOST_QUERIES)), _LANES)


def prepare(
  reads: PageReads,
  K: int,
  k_LNKCH: jax.Array,
  *,
  block_q: int | None = None,
  step_pages: int | None = None,
) -> PageReads:
  """Returns the reads with their `steps`, which all layers share; K are a device's key heads.

  A block of queries that sees nothing has one step, which writes that down.

  Raises:
    ValueError: scalar memory cannot hold the lists.
  """
  C, H = k_LNKCH.shape[3:]
  pages_RP = reads.pages_RP
  page_bytes = 2 * _heads(K) * C * H * k_LNKCH.dtype.itemsize
  n = step_pages or max(1, min(_STEP_BYTES // page_bytes, _MOST_PAGES, pages_RP.shape[1]))
  block_q = block_q or _block(reads.position_RT.shape[1])
  last_RT, count_RX = page_reads.blocks(page_reads.last_seen(reads, C), C, block_q)
  P = pages_RP.shape[1]
  X = count_RX.shape[1]
  count_O = count_RX.reshape(-1)
  entries = len(count_O) * pl.cdiv(P, n)
  # Checked here, to name rows and pages in the error. An entry takes 4 bytes.
  if (needed := 4 * entries * (n + 2)) > _SCALAR_BYTES:
    raise ValueError(
      f'the lists of {len(count_O)} blocks of queries with {P} pages take {needed} bytes of scalar '
      f'memory, {_SCALAR_BYTES} are there: take larger pages or fewer rows at a time'
    )
  steps_O = jnp.maximum(pl.cdiv(count_O, n), 1)
  behind_O = jnp.cumsum(steps_O)
  index_I = jnp.arange(entries, dtype=jnp.int32)
  owner_I = jnp.repeat(
    jnp.arange(len(count_O), dtype=jnp.int32), steps_O, total_repeat_length=entries
  )
  step_I = index_I - (behind_O - steps_O)[owner_I]
  place_In = step_I[:, None] * n + jnp.arange(n)[None, :]
  wanted_In = place_In < count_O[owner_I][:, None]
  page_In = pages_RP[owner_I[:, None] // X, jnp.minimum(place_In, P - 1)]
  # The pipeline copies a block where its index changes. So each of the n operands begins with the
  # first page that it will need, and keeps its page until it needs another.
  first_n = jnp.argmax(wanted_In, axis=0)
  source_In = jax.lax.cummax(jnp.where(wanted_In, index_I[:, None], first_n[None, :]), axis=0)
  page_In = jnp.take_along_axis(page_In, source_In, axis=0)
  # An operand that never needs one takes a page of the first operand, which some row reads.
  page_In = jnp.where(wanted_In.any(axis=0)[None, :], page_In, page_In[first_n[0], 0])
  slot_I = jnp.where(wanted_In[:, 0], step_I * (n * C), -1)
  return reads._replace(
    steps=Steps(
      count=behind_O[-1],
      owner_I=owner_I,
      slot_I=slot_I,
      page_I=page_In.reshape(-1),
      last_R1T=last_RT[:, None],
    )
  )


def _specs(X, n, heads, block_q, queries, cache, C):
  """Describes the blocks of a step (group of key heads, step); 'pages' and 'scales' n times each.

  X blocks of queries make a row; a block o belongs to row o // X. `queries` and `cache` are the
  shapes of these arrays.
  """
  K, _, H = queries[1:]

  def page(j):
    """The page of operand j."""
    return pl.BlockSpec(
      (None, None, heads, *cache[3:]),
      lambda group, i, layer, owner, slot, pages: (layer[0], pages[i * n + j], group, 0, 0),
    )

  def scale(j):
    """Its scales, of all key heads: a block's last two axes must be tiles or whole."""
    return pl.BlockSpec(
      (None, None, K, C),
      lambda group, i, layer, owner, slot, pages: (layer[0], pages[i * n + j], 0, 0),
    )

  def row(i, owner):
    """The row of a step."""
    return jax.lax.div(owner[i], X)

  def block(i, owner):
    """The block of queries of a step, within its row."""
    return jax.lax.rem(owner[i], X)

  return {
    'pages': [page(j) for j in range(n)],
    'scales': [scale(j) for j in range(n)],
    'last': pl.BlockSpec(
      (None, 1, block_q), lambda group, i, layer, owner, *_: (row(i, owner), 0, block(i, owner))
    ),
    'q': pl.BlockSpec(
      (None, heads, block_q, H),
      lambda group, i, layer, owner, *_: (row(i, owner), group, block(i, owner), 0),
    ),
    'row': pl.BlockSpec(
      (None, None, heads, block_q),
      lambda group, i, layer, owner, *_: (row(i, owner), group, 0, block(i, owner)),
    ),
  }


def _program(
  n, slots_last, scale, layer_ref, owner_ref, slot_ref, pages_ref, last_ref, q_ref, *rest
):
  """One step of the online softmax: n pages of a row, for the key heads of a group."""
  # The index maps have used the layer and the pages.
  del layer_ref, pages_ref
  *cache_refs, top_out, total_out, out_ref, top_ref, total_ref, acc_ref = rest
  k_refs, v_refs, *scale_refs = (cache_refs[i : i + n] for i in range(0, len(cache_refs), n))
  heads, queries, _ = q_ref.shape
  # Asked outside the branches, where interpret mode does not know them.
  first_head = pl.program_id(0) * heads
  step = pl.program_id(1)
  final = pl.num_programs(1) - 1
  owner = owner_ref[step]

  @pl.when((step == 0) | (owner != owner_ref[jnp.maximum(step - 1, 0)]))
  def _start():
    """Empties the accumulators of a block of queries."""
    # Above HIDDEN_SCORE, so that slots which nobody sees add nothing (tree_kernels).
    top_ref[...] = jnp.full(top_ref.shape, tree_kernels.LEAST_TOP, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

  def scales(refs, head):
    """The scales of a key head [1, slots]."""
    row = pl.ds(first_head + head, 1)
    return jnp.concatenate([ref[row, :].astype(jnp.float32) for ref in refs], axis=1)

  def numbers(refs, head):
    """The keys or values of a key head, in the dtype of q, which represents int8.

    They are [slots, H], or [H, slots] with `slots_last`.
    """
    return jnp.concatenate(
      [ref[head].astype(q_ref.dtype) for ref in refs], axis=1 if slots_last else 0
    )

  @pl.when(slot_ref[step] >= 0)
  def _meet():
    """One step of the online softmax, for the heads of the group."""
    slots = n * k_refs[0].shape[2 if slots_last else 1]
    slot = slot_ref[step] + jax.lax.broadcasted_iota(jnp.int32, (queries, slots), 1)
    # The same for all heads; slots of repeated pages lie behind the row's last one.
    seen = slot <= last_ref[0, :][:, None]
    for head in range(heads):
      scores = dot(q_ref[head], numbers(k_refs, head), transpose_b=not slots_last) * scale
      # A scale belongs to a slot: it leaves the product over H, and enters the one over slots.
      if scale_refs:
        scores *= scales(scale_refs[0], head)
      scores = jnp.where(seen, scores, tree_kernels.HIDDEN_SCORE)
      top = top_ref[head]
      new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
      weights = jnp.exp(scores - new_top[:, :1])
      # What has been summed so far refers to the old maximum.
      shrink = jnp.exp(top - new_top)
      top_ref[head] = new_top
      total_ref[head] = total_ref[head] * shrink + weights.sum(axis=1, keepdims=True)
      if scale_refs:
        weights *= scales(scale_refs[1], head)
      acc_ref[head] = acc_ref[head] * shrink[:, :1] + dot(
        weights.astype(q_ref.dtype), numbers(v_refs, head), transpose_b=slots_last
      )

  @pl.when((step == final) | (owner != owner_ref[jnp.minimum(step + 1, final)]))
  def _write():
    """Writes the results of a block of queries."""
    for head in range(heads):
      total = total_ref[head]
      # A query that has seen a slot has at least the weight 1 of the largest score.
      top_out[head, :] = jnp.where(total > 0, top_ref[head], MASKED_SCORE)[:, 0]
      total_out[head, :] = total[:, 0]
      out_ref[head] = acc_ref[head]
