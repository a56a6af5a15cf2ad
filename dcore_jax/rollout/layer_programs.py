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

# Rows of tokens that a pass has at most. A product with 64 rows runs at two thirds of the speed
# that one with 256 has, and every program has arrays of this size.
ROWS = 64
# Numbers of rows that are computed; a pass is filled up to the next one.
SIZES = (1, 4, 8, 16, 32, ROWS)
# Draws of a call, and the numbers of them that are made. They are few, since drawing is most of
# what is compiled.
DRAWS = 32
DRAW_SIZES = (1, 8, DRAWS)
# Rows that can read a page without meeting all pages of the group.
READERS = 8


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
  """Which rows read which pages of a group, and which slots they write; int32.

  Attributes:
    mode: place in `MODES`: how rows meet pages.
    writes: number of rows whose keys and values lie in the group.
    start_P: the position of each page's first slot.
    place_RP: a row's place among the readers of each page; -1 where it does not read it.
    reader_PW: the row at each place of a page; any row where there is none.
    write_row_R: the rows whose keys and values lie in the group.
    write_slot_R: where they lie, counted through the group.
  """

  mode: jax.Array | np.ndarray
  writes: jax.Array | np.ndarray
  start_P: jax.Array | np.ndarray
  place_RP: jax.Array | np.ndarray
  reader_PW: jax.Array | np.ndarray
  write_row_R: jax.Array | np.ndarray
  write_slot_R: jax.Array | np.ndarray

  def packed(self) -> np.ndarray:
    """Returns all of it as one array: each argument of a program costs its call some time."""
    return np.concatenate([np.ravel(part) for part in self]).astype(np.int32)


def _unpacked(packed: jax.Array, pages: int) -> Reads:
  """Undoes `Reads.packed`, given the number of pages of a group."""
  shapes = ((), (), (pages,), (ROWS, pages), (pages, READERS), (ROWS,), (ROWS,))
  parts = []
  start = 0
  for shape in shapes:
    count = math.prod(shape)
    parts.append(packed[start : start + count].reshape(shape))
    start += count
  return Reads(*parts)


