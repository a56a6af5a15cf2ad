"""Attention over pages on NVIDIA GPUs: a Pallas-Triton program that walks over a row's pages.

A program takes a block of queries of one row and key head, and one of S shares of the row's pages
(flash-decoding: Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html), so that a few
long rows keep the device busy too. The shares are joined afterwards. Pages are read where they lie,
by their ids; a page that no query of the block sees is not read.

A decode step waits for memory: each number that is read takes part in 2 T operations, where an A100
could do some 300 while it reads a bfloat16 number (312 TFLOP/s, 2.0 TB/s). The least time of a call
is 2 K C H numbers a page, times their bytes, divided by the bandwidth. The shares add 4 S T H bytes
a row and key head, which are written and read again; T is at least 16 there. Letters as in
`page_reads`; S shares.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dcore_jax.models.attention import page_reads, tree_kernels
from dcore_jax.models.attention.page_reads import PageReads, Partial
from dcore_jax.models.attention.reference import MASKED_SCORE
from dcore_jax.models.attention.tree_kernels import dot

_LOG2_E = math.log2(math.e)  # e^x is computed as 2^(x log2 e): the hardware has 2^x only

# Some more programs than an A100 holds at once, which is four on each of its 108 cores. A share is
# at least 256 slots: below, its result is no longer small beside the keys that it has read.
_PROGRAMS = 512
_LEAST_SLOTS = 256


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
  shares: int | None = None,
  interpret: bool = False,
) -> Partial:
  """`pages.partial_pages` on a GPU.

  Args:
    q_RKTH: queries; H a multiple of 16.
    k_LNKCH, v_LNKCH: the cache; C a power of two from 16.
    layer: int32 scalar.
    reads: pages and positions of each row.
    k_scale_LNKC, v_scale_LNKC: scales of a cache of int8.
    block_q: queries of a program, a power of two from 16; by default all T of them, up to 64 for
      16-bit queries and 32 for float32.
    shares: programs that divide a row; by default as many as fill the device.
    interpret: run as plain JAX on any device, for tests.

  Raises:
    ValueError: shapes, dtypes or blocks that do not fit.
  """
  page_reads.check(q_RKTH, k_LNKCH, v_LNKCH, reads, k_scale_LNKC, v_scale_LNKC)
  R, K, T, H = q_RKTH.shape
  C = k_LNKCH.shape[3]
  P = reads.pages_RP.shape[1]
  if C < 16 or C & (C - 1) or H % 16:
    raise ValueError(
      f'pages of {C} slots and heads of {H}: a tensor core wants powers of two from 16, and '
      'multiples of 16'
    )
  # jax counts offsets in 32 signed bits up to 2^32 bytes. That is enough for 2-byte numbers alone.
  if k_LNKCH.dtype.itemsize == 1 and 1 << 31 < k_LNKCH.size <= 1 << 32:
    raise ValueError(
      f'{k_LNKCH.size} int8 keys: between 2^31 and 2^32 jax computes wrong offsets; take fewer '
      'pages or more'
    )
  small = q_RKTH.dtype.itemsize <= 2
  block_q = block_q or min(64 if small else 32, max(16, 1 << (T - 1).bit_length()))
  X = pl.cdiv(T, block_q)
  if shares is None:
    shares = max(1, min(_PROGRAMS // (R * K * X), P * C // _LEAST_SLOTS))
  scales = [] if k_scale_LNKC is None else [k_scale_LNKC, v_scale_LNKC]
  limit_R = reads.limit_R
  if limit_R is None:
    limit_R = jnp.full((R,), jnp.iinfo(jnp.int32).max, jnp.int32)
  # No spec: the program gets the whole array, of which it reads what it needs.
  everywhere = pl.BlockSpec(memory_space=pl.ANY)
  of_row = pl.BlockSpec((None,), lambda i, k, r: (r,))
  blocks = [X * block_q]
  parts = pl.pallas_call(
    functools.partial(_program, block_q, shares, H**-0.5 * _LOG2_E, min(C, 64 if small else 32)),
    # The shares of a block of queries run side by side, then its other key heads.
    grid=(shares * X, K, R),
    in_specs=[
      pl.BlockSpec((1,), lambda i, k, r: (0,)),
      pl.BlockSpec((None, P), lambda i, k, r: (r, 0)),
      *[of_row] * 3,
      pl.BlockSpec((None, T), lambda i, k, r: (r, 0)),
      pl.BlockSpec((None, None, T, H), lambda i, k, r: (r, k, 0, 0)),
      *[everywhere] * (2 + len(scales)),
    ],
    out_specs=[
      *[_share_spec(shares, block_q)] * 2,
      _share_spec(shares, block_q, H),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((shares, R, K, *size), jnp.float32)
      for size in (blocks, blocks, [*blocks, H])
    ],
    interpret=interpret,
    name='page_attention',
    # Keys of the next step are copied while this one is computed. At 64 slots of 128 16-bit numbers
    # that takes 38 KiB of shared memory and 96 registers a thread for 16 queries, so that a core of
    # an A100 holds four programs.
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
  )(
    layer.reshape(1),
    reads.pages_RP,
    reads.start_R,
    reads.count_R,
    limit_R,
    reads.position_RT,
    q_RKTH,
    k_LNKCH,
    v_LNKCH,
    *scales,
  )
  return _join(*(part[:, :, :, :T] for part in parts))


def _share_spec(shares: int, *block: int) -> pl.BlockSpec:
  """Describes a program's part of a result [S, R, K, T, ...]."""
  rest = (0,) * (len(block) - 1)
  return pl.BlockSpec(
    (None, None, None, *block), lambda i, k, r: (i % shares, r, k, i // shares, *rest)
  )


def _join(top_SRKT: jax.Array, total_SRKT: jax.Array, out_SRKTH: jax.Array) -> Partial:
  """Joins the shares of each row, as `merge_partials` joins two."""
  if len(top_SRKT) == 1:
    return Partial(top_RKT=top_SRKT[0], total_RKT=total_SRKT[0], out_RKTH=out_SRKTH[0])
  top = top_SRKT.max(axis=0)
  weight = jnp.exp(top_SRKT - top[None])
  return Partial(
    top_RKT=top,
    total_RKT=(total_SRKT * weight).sum(axis=0),
    out_RKTH=(out_SRKTH * weight[..., None]).sum(axis=0),
  )


def _program(
  block_q,
  shares,
  factor,
  taken,
  layer_ref,
  pages_ref,
  start_ref,
  count_ref,
  limit_ref,
  position_ref,
  q_ref,
  k_ref,
  v_ref,
  *scales_and_results,
):
  """The online softmax over one share of a row's pages, `taken` slots a step.

  `factor` is the scale of the scores, in units of log 2.
  """
  *scale_refs, top_ref, total_ref, out_ref = scales_and_results
  layer = layer_ref[0]
  head = pl.program_id(1)
  pieces = _pieces(q_ref.shape[1])
  # Behind the last query of the row, the block repeats it; these results are cut off. Neither
  # queries nor positions are padded beforehand, which would be a program of its own in each layer.
  first = jax.lax.div(pl.program_id(0), shares) * block_q
  queries = jnp.minimum(first + jnp.arange(block_q, dtype=jnp.int32), q_ref.shape[0] - 1)
  q = [q_ref[queries, piece] for piece in pieces]
  slots = k_ref.shape[3]
  # The last slot that each query sees, counted from the row's first (page_reads.last_seen).
  last = jnp.minimum(position_ref[queries], limit_ref[...] - 1) - start_ref[...]
  last = jnp.minimum(last, count_ref[...] * slots - 1)
  # Pages that any of them sees: none where the last slot is -1.
  count = jax.lax.div(jnp.maximum(last.max(), -1) + slots, slots)
  # A page is taken in this many steps.
  steps = slots // taken
  share = pl.cdiv(count, shares)
  begin = jax.lax.rem(pl.program_id(0), shares) * share
  end = jnp.minimum(begin + share, count)

  def step(place, carry):
    """Takes some slots of a page into the running maximum, sum and output."""
    top, total, *outs = carry
    page = pages_ref[jax.lax.div(place, steps)]
    here = pl.ds(jax.lax.rem(place, steps) * taken, taken)
    # Whatever the cache holds becomes the dtype of q, which represents int8 exactly.
    scores = sum(
      dot(part, k_ref[layer, page, head, here, piece].astype(part.dtype), transpose_b=True)
      for part, piece in zip(q, pieces, strict=True)
    )
    # A scale belongs to a slot, so that it leaves the product over H, and enters the one over C.
    if scale_refs:
      scores *= scale_refs[0][layer, page, head, here].astype(jnp.float32)[None, :]
    slot = place * taken + jnp.arange(taken, dtype=jnp.int32)
    scores = jnp.where(slot[None, :] <= last[:, None], scores, tree_kernels.HIDDEN_SCORE)
    new_top = jnp.maximum(top, scores.max(axis=1))
    weights = jax.lax.exp2((scores - new_top[:, None]) * factor)
    # What has been summed so far refers to the old maximum.
    shrink = jax.lax.exp2((top - new_top) * factor)
    total = total * shrink + weights.sum(axis=1)
    if scale_refs:
      weights *= scale_refs[1][layer, page, head, here].astype(jnp.float32)[None, :]
    weights = weights.astype(q[0].dtype)
    outs = [
      out * shrink[:, None]
      + dot(weights, v_ref[layer, page, head, here, piece].astype(weights.dtype))
      for out, piece in zip(outs, pieces, strict=True)
    ]
    return new_top, total, *outs

  start = (
    # Above HIDDEN_SCORE, so that slots which nobody sees add nothing (tree_kernels).
    jnp.full((block_q,), tree_kernels.LEAST_TOP, jnp.float32),
    jnp.zeros((block_q,), jnp.float32),
    *(jnp.zeros((block_q, piece.size), jnp.float32) for piece in pieces),
  )
  # The bounds depend on data: a share behind the row's end takes no step.
  top, total, *outs = jax.lax.fori_loop(begin * steps, end * steps, step, start)
  # A query that has seen a slot has at least the weight 1 of the largest score.
  top_ref[:] = jnp.where(total > 0, top * (factor / _LOG2_E), MASKED_SCORE)
  total_ref[:] = total
  for out, piece in zip(outs, pieces, strict=True):
    out_ref[:, piece] = out


def _pieces(H: int) -> list[pl.Slice]:
  """Splits a head into powers of two, which Triton's arrays are: 96 into 64 and 32."""
  pieces = []
  begin = 0
  while begin < H:
    size = 1 << ((H - begin).bit_length() - 1)
    pieces.append(pl.ds(begin, size))
    begin += size
  return pieces
