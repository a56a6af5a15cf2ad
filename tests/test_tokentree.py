"""Token trees: what a token sees, what is kept, and how rows are filled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax import packing, tokentree


def sequence(tokens, weights=None, shared=None):
  tokens = np.asarray(tokens, np.int32)
  weights = np.r_[0, np.ones(len(tokens) - 1)] if weights is None else weights
  return tokentree.TokenSequence(
    tokens, np.asarray(weights, np.float32), len(tokens) if shared is None else shared
  )


@st.composite
def sequence_lists(draw):
  """Few distinct tokens and short lengths, so that prefixes meet often; some sequences do not fit
  the row.
  """
  result = []
  for _ in range(draw(st.integers(0, 12))):
    tokens = draw(st.lists(st.integers(0, 2), min_size=1, max_size=14))
    weights = [0] + draw(
      st.lists(st.integers(0, 3), min_size=len(tokens) - 1, max_size=len(tokens) - 1)
    )
    result.append(sequence(tokens, weights, draw(st.integers(0, len(tokens)))))
  return result


def visible(tree, row, query):
  return [j for j in range(query + 1) if query < tree.end[row, j]]


@settings(max_examples=150)
@given(sequence_lists(), st.integers(8, 40), st.integers(1, 3))
def test_visible_keys_are_the_sequence_itself(sequences, capacity, multiple):
  tree = tokentree.pack(sequences, capacity, multiple, pad_id=7)
  assert tree.rows % multiple == 0
  used = np.zeros(tree.tokens.size, bool)
  for index, (seq, path) in enumerate(zip(sequences, tree.paths, strict=True)):
    if index in tree.dropped:
      assert len(seq.tokens) > capacity and not len(path)
      continue
    rows, columns = np.divmod(path, capacity)
    used[path] = True
    assert np.all(rows == rows[0])
    np.testing.assert_array_equal(tree.tokens[rows, columns], seq.tokens)
    np.testing.assert_array_equal(tree.position[rows, columns], np.arange(len(path)))
    np.testing.assert_array_equal(tree.parent[rows, columns], np.r_[-1, columns[:-1]])
    for depth, column in enumerate(columns):  # ancestors and itself, nothing else
      assert visible(tree, rows[0], column) == list(columns[: depth + 1])
  assert tree.live == used.sum()
  for row, column in np.argwhere(~used.reshape(tree.tokens.shape)):
    assert (
      tree.tokens[row, column] == 7
      and tree.parent[row, column] == -1
      and tree.weight[row, column] == 0
    )
    assert visible(tree, row, column) == [column]


@settings(max_examples=100)
@given(sequence_lists(), st.integers(8, 40))
def test_weighted_sums_equal_the_flat_ones(sequences, capacity):
  """Any function of (token, its context) summed with the weights: here a hash of the prefix."""
  tree = tokentree.pack(sequences, capacity)

  def prefix_hash(tokens):
    value = 17
    out = []
    for token in tokens:
      value = (value * 31 + int(token) + 1) % 10007
      out.append(value)
    return np.array(out)

  flat = 0
  hashes = np.zeros(tree.tokens.size)
  for index, (seq, path) in enumerate(zip(sequences, tree.paths, strict=True)):
    if index not in tree.dropped:
      values = prefix_hash(seq.tokens)
      flat += (values * seq.weights).sum()
      hashes[path] = values
  assert flat == (hashes * tree.weight.reshape(-1).astype(np.float64)).sum()
  assert tree.dedup >= 1 or not tree.live


@settings(max_examples=50)
@given(sequence_lists(), st.integers(8, 40))
def test_gather_inverts_scatter_beyond_the_shared_part(sequences, capacity):
  tree = tokentree.pack(sequences, capacity)
  values = [np.full(len(seq.tokens), index + 1, np.float32) for index, seq in enumerate(sequences)]
  for index, back in enumerate(tree.gather(tree.scatter(values))):
    if index not in tree.dropped:
      np.testing.assert_array_equal(back[sequences[index].shared :], index + 1)


def test_merges_prompts_and_keeps_responses_apart():
  prompt = list(range(20))
  group = [
    sequence(prompt + [50, 51], [0] * 20 + [1, 1], 20),
    sequence(prompt + [50, 51], [0] * 20 + [1, 1], 20),
  ]
  tree = tokentree.pack(group, 64)
  signs = [np.full(2, sign, np.float32) for sign in (1, -1)]  # of the responses alone
  tree = tree.with_extras(advantage=tree.scatter(signs))
  assert tree.live == 24 and tree.dedup == 44 / 24
  assert [list(path[20:]) for path in tree.paths] == [[20, 21], [22, 23]]
  np.testing.assert_array_equal(tree.extras['advantage'][0, 20:24], [1, 1, -1, -1])
  assert tree.end[0, 0] == 24 and tree.end[0, 20] == 22


def test_identical_supervised_rows_add_their_weights():
  tree = tokentree.pack([sequence(range(1, 9))] * 3, 16)
  assert tree.live == 8 and tree.dedup == 3
  np.testing.assert_array_equal(tree.weight[0, :8], [0] + [3] * 7)


def test_large_tree_is_split_where_the_trunk_is_shortest():
  """Two dialogues share 4 tokens with each other and 20 within: the cut belongs between the
  dialogues.
  """
  head = [1, 1, 1, 1]
  first = [2] * 16
  second = [3] * 16
  rows = [sequence(head + branch + [leaf] * 8) for branch in (first, second) for leaf in (5, 6)]
  tree = tokentree.pack(rows, 40)
  assert tree.rows == 2 and tree.live == 2 * (4 + 16 + 8 + 8)
  assert tree.paths[0][0] == tree.paths[1][0] != tree.paths[2][0] == tree.paths[3][0]


def test_without_merging_rows_are_plain_packing():
  rows = [sequence([1, 2, 3, 4, 5])] * 3
  tree = tokentree.pack(rows, 10, merge=False)
  assert tree.live == 15 and tree.dedup == 1 and tree.rows == 2
  np.testing.assert_array_equal(tree.end[0], [5] * 5 + [10] * 5)


def test_rows_of_realistic_lengths_are_filled():
  """Single turns of log-normal length (median 1,100 tokens), groups of rollouts of which four
  hardly fit a row, and 60 dialogues of 8 turns over one system prompt.
  """
  rng = np.random.default_rng(0)

  def draw(size):
    return rng.integers(0, 150_000, size)

  single = [
    sequence(draw(size)) for size in np.clip(rng.lognormal(7, 0.7, 400), 50, 8000).astype(int)
  ]
  tree = tokentree.pack(single, 16384)
  assert tree.live >= 0.97 * tree.tokens.size  # 34 rows, the fewest that hold 33.2 rows of tokens
  prompts = [draw(1024) for _ in range(256)]
  tree = tokentree.pack(
    [
      sequence(np.r_[prompt, draw(size)])
      for prompt in prompts
      for size in rng.integers(256, 512, 8)
    ],
    16384,
  )
  assert tree.live >= 0.95 * tree.tokens.size and tree.dedup > 2.7
  dialogues = []
  system = draw(1500)
  for _ in range(60):
    history = np.r_[system, draw(rng.integers(30, 90))]
    for _ in range(8):
      answer = draw(rng.integers(100, 400))
      dialogues.append(
        sequence(np.r_[history, answer], np.r_[np.zeros(len(history)), np.ones(len(answer))])
      )
      history = np.r_[history, draw(rng.integers(50, 400))]
  tree = tokentree.pack(
    dialogues, 16384
  )  # four a row only where the sizes below the system prompt are chosen by their sum
  assert tree.live >= 0.95 * tree.tokens.size and tree.dedup > 5


def test_shards_hold_the_loss_tokens_of_their_own_rows():
  tree = tokentree.pack([sequence(np.arange(9) + 10 * index) for index in range(8)], 9)
  whole = tree.batch(budget=72)
  split = tree.batch(budget=72, shards=4)
  assert split.parent.max() < 18 <= whole.parent.max()  # two rows a shard
  for batch, base in ((whole, 0), (split, np.arange(72) // 18 * 18)):
    used = batch.weight[0] > 0
    flat = batch.tokens.reshape(-1)
    np.testing.assert_array_equal(flat[(batch.parent[0] + base)[used]] + 1, batch.target[0][used])
    np.testing.assert_array_equal(flat[batch.slot[0][used]], batch.target[0][used])
  with pytest.raises(ValueError, match='8 rows do not divide into 1 micro-batches of 3 shards'):
    tree.batch(shards=3)


def test_tokens_and_weights_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='float64'):
    tokentree.TokenSequence(np.array([1.5, 2.0]), np.zeros(2, np.float32), 2)
  for bad in (np.nan, np.inf, -1):
    with pytest.raises(ValueError, match='finite and not negative'):
      sequence([1, 2], [0, bad])


def test_overlong_sequences_are_counted_not_cut():
  tree = tokentree.pack([sequence(range(9)), sequence(range(5))], 8)
  assert tree.dropped == [0] and len(tree.paths[0]) == 0 and tree.live == 5


def test_no_sequences_make_no_rows():
  tree = tokentree.pack([], 8)
  assert tree.tokens.shape == (0, 8) and tree.dedup == 0


def test_batch_holds_loss_tokens_only_and_pads_with_weight_zero():
  tree = tokentree.pack(
    [sequence([1, 2, 3, 4], [0, 0, 1, 2]), sequence([5, 6, 7], [0, 0, 3])], 4, rows_multiple=2
  )
  batch = tree.batch([1, 0], budget=3, accumulate=2)
  assert batch.tokens.shape == (2, 1, 4) and batch.weight.shape == (2, 3)
  np.testing.assert_array_equal(batch.weight, [[3, 0, 0], [1, 2, 0]])
  np.testing.assert_array_equal(batch.target, [[7, 0, 0], [3, 4, 0]])
  np.testing.assert_array_equal(batch.parent, [[1, 0, 0], [1, 2, 0]])
  np.testing.assert_array_equal(batch.slot, [[2, 0, 0], [2, 3, 0]])
  with pytest.raises(ValueError, match='exceed the budget'):
    tree.batch([0], budget=1)
  with pytest.raises(ValueError, match='do not divide'):
    tree.batch([0, 1], accumulate=3)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(tokens=[], weights=[]), 'at least one token'),
    (dict(tokens=[1, 2], weights=[0]), 'weights has shape'),
    (dict(tokens=[1, 2], weights=[1, 0]), 'nothing predicts'),
    (dict(tokens=[1, 2], shared=3), 'outside'),
  ],
)
def test_bad_sequences_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    sequence(**arguments)


def test_packing_is_deterministic_and_full():
  rng = np.random.default_rng(0)
  heads = [rng.integers(0, 400, 60) for _ in range(100)]
  rows = [
    sequence(np.r_[heads[i % 100], rng.integers(0, 400, rng.integers(60, 200))])
    for i in range(1500)
  ]
  tree = tokentree.pack(rows, 1024)
  again = tokentree.pack(rows, 1024)
  np.testing.assert_array_equal(tree.tokens, again.tokens)
  assert tree.live / tree.tokens.size > 0.9


def test_a_sequence_that_ends_where_its_tree_is_cut_takes_no_row():
  """A prompt of 40 tokens by itself, and behind it four branches of 30, two to a row of 100."""
  draw = np.random.default_rng(0).integers
  prompt = draw(0, 1000, 40)
  tree = tokentree.pack(
    [sequence(prompt), *(sequence(np.r_[prompt, draw(0, 1000, 30)]) for _ in range(4))], 100
  )
  assert tree.rows == 2 and tree.live == 2 * (40 + 2 * 30)
  lengths = np.array([40, 70, 70, 70, 70])
  common = np.array([0, 40, 40, 40, 40])
  pieces = packing.cut_pieces(lengths, common, 100)
  assert packing.fullest(lengths, common, 100, pieces)[0].max() == 1
