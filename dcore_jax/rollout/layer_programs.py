"""The device programs of an engine on a CPU: a pass, layer by layer.

A pass is driven by the host, which calls one program for each layer and one for each group of pages
that the layer's queries read. So what is compiled does not grow with the depth of the model, no
layer is cut out of a stack (on a CPU that is a copy), and no length is a shape: what a pass costs
follows from the rows and pages that it has. A call of a program takes 15 microseconds.

Letters as in passes.py.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models import decoder, rotary
from dcore_jax.models.attention.reference import MASKED_SCORE
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.programs import DrawInputs, Drawn, draw_or_score, traces

# Rows of tokens that a pass has at most: with 128 of them a product is as fast as with any more.
ROWS = 128
# Numbers of rows that are computed; a pass is filled up to the next one.
SIZES = (1, 4, 8, 16, 32, 64, ROWS)
# Draws of a call, and the numbers of them that are made. They are few, since drawing is most of
# what is compiled.
DRAWS = 128
DRAW_SIZES = (1, 8, 32, DRAWS)
# Positions of a page: the fewer, the less is read in vain, and the more calls there are.
POSITIONS = 128
# Rows that can read a page together.
READERS = 8
# Pages of a block. A call of a program costs some 100 microseconds beside its products, and what no
# row reads of a block is read in vain.
PAGES = 16


class Queries(NamedTuple):
  """What a layer's attention needs of the rows, and what stands beside it."""

  hidden_RD: jax.Array
  q_RNH: jax.Array
  k_RKH: jax.Array
  v_RKH: jax.Array


class Partial(NamedTuple):
  """Attention before its division, over the pages read so far."""

  top_RN: jax.Array  # the largest score
  total_RN: jax.Array  # sum of exp(score - largest)
  out_RNH: jax.Array  # sum of exp(score - largest) * value


class Reads(NamedTuple):
  """Which rows read which pages of a block, and which slots they write; int32.

  All pages of a block hold the same positions of their texts, so that a row reads at most one.

  Attributes:
    mode: place in `MODES`: how rows meet pages.
    start: the position at which the pages begin.
    page: the page that is read, for modes of one page.
    first: its first row of the pass.
    rows: the number of its rows.
    writes: number of rows whose keys and values lie in the block.
    row_PW: the row at each place of a page; any row where there is none.
    place_R: the place of each row, counted through the block; -1 where it reads none of its pages.
    write_row_R: which rows have their keys and values in the block.
    write_page_R: the page of each of them.
  """

  mode: np.ndarray
  start: np.ndarray
  page: np.ndarray
  first: np.ndarray
  rows: np.ndarray
  writes: np.ndarray
  row_PW: np.ndarray
  place_R: np.ndarray
  write_row_R: np.ndarray
  write_page_R: np.ndarray

  def packed(self) -> np.ndarray:
    """Returns all of it as one array: each argument of a program costs its call some time."""
    return np.concatenate(self, axis=None)


def _unpacked(packed: jax.Array) -> Reads:
  """Undoes `Reads.packed`."""
  parts = []
  start = 0
  for shape in (*[()] * 6, (PAGES, READERS), (ROWS,), (ROWS,), (ROWS,)):
    count = math.prod(shape)
    parts.append(packed[start : start + count].reshape(shape))
    start += count
  return Reads(*parts)


class Mode(NamedTuple):
  """How rows meet the pages of a block.

  'alone': one page meets so many rows that follow each other; 'together': each page meets the rows
  at its first places, so many of them.
  """

  kind: str
  rows: int


MODES = (
  Mode('alone', 1),
  Mode('alone', 8),
  Mode('alone', ROWS),
  Mode('together', 1),
  Mode('together', READERS),
)


def _filled(x: jax.Array, rows: int = ROWS) -> jax.Array:
  """Returns the array with its first axis filled up with zeros."""
  return jnp.pad(x, ((0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)))


