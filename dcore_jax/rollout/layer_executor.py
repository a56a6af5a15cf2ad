"""Runs passes on a CPU, layer by layer.

On a CPU a product needs its operand in one piece, and to copy pages together costs as much as to
read them. So the first pages of all texts stand together, and their second ones, and so on: a block
holds pages of one place. Its rows meet it in one product, and each row reads one of its pages.
Blocks are made when their first page is used.

Letters as in passes.py.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import layer_programs
from dcore_jax.rollout.layer_programs import (
  DRAW_SIZES,
  DRAWS,
  MODES,
  PAGES,
  POSITIONS,
  READERS,
  ROWS,
  SIZES,
  Reads,
)
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import DrawInputs, Drawn
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

# So many pages that one row reads each are read together with all others of their block; fewer are
# cut out one by one.
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
    slots: positions of a page.
    pages: number of pages.
    places: pages of a text.
    overhead: what a pass costs beside its rows, in rows: with one row a pass of 8 layers of width
      512 takes 7 ms, with 32 rows 30 ms.
  """

  rows = ROWS
  slots = POSITIONS
  overhead = 7.0

  def __init__(self, params: decoder.Params, config: DecoderConfig, sizes: EngineSizes):
    self.places = -(-sizes.max_len // POSITIONS)
    # Of each place one for every text that there can be, in whole blocks.
    self._blocks_of_place = -(-(sizes.lanes + sizes.trunks + 1) // PAGES)
    self.pages = self.places * self._blocks_of_place * PAGES
    self._config = config
    self._dtype = params['embed'].dtype
    # Keys and values of each layer, [P, K, C, H], layer after layer.
    self._blocks: dict[int, list[jax.Array]] = {}
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
      for (block, _), one in zip(reads, packed, strict=True):
        keys, values, read = layer_programs.attend(
          block[2 * number], block[2 * number + 1], queries, read, one, position_R
        )
        block[2 * number : 2 * number + 2] = keys, values
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

  def copy(self, source: int, target: int) -> None:
    """Copies a page into another."""
    block, page = divmod(source, PAGES)
    part = layer_programs.read_page(self._block(block), np.int32(page))
    block, page = divmod(target, PAGES)
    self._blocks[block] = layer_programs.write_page(self._block(block), part, np.int32(page))

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
    packed = jax.device_put(_blank_reads().packed())

    def copies() -> None:
      part = layer_programs.read_page(block, np.int32(0))
      layer_programs.write_page(self._new_block(), part, np.int32(0))

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
    shape = (PAGES, config.num_key_value_heads, POSITIONS, config.head_dim)
    blank = []
    for _ in range(2 * config.num_hidden_layers):
      blank.append(jax.device_put(np.zeros(shape, self._dtype)))
    return blank

  def _block(self, number: int) -> list[jax.Array]:
    """Returns a block; memory grows with what is in use."""
    if number not in self._blocks:
      self._blocks[number] = self._new_block()
    return self._blocks[number]

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

  def _reads(self, work: Pass) -> list[tuple[list[jax.Array], Reads]]:
    """Returns the blocks that a pass visits, and what it does there."""
    rows_n = np.bincount(work.text_R, minlength=len(work.pages))
    first_n = np.cumsum(rows_n) - rows_n
    place_n = work.position_R[first_n + rows_n - 1] // POSITIONS
    visits = []
    for place in range(int(place_n.max()) + 1):
      there = np.flatnonzero(place_n >= place).tolist()
      by_block: dict[int, list[tuple[int, int]]] = {}
      for text in there:
        block, page = divmod(work.pages[text][place], PAGES)
        by_block.setdefault(block, []).append((text, page))
      for block, members in by_block.items():
        for reads in self._visits(work, place, members, first_n, rows_n):
          visits.append((self._block(block), reads))
    return visits

  def _visits(
    self,
    work: Pass,
    place: int,
    members: list[tuple[int, int]],
    first_n: np.ndarray,
    rows_n: np.ndarray,
  ) -> Iterator[Reads]:
    """Yields what texts do in a block; `members` are (text, page)."""
    single = [(text, page) for text, page in members if rows_n[text] == 1]
    # Readers beyond the places of a page go alone.
    together, alone = _seated(single) if len(single) >= _TOGETHER else ([], single)
    if together:
      yield _together(work, place, together, first_n)
    alone += [(text, page) for text, page in members if rows_n[text] > 1]
    for text, page in alone:
      yield _alone(work, place, page, int(first_n[text]), int(rows_n[text]))


def _seated(
  members: list[tuple[int, int]],
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
  """Returns ((text, page, its seat there), those for which there is no seat)."""
  seats = collections.Counter()
  seated = []
  left = []
  for text, page in members:
    if seats[page] < READERS:
      seated.append((text, page, seats[page]))
      seats[page] += 1
    else:
      left.append((text, page))
  return seated, left


def _blank_reads() -> Reads:
  return Reads(
    mode=np.int32(0),
    start=np.int32(0),
    page=np.int32(0),
    first=np.int32(0),
    rows=np.int32(0),
    writes=np.int32(0),
    row_PW=np.zeros((PAGES, READERS), np.int32),
    place_R=np.full(ROWS, -1, np.int32),
    write_row_R=np.zeros(ROWS, np.int32),
    write_page_R=np.zeros(ROWS, np.int32),
  )


def _together(
  work: Pass, place: int, members: list[tuple[int, int, int]], first_n: np.ndarray
) -> Reads:
  """Returns what texts with one row each do in a block."""
  reads = _blank_reads()
  text_n, page_n, seat_n = np.array(members, np.int32).T
  row_n = first_n[text_n]
  reads.row_PW[page_n, seat_n] = row_n
  reads.place_R[row_n] = page_n * READERS + seat_n
  written_n = work.position_R[row_n] // POSITIONS == place
  count = np.count_nonzero(written_n)
  reads.write_row_R[:count] = row_n[written_n]
  reads.write_page_R[:count] = page_n[written_n]
  return reads._replace(
    mode=np.int32(_mode('together', int(seat_n.max()) + 1)),
    start=np.int32(place * POSITIONS),
    writes=np.int32(count),
  )


def _alone(work: Pass, place: int, page: int, first: int, rows: int) -> Reads:
  """Returns what one text does in a block."""
  reads = _blank_reads()
  own = first + np.arange(rows)
  written = own[work.position_R[own] // POSITIONS == place]
  reads.write_row_R[: len(written)] = written
  reads.write_page_R[: len(written)] = page
  return reads._replace(
    mode=np.int32(_mode('alone', rows)),
    start=np.int32(place * POSITIONS),
    page=np.int32(page),
    first=np.int32(first),
    rows=np.int32(rows),
    writes=np.int32(len(written)),
  )


def _mode(kind: str, rows: int) -> int:
  """Returns the first mode that holds so many rows."""
  for place, mode in enumerate(MODES):
    if mode.kind == kind and rows <= mode.rows:
      return place
  raise AssertionError('the last mode of each kind holds all')


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
