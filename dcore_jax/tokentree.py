"""Token trees: packed rows in which sequences share their common prefixes (numpy, on the host).

A row is a forest of token nodes in depth-first order. Query i sees key j iff `j <= i < end[j]`: the
keys that a token sees are exactly its ancestors and itself. That one inequality is causal masking,
isolation of packed sequences, and prefix sharing.
Letters: R rows, T tokens in a row (capacity), A micro-batches, M loss tokens of one micro-batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.packing import common_prefixes, plan_rows

# Common prefixes of fewer tokens than this, or in rows below 2,048 tokens than a 32nd of the row,
# are not merged. Merging a chat header that all sequences of a row share would save 4 tokens of
# each, but every block of queries would then read the header's block: single turns of 800 tokens
# took 12 % longer.
_LEAST_SHARED = 64


@dataclasses.dataclass(frozen=True)
class TokenSequence:
  """The tokens of one example. Both arrays have length n > 0.

  Attributes:
    tokens: int32 [n].
    weights: float32 [n], loss weight of predicting token i; 0 for a prompt, and for token 0, which
      nothing predicts.
    shared: number of leading tokens that may be merged with those of other sequences. That is n
      where the loss of a token is made of what adds up over sequences, as in fine-tuning, and the
      length of the prompt where it is not (`objectives.PolicyLoss.merges`).

  Raises:
    ValueError: shapes that disagree, weights that mean nothing, or `shared` outside 0..n.
  """

  tokens: np.ndarray
  weights: np.ndarray
  shared: int

  # Checked here, where the example is known: in a packed row the cause could not be found any more.
  def __post_init__(self):
    size = len(self.tokens)
    if np.shape(self.weights) != (size,):
      raise ValueError(f'weights has shape {np.shape(self.weights)}, expected ({size},)')
    if not size:
      raise ValueError('a sequence needs at least one token')
    if np.asarray(self.tokens).dtype.kind not in 'iu':
      raise ValueError(f'tokens are of type {np.asarray(self.tokens).dtype}, expected integers')
    if not np.all(np.isfinite(self.weights) & (self.weights >= 0)):
      raise ValueError('loss weights must be finite and not negative')
    if not 0 <= self.shared <= size:
      raise ValueError(f'shared = {self.shared} is outside 0..{size}')
    if self.weights[0]:
      raise ValueError('the first token has a loss weight, but nothing predicts it')


class RowBatch(NamedTuple):
  """What a training step reads: a pytree of arrays. Axis A counts accumulated micro-batches.

  `tokens`, `position` and `end` are [A, R, T], one entry a token of a row. The others are [A, M],
  one entry a loss token, so that the vocabulary projection is never computed for other tokens;
  places that are not used have weight 0. With several shards, part s of each array belongs to
  device s along the batch axis: its loss tokens are those of its own rows, and `parent` counts from
  its first row, so that no hidden state has to travel.

  Attributes:
    tokens: int32 ids.
    position: int32 depth from the root, which rotary embeddings use.
    end: int32, one past the last descendant.
    parent: int32 index into the flattened rows, of the hidden state that predicts the loss token.
    slot: int32 index of the loss token itself in the flattened rows.
    target: int32 id of the loss token.
    weight: float32 loss weight.
    extras: further values of each loss token, by name.
  """

  tokens: np.ndarray
  position: np.ndarray
  end: np.ndarray
  parent: np.ndarray
  slot: np.ndarray
  target: np.ndarray
  weight: np.ndarray
  extras: dict[str, np.ndarray]


class _LossTokens(NamedTuple):
  """The loss tokens of some rows, [budget] each; places count from the first of these rows."""

  parent: np.ndarray
  slot: np.ndarray
  target: np.ndarray
  weight: np.ndarray
  extras: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TokenTree:
  """Packed rows, and the way back from them to the sequences.

  Attributes:
    tokens: int32 [R, T]. Padding has weight 0 and sees only itself, so that its softmax is finite.
    position: int32 [R, T], depth from the root.
    parent: int32 [R, T], column of the token before; -1 where there is none.
    end: int32 [R, T], one past the last descendant.
    weight: float32 [R, T], loss weights.
    paths: for each sequence given to `pack` the flat indices (row x T + column) of its tokens;
      empty where it was dropped.
    dropped: indices of the sequences longer than a row. They are never truncated.
    live: tokens in the tree, without padding.
    extras: further values of each token, name -> [R, T].
  """

  tokens: np.ndarray
  position: np.ndarray
  parent: np.ndarray
  end: np.ndarray
  weight: np.ndarray
  paths: list[np.ndarray]
  dropped: list[int]
  live: int
  extras: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def rows(self) -> int:
    """Number of rows, R."""
    return self.tokens.shape[0]

  @property
  def capacity(self) -> int:
    """Tokens of a row, T."""
    return self.tokens.shape[1]

  @property
  def dedup(self) -> float:
    """Tokens of the flat sequences per token of the tree: the factor of work that merging saves."""
    # Sequences that were dropped have empty paths, and so count on neither side.
    return sum(map(len, self.paths)) / max(1, self.live)

  def gather(self, values_RT: np.ndarray) -> list[np.ndarray]:
    """Reads per-token values of the rows back as one array a sequence, in the order of `pack`."""
    flat = np.asarray(values_RT).reshape(-1)
    return [flat[path] for path in self.paths]

  def scatter(
    self, values: Sequence[np.ndarray], dtype: type[np.generic] = np.float32
  ) -> np.ndarray:
    """Writes values of each sequence's tokens onto the rows -> [R, T], 0 elsewhere.

    An array shorter than its sequence belongs to its last tokens, as the values of a response do.
    Where sequences share a token, the value of the last sequence stays. Values of dropped sequences
    are ignored.
    """
    flat = np.zeros(self.tokens.size, dtype)
    for path, value in zip(self.paths, values, strict=True):
      # A dropped sequence has no place, whatever its values are.
      if len(path):
        flat[path[len(path) - len(value) :]] = value
    return flat.reshape(self.tokens.shape)

  def add_up(self, values: Sequence[np.ndarray]) -> np.ndarray:
    """Adds values of each sequence's tokens up on the rows -> float64 [R, T], 0 elsewhere.

    As `scatter`, but where sequences share a token, the sum of their values is there.
    """
    places = []
    added = []
    for path, value in zip(self.paths, values, strict=True):
      if len(path):
        places.append(path[len(path) - len(value) :])
        added.append(value)
    if not places:
      return np.zeros(self.tokens.shape)
    # One pass over all sequences; `bincount` adds in float64, in the order of the sequences.
    total = np.bincount(
      np.concatenate(places), weights=np.concatenate(added), minlength=self.tokens.size
    )
    return total.reshape(self.tokens.shape)

  def rows_of(self, sequences: Sequence[int]) -> set[int]:
    """Returns the rows that hold these sequences, which are named by their places in `pack`."""
    # A sequence lies in one row. Those that were dropped have no path.
    paths = [self.paths[index] for index in sequences]
    return {int(path[0]) // self.capacity for path in paths if len(path)}

  def with_extras(self, **extras: np.ndarray) -> 'TokenTree':
    """Returns a copy with more per-token values, each [R, T]."""
    for name, array in extras.items():
      if array.shape != self.tokens.shape:
        raise ValueError(f'{name} has shape {array.shape}, expected {self.tokens.shape}')
    return dataclasses.replace(self, extras=self.extras | extras)

  def loss_budget(self, rows: int, shards: int = 1) -> int:
    """Returns a number of loss tokens that no choice of `rows` rows exceeds.

    It gives one shape for every batch of that many rows, divided evenly over the shards. It is
    rounded up to quarters of the rows' size, so that the trees of one run share a few shapes, and
    with them the compiled programs.
    """
    # Each shard has a part of its own, which must hold the fullest rows that may meet in it.
    rows //= shards
    # The fullest rows together bound any choice of that many.
    most = int(np.sort(np.count_nonzero(self.weight, axis=1))[-rows:].sum())
    step = -(-rows * self.capacity // 4)
    # At least one quarter: a batch without loss tokens has an array to be empty in.
    return shards * step * max(1, -(-most // step))

  def batch(
    self,
    rows: Sequence[int] | None = None,
    *,
    budget: int | None = None,
    accumulate: int = 1,
    shards: int = 1,
  ) -> RowBatch:
    """Makes a batch of rows: `accumulate` micro-batches with equally many rows each.

    Args:
      rows: numbers of the rows; all by default.
      budget: loss tokens that each micro-batch has room for; `loss_budget` by default.
      accumulate: number of micro-batches, A.
      shards: devices along the batch axis.

    Raises:
      ValueError: the rows do not divide, or a shard has more loss tokens than its part of the
        budget.
    """
    rows = np.arange(self.rows) if rows is None else np.asarray(rows)
    if len(rows) % (accumulate * shards):
      raise ValueError(
        f'{len(rows)} rows do not divide into {accumulate} micro-batches of {shards} shards'
      )
    # Rows stay in the caller's order: micro-batch 0 takes the first `size` of them.
    size = len(rows) // accumulate
    budget = self.loss_budget(size, shards) if budget is None else budget
    if budget % shards:
      raise ValueError(f'a budget of {budget} loss tokens does not divide into {shards} shards')
    own = budget // shards  # loss tokens of one shard
    # Micro-batch by micro-batch, shard by shard within it: the order in which devices split an
    # axis.
    parts = [self._loss_tokens(part, own) for part in np.split(rows, accumulate * shards)]

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
      return np.concatenate(arrays).reshape(accumulate, budget)

    weight = joined([part.weight for part in parts])
    # Parts count slots from their own first row; a micro-batch counts from its first shard's.
    offset = np.arange(shards, dtype=np.int32).repeat(own) * (size // shards * self.capacity)
    slot = joined([part.slot for part in parts])
    extras = {}
    for name in self.extras:
      extras[name] = joined([part.extras[name] for part in parts])
    shape = (accumulate, size, self.capacity)
    return RowBatch(
      tokens=self.tokens[rows].reshape(shape),
      position=self.position[rows].reshape(shape),
      end=self.end[rows].reshape(shape),
      parent=joined([part.parent for part in parts]),
      # Unused places point at slot 0, which exists and has weight 0.
      slot=np.where(weight != 0, slot + offset[None], 0),
      target=joined([part.target for part in parts]),
      weight=weight,
      extras=extras,
    )

  def _loss_tokens(self, rows: np.ndarray, budget: int) -> _LossTokens:
    # In row-major order, so that each row's loss tokens lie side by side.
    row, column = np.nonzero(self.weight[rows])
    if len(row) > budget:
      raise ValueError(f'{len(row)} loss tokens exceed the budget of {budget}')
    # `row` counts within these rows, `source` within the whole tree.
    source = rows[row]
    base = row * self.capacity

    def padded(array: np.ndarray) -> np.ndarray:
      # Zeros behind the loss tokens: weight 0 makes a place unused.
      return np.pad(array, (0, budget - len(row)))

    return _LossTokens(
      parent=padded((base + self.parent[source, column]).astype(np.int32)),
      slot=padded((base + column).astype(np.int32)),
      target=padded(self.tokens[source, column]),
      weight=padded(self.weight[source, column]),
      extras={name: padded(array[source, column]) for name, array in self.extras.items()},
    )


def pack(
  sequences: Sequence[TokenSequence],
  capacity: int,
  rows_multiple: int = 1,
  pad_id: int = 0,
  *,
  merge: bool = True,
) -> TokenTree:
  """Merges common prefixes and packs the resulting trees into rows; deterministic.

  Weights of merged tokens add, which is exactly the sum of the flat losses. `packing` decides which
  row takes which sequence; a tree larger than a row is cut, and the trunk above the cut repeated.

  Args:
    sequences: what to pack; those longer than a row are dropped and named in the result.
    capacity: tokens of a row, T.
    rows_multiple: the number of rows is rounded up to a multiple of it.
    pad_id: token of places that stay empty. They see only themselves and weigh nothing, so that any
      token will do; Llama-3 has none for padding.
    merge: off keeps all sequences apart, which is plain packing.

  Raises:
    ValueError: a capacity or a multiple below 1.
  """
  if capacity < 1 or rows_multiple < 1:
    raise ValueError(f'capacity = {capacity} and rows_multiple = {rows_multiple} must be positive')
  dropped = [index for index, sequence in enumerate(sequences) if len(sequence.tokens) > capacity]
  order, lengths, common = _sorted_by_prefix(sequences, capacity, merge=merge)
  # From here on a sequence is its length and what it shares with its neighbour.
  row_of, fresh = plan_rows(lengths, common, capacity)
  # Rows are numbered from 0; `initial` serves an empty list of sequences.
  rows = -(-(row_of.max(initial=-1) + 1) // rows_multiple) * rows_multiple

  built = _Rows(rows, capacity, pad_id)
  paths = [np.zeros(0, np.int64) for _ in sequences]
  # Stable, so that the sequences of a row stay in sorted order, which is depth-first order.
  by_row = np.argsort(row_of, kind='stable')
  row_starts = np.searchsorted(row_of[by_row], np.arange(rows + 1))
  for row in range(rows):
    members = by_row[row_starts[row] : row_starts[row + 1]]
    chosen = [order[member] for member in members]
    laid_out = built.lay_out(
      row,
      [sequences[index] for index in chosen],
      lengths[members],
      # What a sequence does not add, its row holds already.
      lengths[members] - fresh[members],
    )
    for index, path in zip(chosen, laid_out, strict=True):
      paths[index] = path
  shape = (rows, capacity)
  return TokenTree(
    tokens=built.tokens.reshape(shape),
    position=built.position.reshape(shape),
    parent=built.parent.reshape(shape),
    end=built.end.reshape(shape),
    weight=built.weight.astype(np.float32).reshape(shape),
    paths=paths,
    dropped=dropped,
    live=int(fresh.sum()),
  )


def tree_size(sequences: Sequence[TokenSequence], capacity: int) -> int:
  """Returns the tokens that these sequences, merged, would take in one row of any length.

  More than `capacity` of them do not fit a row of `pack`, which then repeats their trunk. Sequences
  that alone are longer than a row do not count.
  """
  _, lengths, common = _sorted_by_prefix(sequences, capacity, merge=True)
  return int(lengths.sum() - common.sum())


def _sorted_by_prefix(
  sequences: Sequence[TokenSequence], capacity: int, *, merge: bool
) -> tuple[list[int], np.ndarray, np.ndarray]:
  """Sorts the sequences that fit a row -> (their places in order, lengths, common prefixes).

  A common prefix is what a sequence shares with the one before it, or 0 where that is too little.
  """
  # Only the first `shared` tokens may be merged, so that they alone make the key. Big-endian bytes
  # sort as the lists of tokens would; sorting brings common prefixes together, shorter ones first.
  keys = [
    np.asarray(sequence.tokens[: sequence.shared]).astype('>i4').tobytes() for sequence in sequences
  ]
  order = [index for index, sequence in enumerate(sequences) if len(sequence.tokens) <= capacity]
  order.sort(key=keys.__getitem__)
  lengths = np.array([len(sequences[index].tokens) for index in order], np.int64)
  common = common_prefixes([keys[index] for index in order])
  # No prefix is longer than a row, so that capacity + 1 merges nothing.
  least = min(_LEAST_SHARED, capacity // 32) if merge else capacity + 1
  common[common < least] = 0
  return order, lengths, common


class _Rows:
  """The flat arrays of a tree under construction, [rows x capacity], at first all padding."""

  def __init__(self, rows: int, capacity: int, pad_id: int):
    size = rows * capacity
    self.capacity = capacity
    self.tokens = np.full(size, pad_id, np.int32)
    self.position = np.zeros(size, np.int32)
    self.parent = np.full(size, -1, np.int32)
    # Each place of padding ends right behind itself, and so sees nothing else.
    self.end = np.tile(np.arange(1, capacity + 1, dtype=np.int32), rows)
    # Summed in double precision, so that the order of merging does not show in the float32 result.
    self.weight = np.zeros(size, np.float64)

  def lay_out(
    self, row: int, sequences: list[TokenSequence], lengths: np.ndarray, common: np.ndarray
  ) -> list[np.ndarray]:
    """Writes the sequences of a row, depth first, and returns the path of each.

    Sequence i adds its tokens from depth common[i] on, which lie side by side.
    """
    fresh = lengths - common
    start = row * self.capacity
    begins = start + np.concatenate([[0], np.cumsum(fresh)])
    # `path` is that of the sequence before, whose first `shared` tokens are also this one's.
    paths = []
    path = np.zeros(0, np.int64)
    for index, sequence in enumerate(sequences):
      begin = int(begins[index])
      stop = int(begins[index + 1])
      shared = int(common[index])
      path = np.concatenate([path[:shared], np.arange(begin, stop)])
      paths.append(path)
      self.tokens[begin:stop] = sequence.tokens[shared:]
      # Positions count from the root, not from the row: a branch continues its trunk.
      self.position[begin:stop] = np.arange(shared, shared + stop - begin)
      if stop > begin:
        # A branch hangs on the last shared token, a root on nothing; other tokens follow each
        # other.
        self.parent[begin] = path[shared - 1] - start if shared else -1
        self.parent[begin + 1 : stop] = np.arange(begin - start, stop - start - 1)
      # Added, not set: an earlier sequence may have trained the shared tokens already.
      trained = np.flatnonzero(sequence.weights)
      self.weight[path[trained]] += sequence.weights[trained]
    self._close(sequences, lengths, common, begins)
    return paths

  def _close(
    self,
    sequences: list[TokenSequence],
    lengths: np.ndarray,
    common: np.ndarray,
    begins: np.ndarray,
  ) -> None:
    """Writes `end`, backwards: a node ends where the next branch leaves its path above it."""
    # Backwards, the branches after a node are known when it is reached.
    start = begins[0]
    # By depth: where the node of that depth ends. The row's last token ends all of them.
    until = np.full(int(lengths.max(initial=0)), begins[-1])
    for place in range(len(sequences) - 1, -1, -1):
      shared = common[place]
      begin = begins[place]
      self.end[begin : begins[place + 1]] = until[shared : lengths[place]] - start
      # Nodes below the branching end where this sequence begins; those above go on.
      until[shared:] = begin