def nothing(config: DecoderConfig) -> Partial:
  """Returns attention that has read no page yet."""
  heads = (ROWS, config.num_attention_heads)
  return Partial(
    top_RN=jnp.full(heads, MASKED_SCORE, jnp.float32),
    total_RN=jnp.zeros(heads, jnp.float32),
    out_RNH=jnp.zeros((*heads, config.head_dim), jnp.float32),
  )


def _enter(
  layer: decoder.Params, config: DecoderConfig, hidden_RD: jax.Array, position_R: jax.Array
) -> Queries:
  """Begins a layer for some rows."""
  cos, sin = rotary.rope_tables(
    position_R[None], config.head_dim, config.rope_theta, config.rope_scaling
  )
  q, k, v = decoder.queries_keys_values(layer, config, hidden_RD[None], cos, sin, rows='lanes')
  return Queries(hidden_RD=hidden_RD, q_RNH=q[0], k_RKH=k[0], v_RKH=v[0])


def _leave(
  layer: decoder.Params, config: DecoderConfig, hidden_RD: jax.Array, read: Partial
) -> jax.Array:
  """Ends a layer: the hidden states behind it."""
  # A row that only fills the pass up has read nothing.
  total_RN1 = jnp.where(read.total_RN == 0, 1, read.total_RN)[..., None]
  out_RNH = (read.out_RNH / total_RN1).astype(hidden_RD.dtype)
  return decoder.after_attention(layer, config, hidden_RD[None], out_RNH[None], rows='lanes')[0]


@functools.partial(jax.jit, static_argnames='config')
def first(
  embed_VD: jax.Array,
  layer: decoder.Params,
  tokens_R: jax.Array,
  position_R: jax.Array,
  size: jax.Array,
  *,
  config: DecoderConfig,
) -> Queries:
  """Looks tokens up and begins the first layer.

  Args:
    embed_VD: the embedding.
    layer: the first layer.
    tokens_R: token ids.
    position_R: their positions.
    size: which of the numbers of rows is computed.
    config: the model's configuration.
  """
  traces['first'] += 1

  def branch(rows: int):
    def compute():
      queries = _enter(layer, config, embed_VD[tokens_R[:rows]], position_R[:rows])
      return jax.tree.map(_filled, queries)

    return compute

  return jax.lax.switch(size, [branch(rows) for rows in SIZES])


@functools.partial(jax.jit, static_argnames='config')
def middle(
  ended: decoder.Params,
  begun: decoder.Params,
  hidden_RD: jax.Array,
  read: Partial,
  position_R: jax.Array,
  size: jax.Array,
  *,
  config: DecoderConfig,
) -> Queries:
  """Ends one layer and begins the next.

  Args:
    ended: the layer whose attention is there.
    begun: the layer behind it; any where that was the last one.
    hidden_RD: hidden states before the layer that ends.
    read: its attention.
    position_R: the rows' positions.
    size: which of the numbers of rows is computed.
    config: the model's configuration.
  """
  traces['middle'] += 1

  def branch(rows: int):
    def compute():
      part = jax.tree.map(lambda x: x[:rows], read)
      out_RD = _leave(ended, config, hidden_RD[:rows], part)
      return jax.tree.map(_filled, _enter(begun, config, out_RD, position_R[:rows]))

    return compute

  return jax.lax.switch(size, [branch(rows) for rows in SIZES])