# How rows meet the pages of a group: the first so many rows meet all pages, or each page meets the
# rows at so many of its places.
MODES = (('all', 1), ('all', 8), ('all', ROWS), ('page', 1), ('page', READERS))


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
    begun: the layer behind it.
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
  """Writes the rows' keys and values into a group of pages, and attends over the group.

  Args:
    keys: [K, P, C, H], donated.
    values: [K, P, C, H], donated.
    queries: of the rows, with their own keys and values.
    read: attention over other groups.
    packed: what is written and read (`Reads.packed`).
    position_R: the rows' positions; a row sees the slots up to its own.

  Returns:
    (keys, values, attention over this group, too).
  """
  traces['attend'] += 1
  P, C = keys.shape[1:3]
  reads = _unpacked(packed, P)

  # A loop over what is there: a scatter would walk over all rows.
  def write(number: jax.Array, held: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    row = reads.write_row_R[number]
    slot = reads.write_slot_R[number]
    place = (0, slot // C, slot % C, 0)
    stored = []
    for array, new_RKH in zip(held, (queries.k_RKH, queries.v_RKH), strict=True):
      new_K11H = new_RKH[row][:, None, None].astype(array.dtype)
      stored.append(jax.lax.dynamic_update_slice(array, new_K11H, place))
    return tuple(stored)

  keys, values = jax.lax.fori_loop(0, reads.writes, write, (keys, values))
  K, _, _, H = keys.shape
  q_RNH = queries.q_RNH
  q_RKGH = q_RNH.reshape(len(q_RNH), K, -1, H) * H**-0.5
  slot_PC = reads.start_P[:, None] + jnp.arange(C)[None, :]

  def branch(kind: str, count: int):
    def compute():
      if kind == 'all':
        return _all_pages(keys, values, q_RKGH, read, reads, slot_PC, position_R, count)
      return _by_page(keys, values, q_RKGH, read, reads, slot_PC, position_R, count)

    return compute

  read = jax.lax.switch(reads.mode, [branch(*mode) for mode in MODES])
  return keys, values, read


def _all_pages(keys, values, q_RKGH, read, reads, slot_PC, position_R, rows) -> Partial:
  """The first `rows` rows meet all pages of a group."""
  K, P, C, H = keys.shape
  G = q_RKGH.shape[2]
  q = q_RKGH[:rows].transpose(1, 0, 2, 3).reshape(K, rows * G, H)
  scores = _scores(q, keys.reshape(K, P * C, H)).reshape(K, rows, G, P * C)
  before_RPC = slot_PC[None] <= position_R[:rows, None, None]
  seen_RPC = (reads.place_RP[:rows] >= 0)[:, :, None] & before_RPC
  seen = seen_RPC.reshape(1, rows, 1, P * C)
  scores = jnp.where(seen, scores, MASKED_SCORE)
  top_KRG = scores.max(axis=-1)
  weights = jnp.where(seen, jnp.exp(scores - top_KRG[..., None]), 0)
  out = _weighted(weights.reshape(K, rows * G, P * C), values.reshape(K, P * C, H))

  def by_row(x: jax.Array) -> jax.Array:
    """[K, R, G, ...] -> [R, N, ...], filled up."""
    return _filled(jnp.moveaxis(x, 0, 1).reshape(rows, K * G, *x.shape[3:]))

  part = Partial(
    top_RN=_filled(jnp.moveaxis(top_KRG, 0, 1).reshape(rows, K * G) - MASKED_SCORE) + MASKED_SCORE,
    total_RN=by_row(weights.sum(axis=-1)),
    out_RNH=by_row(out.reshape(K, rows, G, H)),
  )
  top_RN = jnp.maximum(read.top_RN, part.top_RN)
  old_RN = jnp.exp(read.top_RN - top_RN)
  new_RN = jnp.exp(part.top_RN - top_RN)
  return Partial(
    top_RN=top_RN,
    total_RN=read.total_RN * old_RN + part.total_RN * new_RN,
    out_RNH=read.out_RNH * old_RN[..., None] + part.out_RNH * new_RN[..., None],
  )


def _by_page(keys, values, q_RKGH, read, reads, slot_PC, position_R, places) -> Partial:
  """Each page of a group meets the rows at its first `places` places."""
  K, P, C, H = keys.shape
  W = places
  G = q_RKGH.shape[2]
  row_PW = reads.reader_PW[:, :W]
  q = q_RKGH[row_PW].transpose(2, 0, 1, 3, 4).reshape(K * P, W * G, H)
  scores = _scores(q, keys.reshape(K * P, C, H)).reshape(K, P, W, G, C)
  seen = (slot_PC[:, None, :] <= position_R[row_PW][:, :, None])[None, :, :, None, :]
  scores = jnp.where(seen, scores, MASKED_SCORE)
  top = scores.max(axis=-1)
  weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0)
  out = _weighted(weights.reshape(K * P, W * G, C), values.reshape(K * P, C, H))

  def by_place(x: jax.Array) -> jax.Array:
    """[K, P, W, G, ...] -> [N, P * W, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(K * G, P * W, *x.shape[4:])

  top_NX = by_place(top)
  # Whether a row stands at a place of a page. Sums over places are products with this; a scatter
  # would walk over the places one by one.
  stands_RX = (reads.place_RP[:, :, None] == jnp.arange(W)[None, None, :]).reshape(-1, P * W)
  top_NRX = jnp.where(stands_RX[None], top_NX[:, None], MASKED_SCORE)
  top_NR = jnp.maximum(read.top_RN.T, top_NRX.max(axis=-1))
  share_NRX = jnp.where(stands_RX[None], jnp.exp(top_NX[:, None] - top_NR[..., None]), 0)
  old_NR = jnp.exp(read.top_RN.T - top_NR)
  total_NR = jnp.sum(share_NRX * by_place(weights.sum(axis=-1))[:, None], axis=-1)
  out_NRH = _weighted(share_NRX, by_place(out.reshape(K, P, W, G, H)))
  return Partial(
    top_RN=top_NR.T,
    total_RN=read.total_RN * old_NR.T + total_NR.T,
    out_RNH=read.out_RNH * old_NR.T[..., None] + out_NRH.swapaxes(0, 1),
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
def last(
  params: decoder.Params,
  hidden_RD: jax.Array,
  read: Partial,
  inputs: DrawInputs,
  size: jax.Array,
  *,
  config: DecoderConfig,
) -> Drawn:
  """Ends the last layer for the rows that are drawn from, and draws.

  Args:
    params: embedding or head, final norm, and the last layer alone.
    hidden_RD: hidden states before the last layer.
    read: its attention.
    inputs: of the draws; `DRAWS` of them.
    size: which of the numbers of draws is made.
    config: the model's configuration.
  """
  traces['last'] += 1

  def branch(count: int):
    def compute():
      some = jax.tree.map(lambda x: x[:count] if x.ndim else x, inputs)
      part = jax.tree.map(lambda x: x[some.row_A], read)
      hidden_AD = _leave(params['layers'][0], config, hidden_RD[some.row_A], part)
      hidden_AD = decoder.final_norm(params, config, hidden_AD[None])[0]
      drawn = draw_or_score(decoder.logits(params, hidden_AD), some)
      return jax.tree.map(lambda x: _filled(x, DRAWS), drawn)

    return compute

  return jax.lax.switch(size, [branch(count) for count in DRAW_SIZES])


@jax.jit
def read_page(group: list[jax.Array], page: jax.Array) -> list[jax.Array]:
  """Returns one page of a group, [K, 1, C, H] for the keys and the values of each layer."""
  traces['read_page'] += 1
  return [jax.lax.dynamic_slice_in_dim(stored, page, 1, axis=1) for stored in group]


@functools.partial(jax.jit, donate_argnames=('group',))
def write_page(group: list[jax.Array], part: list[jax.Array], page: jax.Array) -> list[jax.Array]:
  """Writes what `read_page` gave into a page of a group, which is donated."""
  traces['write_page'] += 1
  written = []
  for stored, new in zip(group, part, strict=True):
    written.append(jax.lax.dynamic_update_slice_in_dim(stored, new, page, axis=1))
  return written
