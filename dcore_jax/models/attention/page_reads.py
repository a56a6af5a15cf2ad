"""Which pages of keys and values each row of queries reads, and attention before its division.

What the implementations of `pages` share. Letters: L layers, N pages, K key heads, C slots of a
page, H head size; R rows, P pages that a row may read, T queries of a row and key head, X blocks of
queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcore_jax.models.attention.reference import MASKED_SCORE


class Steps(NamedTuple):
  """What the grid of the TPU's program walks over: I steps of n pages, of all rows in order."""

  count: jax.Array  # how many of the I steps are used
  owner_I: jax.Array  # the block of queries, r * X + x
  slot_I: jax.Array  # the first slot, counted from the row's; -1 where there is nothing to see
  # The n pages of each step. Flat, because scalar memory pads a last axis to 128 words.
  page_I: jax.Array
  last_R1T: jax.Array  # `last_seen`, for whole blocks of queries


class PageReads(NamedTuple):
  """The pages of R rows, which T queries a key head read. All arrays are int32.

  A slot at position s is seen by the query at position p iff s <= p and s < limit.
  """

  # Page ids in order of position. Those behind `count_R` are never read, but must be valid ids.
  pages_RP: jax.Array
  start_R: jax.Array  # position of the first slot of the row's first page
  count_R: jax.Array  # pages to read, 0 .. P
  position_RT: jax.Array  # of each query
  limit_R: jax.Array | None = None  # where the row ends inside a page; None: by the positions alone
  steps: Steps | None = None  # by `pages.prepare`; None: computed at each call


class Partial(NamedTuple):
  """Attention before its division, in float32.

  A query that sees nothing has (MASKED_SCORE, 0, 0).
  """

  top_RKT: jax.Array  # largest score
  total_RKT: jax.Array  # sum of exp(score - top)
  out_RKTH: jax.Array  # sum of exp(score - top) * value


def merge_partials(a: Partial, b: Partial) -> Partial:
  """Joins what the same queries have seen in two places; neither place may be seen twice."""
  top = jnp.maximum(a.top_RKT, b.top_RKT)
  # Of two parts that see nothing both weights are 1, of zeros: MASKED_SCORE is finite.
  weight_a = jnp.exp(a.top_RKT - top)
  weight_b = jnp.exp(b.top_RKT - top)
  return Partial(
    top_RKT=top,
    total_RKT=a.total_RKT * weight_a + b.total_RKT * weight_b,
    out_RKTH=a.out_RKTH * weight_a[..., None] + b.out_RKTH * weight_b[..., None],
  )


def finish(partial: Partial) -> jax.Array:
  """The division: attention [R, K, T, H] in float32, 0 for a query that saw nothing."""
  total = jnp.where(partial.total_RKT > 0, partial.total_RKT, 1.0)
  return partial.out_RKTH / total[..., None]


def nothing(R: int, K: int, T: int, H: int) -> Partial:
  """The partial result of queries that have seen nothing yet."""
  return Partial(
    top_RKT=jnp.full((R, K, T), MASKED_SCORE, jnp.float32),
    total_RKT=jnp.zeros((R, K, T), jnp.float32),
    out_RKTH=jnp.zeros((R, K, T, H), jnp.float32),
  )


def last_seen(reads: PageReads, slots: int) -> jax.Array:
  """Returns [R, T]: the last slot that each query sees, counted from the row's first slot.

  It is negative where the query sees nothing. All bounds of the row are in this one number.

  Args:
    reads: what is read.
    slots: C, of a page.
  """
  last_RT = reads.position_RT
  if reads.limit_R is not None:
    last_RT = jnp.minimum(last_RT, reads.limit_R[:, None] - 1)
  return jnp.minimum(last_RT - reads.start_R[:, None], reads.count_R[:, None] * slots - 1)


def blocks(last_RT: jax.Array, slots: int, block: int) -> tuple[jax.Array, jax.Array]:
  """Pads the queries to whole blocks: (last_RT, pages that any query of a block sees [R, X]).

  Added queries see nothing.
  """
  R, T = last_RT.shape
  last_RT = jnp.pad(last_RT, ((0, 0), (0, -T % block)), constant_values=-1)
  most_RX = last_RT.reshape(R, -1, block).max(axis=2)
  # -1 // C = -1: no pages.
  return last_RT, jnp.maximum(most_RX // slots + 1, 0)


def check(
  q_RKTH: jax.Array,
  k_LNKCH: jax.Array,
  v_LNKCH: jax.Array,
  reads: PageReads,
  k_scale_LNKC: jax.Array | None,
  v_scale_LNKC: jax.Array | None,
) -> None:
  """Raises a ValueError where shapes do not belong together, or numbers lack their scales."""
  R, K, T, H = q_RKTH.shape
  pages = k_LNKCH.shape
  if len(pages) != 5 or v_LNKCH.shape != pages or (pages[2], pages[4]) != (K, H):
    raise ValueError(
      f'q {q_RKTH.shape}, k {pages} and v {v_LNKCH.shape} do not make [R, K, T, H] and '
      '[L, N, K, C, H] twice'
    )
  if len(reads.pages_RP) != R or reads.position_RT.shape != (R, T):
    raise ValueError(
      f'pages {reads.pages_RP.shape} and positions {reads.position_RT.shape} are not of {R} rows '
      f'of {T} queries'
    )
  for name, scale in (('k_scale', k_scale_LNKC), ('v_scale', v_scale_LNKC)):
    if (scale is not None) != (k_LNKCH.dtype == v_LNKCH.dtype == jnp.int8):
      raise ValueError(f'k {k_LNKCH.dtype}, v {v_LNKCH.dtype}: int8, and it alone, needs {name}')
    if scale is not None and scale.shape != pages[:4]:
      raise ValueError(f'{name} {scale.shape} is not one number a slot and head, {pages[:4]}')


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Rounds keys or values [..., H] to int8: (numbers, float32 scale [...]), x ~ numbers * scale.

  Symmetric, with one scale a slot and head: the largest of the H numbers becomes 127 or -127. The
  error of a number is at most half a scale, 0.4 % of the largest.
  """
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(axis=-1) / 127
  # Zeros stay zeros, whatever they are divided by.
  divisor = jnp.where(scale > 0, scale, 1.0)[..., None]
  return jnp.round(x / divisor).astype(jnp.int8), scale
