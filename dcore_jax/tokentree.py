"""Token trees: packed rows in which sequences share their common prefixes (numpy, on the host).

A row is a forest of token nodes in depth-first order. Query i sees key j iff `j <= i < end[j]`: the keys that a token
sees are exactly its ancestors and itself, which is causal masking, packing isolation and prefix sharing in one.
Letters: R rows, T tokens in a row (capacity), A micro-batches, M loss tokens of one micro-batch.
"""
import bisect
import dataclasses
from collections.abc import Sequence as Sized
from typing import NamedTuple

import numpy as np

# Sharing less than some part of a row is not worth tying sequences together, apart they fill rows better: `pack` tries
# each of these parts and keeps the plan with the fewest rows. The least keeps mere chat headers from making one tree.
_LEAST_SHARES = (1 / 32, 1 / 8, 1 / 4)


@dataclasses.dataclass(frozen=True)
class Sequence:
  """Tokens of one example. All arrays have length n > 0.

  Attributes:
    tokens: int32[n].
    weights: float32[n], loss weight of predicting token i; 0 for a prompt, and for token 0, which nothing predicts.
    shared: leading tokens that may be merged with those of other sequences (SFT: n; RL: the prompt's length).
    extras: per-token values of the loss (advantages, old log-probs ...); then the shared tokens must carry no weight,
      since merging keeps one value of several.
  """
  tokens: np.ndarray
  weights: np.ndarray
  shared: int
  extras: dict[str, np.ndarray] | None = None

  def __post_init__(self):
    size = len(self.tokens)
    arrays = {'weights': self.weights, **(self.extras or {})}
    for name, array in arrays.items():
      if np.shape(array) != (size,):
        raise ValueError(f'{name} has shape {np.shape(array)}, expected ({size},)')
    if not size:
      raise ValueError('a sequence needs at least one token')
    if not 0 <= self.shared <= size:
      raise ValueError(f'shared = {self.shared} is outside 0..{size}')
    if self.weights[0]:
      raise ValueError('the first token has a loss weight, but nothing predicts it')
    if self.extras and np.any(self.weights[:self.shared]):
      raise ValueError('tokens with extras and a loss weight cannot be shared')


