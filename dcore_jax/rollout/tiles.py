"""Which lanes are decoded together.

Letters as in device.py.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.models.attention.reference import Sharing

WIDTH = 8  # places for lanes at a shared trunk


class Tile(NamedTuple):
  """Lanes that are decoded together, and the trunks that they read."""

  lane_B: np.ndarray  # int32, the lane of the engine that each lane of the tile is
  trunk_R: np.ndarray  # int32, the trunk in each row
  sharing: Sharing


def plan_tiles(
  live: np.ndarray,
  spare: np.ndarray,
  trunk_B: np.ndarray,
  length_B: np.ndarray,
  slot_B: np.ndarray,
  sizes: Sequence[int],
) -> list[Tile]:
  """Puts live lanes into tiles of the largest size, the last into the smallest that holds them.

  Lanes of a trunk are side by side and short ones come before long ones, so that a tile reads
  little more than its lanes hold. Spare lanes fill the last tile up.

  Args:
    live: the lanes that run.
    spare: the other lanes.
    trunk_B: the trunk of each lane.
    length_B: tokens of that trunk.
    slot_B: slots in use of each lane's branch.
    sizes: of tiles, ascending.
  """
  # A tile is read as far as its longest lane, so that lanes of like lengths belong together; and
  # lanes of one trunk, which is then read once for all of them.
  reach = {}  # trunk -> tokens of its longest lane
  for trunk in np.unique(trunk_B[live]):
    readers = live[trunk_B[live] == trunk]
    reach[trunk] = int((length_B[readers] + slot_B[readers]).max())

  def by_length(lane: int) -> tuple[int, ...]:
    """The order of lanes: by their trunk's reach, then trunk by trunk."""
    trunk = trunk_B[lane]
    # The lane decides between equals, so that the order is the same in every run.
    return reach[trunk], trunk, slot_B[lane], lane

  order = sorted(live.tolist(), key=by_length)
  unused = spare.tolist()
  tiles = []
  while order:
    size = next((size for size in sizes if len(order) <= size), sizes[-1])
    mine = order[:size]
    order = order[size:]
    # Programs are compiled for a few sizes: lanes that run nothing fill the tile up.
    missing = size - len(mine)
    tiles.append(_tile(mine, unused[:missing], trunk_B, length_B))
    unused = unused[missing:]
  return tiles


def _tile(live: list[int], fill: list[int], trunk_B: np.ndarray, length_B: np.ndarray) -> Tile:
  """Makes a tile of the lanes `live`, filled up with the lanes `fill`.

  Its trunks stand in rows of `WIDTH` places where that makes at most a quarter as many rows as
  lanes, and otherwise once for each lane.
  """
  lanes = len(live) + len(fill)
  lane_B = np.array(live + fill, np.int32)
  rows = _rows_of_trunks([int(trunk_B[lane]) for lane in live])
  # Groups of eight fill an eighth of as many rows as lanes where they begin and end with the tile,
  # and up to a quarter where they do not. More shapes would be more programs.
  count = next((size for size in (lanes // 8, lanes // 4) if len(rows) <= size), None)
  if count is None:
    return _tile_of_single_rows(lane_B, len(live), trunk_B, length_B)
  trunk_R = np.zeros(count, np.int32)
  length_R = np.zeros(count, np.int32)
  lane_RW = np.zeros((count, WIDTH), np.int32)
  place_B = np.zeros(lanes, np.int32)
  for row, (trunk, mine) in enumerate(rows):
    trunk_R[row] = trunk
    # All lanes of a row read the same trunk; any of them knows its length.
    length_R[row] = length_B[live[mine[0]]]
    lane_RW[row, : len(mine)] = mine
    place_B[mine] = row * WIDTH + np.arange(len(mine))
  return Tile(lane_B, trunk_R, Sharing(length_R, lane_RW, place_B))


def _rows_of_trunks(trunks: Sequence[int]) -> list[tuple[int, list[int]]]:
  """Returns (trunk, up to `WIDTH` of its readers) for each row, readers as places in `trunks`."""
  readers = collections.defaultdict(list)
  for place, trunk in enumerate(trunks):
    readers[trunk].append(place)
  rows = []
  for trunk, places in readers.items():
    for first in range(0, len(places), WIDTH):
      rows.append((trunk, places[first : first + WIDTH]))
  return rows


def _tile_of_single_rows(
  lane_B: np.ndarray, live: int, trunk_B: np.ndarray, length_B: np.ndarray
) -> Tile:
  """Makes a tile whose lanes have a row of their own each; only the first `live` of them run."""
  place_B = np.arange(len(lane_B), dtype=np.int32)
  # Lanes that run nothing read nothing.
  length_R = np.where(place_B < live, length_B[lane_B], 0).astype(np.int32)
  return Tile(lane_B, trunk_B[lane_B], Sharing(length_R, place_B[:, None], place_B))
