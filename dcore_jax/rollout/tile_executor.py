"""Runs passes on a CPU: texts that wait for a token in tiles, prompts and guesses one by one.

Letters as in passes.py.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import programs, tile_programs
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import DrawInputs, Drawn, no_draws, some_draws
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.rollout.tile_programs import DecodeShape, ReadShape, Tile
from dcore_jax.rollout.tiling import Members, Tiling, bucket, ladder

# Tokens that a text gets in one call, longest last. A read of 30 layers of width 576 takes 60 and
# 222 ms, a step of one text 25.
_READS = (16, 128)
# Tokens that are read by the longest call; for fewer, short ones are faster.
_LONG_READ = 49
# Draws of a call beside tiles: as many as a text with guesses has.
_DRAWS = 16
# Spans of reads, whose layers are scanned: each is that many times as long as the one before it.
_GROWTH_OF_READS = 4


def _on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the function without the mesh in context, which may be a trainer's over all hosts."""

  @functools.wraps(function)
  def alone(*arguments: Any) -> Any:
    with jax.set_mesh(None):
      return function(*arguments)

  return alone


class TileExecutor:
  """Holds the weights and the cache of an engine on one CPU, and runs its passes.

  Args:
    params: the parameter tree.
    config: the model's configuration.
    sizes: lanes and lengths, resolved.
    stop_ids: tokens that end a text.

  Attributes:
    rows: rows of a pass at most.
    slots: positions of a page: a text has one page, since a product needs its operand in one piece.
    pages: number of pages.
    overhead: what a pass costs beside its rows, in rows.
    guess_cost: what a pass with guesses for one text costs, in passes without.
    riders: rollouts that may ride on a text.
    steps: tokens that are drawn for each text before the host looks.
  """

  rows = 512
  # Guesses are read by another program, which takes as long as three steps of one text, however
  # many they are.
  overhead = 4.0
  guess_cost = 3.0

  @_on_one_device
  def __init__(
    self,
    params: decoder.Params,
    config: DecoderConfig,
    sizes: EngineSizes,
    stop_ids: np.ndarray,
  ):
    self._config = config
    self._stop_ids = stop_ids
    self.steps = sizes.steps_per_call
    self.slots = sizes.max_len
    self.pages = sizes.lanes + sizes.trunks + 1
    self._read_spans = ladder(sizes.max_len, _GROWTH_OF_READS)
    self.load(params)
    cache = decoder.init_cache(config, self.pages, sizes.max_len, params['embed'].dtype)
    # Tied to its device, as what calls return is: for an array that is not, jax compiles a program
    # of its own.
    self._cache = jax.device_put(cache, params['embed'].sharding)
    self._tiling = Tiling(
      sizes,
      layers=config.num_hidden_layers,
      weight_bytes=_bytes(params),
      slot_bytes=_bytes(cache) // (self.pages * self.slots),
    )
    self.riders = self._tiling.most_draws
    # Of a pass, with room behind it for the padding of its last piece.
    hidden_RD = jnp.zeros((self.rows + _READS[-1], config.hidden_size), params['embed'].dtype)
    self._hidden_RD = jax.device_put(hidden_RD, params['embed'].sharding)

  def unload(self) -> None:
    """Lets the weights go."""
    del self._params
    del self._turned

  @_on_one_device
  def load(self, params: decoder.Params) -> None:
    """Takes other weights of the same shapes."""
    self._params = params
    # A copy for the few rows of a step, layer by layer and transposed (`decoder.turn`).
    self._turned = decoder.turn(params)

  @_on_one_device
  def run(self, work: Pass) -> tuple[Drawn | None, Drawn | None]:
    """Runs a pass: what was drawn and what was scored, on the host."""
    rows_n = np.bincount(work.text_R, minlength=len(work.pages))
    first = 0
    for text, rows in enumerate(rows_n.tolist()):
      tokens = work.tokens_R[first : first + rows]
      self._read(work.pages[text][0], tokens, int(work.position_R[first]), first)
      first += rows
    drawn, scored = (self._draw(inputs) for inputs in (work.draws, work.scores))
    return drawn, scored

  @_on_one_device
  def run_ahead(self, work: Pass) -> tuple[Drawn, np.ndarray]:
    """Draws `steps` tokens for texts that have one row each.

    Returns:
      (what was drawn [A, steps], the tokens that each text went on with [texts, steps]).
    """
    calls = []
    for members in self._tiling.divide(work):
      calls.append((members, self._decode(work, members)))
    texts = np.zeros((len(work.pages), self.steps), np.int32)
    all_drawn = None
    # Calls end in the order in which they were made; here the host waits.
    for members, (tile, drawn) in calls:
      drawn = jax.tree.map(lambda x: np.moveaxis(x, 0, 1), jax.device_get(drawn))
      if all_drawn is None:
        shape = (len(work.draws.row_A),)
        all_drawn = jax.tree.map(
          lambda x, shape=shape: np.zeros(shape + x.shape[1:], x.dtype), drawn
        )
      for to, given in zip(jax.tree.leaves(all_drawn), jax.tree.leaves(drawn), strict=True):
        to[members.draws] = given[: len(members.draws)]
      leaders = tile.leader_B[: len(members.texts)]
      texts[members.texts] = drawn.token_A[leaders]
    return all_drawn, texts

  @_on_one_device
  def copy(self, source: int, target: int, positions: int) -> None:
    """Copies the first positions of a page into another."""
    self._cache = tile_programs.copy_row(
      self._cache, np.int32(source), np.int32(target), np.int32(positions)
    )

  def prepare(self, progress: Callable[[int, int], None]) -> None:
    """Compiles all programs; `progress` gets (those that are ready, all)."""
    # Each is traced on a thread, which has a context of its own.
    programs.compile_all([_on_one_device(lower) for lower in self._lowered()], progress)

  # --- what calls are made of ---------------------------------------------------------------------

  def _lowered(self) -> Iterator[Callable[[], jax.stages.Lowered]]:
    """Yields for each program what traces it."""
    # Lowering reads no more than shapes and places, and donates nothing.
    cache = self._cache
    for span in self._tiling.spans:
      for B, A in self._tiling.tiles:
        shape = DecodeShape(config=self._config, span=span, steps=self.steps)
        yield lambda B=B, A=A, shape=shape: tile_programs.decode.lower(
          self._turned, cache, _no_tile(B), no_draws(A), self._stop_ids, shape=shape
        )
    for span in self._read_spans:
      for count in _READS:
        shape = ReadShape(config=self._config, span=span)
        yield lambda count=count, shape=shape: tile_programs.read.lower(
          self._params,
          cache,
          self._hidden_RD,
          np.zeros(count, np.int32),
          np.zeros(3, np.int32),
          shape=shape,
        )
    yield lambda: tile_programs.draw.lower(self._params, self._hidden_RD, no_draws(_DRAWS))
    yield lambda: tile_programs.copy_row.lower(cache, np.int32(0), np.int32(0), np.int32(0))

  def _read(self, page: int, tokens: np.ndarray, start: int, row: int) -> None:
    """Appends tokens to a text; their hidden states are those of the pass from `row` on."""
    first = 0
    while first < len(tokens):
      count = _READS[-1] if len(tokens) - first >= _LONG_READ else _READS[0]
      piece = tokens[first : first + count]
      padded = np.zeros(count, np.int32)
      padded[: len(piece)] = piece
      span = bucket(self._read_spans, start + first + len(piece))
      self._cache, self._hidden_RD = tile_programs.read(
        self._params,
        self._cache,
        self._hidden_RD,
        padded,
        np.array([page, start + first, row + first], np.int32),
        shape=ReadShape(config=self._config, span=span),
      )
      first += count

  def _draw(self, inputs: DrawInputs | None) -> Drawn | None:
    """Draws or scores, `_DRAWS` rows at a time; None where there is nothing to do."""
    calls = []
    for places in programs.pieces(inputs, _DRAWS):
      some = some_draws(inputs, places, _DRAWS)
      drawn = tile_programs.draw(self._params, self._hidden_RD, some)
      calls.append((places.stop - places.start, drawn))
    return programs.joined(jax.device_get(calls))

  def _decode(self, work: Pass, members: Members) -> tuple[Tile, Drawn]:
    """Makes a decode call; returns its tile and what it will have drawn."""
    texts, draws = members
    owner = _places_of(work.text_R[work.draws.row_A[draws]], texts)
    B, A = self._tiling.tile_for(members)
    tile = _no_tile(B)
    count = len(texts)
    tile.row_B[:count] = [work.pages[text][0] for text in texts]
    tile.token_B[:count] = work.tokens_R[texts]
    tile.position_B[:count] = work.position_R[texts]
    tile.leader_B[:count] = np.searchsorted(owner, np.arange(count))
    tile.left_B[:count] = work.left_N[texts]
    tile = tile._replace(draws=np.int32(len(owner)))
    inputs = some_draws(work.draws, draws, A)
    inputs.row_A[: len(owner)] = owner
    span = self._tiling.span(int(tile.position_B.max()))
    shape = DecodeShape(config=self._config, span=span, steps=self.steps)
    self._cache, drawn = tile_programs.decode(
      self._turned, self._cache, tile, inputs, self._stop_ids, shape=shape
    )
    return tile, drawn


def _bytes(arrays: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def _no_tile(texts: int) -> Tile:
  """Returns a tile without a text."""
  return Tile(
    row_B=np.zeros(texts, np.int32),
    token_B=np.zeros(texts, np.int32),
    position_B=np.zeros(texts, np.int32),
    left_B=np.zeros(texts, np.int32),
    leader_B=np.zeros(texts, np.int32),
    draws=np.int32(0),
  )


def _places_of(text_A: np.ndarray, texts: list[int]) -> np.ndarray:
  """Returns the place of each text in a list of them."""
  order = np.argsort(texts)
  return order[np.searchsorted(texts, text_A, sorter=order)]
