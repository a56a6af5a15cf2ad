"""The numbers of docs/psi.md, and that the general statements behind them hold."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.learn import psi_theory as theory

PUBLISHED = theory.psi_alone(theory.PUBLISHED)
IGNORED = theory.psi_alone(theory.WRONG_IGNORED)
share = st.floats(0.02, 0.98)


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3), r=st.tuples(*[share] * 3))
def test_psi_is_ascent_on_the_share_of_uniform_groups(weights, r):
  """Whatever the policy and the rewards; and without the condition it has no mean at all."""
  p = np.divide(weights, sum(weights))
  q = float(p @ r)
  assert abs(theory.mean_gradient(p, r, theory.every_group, 4)).max() < 1e-12
  ours = theory.mean_gradient(p, r, PUBLISHED, 4)
  np.testing.assert_allclose(ours, theory.uniform_ascent(p, r, 4), atol=1e-7)
  right = theory.mean_gradient(p, r, IGNORED, 4)
  np.testing.assert_allclose(right, q**3 * p * (np.array(r) - q), atol=1e-7)


def test_the_ascent_is_the_gradient_of_the_share():
  """By differences of q^G + (1 - q)^G."""
  logits, r = np.log([0.2, 0.5, 0.3]), np.array([0.9, 0.5, 0.2])

  def uniform(logits):
    p = np.exp(logits)
    q = p @ r / p.sum()
    return q**8 + (1 - q) ** 8

  steps = 1e-6 * np.eye(3)
  slopes = [(uniform(logits + h) - uniform(logits - h)) / 2e-6 for h in steps]
  np.testing.assert_allclose(theory.uniform_ascent(np.exp(logits), r), np.divide(slopes, 8), 1e-6)


@pytest.mark.parametrize(
  ('r', 'wanted'),
  [
    ((0.95, 0.85), (0, 0.00604, 0.00604, 0.05734, 0.03371)),
    ((0.6, 0.4), (0, -0.00045, 0.00010, 0.00141, 0.05583)),
    ((0.3, 0.08), (0, -0.01393, 0.00000, 0.04434, 0.07463)),
  ],
)
def test_means_on_a_word_that_helps(r, wanted):
  rules = (theory.every_group, PUBLISHED, IGNORED, theory.on_the_word, theory.GRPO)
  ours = [theory.mean_gradient((0.2, 0.8), r, rule)[0] for rule in rules]
  np.testing.assert_allclose(ours, wanted, atol=6e-6)


@pytest.mark.parametrize(
  ('q', 'percent'),
  [
    (0.13, (-0.05, -0.54, -2.1, -9.0)),
    (0.5, (0, 0, 0, 0)),
    (0.9, (0.07, 0.66, 2.6, 11.0)),
    (0.95, (0.09, 0.91, 3.6, 15.0)),
  ],
)
def test_psi_relative_to_grpo(q, percent):
  ratio = 100 * theory.uniform_factor(q) / theory.grpo_factor(q)
  ours = [psi * ratio for psi in (0.003, 0.03, 0.12, 0.5)]
  np.testing.assert_allclose(ours, percent, rtol=0.03, atol=0.006)


def test_what_practice_adds():
  old = (0.70, 0.25, 0.05)
  assert abs(theory.clipped_gradient(old, old)).max() < 1e-6
  pulled = theory.clipped_gradient(old, (0.65, 0.25, 0.10))
  np.testing.assert_allclose(pulled, [0.065, 0.025, -0.090], atol=1e-5)
  bias = [theory.length_bias(200, 100, n, 'token') for n in (1, 8, 64)]
  np.testing.assert_allclose(bias, [-0.60, -0.10, -0.013], rtol=0.06)
  for sequences in (1, 8):
    assert theory.length_bias(200, 100, sequences, 'sequence') == pytest.approx(-0.6)
    assert theory.length_bias(200, 100, sequences, 'dr') == pytest.approx(0, abs=1e-12)
  changes = [theory.entropy_change(p) for p in ((0.7, 0.3), (0.9, 0.1))]
  np.testing.assert_allclose(changes, [-0.0076, 0.0014], atol=6e-5)


@pytest.mark.parametrize(
  ('p', 'updates', 'wanted'), [(0.01, 8, -0.61), (0.01, 32, -0.30), (0.1, 8, -0.034)]
)
def test_adam_drifts_against_rare_tokens(p, updates, wanted):
  mean, error = theory.adam_drift(p, updates)
  assert abs(mean - wanted) < 0.01 + 3 * error and mean < -3 * error


def test_the_present_kl_feeds_ids_and_the_bonus_tokens():
  pushes = theory.kl_pushes()
  forward = pushes['KL(uniform || policy)']
  reverse = pushes['KL(policy || uniform)']
  assert forward['unlikely'] == pytest.approx(0.873, abs=1e-3)
  assert forward['no token'] == pytest.approx(0.094, abs=1e-3)
  assert forward['likely'] == pytest.approx(0.001, abs=5e-4)
  assert reverse['likely'] == pytest.approx(0.188, abs=1e-3)
  assert abs(reverse['unlikely']) + abs(reverse['no token']) < 1e-4


@pytest.mark.parametrize('r', [(0.95, 0.85), (0.3, 0.08)])
def test_the_size_is_that_of_sampled_groups(r):
  """And a random sign takes the mean away, but not the size."""
  rng = np.random.default_rng(0)
  p = np.array([0.2, 0.8])
  actions_PG = (rng.random((20_000, 8)) > p[0]).astype(int)
  rewards_PG = (rng.random((20_000, 8)) < np.array(r)[actions_PG]).astype(float)
  score_PG = (actions_PG == 0) - p[0]
  for rule in (PUBLISHED, theory.placebo(PUBLISHED)):
    sampled_P = (rule(rewards_PG, actions_PG) * score_PG).mean(axis=1)
    size = theory.gradient_size(p, r, PUBLISHED)[0]
    assert np.sqrt(np.square(sampled_P).mean()) == pytest.approx(size, rel=0.05)
    mean = theory.mean_gradient(p, r, PUBLISHED)[0] if rule is PUBLISHED else 0
    assert sampled_P.mean() == pytest.approx(mean, abs=4 * size / np.sqrt(20_000))


def test_learning_follows_the_mean():
  """Psi alone lowers q on a hard prompt; without wrong answers, or as a placebo, it does not."""
  options = dict(updates=30, rate=0.5, runs=256)
  r = (0.3, 0.08)
  start = 0.124
  published, ignored, placebo, grpo = (
    theory.learn((0.2, 0.8), r, rule, **options).mean(axis=0)
    for rule in (PUBLISHED, IGNORED, theory.placebo(PUBLISHED), theory.GRPO)
  )
  assert published[0] == ignored[0] == grpo[0] == pytest.approx(start)
  assert published[-1] < start - 0.01
  assert abs(ignored[-1] - start) < 2e-3 and abs(placebo[-1] - start) < 8e-3
  assert grpo[-1] > start + 0.05
  both = theory.added(theory.GRPO, PUBLISHED, weights=(2, -1))
  rewards_PG, actions_PG = np.array([[1.0, 0.0], [1.0, 1.0]]), np.zeros((2, 2), int)
  wanted = 2 * theory.GRPO(rewards_PG, actions_PG) - PUBLISHED(rewards_PG, actions_PG)
  np.testing.assert_array_equal(both(rewards_PG, actions_PG), wanted)


def test_the_sampled_share_counts_every_group():
  rewards_PN = np.array([[1, 1, 1, 0, 2], [3, 3, 3, 3, 3]])
  pairs = list(itertools.combinations(rewards_PN[0], 2))
  wanted = np.mean([a == b for a, b in pairs])
  np.testing.assert_allclose(theory.sampled_uniform_share(rewards_PN, 2), [wanted, 1])
  rng = np.random.default_rng(0)
  many = theory.sampled_uniform_share(rng.random((4000, 10)) < 0.8, 8)
  assert many.mean() == pytest.approx(theory.uniform_share(0.8), abs=0.02)
  with pytest.raises(ValueError, match='5 rollouts of a prompt make no group of 8'):
    theory.sampled_uniform_share(rewards_PN)
