"""DA-GRPO's rivals against plain transcripts of their formulas, and golden values."""

import statistics

import numpy as np
import pytest

from dcore_jax.learn import advantages, controls

REWARDS = np.float32([[4, 4, -2, 1], [-3, -3, -3, -3], [4, 4, 4, 4], [1, -2, -2, 4]])
RNG = np.random.default_rng(0)
ENTROPY = np.float32(RNG.random((4, 4, 6)) * 3)
MASK = np.float32(RNG.random((4, 4, 6)) < 0.8)
SIGNS = np.float32([1, -1, 1, -1])


def made(name, rewards=REWARDS, **options):
  return advantages.make_estimator(name, options)(rewards, ENTROPY, MASK)


def relative(group):
  """GRPO's advantages of one group, in plain Python."""
  group = [float(reward) for reward in group]
  if len(set(group)) == 1:
    return [0.0] * len(group)
  mean = statistics.mean(group)
  return [(reward - mean) / (statistics.stdev(group) + 1e-6) for reward in group]


def by_token(rule):
  """Applies rule(prompt, rollout, A, H) to every token of the mask."""
  result = np.zeros(MASK.shape)
  for p, g, t in zip(*np.nonzero(MASK), strict=True):
    result[p, g, t] = rule(p, g, relative(REWARDS[p])[g], float(ENTROPY[p, g, t]))
  return result


def virtual(p, g, a, h):
  group = [*map(float, REWARDS[p]), 4.0]
  deviation = statistics.stdev(group)
  return (group[g] - statistics.mean(group)) / (deviation + 1e-6) if deviation else 0.0


def likelihood(p, g, a, h):
  right = [reward > 0 for reward in REWARDS[p]]
  share = sum(right) / 4
  return (right[g] - share) / share if share else 0.0


def placebo(p, g, a, h):
  return SIGNS[p] * min(0.4 * h, 0.5) if p in (1, 2) else a


def placebo_of_right(p, g, a, h):
  return placebo(p, g, a, h) if p != 1 else 0.0


@pytest.mark.parametrize(
  ('name', 'options', 'rule'),
  [
    ('psi_placebo', dict(signs_P=SIGNS, alpha=0.4), placebo),
    ('psi_placebo', dict(signs_P=SIGNS, alpha=0.4, psi_when_wrong='ignore'), placebo_of_right),
    (
      'entropy_shaped',
      dict(alpha=0.4, shaping_kappa=2.0),
      lambda p, g, a, h: a + min(0.4 * h, abs(a) / 2),
    ),
    ('ngrpo', {}, virtual),
    ('max_rl', {}, likelihood),
    (
      'positive_weighted',
      dict(positive_weight=0.3),
      lambda p, g, a, h: 0.3 * a if a > 0 else a,
    ),
    (
      'top_entropy',
      dict(top_share=0.2),
      lambda p, g, a, h: a * (h >= np.quantile(ENTROPY[MASK != 0].astype(float), 0.8)),
    ),
  ],
)
def test_estimators_equal_plain_transcripts(name, options, rule):
  ours = made(name, **options)
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, by_token(rule), rtol=1e-6, atol=1e-6)


def test_the_placebo_is_psi_but_for_its_sign():
  """Its norm is psi's, and over the signs it cancels."""
  psi = made('da_grpo', alpha=0.4)
  one, other = (made('psi_placebo', alpha=0.4, signs_P=signs) for signs in (SIGNS, -SIGNS))
  np.testing.assert_array_equal(np.abs(one[1:3]), psi[1:3])
  np.testing.assert_array_equal(one[1:3] + other[1:3], 0 * psi[1:3])
  np.testing.assert_array_equal(one[[0, 3]], psi[[0, 3]])
  parts = advantages.make_parts('psi_placebo', dict(signs_P=SIGNS))(REWARDS)
  np.testing.assert_array_equal(parts.weight_PG, np.repeat(SIGNS[:, None], 4, axis=1))


def test_signs_are_of_their_keys_and_balanced():
  signs = controls.group_signs(3, 7, range(2000))
  assert set(signs) == {-1, 1} and abs(signs.mean()) < 0.07
  np.testing.assert_array_equal(controls.group_signs(3, 7, [11, 5]), signs[[11, 5]])
  for seed, step in ((4, 7), (3, 8)):
    assert abs((controls.group_signs(seed, step, range(2000)) * signs).mean()) < 0.07


def test_golden_values():
  """One right of eight: GRPO 2.47 and -0.35, NGRPO 1.76 and -0.50 (its paper), MaxRL 7 and -1."""
  rewards = np.float32([[1, 0, 0, 0, 0, 0, 0, 0]])
  for name, options, first, others in (
    ('grpo', {}, 2.4749, -0.3536),
    ('ngrpo', dict(virtual_reward=1.0), 1.7638, -0.5040),
    ('max_rl', {}, 7.0, -1.0),
    ('positive_weighted', dict(positive_weight=0.5), 1.2374, -0.3536),
  ):
    ones = np.ones((1, 8, 1))
    ours = advantages.make_estimator(name, options)(rewards, ones, ones)[0, :, 0]
    np.testing.assert_allclose(ours, [first] + [others] * 7, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('psi_placebo', {}, '4 groups need a sign each'),
    ('psi_placebo', dict(signs_P=SIGNS[:2]), '4 groups need a sign each'),
    ('psi_placebo', dict(signs_P=SIGNS, psi_when_wrong='punish'), 'has no placebo'),
    ('psi_placebo', dict(signs_P=SIGNS, alpha=-1.0), 'must not be negative'),
    ('top_entropy', dict(top_share=0.0), 'top_share = 0.0'),
    ('entropy_shaped', dict(shaping_kappa=1.0), 'shaping_kappa = 1.0'),
    ('ngrpo', dict(virtual_reward=3.0), 'above virtual_reward = 3.0'),
    ('positive_weighted', dict(positive_weight=-1.0), 'positive_weight = -1.0'),
  ],
)
def test_options_that_mean_nothing(name, options, message):
  with pytest.raises(ValueError, match=message):
    made(name, **options)