@functools.partial(jax.jit, donate_argnames=('keys', 'values'))
def attend(
  keys: jax.Array,
  values: jax.Array,
  queries: Queries,
  read: Partial,
  packed: jax.Array,
  position_R: jax.Array,
) -> tuple[jax.Array, jax.Array, Partial]:
  """Writes the rows' keys and values into a block, and attends over it.

  Args:
    keys: [P, K, C, H], donated.
    values: [P, K, C, H], donated.
    queries: of the rows, with their own keys and values.
    read: attention over other blocks.
    packed: what is written and read (`Reads.packed`).
    position_R: the rows' positions; a row sees the positions up to its own.

  Returns:
    (keys, values, attention over this block, too).
  """
  traces['attend'] += 1
  _, K, C, H = keys.shape
  reads = _unpacked(packed)

  # A loop over what is there: a scatter would walk over all rows.
  def write(number: jax.Array, held: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    row = reads.write_row_R[number]
    place = (reads.write_page_R[number], 0, position_R[row] - reads.start, 0)
    stored = []
    for array, new_RKH in zip(held, (queries.k_RKH, queries.v_RKH), strict=True):
      new_1KH = jax.lax.dynamic_slice_in_dim(new_RKH, row, 1)
      new_1K1H = new_1KH[:, :, None].astype(array.dtype)
      stored.append(jax.lax.dynamic_update_slice(array, new_1K1H, place))
    return tuple(stored)

  keys, values = jax.lax.fori_loop(0, reads.writes, write, (keys, values))
  position_C = reads.start + jnp.arange(C)
  q_RNH = queries.q_RNH
  q_RKGH = q_RNH.reshape(len(q_RNH), K, -1, H)

  def together(mode: Mode):
    def compute() -> Partial:
      row_PW = reads.row_PW[:, : mode.rows]
      G = q_RKGH.shape[2]
      q_PKTH = q_RKGH[row_PW].swapaxes(1, 2).reshape(PAGES, K, mode.rows * G, H)
      seen_PWC = position_C[None, None] <= position_R[row_PW][..., None]
      seen_PTC = jnp.repeat(seen_PWC, G, axis=1)
      parts = _attention(q_PKTH, keys, values, seen_PTC[:, None])

      def by_row(x: jax.Array) -> jax.Array:
        """[P, K * W * G, ...] -> [R, N, ...]; places are gathered: a scatter would be a loop."""
        rest = x.shape[2:]
        x = x.reshape(PAGES, K, mode.rows, G, *rest).swapaxes(1, 2)
        # Places are counted with all that a page can have.
        place_R = reads.place_R // READERS * mode.rows + reads.place_R % READERS
        return x.reshape(-1, K * G, *rest)[jnp.maximum(place_R, 0)]

      return _merged(read, jax.tree.map(by_row, parts), reads.place_R >= 0)

    return compute

  def alone(rows: int):
    def compute() -> Partial:
      # The window of rows may begin before the text's own, at the end of the pass.
      first = jnp.minimum(reads.first, ROWS - rows)
      row_r = first + jnp.arange(rows)
      k_1KCH, v_1KCH = (
        jax.lax.dynamic_slice_in_dim(stored, reads.page, 1) for stored in (keys, values)
      )
      q_rKGH = jax.lax.dynamic_slice_in_dim(q_RKGH, first, rows)
      position_r = jax.lax.dynamic_slice_in_dim(position_R, first, rows)
      seen_rC = position_C[None] <= position_r[:, None]
      G = q_rKGH.shape[2]
      parts = _attention(
        q_rKGH.transpose(1, 2, 0, 3).reshape(1, K, G * rows, H),
        k_1KCH,
        v_1KCH,
        jnp.tile(seen_rC, (G, 1))[None, None],
      )

      def by_row(x: jax.Array) -> jax.Array:
        """[1, K * G * rows, ...] -> [rows, N, ...]."""
        return jnp.moveaxis(x.reshape(K * G, rows, *x.shape[2:]), 0, 1)

      window = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, rows), read)
      own_r = (row_r >= reads.first) & (row_r < reads.first + reads.rows)
      merged = _merged(window, jax.tree.map(by_row, parts), own_r)
      return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, 0), read, merged
      )

    return compute

  branches = [alone(mode.rows) if mode.kind == 'alone' else together(mode) for mode in MODES]
  read = jax.lax.switch(reads.mode, branches)
  return keys, values, read


