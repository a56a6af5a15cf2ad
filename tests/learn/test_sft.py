"""Supervised steps: trees equal flat rows, micro-batches change nothing, one compilation, the loss
falls.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from dcore_jax import tokentree
from dcore_jax.learn import optimizer, sft
from dcore_jax.learn.batches import BatchShape, batches


def dialogues(count=6, seed=0):
  """Rows of a dialogue branch at every turn: shared history, then a weighted answer."""
  rng = np.random.default_rng(seed)
  result = []
  for _ in range(count):
    history = rng.integers(0, 23, 8)
    for _ in range(3):
      answer = rng.integers(0, 23, 5)
      tokens = np.r_[history, answer].astype(np.int32)
      weights = np.r_[np.zeros(len(history)), rng.integers(1, 3, 5)].astype(np.float32)
      result.append(tokentree.TokenSequence(tokens, weights, len(tokens)))
      history = np.r_[history, rng.integers(0, 23, 4)]
  return result


@pytest.fixture(scope='module')
def sgd_step(config, params):
  """batch -> (loss, gradient) of one step, read back through plain gradient descent of rate 1."""
  tx = optax.sgd(1.0)
  step = sft.make_sft_step(config, tx)

  def run(batch):
    state, metrics = step(optimizer.init_state(params, tx), batch)
    return metrics['loss'], jax.tree.map(np.subtract, params, state.params)

  return run


@pytest.fixture(scope='module')
def flat(config, params, flat_scores, padded):
  """(loss, gradient) of the dialogues without packing."""
  sequences = dialogues()
  weights = padded(sequences, [sequence.weights for sequence in sequences])

  def loss(params):
    return -(weights * flat_scores(params, sequences)[0]).sum() / weights.sum()

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize('capacity, rows, accumulate', [(64, 8, 1), (40, 8, 2)])
def test_tree_equals_flat_rows(sgd_step, flat, capacity, rows, accumulate):
  sequences = dialogues()
  assert tokentree.pack(sequences, capacity).dedup > 1.2
  shape = BatchShape(rows=rows, accumulate=accumulate)
  made = batches(sequences, shape, capacity=capacity, epochs=1, seed=0)
  loss, grads = sgd_step(next(iter(made)))
  np.testing.assert_allclose(loss, flat[0], rtol=1e-5)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), grads, flat[1])


def test_every_row_once_an_epoch_in_a_seeded_order():
  made = batches(dialogues(10), BatchShape(rows=4), capacity=48, epochs=2, seed=3)
  first = list(made)
  again = list(made)
  assert len(first) == len(made) == 2 * made.per_epoch
  jax.tree.map(np.testing.assert_array_equal, first, again)

  def key(batch):
    return sorted(row.tobytes() for row in batch.tokens[0])

  epochs = [
    sum((key(batch) for batch in first[start : start + made.per_epoch]), [])
    for start in (0, made.per_epoch)
  ]
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row.tobytes() for row in made.tree.tokens)
  assert [key(batch) for batch in first[: made.per_epoch]] != [
    key(batch) for batch in first[made.per_epoch :]
  ]
  jax.tree.map(np.testing.assert_array_equal, list(made.start(3)), first[3:])


def test_hosts_share_each_batch():
  """Two hosts of two shards each: laid side by side their parts are the batch of one host with four
  shards.
  """
  sequences = dialogues(10)
  options = dict(capacity=48, epochs=2, seed=3)
  shape = BatchShape(rows=8, accumulate=2, shards=4)
  whole = list(batches(sequences, shape, **options))
  shares = [dataclasses.replace(shape, host=host, hosts=2) for host in range(2)]
  hosts = [list(batches(sequences, share, **options)) for share in shares]
  joined = [
    jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *parts)
    for parts in zip(*hosts, strict=True)
  ]
  for one, other in zip(joined, whole, strict=True):
    # which counts from the first row of the host
    one = one._replace(slot=other.slot)
    other = other
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_prefetched_batches_are_the_same_from_any_step():
  made = batches(dialogues(10), BatchShape(rows=4), capacity=48, epochs=2, seed=3)
  for step in (0, 3, len(made)):
    for one, other in zip(made.prefetched(step), list(made)[step:], strict=True):
      jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_error_while_prefetching_is_raised():
  made = batches(dialogues(10), BatchShape(rows=4), capacity=48, epochs=1, seed=3)
  with pytest.raises(ValueError, match='exceed the budget of 1'):
    list(dataclasses.replace(made, budget=1).prefetched(0))


def test_loss_falls_and_the_step_compiles_once(config, params):
  made = batches(dialogues(), BatchShape(rows=4), capacity=64, epochs=30, seed=0)
  schedule = optimizer.Schedule('cosine', warmup=0.1, total_steps=len(made))
  tx = optimizer.make_optimizer('adamw', 5e-2, schedule)
  step = sft.make_sft_step(config, tx)
  state = optimizer.init_state(params, tx)
  losses = []
  for batch in made:
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  assert step._cache_size() == 1
  assert np.mean(losses[-2:]) < 0.6 * np.mean(losses[:2])
  assert int(state.step) == len(made)


def test_batch_without_loss_tokens_changes_nothing(sgd_step):
  sequences = [tokentree.TokenSequence(np.arange(5, dtype=np.int32), np.zeros(5, np.float32), 5)]
  loss, grads = sgd_step(tokentree.pack(sequences, 64, rows_multiple=8).batch(budget=512))
  assert loss == 0 and all(not np.any(grad) for grad in jax.tree.leaves(grads))


def test_refuses_batches_that_cannot_be():
  with pytest.raises(ValueError, match='do not make batches'):
    batches(dialogues(), BatchShape(rows=4, accumulate=3), capacity=64, epochs=1, seed=0)
  with pytest.raises(ValueError, match='no sequence fits'):
    batches(dialogues(), BatchShape(rows=4), capacity=4, epochs=1, seed=0)


def test_the_mean_loss_is_that_of_a_step_on_tree_and_flat_rows(config, params, sgd_step):
  flat = tokentree.pack(dialogues(), 64, merge=False)
  tree = tokentree.pack(dialogues(), 64)
  assert tree.dedup > 1
  wanted, _ = sgd_step(tokentree.pack(dialogues(), 64, rows_multiple=8).batch(budget=512))
  for packed in (tree, flat):
    assert sft.mean_loss(params, config, packed) == pytest.approx(float(wanted), rel=1e-5)
