"""Runs passes on a CPU, layer by layer.

The cache is a list of groups of pages. A pass visits the groups that hold pages of its texts, and
no others; groups are made when their first page is used.

Letters as in passes.py.
"""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import layer_programs
from dcore_jax.rollout.layer_programs import DRAW_SIZES, DRAWS, MODES, READERS, ROWS, SIZES, Reads
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import DrawInputs, Drawn
from dcore_jax.rollout.sampling import SamplingParams

# Positions of a page. Half of one is read in vain by each text; the fewer a page has, the more of
# them are looked after.
SLOTS = 64
# Bytes of the keys and values of a group in one layer. A call of a program takes 15 microseconds,
# in which some 200 kB can be read; a group is read as a whole, however few of its pages are in use.
_GROUP_BYTES = 1_500_000
_GROUP_PAGES = (8, 64)  # fewest and most

# One compiled program: layer by layer, each copy would be dispatched on its own.
_turn = jax.jit(decoder.turn)


class LayerExecutor:
  """Holds the weights and the cache of an engine on one CPU, and runs its passes.

  Args:
    params: the parameter tree.
    config: the model's configuration.

  Attributes:
    rows: rows of a pass at most.
    slots: positions of a page.
    overhead: what a pass costs beside its rows, in rows: with one row a pass of 8 layers of width
      512 takes 7 ms, with 32 rows 30 ms.
  """

  rows = ROWS
  slots = SLOTS
  overhead = 7.0

  def __init__(self, params: decoder.Params, config: DecoderConfig):
    self._config = config
    self._dtype = params['embed'].dtype
    one_page = 2 * SLOTS * config.num_key_value_heads * config.head_dim * self._dtype.itemsize
    fewest, most = _GROUP_PAGES
    self._pages = int(np.clip(_GROUP_BYTES // one_page, fewest, most))
    # For each group the keys and values of each layer, [K, P, C, H], layer after layer.
    self._groups: list[list[jax.Array]] = []
    self._nothing = layer_programs.nothing(config)
    self.load(params)

  def unload(self) -> None:
    """Lets the weights go."""
    del self._params
    del self._last

  def load(self, params: decoder.Params) -> None:
    """Takes other weights of the same shapes."""
    # A copy for single rows, layer by layer and transposed (`decoder.turn`).
    self._params = _turn(params)
    self._last = {**self._params, 'layers': self._params['layers'][-1:]}

  def run(self, work: Pass) -> tuple[Drawn | None, Drawn | None]:
    """Runs a pass: what was drawn and what was scored, on the host."""
    config = self._config
    layers = self._params['layers']
    count = len(work.tokens_R)
    reads = self._reads(work)
    tokens_R, position_R, *packed = jax.device_put(
      [_filled(work.tokens_R), _filled(work.position_R), *(one.packed() for one in reads.values())]
    )
    size = jax.device_put(np.int32(np.searchsorted(SIZES, count)))
    queries = layer_programs.first(
      self._params['embed'], layers[0], tokens_R, position_R, size, config=config
    )
    for number, layer in enumerate(layers):
      read = self._nothing
      for group, one in zip(reads, packed, strict=True):
        held = self._groups[group]
        keys, values, read = layer_programs.attend(
          held[2 * number], held[2 * number + 1], queries, read, one, position_R
        )
        held[2 * number] = keys
        held[2 * number + 1] = values
      if number + 1 < len(layers):
        queries = layer_programs.middle(
          layer, layers[number + 1], queries.hidden_RD, read, position_R, size, config=config
        )

    def finish(inputs: DrawInputs | None) -> Drawn | None:
      if inputs is None or not len(inputs.row_A):
        return None
      return self._finish(queries.hidden_RD, read, inputs)

    return finish(work.draws), finish(work.scores)

  def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies pages; each pair is (from, to)."""
    for source, target in pairs:
      group, place = divmod(source, self._pages)
      part = layer_programs.read_page(self._group(group), np.int32(place))
      group, place = divmod(target, self._pages)
      self._groups[group] = layer_programs.write_page(self._group(group), part, np.int32(place))

  def prepare(self, progress: Callable[[int, int], None]) -> None:
    """Compiles all programs, two at a time; `progress` gets (those that are ready, all)."""
    config = self._config
    layers = self._params['layers']
    tokens_R, size = jax.device_put([np.zeros(ROWS, np.int32), np.int32(0)])
    hidden_RD = jnp.zeros((ROWS, config.hidden_size), self._dtype)
    q_RNH = jnp.zeros((ROWS, config.num_attention_heads, config.head_dim), self._dtype)
    k_RKH = jnp.zeros((ROWS, config.num_key_value_heads, config.head_dim), self._dtype)
    queries = layer_programs.Queries(hidden_RD=hidden_RD, q_RNH=q_RNH, k_RKH=k_RKH, v_RKH=k_RKH)
    group = self._new_group()
    inputs = _draws_filled(_no_draw())
    packed = jax.device_put(self._blank_reads().packed())

    def pages() -> None:
      part = layer_programs.read_page(group, np.int32(0))
      layer_programs.write_page(self._new_group(), part, np.int32(0))

    # Each is called once as a pass calls it, and what it gives is thrown away. The longest first.
    calls = [
      lambda: layer_programs.last(
        self._last, hidden_RD, self._nothing, inputs, size, config=config
      ),
      lambda: layer_programs.middle(
        layers[0], layers[-1], hidden_RD, self._nothing, tokens_R, size, config=config
      ),
      lambda: layer_programs.attend(
        *self._new_group()[:2], queries, self._nothing, packed, tokens_R
      ),
      lambda: layer_programs.first(
        self._params['embed'], layers[0], tokens_R, tokens_R, size, config=config
      ),
      pages,
    ]
    progress(0, len(calls))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      waiting = [pool.submit(call) for call in calls]
      for ready, one in enumerate(concurrent.futures.as_completed(waiting), start=1):
        one.result()
        progress(ready, len(calls))

  # --- what passes are made of --------------------------------------------------------------------

  def _new_group(self) -> list[jax.Array]:
    config = self._config
    shape = (config.num_key_value_heads, self._pages, SLOTS, config.head_dim)
    blank = []
    for _ in range(2 * config.num_hidden_layers):
      blank.append(jax.device_put(np.zeros(shape, self._dtype)))
    return blank

  def _group(self, number: int) -> list[jax.Array]:
    """Returns a group; memory grows with what is in use."""
    while len(self._groups) <= number:
      self._groups.append(self._new_group())
    return self._groups[number]

  def _finish(self, hidden_RD: jax.Array, read: Any, inputs: DrawInputs) -> Drawn:
    """Draws or scores, `DRAWS` rows at a time."""
    found = []
    for first in range(0, len(inputs.row_A), DRAWS):
      some = _places(inputs, slice(first, first + DRAWS))
      count = len(some.row_A)
      size = np.int32(np.searchsorted(DRAW_SIZES, count))
      drawn = layer_programs.last(
        self._last, hidden_RD, read, _draws_filled(some), size, config=self._config
      )
      found.append((count, drawn))
    host = []
    for count, drawn in jax.device_get(found):
      host.append(jax.tree.map(lambda x, count=count: x[:count], drawn))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *host)

  def _blank_reads(self) -> Reads:
    return Reads(
      mode=np.int32(0),
      writes=np.int32(0),
      start_P=np.zeros(self._pages, np.int32),
      place_RP=np.full((ROWS, self._pages), -1, np.int32),
      reader_PW=np.zeros((self._pages, READERS), np.int32),
      write_row_R=np.zeros(ROWS, np.int32),
      write_slot_R=np.zeros(ROWS, np.int32),
    )

  def _reads(self, work: Pass) -> dict[int, Reads]:
    """Returns what is read and written of each group that holds pages of the pass's texts."""
    P = self._pages
    count = len(work.tokens_R)
    rows_X = np.bincount(work.text_R, minlength=len(work.pages))
    first_X = np.cumsum(rows_X) - rows_X
    # One entry for each page of each text.
    pages_X = np.array([len(pages) for pages in work.pages])
    page_n = np.concatenate([np.asarray(pages) for pages in work.pages])
    text_n = np.repeat(np.arange(len(work.pages)), pages_X)
    start_n = (np.arange(len(page_n)) - np.repeat(np.cumsum(pages_X) - pages_X, pages_X)) * SLOTS
    order = np.argsort(page_n, kind='stable')
    page_n = page_n[order]
    text_n = text_n[order]
    start_n = start_n[order]
    # One entry for each row of each text that reads the page: its place among the page's readers.
    width_n = rows_X[text_n]
    page_m = np.repeat(page_n, width_n)
    begin_m = np.repeat(np.cumsum(width_n) - width_n, width_n)
    row_m = np.repeat(first_X[text_n], width_n) + np.arange(len(page_m)) - begin_m
    place_m = np.arange(len(page_m)) - np.searchsorted(page_m, page_m)
    write_page_R = np.concatenate([np.asarray(pages) for pages in work.pages])[
      np.repeat(np.cumsum(pages_X) - pages_X, rows_X) + work.position_R // SLOTS
    ]
    result = {}
    for group in np.unique(page_n // P).tolist():
      self._group(group)
      reads = self._blank_reads()
      mine_n = page_n // P == group
      reads.start_P[page_n[mine_n] % P] = start_n[mine_n]
      mine_m = page_m // P == group
      page = page_m[mine_m] % P
      reads.place_RP[row_m[mine_m], page] = place_m[mine_m]
      few = mine_m & (place_m < READERS)
      reads.reader_PW[page_m[few] % P, place_m[few]] = row_m[few]
      written = np.flatnonzero(write_page_R // P == group)
      reads.write_row_R[: len(written)] = written
      slot = write_page_R[written] % P * SLOTS + work.position_R[written] % SLOTS
      reads.write_slot_R[: len(written)] = slot
      result[group] = reads._replace(
        mode=np.int32(_mode(count, int(place_m[mine_m].max()) + 1)), writes=np.int32(len(written))
      )
    return result


def _mode(rows: int, readers: int) -> int:
  """Returns how rows meet the pages of a group, given the most readers that a page has."""
  for kind, most in (('all', 1), ('all', 8)):
    if rows <= most:
      return MODES.index((kind, most))
  for kind, most in (('page', 1), ('page', READERS)):
    if readers <= most:
      return MODES.index((kind, most))
  return MODES.index(('all', ROWS))


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