def _attention(
  q_PKTH: jax.Array, k_PKCH: jax.Array, v_PKCH: jax.Array, seen_PKTC: jax.Array
) -> Partial:
  """Attention of T queries of each page, [P, K * T, ...]."""
  P, K, T, H = q_PKTH.shape
  C = k_PKCH.shape[2]
  q, k, v = (x.reshape(P * K, -1, H) for x in (q_PKTH, k_PKCH, v_PKCH))
  scores = _scores(q, k).reshape(P, K, T, C) * H**-0.5
  scores = jnp.where(seen_PKTC, scores, MASKED_SCORE)
  top = scores.max(axis=-1)
  # A row that sees nothing here has a top of MASKED_SCORE, and adds nothing where it is merged.
  weights = jnp.exp(scores - top[..., None])
  out = _weighted(weights.reshape(P * K, T, C), v)
  return Partial(
    top_RN=top.reshape(P, K * T),
    total_RN=weights.sum(axis=-1).reshape(P, K * T),
    out_RNH=out.reshape(P, K * T, H),
  )


def _merged(read: Partial, part: Partial, own_R: jax.Array) -> Partial:
  """Adds attention over other positions for some rows."""
  top_RN = jnp.where(own_R[:, None], jnp.maximum(read.top_RN, part.top_RN), read.top_RN)
  old_RN = jnp.exp(read.top_RN - top_RN)
  new_RN = jnp.where(own_R[:, None], jnp.exp(part.top_RN - top_RN), 0)
  return Partial(
    top_RN=top_RN,
    total_RN=read.total_RN * old_RN + part.total_RN * new_RN,
    out_RNH=read.out_RNH * old_RN[..., None] + part.out_RNH * new_RN[..., None],
  )


def _scores(q_BTH: jax.Array, k_BCH: jax.Array) -> jax.Array:
  """float32 [B, T, C]; up to four queries one product of matrix and vector for each is faster."""
  T = q_BTH.shape[1]
  if T > 4:
    return jnp.einsum('bth,bch->btc', q_BTH, k_BCH, preferred_element_type=jnp.float32)
  rows = []
  for row in range(T):
    rows.append(jnp.einsum('bh,bch->bc', q_BTH[:, row], k_BCH, preferred_element_type=jnp.float32))
  return jnp.stack(rows, axis=1)


def _weighted(weights_BTC: jax.Array, v_BCH: jax.Array) -> jax.Array:
  """Sums of values, float32 [B, T, H]."""
  return jnp.einsum(
    'btc,bch->bth', weights_BTC.astype(v_BCH.dtype), v_BCH, preferred_element_type=jnp.float32
  )


@functools.partial(jax.jit, static_argnames='config')
def draw(
  params: decoder.Params,
  hidden_RD: jax.Array,
  inputs: DrawInputs,
  size: jax.Array,
  *,
  config: DecoderConfig,
) -> Drawn:
  """Draws from rows of a pass, or scores tokens behind them.

  Args:
    params: embedding or head, and the final norm.
    hidden_RD: hidden states behind the last layer.
    inputs: of the draws; `DRAWS` of them.
    size: which of the numbers of draws is made.
    config: the model's configuration.
  """
  traces['draw'] += 1

  def branch(count: int):
    def compute():
      some = jax.tree.map(lambda x: x[:count] if x.ndim else x, inputs)
      hidden_AD = decoder.final_norm(params, config, hidden_RD[some.row_A][None])[0]
      drawn = draw_or_score(decoder.logits(params, hidden_AD), some)
      return jax.tree.map(lambda x: _filled(x, DRAWS), drawn)

    return compute

  return jax.lax.switch(size, [branch(count) for count in DRAW_SIZES])


@jax.jit
def read_page(block: list[jax.Array], page: jax.Array) -> list[jax.Array]:
  """Returns one page of a block, [1, K, C, H] for keys and values of each layer."""
  traces['read_page'] += 1
  return [jax.lax.dynamic_slice_in_dim(stored, page, 1) for stored in block]


@functools.partial(jax.jit, donate_argnames=('block',))
def write_page(block: list[jax.Array], part: list[jax.Array], page: jax.Array) -> list[jax.Array]:
  """Writes what `read_page` gave into a page of a block, which is donated."""
  traces['write_page'] += 1
  written = []
  for stored, new in zip(block, part, strict=True):
    written.append(jax.lax.dynamic_update_slice_in_dim(stored, new, page, 0))
  return written
