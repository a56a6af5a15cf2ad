"""The host's account: which tokens each trunk holds, what runs in each lane, and which lanes are decoded together.

Letters as in device.py.
"""

import collections
import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.models.attention import Sharing

WIDTH = 8  # places for lanes at a shared trunk
_MIN_PREFIX = (
  32  # tokens in common that are worth a copy of a trunk; also a quarter of the prompt at least
)


def bucket_ladder(max_len: int) -> tuple[int, ...]:
  """The lengths that programs are compiled for: 64, 128, 192, 256, 384, 512, 768, 1024, ... up to `max_len`."""
  steps = {64, 192} | {base << shift for base in (128, 192) for shift in range(32)}
  return (*sorted(step for step in steps if step < max_len), max_len)


def span_ladder(max_len: int) -> tuple[int, ...]:
  """The spans of slots that decode programs are compiled for: 64, 128, 256, 512, 768, 1024, 1536, ... up to `max_len`. Short
  ones are coarser than for prompts: reading them is a small part of a step, and each pair of spans is a program."""
  return tuple(
    step
    for step in bucket_ladder(max_len)
    if step > 512 or step == max_len or step.bit_count() == 1
  )


def bucket(ladder: Sequence[int], length: int) -> int:
  """The smallest step of the ladder that holds `length`."""
  return ladder[int(np.searchsorted(ladder, length))]


class Fill(NamedTuple):
  """Tokens to be appended to `start` slots that trunk `source` has, as trunk `target`."""

  source: int
  target: int
  start: int
  tokens: np.ndarray  # int32 [n], n >= 1


