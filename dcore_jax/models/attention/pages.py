"""Attention over a paged cache of keys and values: for decode steps and pieces of a prefill.

Keys and values are in pages of C slots, [L, N, K, C, H]: all layers and pages as one array, which
is read where it lies. A row of queries reads a list of pages; several rows may read the same page,
and several lanes that share a trunk are one row of T = W * M * G queries (W lanes, M tokens of
each, G query heads a key head), so that each key is read once for all of them. Lengths are numbers,
not shapes: one program serves all of them.

| platform | what it is |
|---|---|
| gpu | our Pallas-Triton kernel, `pages_gpu` |
| tpu | our Pallas-Mosaic kernel, `pages_tpu` |
| other | plain JAX, one page of every row at a time |

A part of the cache gives a partial result; parts are joined by `merge_partials` and divided by
`finish`. What bounds a decode step on an accelerator is reading keys and values: 2 K C H times the
bytes of a number for each page and layer, divided by the memory bandwidth. Letters as in
`page_reads`.
"""

import jax
import jax.numpy as jnp

from dcore_jax import sharding
from dcore_jax.models.attention import page_reads, pages_gpu, pages_tpu
from dcore_jax.models.attention.page_reads import PageReads, Partial
from dcore_jax.models.attention.reference import MASKED_SCORE

finish = page_reads.finish
merge_partials = page_reads.merge_partials
quantize = page_reads.quantize


