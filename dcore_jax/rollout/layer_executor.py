"""Runs passes on a CPU, layer by layer.

Every text has the positions of its own: on a CPU a product needs its operand in one piece, and what
is copied together costs as much as what is read. So a page is as long as a text may become, and its
positions are cut into blocks. A block holds the same positions of several texts, which meet their
rows in one product. Blocks are made when their first position is used.

Letters as in passes.py; Y texts of a block, C its positions.
"""

import concurrent.futures
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import layer_programs
from dcore_jax.rollout.layer_programs import (
  ALL_TEXTS,
  DRAW_SIZES,
  DRAWS,
  POSITIONS,
  ROWS,
  ROWS_OF_ONE,
  SIZES,
  Reads,
)
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import DrawInputs, Drawn
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

# Texts of a block. A call of a program costs some 100 microseconds beside its products, so that few
# large blocks are better than many small ones.
_TEXTS = 32
# So many texts with one row each are read together with all others of their block; fewer are cut
# out one by one.
_TOGETHER = 3

# One compiled program: layer by layer, each copy would be dispatched on its own.
_turn = jax.jit(decoder.turn)


class LayerExecutor:
  """Holds the weights and the cache of an engine on one CPU, and runs its passes.

  Args:
    params: the parameter tree.
    config: the model's configuration.
    sizes: lanes and lengths.

  Attributes:
    rows: rows of a pass at most.
    slots: positions of a page, which is that of one text.
    overhead: what a pass costs beside its rows, in rows: with one row a pass of 8 layers of width
      512 takes 7 ms, with 32 rows 30 ms.
  """

  rows = ROWS
  overhead = 7.0

  def __init__(self, params: decoder.Params, config: DecoderConfig, sizes: EngineSizes):
    self.slots = sizes.max_len
    self._config = config
    self._dtype = params['embed'].dtype
    self._texts = min(_TEXTS, sizes.lanes)
    # (texts, positions) -> keys and values of each layer, [Y, K, C, H], layer after layer.
    self._blocks: dict[tuple[int, int], list[jax.Array]] = {}
    self._nothing = layer_programs.nothing(config)
    # Made once: to bring a number to the device takes as long as to call a program.
    self._sizes = [jnp.int32(place) for place in range(max(len(SIZES), len(DRAW_SIZES)))]
    self.load(params)

  def unload(self) -> None:
    """Lets the weights go."""
    del self._params
    del self._head

  def load(self, params: decoder.Params) -> None:
    """Takes other weights of the same shapes."""
    # A copy for single rows, layer by layer and transposed (`decoder.turn`).
    self._params = _turn(params)
    # Beside the layers: whether these are a tuple says how products are made (`decoder.logits`).
    self._head = {**self._params, 'layers': ()}

  def run(self, work: Pass) -> tuple[Drawn | None, Drawn | None]:
    """Runs a pass: what was drawn and what was scored, on the host."""
    config = self._config
    layers = self._params['layers']
    count = len(work.tokens_R)
    reads = self._reads(work)
    tokens_R, position_R, *packed = [
      jnp.asarray(array)
      for array in (
        _filled(work.tokens_R),
        _filled(work.position_R),
        *(one.packed() for _, one in reads),
      )
    ]
    size = self._sizes[np.searchsorted(SIZES, count)]
    queries = layer_programs.first(
      self._params['embed'], layers[0], tokens_R, position_R, size, config=config
    )
    for number, layer in enumerate(layers):
      read = self._nothing
      keys = 2 * number
      values = keys + 1
      for (block, _), one in zip(reads, packed, strict=True):
        block[keys], block[values], read = layer_programs.attend(
          block[keys], block[values], queries, read, one, position_R
        )
      # Behind the last layer another one is begun in vain, which spares a program.
      behind = layers[(number + 1) % len(layers)]
      queries = layer_programs.middle(
        layer, behind, queries.hidden_RD, read, position_R, size, config=config
      )

    def finish(inputs: DrawInputs | None) -> Drawn | None:
      if inputs is None or not len(inputs.row_A):
        return None
      return self._draw(queries.hidden_RD, inputs)

    return finish(work.draws), finish(work.scores)

  def copy(self, source: int, target: int, positions: int) -> None:
    """Copies the first positions of a page into another."""
    for place in range(-(-positions // POSITIONS)):
      tile, text = divmod(source, self._texts)
      part = layer_programs.read_text(self._block(tile, place), np.int32(text))
      tile, text = divmod(target, self._texts)
      block = self._block(tile, place)
      self._blocks[tile, place] = layer_programs.write_text(block, part, np.int32(text))

  def prepare(self, progress: Callable[[int, int], None]) -> None:
    """Compiles all programs, two at a time; `progress` gets (those that are ready, all)."""
    config = self._config
    layers = self._params['layers']
    tokens_R, size = jax.device_put([np.zeros(ROWS, np.int32), np.int32(0)])
    hidden_RD = jnp.zeros((ROWS, config.hidden_size), self._dtype)
    q_RNH = jnp.zeros((ROWS, config.num_attention_heads, config.head_dim), self._dtype)
    k_RKH = jnp.zeros((ROWS, config.num_key_value_heads, config.head_dim), self._dtype)
    queries = layer_programs.Queries(hidden_RD=hidden_RD, q_RNH=q_RNH, k_RKH=k_RKH, v_RKH=k_RKH)
    block = self._new_block()
    inputs = _draws_filled(_no_draw())
    packed = jax.device_put(self._blank_reads().packed())

    def copies() -> None:
      part = layer_programs.read_text(block, np.int32(0))
      layer_programs.write_text(self._new_block(), part, np.int32(0))

    # Each is called once as a pass calls it, and what it gives is thrown away. The longest first.
    calls = [
      lambda: layer_programs.draw(self._head, hidden_RD, inputs, size, config=config),
      lambda: layer_programs.middle(
        layers[0], layers[-1], hidden_RD, self._nothing, tokens_R, size, config=config
      ),
      lambda: layer_programs.attend(
        *self._new_block()[:2], queries, self._nothing, packed, tokens_R
      ),
      lambda: layer_programs.first(
        self._params['embed'], layers[0], tokens_R, tokens_R, size, config=config
      ),
      copies,
    ]
    progress(0, len(calls))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      waiting = [pool.submit(call) for call in calls]
      for ready, one in enumerate(concurrent.futures.as_completed(waiting), start=1):
        one.result()
        progress(ready, len(calls))

  # --- what passes are made of --------------------------------------------------------------------

  def _new_block(self) -> list[jax.Array]:
    config = self._config
    shape = (self._texts, config.num_key_value_heads, POSITIONS, config.head_dim)
    blank = []
    for _ in range(2 * config.num_hidden_layers):
      blank.append(jax.device_put(np.zeros(shape, self._dtype)))
    return blank

  def _block(self, tile: int, place: int) -> list[jax.Array]:
    """Returns a block; memory grows with what is in use."""
    if (tile, place) not in self._blocks:
      self._blocks[tile, place] = self._new_block()
    return self._blocks[tile, place]

  def _draw(self, hidden_RD: jax.Array, inputs: DrawInputs) -> Drawn:
    """Draws or scores, `DRAWS` rows at a time."""
    found = []
    for first in range(0, len(inputs.row_A), DRAWS):
      some = _places(inputs, slice(first, first + DRAWS))
      count = len(some.row_A)
      size = self._sizes[np.searchsorted(DRAW_SIZES, count)]
      drawn = layer_programs.draw(
        self._head, hidden_RD, _draws_filled(some), size, config=self._config
      )
      found.append((count, drawn))
    host = []
    for count, drawn in jax.device_get(found):
      host.append(jax.tree.map(lambda x, count=count: x[:count], drawn))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *host)

  def _blank_reads(self) -> Reads:
    return Reads(
      mode=np.int32(ALL_TEXTS),
      start=np.int32(0),
      text=np.int32(0),
      first=np.int32(0),
      rows=np.int32(0),
      writes=np.int32(0),
      row_Y=np.zeros(self._texts, np.int32),
      text_R=np.full(ROWS, -1, np.int32),
      write_row_R=np.zeros(ROWS, np.int32),
      write_text_R=np.zeros(ROWS, np.int32),
    )

  def _reads(self, work: Pass) -> list[tuple[list[jax.Array], Reads]]:
    """Returns the blocks that a pass visits, and what it does there."""
    rows_n = np.bincount(work.text_R, minlength=len(work.pages))
    first_n = np.cumsum(rows_n) - rows_n
    last_n = work.position_R[first_n + rows_n - 1]
    page_n = np.array([pages[0] for pages in work.pages])
    visits = []
    for tile in np.unique(page_n // self._texts).tolist():
      mine_n = page_n // self._texts == tile
      for place in range(int(last_n[mine_n].max()) // POSITIONS + 1):
        there_n = mine_n & (last_n >= place * POSITIONS)
        single = np.flatnonzero(there_n & (rows_n == 1))
        alone = np.flatnonzero(there_n)
        if len(single) >= _TOGETHER:
          visits.append((tile, place, self._together(work, place, first_n[single], page_n[single])))
          alone = np.flatnonzero(there_n & (rows_n > 1))
        for text in alone.tolist():
          reads = self._alone(work, place, int(first_n[text]), int(rows_n[text]), page_n[text])
          visits.append((tile, place, reads))
    return [(self._block(tile, place), reads) for tile, place, reads in visits]

  def _together(self, work: Pass, place: int, row_n: np.ndarray, page_n: np.ndarray) -> Reads:
    """Returns what texts with one row each do in a block."""
    reads = self._blank_reads()
    text_n = page_n % self._texts
    reads.row_Y[text_n] = row_n
    reads.text_R[row_n] = text_n
    written_n = work.position_R[row_n] // POSITIONS == place
    count = np.count_nonzero(written_n)
    reads.write_row_R[:count] = row_n[written_n]
    reads.write_text_R[:count] = text_n[written_n]
    return reads._replace(start=np.int32(place * POSITIONS), writes=np.int32(count))

  def _alone(self, work: Pass, place: int, first: int, rows: int, page: int) -> Reads:
    """Returns what one text does in a block."""
    reads = self._blank_reads()
    own = first + np.arange(rows)
    written = own[work.position_R[own] // POSITIONS == place]
    reads.write_row_R[: len(written)] = written
    reads.write_text_R[: len(written)] = page % self._texts
    return reads._replace(
      mode=np.int32(1 + np.searchsorted(ROWS_OF_ONE, rows)),
      start=np.int32(place * POSITIONS),
      text=np.int32(page % self._texts),
      first=np.int32(first),
      rows=np.int32(rows),
      writes=np.int32(len(written)),
    )


def _filled(array: np.ndarray) -> np.ndarray:
  """Returns int32 [ROWS], filled up with zeros."""
  filled = np.zeros(ROWS, np.int32)
  filled[: len(array)] = array
  return filled


def _places(inputs: DrawInputs, places: slice) -> DrawInputs:
  """Returns some of the draws."""
  return jax.tree.map(lambda x: x[places] if np.ndim(x) else x, inputs)


def _draws_filled(inputs: DrawInputs) -> DrawInputs:
  """Returns `DRAWS` draws, filled up with zeros."""

  def fill(x: np.ndarray) -> np.ndarray:
    if not np.ndim(x):
      return x
    filled = np.zeros((DRAWS, *x.shape[1:]), x.dtype)
    filled[: len(x)] = x
    return filled

  return jax.tree.map(fill, inputs)


def _no_draw() -> DrawInputs:
  """Returns no draw at all."""
  rule = SamplingParams().rule()
  return DrawInputs(
    row_A=np.zeros(0, np.int32),
    key_A2=np.zeros((0, 2), np.uint32),
    index_A=np.zeros(0, np.int32),
    rule=jax.tree.map(lambda number: np.zeros(0, number.dtype), rule),
    target_A=np.zeros(0, np.int32),
    scoring=np.bool_(False),
    listing=np.bool_(False),
  )
