"""How an accelerator's pass is laid out: its rows as grids of B blocks with M tokens each.

A program is compiled for a grid, and not for a pass. So there are three of them:

| grid | B | M | what goes there |
|---|---|---|---|
| ONE | lanes | 1 | texts that wait for their next token |
| FEW | at most 64 | 8 | the same with guesses, and short prompts |
| PIECE | 4 | 128 | long prompts |

A text with more rows than a block has several blocks, which list the same pages: a layer writes all
keys before it reads any, and a row sees what stands before its own position. Blocks that begin with
the same pages, as those of rollouts of one prompt do, read them together: up to W blocks are then
one row of queries (`Sharing`).

Everything here is numpy, a few operations a grid. Letters as in passes.py, and in grids: B blocks,
M tokens of a block, S rows of blocks that read together, W places of such a row, N pages of the
cache.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.rollout.passes import Pass

WIDTH = 8  # W: groups of rollouts have eight members in the paper
_FEW = 8  # tokens of a block for guesses
_FEW_BLOCKS = 64
_PIECE = 128
_PIECES = 4
PIECE = _PIECE * _PIECES  # rows of prompts that one call takes


@dataclasses.dataclass(frozen=True)
class GridShape:
  """The sizes of a grid, for which a program is compiled.

  Attributes:
    blocks: B.
    width: M, tokens of a block.
    pages: P, pages of the longest text.
    shared: S, rows of blocks that read together; 0: none do.
  """

  blocks: int
  width: int
  pages: int
  shared: int


class Sharing(NamedTuple):
  """Which blocks read their first pages together; int32.

  Attributes:
    block_SW: the blocks of each row, -1 where a place is empty. All of them begin with the pages of
      the first.
    count_S: how many pages they read together.
    place_B: row * W + place of each block; -1 where it reads alone.
  """

  block_SW: np.ndarray
  count_S: np.ndarray
  place_B: np.ndarray


class Grid(NamedTuple):
  """A grid as the program takes it; int32.

  Attributes:
    token_BM: token ids.
    position_BM: their positions; -1 where there is no token.
    row_BM: their rows of the pass.
    pages_BP: the pages of each block's text, from its first position on.
    sharing: which blocks read together.
  """

  token_BM: np.ndarray
  position_BM: np.ndarray
  row_BM: np.ndarray
  pages_BP: np.ndarray
  sharing: Sharing


@dataclasses.dataclass(frozen=True)
class GridShapes:
  """The three grids of an engine."""

  one: GridShape
  few: GridShape
  piece: GridShape

  def __iter__(self):
    return iter((self.one, self.few, self.piece))


def grid_shapes(lanes: int, pages: int) -> GridShapes:
  """Returns the grids of an engine with so many lanes, whose texts have so many pages at most."""

  def shape(blocks: int, width: int) -> GridShape:
    # A row of two blocks saves half, so that a quarter as many rows as blocks get most of it.
    shared = -(-blocks // 4) if blocks > 1 else 0
    return GridShape(blocks=blocks, width=width, pages=pages, shared=shared)

  return GridShapes(
    one=shape(lanes, 1),
    few=shape(min(lanes, _FEW_BLOCKS), _FEW),
    # A kernel reads pages anew for each 64 to 256 queries, which a block of a piece has alone.
    piece=GridShape(blocks=_PIECES, width=_PIECE, pages=pages, shared=0),
  )


def lay_out(work: Pass, shapes: GridShapes, slots: int, rows: int) -> list[tuple[GridShape, Grid]]:
  """Lays the rows of a pass out into grids, which are to be computed in this order.

  Args:
    work: the pass; the rows of a text stand together, in order of position.
    shapes: the grids that there are programs for.
    slots: C, of a page.
    rows: rows of the engine's passes, an index behind which nothing is written.
  """
  count_n = np.bincount(work.text_R, minlength=len(work.pages))
  few = shapes.few
  # Few lanes make small grids, of which a prompt would need many.
  longest = few.width * max(1, min(8, few.blocks // 4))
  single_n = count_n == 1
  few_n = ~single_n & (count_n <= longest)
  # Where the grid of guesses runs anyway, its empty blocks cost nothing.
  needed = int((-(-count_n[few_n] // few.width)).sum())
  if needed and np.count_nonzero(single_n) <= -needed % few.blocks:
    few_n |= single_n
    single_n = np.zeros_like(single_n)
  grids = []
  for shape, mine_n in (
    (shapes.one, single_n),
    (few, few_n),
    (shapes.piece, count_n > longest),
  ):
    texts = np.flatnonzero(mine_n)
    if len(texts):
      grids += [(shape, grid) for grid in _grids(work, texts, count_n, shape, slots, rows)]
  return grids


def blank(shape: GridShape, rows: int) -> Grid:
  """Returns a grid without tokens, for an engine with so many rows of a pass."""
  cells = (shape.blocks, shape.width)
  return Grid(
    token_BM=np.zeros(cells, np.int32),
    position_BM=np.full(cells, -1, np.int32),
    row_BM=np.full(cells, rows, np.int32),
    pages_BP=np.zeros((shape.blocks, shape.pages), np.int32),
    sharing=Sharing(
      block_SW=np.full((shape.shared, WIDTH), -1, np.int32),
      count_S=np.zeros(shape.shared, np.int32),
      place_B=np.full(shape.blocks, -1, np.int32),
    ),
  )


def _grids(
  work: Pass, texts: np.ndarray, count_n: np.ndarray, shape: GridShape, slots: int, rows: int
) -> list[Grid]:
  """Returns the grids of some texts."""
  M = shape.width
  first_n = np.cumsum(count_n) - count_n
  blocks_t = -(-count_n[texts] // M)
  # For every block its text, counted among `texts`, and its place there.
  text_b = np.repeat(np.arange(len(texts)), blocks_t)
  place_b = np.arange(len(text_b)) - np.repeat(np.cumsum(blocks_t) - blocks_t, blocks_t)
  first_b = first_n[texts][text_b] + place_b * M
  size_b = np.minimum(count_n[texts][text_b] - place_b * M, M)
  table_tP = _table([work.pages[text] for text in texts.tolist()], shape.pages)
  grids = []
  for start in range(0, len(text_b), shape.blocks):
    some = slice(start, start + shape.blocks)
    grid = blank(shape, rows)
    used = len(text_b[some])
    there_bM = np.arange(M)[None, :] < size_b[some][:, None]
    row_m = (first_b[some][:, None] + np.arange(M)[None, :])[there_bM]
    grid.row_BM[:used][there_bM] = row_m
    grid.token_BM[:used][there_bM] = work.tokens_R[row_m]
    grid.position_BM[:used][there_bM] = work.position_R[row_m]
    grid.pages_BP[:used] = table_tP[text_b[some]]
    if shape.shared and used > 1:
      read_b = grid.position_BM[:used].max(axis=1) // slots + 1
      _share(grid.sharing, grid.pages_BP[:used], read_b)
    grids.append(grid)
  return grids


def _table(pages: Sequence[Sequence[int]], width: int) -> np.ndarray:
  """Returns lists of pages as int32 [n, P], filled up with zeros."""
  length_n = np.fromiter(map(len, pages), np.int32, len(pages))
  table_nP = np.zeros((len(pages), width), np.int32)
  listed = itertools.chain.from_iterable(pages)
  table_nP[np.arange(width)[None, :] < length_n[:, None]] = np.fromiter(
    listed, np.int32, int(length_n.sum())
  )
  return table_nP


def _share(sharing: Sharing, pages_bP: np.ndarray, read_b: np.ndarray) -> None:
  """Lets blocks with the same first pages read them together, those first that save most.

  Args:
    sharing: without any yet; it is filled in.
    pages_bP: pages of each block.
    read_b: how many of them it reads.
  """
  # In the order of their bytes, blocks that begin with the same pages are neighbours.
  names = [pages.tobytes() for pages in pages_bP]
  order = sorted(range(len(names)), key=names.__getitem__)
  sorted_bP = pages_bP[order]
  same_bP = sorted_bP[1:] == sorted_bP[:-1]
  same_b = np.where(same_bP.all(axis=1), pages_bP.shape[1], same_bP.argmin(axis=1))
  read_b = read_b[order]
  common = np.minimum(same_b, np.minimum(read_b[1:], read_b[:-1])).tolist()
  runs = []
  first = 0
  while first < len(common):
    saved, last, pages = _best_run(common, first)
    if saved:
      runs.append((saved, first, last, pages))
    first = last + 1
  # What saves most comes first; equals in their order, which is the same on every host.
  runs.sort(key=lambda run: -run[0])
  for row, (_, first, last, pages) in enumerate(runs[: len(sharing.count_S)]):
    blocks = order[first : last + 1]
    sharing.block_SW[row, : len(blocks)] = blocks
    sharing.count_S[row] = pages
    sharing.place_B[blocks] = row * WIDTH + np.arange(len(blocks))


def _best_run(common: list[int], first: int) -> tuple[int, int, int]:
  """Returns (pages saved, last block, pages in common) of neighbours from a block on.

  A block joins as long as that saves more.

  Args:
    common: pages that each block has in common with the next one.
    first: the first block.
  """
  saved = 0
  last = first
  pages = 0
  least = common[first]
  for size in range(1, min(WIDTH - 1, len(common) - first) + 1):
    least = min(least, common[first + size - 1])
    if size * least <= saved:
      break
    saved = size * least
    last = first + size
    pages = least
  return saved, last, pages
