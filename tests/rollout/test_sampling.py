"""The draw against the distribution it should have, and references of top-k and top-p in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.rollout import sampling
from dcore_jax.rollout.sampling import SamplingParams, sample

DRAWS = 20000
DRAW = jax.jit(sampling.draw)


def keys(count, seed=0):
  return sampling.token_keys(
    np.tile(sampling.request_key(seed, (1,)), (count, 1)), np.arange(count)
  )


def truncate(mass, top_p=1.0, top_k=0, min_p=0.0):
  return sampling.truncate(
    mass, *(jnp.full(mass.shape[:1], number) for number in (top_p, top_k, min_p))
  )


def reference(logits, temperature, top_p=1.0, top_k=0, min_p=0.0):
  """float64 probabilities after temperature, top-k, top-p of what is left, min-p; by sorting."""
  scaled = np.asarray(logits, np.float64) / temperature
  prob = np.exp(scaled - scaled.max())
  order = np.argsort(-prob)
  if top_k:
    prob[order[top_k:]] = 0
  prob /= prob.sum()
  before = np.cumsum(prob[order]) - prob[order]
  prob[order[before >= top_p]] = 0
  prob[prob < min_p * prob.max()] = 0
  return prob / prob.sum()


RULES = [
  dict(temperature=1.0),
  dict(temperature=0.6),
  dict(temperature=1.7, top_k=5),
  dict(temperature=1.0, top_p=0.7),
  dict(temperature=0.8, top_p=0.9, top_k=7),
  dict(temperature=1.0, top_k=1),
  dict(temperature=1.0, top_p=1e-6),
  dict(temperature=1.0, min_p=0.05),
  dict(temperature=1.2, top_p=0.95, top_k=20, min_p=0.1),
]


@pytest.mark.parametrize('rule', RULES, ids=str)
@pytest.mark.parametrize('vocab', [64, 100])
def test_draws_follow_the_distribution(rule, vocab):
  logits = np.random.default_rng(vocab).normal(0, 2, vocab).astype(np.float32)
  want = reference(logits, **rule)
  chosen = SamplingParams(**rule)
  many = jnp.tile(logits[None], (DRAWS, 1))
  lanes = jax.tree.map(lambda number: jnp.full(DRAWS, number), chosen.rule())
  tokens, logprobs, full_logprobs, entropies, _ = DRAW(
    many, sampling.uniforms(keys(DRAWS)), lanes, False
  )
  counts = np.bincount(tokens, minlength=vocab)
  assert not counts[want == 0].any()
  np.testing.assert_allclose(logprobs, np.log(want[tokens]), atol=1e-5)
  whole = reference(logits, rule['temperature'])
  np.testing.assert_allclose(full_logprobs, np.log(whole[tokens]), atol=1e-5)
  np.testing.assert_allclose(entropies, -(whole * np.log(whole)).sum(), atol=1e-5)
  expected = want * DRAWS
  often = expected > 5
  freedom = max(often.sum() - 1, 1)
  chi_square = (np.square(counts - expected)[often] / expected[often]).sum()
  assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations


@pytest.mark.parametrize('rule', [dict(temperature=0), *RULES], ids=str)
def test_alternatives_are_the_likeliest_tokens_of_the_policy_that_draws(rule):
  logits = np.random.default_rng(7).normal(0, 2, (3, 100)).astype(np.float32)
  logits[:, 40] = logits[:, 60] = 5  # of equals the first comes first
  chosen = SamplingParams(**rule)
  lanes = jax.tree.map(lambda number: jnp.full(3, number), chosen.rule())
  asked = jnp.asarray(logits), sampling.uniforms(keys(3)), lanes
  *drawn, top = DRAW(*asked, True)
  for got, alone in zip(drawn, DRAW(*asked, False)[:4], strict=True):
    np.testing.assert_array_equal(got, alone)
  for lane, row in enumerate(logits):
    kept = truncated_reference(row, **rule)
    order = np.argsort(-kept, kind='stable')[:20]
    count = min(20, (kept > 0).sum())
    assert top.token_BJ[lane, :count].tolist() == order[:count].tolist()
    with np.errstate(divide='ignore'):
      np.testing.assert_allclose(top.logprob_BJ[lane], np.log(kept[order]), atol=1e-5)


def truncated_reference(logits, temperature, **truncation):
  """`reference` with tokens as likely as the last one kept."""
  kept = reference(logits, temperature or 1.0, **truncation)
  full = reference(logits, temperature or 1.0)
  kept = np.where(full >= full[kept > 0].min(), full, 0)
  return kept / kept.sum()


def test_greedy_takes_the_first_maximum_and_reports_the_untempered_log_probability():
  logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [-1.0, -5.0, -0.5, -9.0]])
  tokens, logprobs, *_ = sample(logits, keys(2), SamplingParams(temperature=0))
  assert tokens.tolist() == [1, 2]
  np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[jnp.arange(2), tokens], atol=1e-6)


def test_a_large_vocabulary_reaches_its_last_block_and_never_a_token_without_mass():
  logits = np.full((2, 151936), -np.inf, np.float32)
  logits[0, [0, 151935]] = 0, 1
  logits[1, 70000] = -3
  tokens, logprobs, *_ = sample(
    jnp.asarray(np.repeat(logits, 16, axis=0)), keys(32), SamplingParams()
  )
  assert set(tokens[:16].tolist()) == {0, 151935} and set(tokens[16:].tolist()) == {70000}
  np.testing.assert_allclose(logprobs[16:], 0, atol=1e-6)


def test_equally_likely_tokens_at_the_threshold_are_all_kept():
  mass = jnp.array([[1.0, 0.5, 0.5, 0.25]])
  np.testing.assert_array_equal(truncate(mass, top_k=2) > 0, [[True, True, True, False]])
  np.testing.assert_array_equal(truncate(mass, top_p=0.5) > 0, [[True, True, True, False]])
  np.testing.assert_array_equal(truncate(mass, top_p=0.44) > 0, [[True, False, False, False]])


def test_a_lane_draws_the_same_beside_others():
  logits = jax.random.normal(jax.random.key(0), (8, 50))
  rule = SamplingParams(temperature=0.9, top_p=0.8)
  together = sample(logits, keys(8), rule)
  for lane in (0, 3, 7):
    alone = sample(logits[lane : lane + 1], keys(8)[lane : lane + 1], rule)
    assert alone[0][0] == together[0][lane]
    np.testing.assert_allclose(alone[1][0], together[1][lane], atol=1e-6)


def test_lanes_with_different_rules_draw_as_each_does_alone():
  logits = jax.random.normal(jax.random.key(3), (5, 50))
  rules = [
    SamplingParams(0),
    SamplingParams(0.7),
    SamplingParams(1.0, top_k=3),
    SamplingParams(1.0, top_p=0.6),
    SamplingParams(1.3, min_p=0.2),
  ]
  together = jax.tree.map(lambda *numbers: np.stack(numbers), *(rule.rule() for rule in rules))
  for lanes in (slice(5), slice(2)):
    some = sampling.Rule(*(numbers[lanes] for numbers in together))
    drawn = sampling.draw(logits[lanes], sampling.uniforms(keys(5)[lanes]), some, False)
    for lane, rule in enumerate(rules[lanes]):
      alone = sample(logits[lane : lane + 1], keys(5)[lane : lane + 1], rule)
      assert alone.token_B[0] == drawn.token_B[lane]
      np.testing.assert_allclose(alone.logprob_B[0], drawn.logprob_B[lane], atol=1e-6)
      np.testing.assert_allclose(alone.full_logprob_B[0], drawn.full_logprob_B[lane], atol=1e-6)


def test_extreme_logits_stay_finite_and_nan_is_not_hidden():
  logits = jnp.array([[1e30, -1e30, 0.0], [jnp.nan, 0.0, 1.0]])
  tokens, logprobs, *_ = sample(
    logits, keys(2), SamplingParams(temperature=0.01, top_p=0.9, top_k=2)
  )
  assert tokens[0] == 0 and logprobs[0] == 0 and np.isnan(logprobs[1])
  assert 0 <= tokens[1] < 3


def test_request_keys_differ_by_every_part():
  made = [
    sampling.request_key(seed, key_id)
    for seed, key_id in (
      (0, ()),
      (0, (0,)),
      (0, (0, 0)),
      (1, (0,)),
      (0, (1, 0)),
      (0, (0, 1)),
      (0, (2**32 - 1,)),
    )
  ]
  assert len({key.tobytes() for key in made}) == len(made)
  assert made[0].dtype == np.uint32 and made[0].shape == (2,)
  with pytest.raises(ValueError, match='key_id'):
    sampling.request_key(0, (-1,))


@pytest.mark.parametrize(
  'bad',
  [
    dict(temperature=-0.1),
    dict(temperature=float('nan')),
    dict(top_p=0.0),
    dict(top_p=1.1),
    dict(top_k=-1),
    dict(max_tokens=0),
    dict(seed=-1),
    dict(min_p=1.1),
    dict(stop=('',)),
    dict(stop='text'),
  ],
  ids=str,
)
def test_values_out_of_range_are_named(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    SamplingParams(**bad)