class RowBatch(NamedTuple):
  """What a training step reads, a pytree of arrays. The leading axis A counts micro-batches that are accumulated.

  Per token of a row: tokens, position, end [A, R, T]. Per loss token, so that the vocabulary projection is never
  computed for the others: parent (index into the flattened R x T whose hidden state predicts it), slot (its own index
  there), target (its id), weight and extras [A, M]; unused places have weight 0.
  """
  tokens: np.ndarray
  position: np.ndarray
  end: np.ndarray
  parent: np.ndarray
  slot: np.ndarray
  target: np.ndarray
  weight: np.ndarray
  extras: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TokenTree:
  """Packed rows and the way back from them.

  Attributes:
    tokens, position, parent, end: int32[R, T]; weight: float32[R, T]; extras: name -> [R, T]. `position` is the depth
      from the root, `parent` the column of the token before (-1: none), `end` one past the last descendant.
      Padding has weight 0 and sees only itself, so that its softmax is finite.
    paths: for each sequence given to `pack` the flat indices (row x T + column) of its tokens; empty where dropped.
    dropped: indices of the sequences longer than a row. They are never truncated.
    live: tokens in the tree, padding apart.
  """
  tokens: np.ndarray
  position: np.ndarray
  parent: np.ndarray
  end: np.ndarray
  weight: np.ndarray
  extras: dict[str, np.ndarray]
  paths: list[np.ndarray]
  dropped: list[int]
  live: int

  @property
  def rows(self) -> int:
    return self.tokens.shape[0]

  @property
  def capacity(self) -> int:
    return self.tokens.shape[1]

  @property
  def dedup(self) -> float:
    """Tokens of the flat sequences per token of the tree: the share of work that merging saves."""
    return sum(map(len, self.paths)) / max(1, self.live)

  def gather(self, values_RT: np.ndarray) -> list[np.ndarray]:
    """Per-token values of the rows -> those of each sequence, in the order given to `pack`."""
    flat = np.asarray(values_RT).reshape(-1)
    return [flat[path] for path in self.paths]

  def scatter(self, values: Sized[np.ndarray]) -> np.ndarray:
    """The inverse of `gather` -> float32[R, T]. Of merged tokens the last sequence's value stays."""
    flat = np.zeros(self.tokens.size, np.float32)
    for path, value in zip(self.paths, values, strict=True):
      flat[path] = value[:len(path)]  # nothing of a dropped sequence
    return flat.reshape(self.tokens.shape)

  def with_extras(self, **extras: np.ndarray) -> 'TokenTree':
    """A copy with more per-token values, each [R, T]."""
    for name, array in extras.items():
      if array.shape != self.tokens.shape:
        raise ValueError(f'{name} has shape {array.shape}, expected {self.tokens.shape}')
    return dataclasses.replace(self, extras=self.extras | extras)

  def loss_budget(self, rows: int) -> int:
    """Loss tokens that no choice of `rows` rows exceeds: one shape for every batch of them.

    Rounded up to quarters of the rows' size, so that the trees of one run share a few shapes.
    """
    most = int(np.sort(np.count_nonzero(self.weight, axis=1))[-rows:].sum())
    step = -(-rows * self.capacity // 4)
    return step * max(1, -(-most // step))

  def batch(self, rows: Sized[int] | None = None, *, budget: int | None = None, accumulate: int = 1) -> RowBatch:
    """The given rows (default: all) as `accumulate` micro-batches of equally many rows and `budget` loss tokens each.

    Raises ValueError when the rows do not divide or the loss tokens of a micro-batch exceed the budget.
    """
    rows = np.arange(self.rows) if rows is None else np.asarray(rows)
    if len(rows) % accumulate:
      raise ValueError(f'{len(rows)} rows do not divide into {accumulate} micro-batches')
    parts = np.split(rows, accumulate)
    budget = self.loss_budget(len(parts[0])) if budget is None else budget
    stacked = [self._micro_batch(part, budget) for part in parts]
    columns = [np.stack(leaves) for leaves in zip(*(leaf[:-1] for leaf in stacked))]
    return RowBatch(*columns, {name: np.stack([leaf.extras[name] for leaf in stacked]) for name in self.extras})

  def _micro_batch(self, rows: np.ndarray, budget: int) -> RowBatch:
    row, column = np.nonzero(self.weight[rows])
    if len(row) > budget:
      raise ValueError(f'{len(row)} loss tokens exceed the budget of {budget}')
    source = rows[row]
    unused = (0, budget - len(row))
    base = row * self.capacity
    return RowBatch(
        tokens=self.tokens[rows], position=self.position[rows], end=self.end[rows],
        parent=np.pad(base + self.parent[source, column], unused).astype(np.int32),
        slot=np.pad(base + column, unused).astype(np.int32),
        target=np.pad(self.tokens[source, column], unused),
        weight=np.pad(self.weight[source, column], unused),
        extras={name: np.pad(array[source, column], unused) for name, array in self.extras.items()})


def pack(sequences: Sized[Sequence], capacity: int, rows_multiple: int = 1, pad_id: int = 0) -> TokenTree:
  """Merges common prefixes and packs the resulting trees in rows of `capacity` tokens; deterministic.

  Weights of merged tokens add, which is exactly the sum of the flat losses. A tree larger than a row is split where
  that repeats the fewest trunk tokens. Rows are filled best-fit-decreasing and their number rounded up to
  `rows_multiple`. Prefixes too short to be worth it stay apart.
  """
  if capacity < 1 or rows_multiple < 1:
    raise ValueError(f'capacity = {capacity} and rows_multiple = {rows_multiple} must be positive')
  names = {tuple(sorted(sequence.extras or ())) for sequence in sequences}
  if len(names) > 1:
    raise ValueError(f'sequences disagree on their extras: {sorted(names)}')
  dropped = [index for index, sequence in enumerate(sequences) if len(sequence.tokens) > capacity]
  # Big-endian bytes compare as the token lists do; sorting brings common prefixes together, shorter ones first.
  keys = [np.asarray(sequence.tokens[:sequence.shared]).astype('>i4').tobytes() for sequence in sequences]
  order = sorted(set(range(len(sequences))) - set(dropped), key=keys.__getitem__)
  lengths = np.array([len(sequences[index].tokens) for index in order], np.int64)
  common = _common_prefixes([keys[index] for index in order])
  plans = [_plan(lengths, np.where(common < share * capacity, 0, common), order, capacity) for share in _LEAST_SHARES]
  common, pieces, sizes, starts, rows = min(plans, key=lambda plan: plan[-1])
  rows = -(-rows // rows_multiple) * rows_multiple

  paths = [np.zeros(0, np.int64) for _ in sequences]
  ends = np.tile(np.arange(1, capacity + 1), rows)
  parent = np.full(rows * capacity, -1)
  for (first, last), start in zip(pieces, starts):
    _lay_out(start, lengths[first:last], common[first:last], order[first:last], paths, parent, ends, capacity)
  return _fill(sequences, paths, parent, ends, dropped, names, rows, capacity, pad_id, sum(sizes))


def _common_prefixes(keys: list[bytes]) -> np.ndarray:
  """Tokens that each key has in common with the one before it (0 for the first)."""
  common = np.zeros(len(keys), np.int64)
  arrays = [np.frombuffer(key, '>i4') for key in keys]
  for index in range(1, len(keys)):
    left, right = arrays[index - 1], arrays[index]
    size = min(len(left), len(right))
    differ = left[:size] != right[:size]
    common[index] = differ.argmax() if differ.any() else size
  return common


def _plan(lengths: np.ndarray, common: np.ndarray, order: list[int],
          capacity: int) -> tuple[np.ndarray, list[tuple[int, int]], list[int], list[int], int]:
  """Trees and their places -> (tokens shared with the sequence before, runs, their sizes, their flat starts, rows)."""
  pieces = _pieces(lengths, common, capacity)
  common[[first for first, _ in pieces]] = 0
  sizes = [int((lengths[first:last] - common[first:last]).sum()) for first, last in pieces]
  starts, rows = _best_fit_decreasing(sizes, [order[first] for first, _ in pieces], capacity)
  return common, pieces, sizes, starts, rows


def _pieces(lengths: np.ndarray, common: np.ndarray, capacity: int) -> list[tuple[int, int]]:
  """Cuts the sorted sequences into runs [first, last) whose merged size fits a row, repeating the fewest tokens.

  A cut before sequence i repeats common[i] tokens. Dynamic programme over the cuts of one tree: best[b] is the least
  repetition of the sequences before b; a run [a, b) has common[a] + sum(lengths - common)[a:b] tokens.
  """
  pieces = []
  roots = np.flatnonzero(common == 0)
  total = np.concatenate([[0], np.cumsum(lengths - common)])
  for start, stop in zip(roots, np.append(roots[1:], len(lengths))):
    if total[stop] - total[start] <= capacity:
      pieces.append((int(start), int(stop)))
      continue
    best, cut, first = [0], [int(start)], int(start)
    for last in range(int(start) + 1, int(stop) + 1):
      while common[first] + total[last] - total[first] > capacity:  # the size falls as `first` grows
        first += 1
      cost = np.asarray(best[first - start:]) + common[first:last]
      choice = int(cost.argmin())
      best.append(int(cost[choice]))
      cut.append(first + choice)
    run, last = [], int(stop)
    while last > start:
      run.append((cut[last - start], last))
      last = cut[last - start]
    pieces.extend(reversed(run))
  return pieces


def _best_fit_decreasing(sizes: list[int], ties: list[int], capacity: int) -> tuple[list[int], int]:
  """Places each size in the fullest row that still holds it -> (flat start of each, number of rows)."""
  starts, room, rows = [0] * len(sizes), [], 0  # room: sorted (free tokens, row)
  for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], ties[i])):
    place = bisect.bisect_left(room, (sizes[index], -1))
    if place == len(room):
      free, row, rows = capacity, rows, rows + 1
    else:
      free, row = room.pop(place)
    starts[index] = row * capacity + capacity - free
    bisect.insort(room, (free - sizes[index], row))
  return starts, rows


def _lay_out(start: int, lengths: np.ndarray, common: np.ndarray, order: list[int], paths: list[np.ndarray],
             parent: np.ndarray, ends: np.ndarray, capacity: int) -> None:
  """Writes one tree's paths, parents and ends, depth first: sequence i adds its tokens from depth common[i] on."""
  fresh = lengths - common
  begins = start + np.concatenate([[0], np.cumsum(fresh)])
  path = np.zeros(0, np.int64)
  for index, begin, shared, new in zip(order, begins.tolist(), common.tolist(), fresh.tolist()):
    path = np.concatenate([path[:shared], np.arange(begin, begin + new)])
    paths[index] = path
    parent[path[shared:]] = np.concatenate([[-1], path % capacity])[shared:-1]
  # Backwards: a node ends where the next branch leaves its path above it, at the latest with the tree.
  until = np.full(int(lengths.max()), begins[-1])
  row = start - start % capacity
  for place in range(len(order) - 1, -1, -1):
    shared, begin = common[place], begins[place]
    ends[begin:begins[place + 1]] = until[shared:lengths[place]] - row
    until[shared:] = begin


def _fill(sequences: Sized[Sequence], paths: list[np.ndarray], parent: np.ndarray, ends: np.ndarray,
          dropped: list[int], names: set[tuple[str, ...]], rows: int, capacity: int, pad_id: int,
          live: int) -> TokenTree:
  """Writes the sequences' values along their paths."""
  kept = [index for index, path in enumerate(paths) if len(path)]
  flat = np.concatenate([paths[index] for index in kept] or [np.zeros(0, np.int64)])

  def along(values: list[np.ndarray], fill: float, dtype: type) -> np.ndarray:
    out = np.full(rows * capacity, fill, dtype)
    if values:
      out[flat] = np.concatenate(values)
    return out.reshape(rows, capacity)

  weights = np.concatenate([sequences[index].weights for index in kept] or [np.zeros(0)])
  weight = np.bincount(flat, weights, minlength=rows * capacity).astype(np.float32)
  extras = {name: along([sequences[index].extras[name] for index in kept], 0, np.float32)
            for name in (next(iter(names)) if names else ())}
  shape = (rows, capacity)
  return TokenTree(
      tokens=along([sequences[index].tokens for index in kept], pad_id, np.int32),
      position=along([np.arange(len(paths[index])) for index in kept], 0, np.int32),
      parent=parent.astype(np.int32).reshape(shape), end=ends.astype(np.int32).reshape(shape),
      weight=weight.reshape(shape), extras=extras, paths=paths, dropped=dropped, live=live)