class TrunkTable:
  """Which tokens each trunk holds and how many lanes read it. A trunk that none reads keeps its tokens until it is needed for
  others: a prompt that begins with them continues it, and one that has a long prefix in common starts from a copy."""

  def __init__(self, trunks: int, max_len: int):
    self.length_P = np.zeros(trunks, np.int32)
    self._tokens_PS = np.full((trunks, max_len), -1, np.int32)
    self._users_P = np.zeros(trunks, np.int32)
    self._used_P = np.zeros(trunks, np.int64)  # when a lane last let go of it
    self._clock = 0
    self._pinned: set[int] = set()  # read or written by the fills of this round
    self._written: set[int] = set()

  def start_round(self) -> None:
    """What was planned so far is on the device now."""
    self._pinned, self._written = set(), set()

  def forget(self) -> None:
    """Drops the tokens of trunks that no lane reads."""
    self.length_P[self._users_P == 0] = 0

  def acquire(self, prompt: np.ndarray) -> tuple[int, Fill | None] | None:
    """A trunk for one more lane with this prompt and what it lacks; None where that has to wait for a trunk or for a fill of
    this round to be there."""
    n = len(prompt)
    differs_PS = self._tokens_PS[:, :n] != prompt[None, :]
    common_P = np.where(differs_PS.any(axis=1), differs_PS.argmax(axis=1), n)
    common_P = np.minimum(common_P, self.length_P)
    exact = np.flatnonzero((common_P == n) & (self.length_P == n))
    if len(exact):
      self._users_P[exact[0]] += 1
      return int(exact[0]), None
    best = int(common_P.argmax())
    start = min(int(common_P[best]), n - 1)  # the hidden state of the last token is needed as well
    if 0 < start == self.length_P[best] and self._idle(best):
      target = best
    elif start >= max(_MIN_PREFIX, n // 4):
      if best in self._written:
        return None
      target = self._idle_one(excluded=(best,))
      if target is None and self._idle(best):
        target = best
    else:
      target, start = self._idle_one(), 0
    if target is None:
      return None
    source = best if start else target
    self._take(target, prompt)
    self._pinned.add(source)
    return target, Fill(source, target, start, prompt[start:])

  def grow(self, trunk: int, tokens: np.ndarray) -> int | None:
    """A trunk for the lane that reads `trunk` and shall read `tokens` instead, which begin with it: the same one where no other
    lane reads it. None: there is none now."""
    target = trunk if self._users_P[trunk] == 1 and trunk not in self._pinned else self._idle_one()
    if target is not None:
      self._users_P[trunk] -= 1
      self._take(target, tokens)
      self._pinned.add(trunk)
    return target

  def release(self, trunk: int) -> None:
    """One lane less reads it."""
    self._users_P[trunk] -= 1
    self._clock += 1
    self._used_P[trunk] = self._clock

  def _idle(self, trunk: int) -> bool:
    return not self._users_P[trunk] and trunk not in self._pinned

  def _idle_one(self, excluded: Collection[int] = ()) -> int | None:
    """An empty trunk, or the one that has been idle for longest."""
    idle = [
      trunk
      for trunk in np.flatnonzero(self._users_P == 0).tolist()
      if self._idle(trunk) and trunk not in excluded
    ]
    return min(
      idle, key=lambda trunk: (self.length_P[trunk] > 0, self._used_P[trunk]), default=None
    )

  def _take(self, trunk: int, tokens: np.ndarray) -> None:
    self._tokens_PS[trunk], self.length_P[trunk] = -1, len(tokens)
    self._tokens_PS[trunk, : len(tokens)] = tokens
    self._users_P[trunk] += 1
    self._pinned.add(trunk)
    self._written.add(trunk)


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
  """Lanes that are decoded together."""

  lane_B: np.ndarray  # int32
  trunk_R: np.ndarray  # int32
  sharing: Sharing


def plan_tiles(
  live: np.ndarray,
  spare: np.ndarray,
  trunk_A: np.ndarray,
  length_A: np.ndarray,
  slot_A: np.ndarray,
  sizes: Sequence[int],
) -> list[Tile]:
  """The live lanes in tiles of the largest size and, for the last ones, the smallest that holds them.

  Lanes of a trunk are side by side and short ones before long ones, so that a tile reads little more than its lanes hold.
  Spare lanes fill the last one up.

  Args:
    live: the lanes that run; `spare`: others.
    trunk_A: the trunk of each lane.
    length_A: tokens of that trunk.
    slot_A: slots in use of each lane's branch.
    sizes: of tiles, ascending.
  """
  reach = {
    trunk: int((length_A[mine] + slot_A[mine]).max())
    for trunk in np.unique(trunk_A[live])
    for mine in [live[trunk_A[live] == trunk]]
  }
  order = sorted(
    live.tolist(), key=lambda lane: (reach[trunk_A[lane]], trunk_A[lane], slot_A[lane], lane)
  )
  tiles, spare = [], spare.tolist()
  while order:
    size = next((size for size in sizes if len(order) <= size), sizes[-1])
    mine, order = order[:size], order[size:]
    fill = spare[: size - len(mine)]
    spare = spare[len(fill) :]
    tiles.append(_tile(mine, fill, trunk_A, length_A))
  return tiles


def _tile(live: list[int], fill: list[int], trunk_A: np.ndarray, length_A: np.ndarray) -> Tile:
  """The trunks in rows of `WIDTH` places where that makes at most a quarter as many rows as lanes, else one for each lane."""
  B = len(live) + len(fill)
  lane_B = np.array(live + fill, np.int32)
  places = collections.defaultdict(list)
  for index, lane in enumerate(live):
    places[trunk_A[lane]].append(index)
  rows = [
    (trunk, mine[first : first + WIDTH])
    for trunk, mine in places.items()
    for first in range(0, len(mine), WIDTH)
  ]
  R = next((R for R in (B // 8, B // 4) if len(rows) <= R), None)
  if R is None:
    length_R = np.where(np.arange(B) < len(live), length_A[lane_B], 0).astype(np.int32)
    place_B = np.arange(B, dtype=np.int32)
    return Tile(lane_B, trunk_A[lane_B], Sharing(length_R, place_B[:, None], place_B))
  trunk_R, length_R = np.zeros((2, R), np.int32)
  lane_RW, place_B = np.zeros((R, WIDTH), np.int32), np.zeros(B, np.int32)
  for row, (trunk, mine) in enumerate(rows):
    trunk_R[row], length_R[row] = trunk, length_A[live[mine[0]]]
    lane_RW[row, : len(mine)] = mine
    place_B[mine] = row * WIDTH + np.arange(len(mine))
  return Tile(lane_B, trunk_R, Sharing(length_R, lane_RW, place_B))
