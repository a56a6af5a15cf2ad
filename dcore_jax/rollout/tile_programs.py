"""The device programs of an engine on a CPU.

Every text has a row of the cache. A decode call copies the rows of a few texts together, draws
several tokens for each, and copies what is new back: for the price of one copy a call every step
reads dense memory. Its layers are compiled one by one, since on a CPU a layer that is cut out of a
stack is a copy.

Letters as in passes.py; B texts of a call, X rows of the cache, S positions, Q steps.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import sampling
from dcore_jax.rollout.programs import DrawInputs, Drawn, draw_or_score, traces

# XLA's CPU compiler would cut a program into 32 parts and optimise each on its own, which takes a
# fifth more time in all. Programs are compiled side by side instead (`programs.compile_all`).
_COMPILER_OPTIONS = {'xla_cpu_parallel_codegen_split_count': 1}


class Tile(NamedTuple):
  """Texts that are decoded together.

  Attributes:
    row_B: int32, their rows of the cache; different ones.
    token_B: int32, the last token of each.
    position_B: int32, its position.
    left_B: int32, tokens that it may still get; 0: there is no text.
    leader_B: int32, the draw that a text goes on with.
    draws: int32 [], how many draws there are.
  """

  row_B: np.ndarray
  token_B: np.ndarray
  position_B: np.ndarray
  left_B: np.ndarray
  leader_B: np.ndarray
  draws: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecodeShape:
  """What a decode program is compiled for, beside its numbers of texts and draws.

  Attributes:
    config: the model's configuration.
    span: positions of each text that are read.
    steps: tokens that are drawn for each text.
  """

  config: DecoderConfig
  span: int
  steps: int


class _Decoding(NamedTuple):
  """What one step hands to the next."""

  step: jax.Array
  cache: decoder.KVCache  # [B, K, S, H] for each layer
  token_B: jax.Array
  live_B: jax.Array
  drawn: Drawn  # [Q, A, ...]


# Traced once for all programs of as many texts.
_draw = jax.jit(sampling.draw)


@functools.partial(
  jax.jit,
  static_argnames='shape',
  donate_argnames='cache',
  compiler_options=_COMPILER_OPTIONS,
)
def decode(
  params: decoder.Params,
  cache: decoder.KVCache,
  tile: Tile,
  inputs: DrawInputs,
  stop_ids: jax.Array,
  *,
  shape: DecodeShape,
) -> tuple[decoder.KVCache, Drawn]:
  """Draws `steps` tokens for the rollouts of some texts; each text goes on with its leader's.

  Args:
    params: the tree of `decoder.turn`.
    cache: stacked, [L, X, K, S, H]; donated.
    tile: the texts.
    inputs: of the first draws; `row_A` is the text of each, as its place in the tile. They are made
      B at a time, in as many pieces as there are draws: A is a multiple of B.
    stop_ids: tokens that end a text. Steps end where all texts have ended or have all they may get.
    shape: what is compiled in.

  Returns:
    (the cache, what was drawn [Q, A]).
  """
  traces['decode'] += 1

  B = len(tile.row_B)
  A = len(inputs.row_A)
  pieces = (tile.draws + B - 1) // B
  # Of all steps at once: the generator is no part of the loop.
  uniform_QA2 = jax.vmap(
    lambda index_A: sampling.uniforms(sampling.token_keys(inputs.key_A2, index_A))
  )(inputs.index_A[None] + jnp.arange(shape.steps)[:, None])

  def draw_piece(piece: jax.Array, logits_BV: jax.Array, step: jax.Array) -> Drawn:
    def cut(x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice_in_dim(x, piece * B, B)

    uniform_B2 = cut(jax.lax.dynamic_index_in_dim(uniform_QA2, step, keepdims=False))
    rule = jax.tree.map(cut, inputs.rule)
    logits_BV = logits_BV[cut(inputs.row_A)].astype(jnp.float32)
    return Drawn(*_draw(logits_BV, uniform_B2, rule, inputs.listing))

  def draw_all(hidden_BD: jax.Array, step: jax.Array, drawn: Drawn) -> Drawn:
    logits_BV = decoder.logits(params, hidden_BD)

    def add(piece: jax.Array, drawn: Drawn) -> Drawn:
      def put(all_QA: jax.Array, new_B: jax.Array) -> jax.Array:
        start = (step, piece * B) + (0,) * (new_B.ndim - 1)
        return jax.lax.dynamic_update_slice(all_QA, new_B[None], start)

      return jax.tree.map(put, drawn, draw_piece(piece, logits_BV, step))

    return jax.lax.fori_loop(0, pieces, add, drawn)

  def unfinished(now: _Decoding) -> jax.Array:
    return (now.step < shape.steps) & jnp.any(now.live_B)

  def advance(now: _Decoding) -> _Decoding:
    # A text that has ended writes past the end, where what is written is dropped.
    position_B = jnp.where(now.live_B, tile.position_B + now.step, shape.span)
    hidden_BD, held = decoder.extend_each(params, shape.config, now.cache, now.token_B, position_B)
    drawn = draw_all(hidden_BD, now.step, now.drawn)
    token_B = drawn.token_A[now.step, tile.leader_B]
    stopped_B = jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1)
    return _Decoding(
      step=now.step + 1,
      cache=held,
      token_B=token_B,
      live_B=now.live_B & ~stopped_B & (now.step + 1 < tile.left_B),
      drawn=drawn,
    )

  logits_BV = jax.ShapeDtypeStruct((B, shape.config.vocab_size), jnp.float32)
  one = jax.eval_shape(draw_piece, 0, logits_BV, 0)
  start = _Decoding(
    step=jnp.int32(0),
    cache=_gathered(cache, tile.row_B, shape.span),
    token_B=jnp.asarray(tile.token_B),
    live_B=tile.left_B > 0,
    drawn=jax.tree.map(lambda leaf: jnp.zeros((shape.steps, A, *leaf.shape[1:]), leaf.dtype), one),
  )
  end = jax.lax.while_loop(unfinished, advance, start)
  return _appended(cache, end.cache, tile, shape), end.drawn


def _gathered(cache: decoder.KVCache, row_B: jax.Array, span: int) -> decoder.KVCache:
  """Returns the first positions of some rows, with an array for each layer."""
  L, _, K, _, H = cache.k.shape
  B = len(row_B)

  def copy(place: jax.Array, copied: decoder.KVCache) -> decoder.KVCache:
    def one(stored: jax.Array, layers: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      part = jax.lax.dynamic_slice(stored, (0, row_B[place], 0, 0, 0), (L, 1, K, span, H))
      return tuple(
        jax.lax.dynamic_update_slice_in_dim(layer, part[number], place, 0)
        for number, layer in enumerate(layers)
      )

    return decoder.KVCache(one(cache.k, copied.k), one(cache.v, copied.v))

  blank = tuple(jnp.zeros((B, K, span, H), cache.k.dtype) for _ in range(L))
  return jax.lax.fori_loop(0, B, copy, decoder.KVCache(blank, blank))


def _appended(
  cache: decoder.KVCache, tile_cache: decoder.KVCache, tile: Tile, shape: DecodeShape
) -> decoder.KVCache:
  """Returns the cache with the positions written back that a call can have filled.

  Where the span ends before them, they begin earlier, and what lies before is written as it was.
  """
  window = min(shape.steps, shape.span)

  def copy(place: jax.Array, cache: decoder.KVCache) -> decoder.KVCache:
    first = jnp.minimum(tile.position_B[place], shape.span - window)

    def one(stored: jax.Array, layers: tuple[jax.Array, ...]) -> jax.Array:
      parts = []
      for layer in layers:
        size = (1, layer.shape[1], window, layer.shape[3])
        parts.append(jax.lax.dynamic_slice(layer, (place, 0, first, 0), size))
      return jax.lax.dynamic_update_slice(
        stored, jnp.stack(parts), (0, tile.row_B[place], 0, first, 0)
      )

    return decoder.KVCache(one(cache.k, tile_cache.k), one(cache.v, tile_cache.v))

  # Rows that only fill the tile up are not written.
  return jax.lax.fori_loop(0, jnp.sum(tile.left_B > 0), copy, cache)


@dataclasses.dataclass(frozen=True)
class ReadShape:
  """What a program that reads tokens is compiled for, beside their number.

  Attributes:
    config: the model's configuration.
    span: positions of the text that are read.
  """

  config: DecoderConfig
  span: int


@functools.partial(
  jax.jit,
  static_argnames='shape',
  donate_argnames=('cache', 'hidden_RD'),
  compiler_options=_COMPILER_OPTIONS,
)
def read(
  params: decoder.Params,
  cache: decoder.KVCache,
  hidden_RD: jax.Array,
  tokens_T: jax.Array,
  place_3: jax.Array,
  *,
  shape: ReadShape,
) -> tuple[decoder.KVCache, jax.Array]:
  """Appends tokens to a row of the cache, and puts their hidden states among those of the pass.

  Args:
    params: the stacked tree.
    cache: stacked; donated.
    hidden_RD: final-normed hidden states of the pass; donated.
    tokens_T: token ids, padded on the right.
    place_3: int32, the row of the cache, the position of the first token, its row of the pass.
    shape: what is compiled in.

  Returns:
    (cache, hidden_RD). What stands behind the tokens' hidden states means nothing.
  """
  traces['read'] += 1
  L, _, K, _, H = cache.k.shape
  row, start, first = place_3
  size = (L, 1, K, shape.span, H)
  part = jax.tree.map(lambda stored: jax.lax.dynamic_slice(stored, (0, row, 0, 0, 0), size), cache)
  hidden_1TD, part = decoder.extend(params, shape.config, part, tokens_T[None], start[None])
  cache = jax.tree.map(
    lambda stored, new: jax.lax.dynamic_update_slice(stored, new, (0, row, 0, 0, 0)), cache, part
  )
  return cache, jax.lax.dynamic_update_slice(hidden_RD, hidden_1TD[0], (first, 0))


@functools.partial(jax.jit, compiler_options=_COMPILER_OPTIONS)
def draw(params: decoder.Params, hidden_RD: jax.Array, inputs: DrawInputs) -> Drawn:
  """Draws from hidden states, or scores tokens behind them; a fixed number of each.

  Args:
    params: the stacked tree.
    hidden_RD: final-normed.
    inputs: of the draws.
  """
  traces['draw'] += 1
  return draw_or_score(decoder.logits(params, hidden_RD[inputs.row_A]), inputs)


# Positions that are copied together.
_PIECE = 128


@functools.partial(jax.jit, donate_argnames='cache', compiler_options=_COMPILER_OPTIONS)
def copy_row(
  cache: decoder.KVCache, source: jax.Array, target: jax.Array, positions: jax.Array
) -> decoder.KVCache:
  """Copies the first positions of a row of the cache into another, in whole pieces."""
  traces['copy'] += 1
  L, _, K, S, H = cache.k.shape
  piece = min(_PIECE, S)

  def copy(number: jax.Array, cache: decoder.KVCache) -> decoder.KVCache:
    # The last piece may reach back over what is copied already.
    first = jnp.minimum(number * piece, S - piece)

    def one(stored: jax.Array) -> jax.Array:
      part = jax.lax.dynamic_slice(stored, (0, source, 0, first, 0), (L, 1, K, piece, H))
      return jax.lax.dynamic_update_slice(stored, part, (0, target, 0, first, 0))

    return jax.tree.map(one, cache)

  return jax.lax.fori_loop(0, (positions + piece - 1) // piece, copy, cache)
