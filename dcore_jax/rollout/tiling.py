"""Which texts of a pass are decoded together, and how many positions of theirs are read.

Letters as in passes.py; B texts of a tile, A draws of it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.sizes import EngineSizes

# Texts of a tile, and most draws of it, which are made as many at a time as it has texts. Larger
# tiles fall out of a CPU's caches, smaller ones starve its matrix products: a step of 8 layers of
# width 512 takes 6 ms for 1 text, 12 for 8 and 30 for 32 (100 MB of weights).
_TILES = ((1, 8), (8, 16), (32, 64))
# The shortest span of positions that is compiled for. Each is that many times as long as the one
# before it; layers are compiled one by one, so that a deep model has to do with fewer.
_SHORTEST = 256
_GROWTH = 2
_GROWTH_OF_DEEP = 4
_DEEP = 8  # layers


class Members(NamedTuple):
  """Texts of a pass that are decoded together, and the draws of them; places in the pass."""

  texts: list[int]
  draws: list[int]


class Tiling:
  """Divides the texts of a pass among tiles: few, of few texts, and no longer than they must be.

  A tile is read as far as its longest text, and each reads all weights once. Programs are compiled
  for every size of a tile and every span, so that there are few of either.

  Args:
    sizes: of the engine, resolved.
    layers: of the model.
    weight_bytes: of all weights.
    slot_bytes: of the keys and values of one position.

  Attributes:
    tiles: (texts, draws) that programs are compiled for.
    spans: positions of each text that they read.
    most_draws: draws of the largest tile.
  """

  def __init__(self, sizes: EngineSizes, *, layers: int, weight_bytes: int, slot_bytes: int):
    self._steps = sizes.steps_per_call
    self._max_len = sizes.max_len
    self._weight_bytes = weight_bytes
    self._slot_bytes = slot_bytes
    growth = _GROWTH_OF_DEEP if layers > _DEEP else _GROWTH
    self.spans = ladder(sizes.max_len, growth)
    self.tiles = _tiles(sizes.lanes)
    self.most_draws = self.tiles[-1][1]

  def divide(self, work: Pass) -> Iterator[Members]:
    """Yields the texts of each tile, short ones first: a tile is read as far as its longest."""
    by_text: list[list[int]] = [[] for _ in work.pages]
    for draw, text in enumerate(work.text_R[work.draws.row_A].tolist()):
      by_text[text].append(draw)
    most_texts, most_draws = self.tiles[-1]
    order = np.argsort(work.position_R, kind='stable').tolist()
    spans = [self.span(int(work.position_R[text])) for text in order]
    members = Members([], [])
    for number, text in enumerate(order):
      full = len(members.texts) == most_texts
      full |= len(members.draws) + len(by_text[text]) > most_draws
      longer = number and spans[number] > spans[number - 1]
      if members.texts and (full or longer and self._parts(members, spans, number)):
        yield members
        members = Members([], [])
      members.texts.append(text)
      members.draws.extend(by_text[text])
    yield members

  def _parts(self, members: Members, spans: Sequence[int], number: int) -> bool:
    """Returns whether texts from `number` on, which are longer, are better off in another tile.

    That reads the weights once more, and fewer positions of the short texts.
    """
    short = len(members.texts)
    together = min(short + len(spans) - number, self.tiles[-1][0])
    saved = self._texts(together) * spans[number] - self._texts(short) * spans[number - 1]
    again = self._texts(together - short) * spans[number]
    return (saved - again) * self._slot_bytes > self._weight_bytes

  def _texts(self, count: int) -> int:
    """Returns the texts of the smallest tile that holds so many."""
    return next((B for B, _ in self.tiles if count <= B), self.tiles[-1][0])

  def span(self, position: int) -> int:
    """Returns the positions that a call reads of a text whose last token stands there."""
    return bucket(self.spans, min(position + self._steps, self._max_len))

  def tile_for(self, members: Members) -> tuple[int, int]:
    """Returns the smallest (texts, draws) that a program for these members is compiled for."""
    texts = len(members.texts)
    draws = len(members.draws)
    return next((B, A) for B, A in self.tiles if texts <= B and draws <= A)


def _tiles(lanes: int) -> list[tuple[int, int]]:
  """Returns the tiles of an engine, none of which has room for more texts than it has lanes."""
  most = next((texts for texts, _ in _TILES if lanes <= texts), _TILES[-1][0])
  tiles = []
  for texts, draws in _TILES:
    if texts <= most:
      # A place without a text takes as long as one with.
      room = min(texts, lanes)
      tiles.append((room, draws * room // texts))
  return tiles


def ladder(longest: int, growth: int) -> list[int]:
  """Returns the spans that programs are compiled for, up to the longest."""
  spans = []
  span = _SHORTEST
  while span < longest:
    spans.append(span)
    span *= growth
  return [*spans, longest]


def bucket(spans: Sequence[int], length: int) -> int:
  """Returns the smallest span that holds `length`."""
  return spans[int(np.searchsorted(spans, length))]
