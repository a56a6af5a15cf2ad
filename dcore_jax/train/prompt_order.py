"""Which items of a source are trained on, which are held out, and in which order they are asked."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PromptOrder:
  """The items that each step asks: a pure function of (seed, step, turn).

  A resumed run therefore asks what the run that was killed would have asked.

  Attributes:
    items: the numbers of the items that are trained on.
    prompts: items a step.
    seed: of the order.

  Raises:
    ValueError: fewer items than a step asks.
  """

  items: Sequence[int]
  prompts: int
  seed: int

  def __post_init__(self):
    if not self.items or len(self.items) < self.prompts:
      raise ValueError(f'{len(self.items)} prompts are too few for batches of {self.prompts}')

  def chosen(self, step: int, turn: int = 0) -> list[int]:
    """The items of one turn of a step.

    The first turns of an epoch's steps draw without replacement. Further turns, which dynamic
    sampling asks for, draw items that the step has not asked yet, as long as there are any.
    """
    if turn:
      return self._further(step, turn)
    # Items that do not fill a last batch of the epoch are left out; the next epoch draws anew.
    epoch, place = divmod(step, len(self.items) // self.prompts)
    order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
    return [self.items[i] for i in order[place * self.prompts : (place + 1) * self.prompts]]

  def _further(self, step: int, turn: int) -> list[int]:
    asked = set()
    for earlier in range(turn):
      asked.update(self.chosen(step, earlier))
    order = np.random.default_rng([self.seed, step, turn]).permutation(len(self.items))
    drawn = [self.items[i] for i in order]
    fresh = [item for item in drawn if item not in asked]
    again = [item for item in drawn if item in asked]
    return (fresh + again)[: self.prompts]


def set_aside(kinds: Sequence[str], count: int) -> tuple[list[int], list[int]]:
  """(`count` held-out items, the others): always the same ones, and of every kind its share.

  The first items of a kind are taken, not a random sample: neighbours may be steps of one task,
  and should be on the same side.

  Raises:
    ValueError: more items than there are.
  """
  if count > len(kinds):
    raise ValueError(f'rl.validation = {count} exceeds the {len(kinds)} prompts')
  members = collections.defaultdict(list)
  for index, kind in enumerate(kinds):
    members[kind].append(index)
  sizes = np.array([len(group) for group in members.values()])
  shares = np.floor(sizes * count / max(1, len(kinds))).astype(int)
  shares[: count - shares.sum()] += 1  # the first kinds take what rounding down has left
  aside = []
  rest = []
  for group, share in zip(members.values(), shares, strict=True):
    aside += group[:share]
    rest += group[share:]
  return aside, rest
