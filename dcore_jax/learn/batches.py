"""Batches of packed rows on the host: which rows a step sees, and in which order.

A thread makes them ahead, since the host would otherwise stand idle while the device works.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from dcore_jax import tokentree

Item = TypeVar('Item')


def made_ahead(source: Iterator[Item], depth: int) -> Iterator[Item]:
  """Yields the items of an iterator in their order, made by a thread up to `depth` items ahead.

  An error in the iterator is raised in place of the item that it would have made. No item is None.
  """
  # One thread and no more: a generator cannot be entered twice, and the items come in order.
  with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
    waiting = collections.deque()
    for _ in range(depth):
      waiting.append(thread.submit(next, source, None))
    while True:
      item = waiting.popleft().result()
      if item is None:
        return
      # Asked for before the caller works on this one, so that the thread never stands idle.
      waiting.append(thread.submit(next, source, None))
      yield item


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """How the rows of one step are split.

  Attributes:
    rows: packed rows of a step, over all hosts.
    accumulate: micro-batches they are split into.
    shards: devices along the batch axis, over all hosts; the rows of a micro-batch divide over
      them.
    host: this host's number; it yields the host-th of `hosts` equal parts of each micro-batch.
    hosts: number of hosts; `shards` divides over them.

  Raises:
    ValueError: numbers that do not divide.
  """

  rows: int
  accumulate: int = 1
  shards: int = 1
  host: int = 0
  hosts: int = 1

  def __post_init__(self):
    splits = self.rows % (self.accumulate * self.shards) == 0 and self.shards % self.hosts == 0
    if self.rows < 1 or not splits or not 0 <= self.host < self.hosts:
      raise ValueError(
        f'rows = {self.rows}, accumulate = {self.accumulate}, shards = {self.shards}, '
        f'host = {self.host}, hosts = {self.hosts} do not make batches'
      )


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of constant shape over packed rows.

  Each epoch visits every row once, in an order that follows from (seed, epoch) alone. A batch is a
  pure function of its number, so a checkpoint has to remember that number only. Where the rows do
  not fill the batches, empty rows are shuffled in. `len()` counts the batches of all epochs.

  Attributes:
    tree: all rows; every host packs the same ones.
    shape: how the rows of a step are split.
    epochs: passes over the rows.
    seed: of the order.
    budget: loss tokens of a micro-batch, over all hosts.
  """

  tree: tokentree.TokenTree
  shape: BatchShape
  epochs: int
  seed: int
  budget: int

  @property
  def per_epoch(self) -> int:
    """Batches of one epoch."""
    return self.tree.rows // self.shape.rows

  def __len__(self) -> int:
    return self.epochs * self.per_epoch

  def __iter__(self) -> Iterator[tokentree.RowBatch]:
    return self.start(0)

  def start(self, step: int) -> Iterator[tokentree.RowBatch]:
    """Yields the batches from number `step` on, with which a resumed run continues."""
    shape = self.shape
    order = np.zeros(0, np.int64)
    for index in range(step, len(self)):
      epoch, place = divmod(index, self.per_epoch)
      # Once an epoch, and where a resumed run begins in the middle of one.
      if place == 0 or index == step:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.tree.rows)
      chosen = order[place * shape.rows : (place + 1) * shape.rows]
      # Each micro-batch is divided, and not the step: all hosts work on one at the same time.
      by_host = chosen.reshape(shape.accumulate, shape.hosts, -1)
      yield self.tree.batch(
        by_host[:, shape.host].reshape(-1),
        budget=self.budget // shape.hosts,
        accumulate=shape.accumulate,
        shards=shape.shards // shape.hosts,
      )

  def prefetched(self, step: int, depth: int = 2) -> Iterator[tokentree.RowBatch]:
    """Yields what `start(step)` does, each batch made while the device works on earlier ones."""
    return made_ahead(self.start(step), depth)


def batches(
  sequences: Sequence[tokentree.TokenSequence],
  shape: BatchShape,
  *,
  capacity: int,
  epochs: int,
  seed: int,
  pad_id: int = 0,
) -> Batches:
  """Packs the sequences once into rows of `capacity` tokens.

  `.tree` of the result tells what was merged and dropped.

  Raises:
    ValueError: negative `epochs`, or no sequence that fits.
  """
  if epochs < 0:
    raise ValueError(f'epochs = {epochs} do not make batches')
  tree = tokentree.pack(sequences, capacity, shape.rows, pad_id)
  if not tree.rows:
    raise ValueError(f'no sequence fits in {capacity} tokens ({len(tree.dropped)} are longer)')
  budget = tree.loss_budget(shape.rows // shape.accumulate, shape.shards)
  return Batches(tree=tree, shape=shape, epochs=epochs, seed=seed, budget=budget)