def prepare(reads: PageReads, k_LNKCH: jax.Array) -> PageReads:
  """Computes once what the reads of all layers have in common, before the loop over layers.

  XLA leaves it inside that loop: some tens of small operations a layer on a TPU. Elsewhere there is
  nothing to compute. The result belongs to these reads alone: another count or position needs
  another call. It may be called on whole arrays, outside of `sharding.on_shards`.

  Args:
    reads: what is read in every layer.
    k_LNKCH: the cache, whole.
  """
  if sharding.platform() != 'tpu':
    return reads
  K = k_LNKCH.shape[2]
  shards = sharding.shards('kv_heads')
  return pages_tpu.prepare(reads, K if K % shards else K // shards, k_LNKCH)


def partial_pages(
  q_RKTH: jax.Array,
  k_LNKCH: jax.Array,
  v_LNKCH: jax.Array,
  layer: jax.Array,
  reads: PageReads,
  k_scale_LNKC: jax.Array | None = None,
  v_scale_LNKC: jax.Array | None = None,
) -> Partial:
  """Attends over the pages of each row with its T queries; float32, before the division.

  Scores are q k / sqrt(H). Products run in the dtype of q and are summed in float32, weights are
  rounded to the dtype of q for theirs. Slots that nobody sees must hold finite numbers. Arrays are
  those of one device: under a mesh, call it inside `sharding.on_shards`, together with `finish`,
  whose result is split as q is.

  Args:
    q_RKTH: queries, float32 or bfloat16.
    k_LNKCH, v_LNKCH: the cache of all layers.
    layer: int32 scalar.
    reads: pages and positions of each row.
    k_scale_LNKC, v_scale_LNKC: for a cache of int8, the scales that `quantize` gives.

  Raises:
    ValueError: shapes or dtypes that do not fit.
  """
  # As in `tree_attention`: the platform of the mesh in context, which may not be this process's.
  attend = {'gpu': pages_gpu.partial_pages, 'tpu': pages_tpu.partial_pages}.get(
    sharding.platform(), reference
  )
  return attend(q_RKTH, k_LNKCH, v_LNKCH, layer, reads, k_scale_LNKC, v_scale_LNKC)


def write(
  x_LNKC: jax.Array, new_BK: jax.Array, layer: jax.Array, page_B: jax.Array, slot_B: jax.Array
) -> jax.Array:
  """Writes one slot a lane into a cache [L, N, K, C, H], or into its scales [L, N, K, C].

  A page id of N or more, as for a lane that has ended, writes nothing. Two lanes must not write to
  the same slot.

  Args:
    x_LNKC: the cache; where it is donated or a loop's carry, it changes in place.
    new_BK: numbers [B, K, H] or scales [B, K] of each lane and key head.
    layer: int32 scalar.
    page_B, slot_B: where they go; a slot is counted within its page.
  """
  # The key heads have an index of their own. With a slice in their place, XLA for TPUs moves their
  # axis for the write, which copies the whole cache (compiled for a v5p with jax 0.10.2).
  head_1K = jnp.arange(x_LNKC.shape[2])[None, :]
  return x_LNKC.at[layer, page_B[:, None], head_1K, slot_B[:, None]].set(
    new_BK.astype(x_LNKC.dtype), mode='drop'
  )


def reference(
  q_RKTH: jax.Array,
  k_LNKCH: jax.Array,
  v_LNKCH: jax.Array,
  layer: jax.Array,
  reads: PageReads,
  k_scale_LNKC: jax.Array | None = None,
  v_scale_LNKC: jax.Array | None = None,
) -> Partial:
  """The contract in plain JAX: a loop over places 0 .. P - 1, one page of every row a step.

  It stops behind the last page that any row sees. For 32 rows of 16 pages of 64 slots and 2 key
  heads of 48 it takes 0.9 times the CPU time of attention over a cache without pages where half of
  the slots are in use, and 1.7 times where all are; over copies of all pages it would be 3.6 and
  2.5 times (medians of interleaved calls, beside other work).
  """
  page_reads.check(q_RKTH, k_LNKCH, v_LNKCH, reads, k_scale_LNKC, v_scale_LNKC)
  R, K, T, H = q_RKTH.shape
  C = k_LNKCH.shape[3]
  last_RT = page_reads.last_seen(reads, C)

  def one_page(place: jax.Array, partial: Partial) -> Partial:
    """Adds what each row sees of its page at `place`."""
    page_R = jax.lax.dynamic_index_in_dim(reads.pages_RP, place, axis=1, keepdims=False)

    def held(x_LN):
      """That page of each row, of a cache or of its scales; None stays None."""
      return None if x_LN is None else x_LN[layer, page_R]

    seen_RTC = place * C + jnp.arange(C)[None, None, :] <= last_RT[:, :, None]
    page = _attend_page(
      q_RKTH, held(k_LNKCH), held(v_LNKCH), seen_RTC, held(k_scale_LNKC), held(v_scale_LNKC)
    )
    return merge_partials(partial, page)

  pages = jnp.max(last_RT, initial=-1) // C + 1
  return jax.lax.fori_loop(0, pages, one_page, page_reads.nothing(R, K, T, H))


def _attend_page(
  q_RKTH: jax.Array,
  k_RKCH: jax.Array,
  v_RKCH: jax.Array,
  seen_RTC: jax.Array,
  k_scale_RKC: jax.Array | None,
  v_scale_RKC: jax.Array | None,
) -> Partial:
  """Attends over one page of every row."""
  R, K, T, H = q_RKTH.shape
  C = k_RKCH.shape[2]
  # Batch axes are merged before the products, as in `attention.reference`.
  q = q_RKTH.reshape(R * K, T, H)
  k = k_RKCH.reshape(R * K, C, H).astype(q.dtype)
  v = v_RKCH.reshape(R * K, C, H).astype(q.dtype)
  # Up to some four queries, matrix-vector products are faster on a CPU.
  scores = (
    jax.lax.platform_dependent(q, k, cpu=_row_scores, default=_scores) if T <= 4 else _scores(q, k)
  )
  scores = scores.reshape(R, K, T, C) * H**-0.5
  # A scale belongs to a slot, so that it leaves the product over H, and enters the one over C.
  if k_scale_RKC is not None:
    scores *= k_scale_RKC[:, :, None, :].astype(jnp.float32)
  seen = seen_RTC[:, None]
  scores = jnp.where(seen, scores, MASKED_SCORE)
  top = scores.max(axis=-1)
  # Of a query that sees nothing, score - top is 0 everywhere.
  weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
  total = weights.sum(axis=-1)
  if v_scale_RKC is not None:
    weights *= v_scale_RKC[:, :, None, :].astype(jnp.float32)
  weights = weights.reshape(R * K, T, C).astype(q.dtype)
  out = jnp.einsum('bts,bsh->bth', weights, v, preferred_element_type=jnp.float32)
  return Partial(top_RKT=top, total_RKT=total, out_RKTH=out.reshape(R, K, T, H))


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """Products [b, t, s] in float32, as one batched matrix product."""
  return jnp.einsum('bth,bsh->bts', q, k, preferred_element_type=jnp.float32)


def _row_scores(q: jax.Array, k: jax.Array) -> jax.Array:
  """The same products, as one matrix-vector product a query."""
  rows = [
    jnp.einsum('bh,bsh->bs', q[:, row], k, preferred_element_type=jnp.float32)
    for row in range(q.shape[1])
  ]
  return jnp.stack(rows, axis=1)
