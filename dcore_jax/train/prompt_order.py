"""Which items of a source are trained on, which are held out, and in which order they are asked."""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class PromptOrder:
  """The items that each step asks: a pure function of (seed, step, turn).

  A resumed run therefore asks what the run that was killed would have asked.

  Attributes:
    items: the numbers of the items that are trained on.
    prompts: the number of items that each step asks.
    seed: the seed of the order.

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
    """Returns the items of one turn of a step.

    The first turns of an epoch's steps draw without replacement. Further turns, which dynamic
    sampling asks for, draw items that the step has not asked yet, as long as there are any.
    """
    if turn:
      return self._further(step, turn)
    # Items that do not fill a last batch of the epoch are left out; the next epoch draws anew.
    epoch, place = divmod(step, len(self.items) // self.prompts)
    # A generator for each epoch, so that no state has to be kept in a checkpoint.
    order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
    return [self.items[i] for i in order[place * self.prompts : (place + 1) * self.prompts]]

  def _further(self, step: int, turn: int) -> list[int]:
    asked = set()
    # Earlier turns are computed anew: the order is a function, and nobody has to remember them.
    for earlier in range(turn):
      asked.update(self.chosen(step, earlier))
    order = np.random.default_rng([self.seed, step, turn]).permutation(len(self.items))
    drawn = [self.items[i] for i in order]
    fresh = [item for item in drawn if item not in asked]
    again = [item for item in drawn if item in asked]
    # With few items a turn may have to ask some again; they get other random streams by their turn.
    return (fresh + again)[: self.prompts]


class Label(NamedTuple):
  """What an item of a source belongs to.

  Attributes:
    task: a name that all items of one task or dialogue share.
    kind: of the task.
    stream: numbers the random stream of measurements of the item, 0..2^32-1.
  """

  task: str
  kind: str
  stream: int


def set_aside(labels: Sequence[Label], count: int, seed: int) -> list[int]:
  """Returns the numbers of up to `count` held-out items, in ascending order.

  All items of a task are on one side: a later step or turn shows how an earlier one is answered.
  Every kind of task has one task at least, the smallest first where `count` does not reach for all,
  and beyond that its share of the items. There are fewer than `count` where whole tasks do not give
  as many. Which tasks of a kind come first follows from `seed` and their names alone, not from the
  order of the items or from other kinds.

  Raises:
    ValueError: more items than there are, or no task with so few.
  """
  # Asking for more than there is would quietly hold out everything.
  if count > len(labels):
    raise ValueError(f'rl.validation = {count} exceeds the {len(labels)} prompts')
  if not count:
    return []
  items_by_task = collections.defaultdict(list)
  # A task has one kind: that of its first label, by name, whatever the order of the items.
  kind_by_task: dict[str, str] = {}
  for number, label in enumerate(labels):
    items_by_task[label.task].append(number)
    kind_by_task[label.task] = min(label.kind, kind_by_task.get(label.task, label.kind))
  sizes = {task: len(items) for task, items in items_by_task.items()}
  # Only tasks and their sizes decide; the items follow their task.
  chosen = _choose_tasks(kind_by_task, sizes, count, seed)
  if not chosen:
    raise ValueError(
      f'rl.validation = {count}: tasks are set aside as a whole, and the smallest has '
      f'{min(sizes.values())} prompts'
    )
  aside = []
  for task in chosen:
    aside += items_by_task[task]
  return sorted(aside)


def _choose_tasks(
  kind_by_task: Mapping[str, str], sizes: Mapping[str, int], count: int, seed: int
) -> list[str]:
  """Returns tasks of at most `count` items together, of as many kinds as possible."""
  waiting: dict[str, list[str]] = collections.defaultdict(list)
  # Ordered by a hash of its own name, a task keeps its place when other tasks come or go.
  for task in sorted(kind_by_task, key=lambda task: _rank(seed, task)):
    waiting[kind_by_task[task]].append(task)
  items = {kind: sum(sizes[task] for task in tasks) for kind, tasks in waiting.items()}
  smallest = {kind: min(sizes[task] for task in tasks) for kind, tasks in waiting.items()}
  chosen = []
  room = count
  # Items that each kind still lacks of its share.
  lacking = {kind: count * items[kind] / sum(items.values()) for kind in waiting}

  def take(kind: str, most: int) -> None:
    nonlocal room
    # The first task that fits: a large one must not keep smaller ones of its kind out.
    task = next(task for task in waiting[kind] if sizes[task] <= most)
    waiting[kind].remove(task)
    chosen.append(task)
    room -= sizes[task]
    lacking[kind] -= sizes[task]

  # One task of each kind. Kinds with small tasks come first, so that most kinds find room.
  covered = []
  reserved = 0
  for kind in sorted(waiting, key=lambda kind: (smallest[kind], -items[kind], kind)):
    # The room for the smallest task of each later kind stays reserved while earlier kinds choose.
    if reserved + smallest[kind] <= count:
      covered.append(kind)
      reserved += smallest[kind]
  for kind in covered:
    reserved -= smallest[kind]
    take(kind, room - reserved)
  # Then always of the kind that lacks most.
  while True:
    fitting = []
    for kind, tasks in waiting.items():
      if any(sizes[task] <= room for task in tasks):
        fitting.append(kind)
    if not fitting:
      return chosen
    # The name of the kind decides between equals, so that the choice does not depend on the order.
    take(max(fitting, key=lambda kind: (lacking[kind], kind)), room)


def _rank(seed: int, task: str) -> bytes:
  """Returns a task's place in an order that does not depend on other tasks."""
  return hashlib.sha256(f'{seed}/{task}'.encode()).digest()


def training_order(kinds: Sequence[str], held_out: Sequence[int]) -> list[int]:
  """Returns the items that are not held out, kind by kind in the order of first occurrence."""
  aside = set(held_out)
  members = collections.defaultdict(list)
  for number, kind in enumerate(kinds):
    if number not in aside:
      members[kind].append(number)
  return [number for group in members.values() for number in group]
