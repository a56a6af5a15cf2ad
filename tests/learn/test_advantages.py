"""Advantages against the golden values of the released code and plain transcripts."""

import functools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dcore_jax.learn import advantages

MIXED = [4, 4, 4, 4, -2, -2, 1, 1]
ENTROPY = (1, 10, 0, 2, 3, 4)
da_grpo = advantages.da_grpo_advantages


def group(rewards, entropy=ENTROPY):
  rewards = np.array([rewards], np.float32)
  entropy = np.broadcast_to(np.float32(entropy), (*rewards.shape, len(entropy)))
  return rewards, entropy, np.ones(entropy.shape, np.float32)


def psi(arrays, **options):
  def estimator(*arrays):
    return da_grpo(*arrays, **options)

  return advantages.psi_part(estimator, estimator(*arrays), arrays[0], arrays[2])


@pytest.mark.parametrize('name', ['grpo', 'da_grpo', 'rl_zvp'])
def test_group_with_variance(name):
  result = advantages.ADVANTAGES[name](*group(MIXED))
  np.testing.assert_allclose(
    result[0, :, 0], [0.8461] * 4 + [-1.4102] * 2 + [-0.2820] * 2, atol=5e-5
  )
  assert result.dtype == np.float32 and not psi(group(MIXED)).any()


@pytest.mark.parametrize(
  'multiplier, golden', [(2.0, (0.2, 1, 0, 0.4, 0.6, 0.8)), (1.0, (0.1, 0.5, 0, 0.2, 0.3, 0.4))]
)
@pytest.mark.parametrize('zero_test', ['group', 'token', 'below'])
@pytest.mark.parametrize('reward', [4, -3, 0])
def test_psi_replaces_the_vanished_advantage(multiplier, golden, zero_test, reward):
  """psi is blind to the sign of the reward; 2 is what the released code executes, 1 what the paper
  says.
  """
  options = dict(alpha=0.1, delta=0.5, zero_test=zero_test, psi_multiplier=multiplier)
  np.testing.assert_allclose(da_grpo(*group([reward] * 8), **options)[0], [golden] * 8, rtol=1e-6)
  np.testing.assert_array_equal(
    psi(group([reward] * 8), **options), da_grpo(*group([reward] * 8), **options)
  )


@pytest.mark.parametrize('name', ['grpo', 'dr_grpo', 'rloo'])
@pytest.mark.parametrize('reward', [4, -3, 0, 3.590909090909091])
def test_estimators_without_entropy_learn_nothing_from_equal_rewards(name, reward):
  assert not advantages.ADVANTAGES[name](*group([reward] * 8)).any()


def test_rounded_mean_hides_a_uniform_group_from_the_token_test_only():
  arrays = group([3.590909090909091] * 8)
  np.testing.assert_allclose(da_grpo(*arrays, zero_test='token'), 0.3158, atol=5e-5)
  assert not psi(arrays, zero_test='token').any()
  assert da_grpo(*arrays, zero_test='group').max() == np.float32(0.5)


def test_rollout_at_the_group_mean_gets_psi_by_the_token_test_only():
  arrays = group([4, -2, 1, 1, 4, -2, 1, 1])
  assert (psi(arrays, zero_test='token')[0, :, 0] > 0).tolist() == [0, 0, 1, 1] * 2
  assert not psi(arrays, zero_test='group').any()


def test_the_printed_condition_overwrites_negative_advantages():
  result = da_grpo(*group(MIXED), zero_test='below')
  np.testing.assert_allclose(result[0, :4], 0.8461, atol=5e-5)
  np.testing.assert_allclose(result[0, 4:], [(0.1, 0.5, 0, 0.2, 0.3, 0.4)] * 4, rtol=1e-6)


def test_standardisation_rounds_as_torch_does():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  whole = rng.integers(-3, 5, (500, 1))
  parts = rng.integers(0, 9, (500, 8)) / rng.integers(1, 12, (500, 1))
  rewards = np.float32(whole + parts)
  rewards[::2] = rewards[::2, :1]
  result = da_grpo(rewards, np.zeros((500, 8, 1)), np.ones((500, 8, 1)), zero_test='token')
  for row, reward in zip(result[..., 0], torch.tensor(rewards), strict=True):
    np.testing.assert_allclose(
      row, (reward - reward.mean()) / (reward.std() + 1e-6), rtol=1e-5, atol=1e-6
    )


def test_mask_and_single_rollouts():
  rewards, entropy, mask = group([2.0])
  mask[..., 4:] = 0
  np.testing.assert_allclose(da_grpo(rewards, entropy, mask)[0, 0], [2, 2, 2, 2, 0, 0], rtol=1e-5)
  np.testing.assert_allclose(
    da_grpo(rewards * 0, entropy, mask)[0, 0], [0.1, 0.5, 0, 0.2, 0, 0], rtol=1e-6
  )
  for name in ('dr_grpo', 'rloo'):  # nothing to compare with
    np.testing.assert_allclose(
      advantages.ADVANTAGES[name](rewards, entropy, mask)[0, 0], [2, 2, 2, 2, 0, 0]
    )


def test_rl_zvp_signs():
  right = advantages.rl_zvp_advantages(*group([4] * 8))[0, 0]
  wrong = advantages.rl_zvp_advantages(*group([0] * 8))[0, 0]
  np.testing.assert_allclose(right, 0.1 * np.float32(ENTROPY), rtol=1e-6)
  np.testing.assert_allclose(wrong, 0.1 * (np.float32(ENTROPY) - 10), rtol=1e-6)


@pytest.mark.parametrize(
  'when, wanted', [('ignore', (0,) * 6), ('punish', (-0.4, 0, -0.5, -0.3, -0.2, -0.1))]
)
def test_psi_of_wrong_groups(when, wanted):
  """Only groups at or below the threshold are treated so; the cap of psi bounds punishment too."""
  np.testing.assert_allclose(
    da_grpo(*group([-3] * 8), psi_when_wrong=when)[0], [wanted] * 8, atol=1e-6
  )
  np.testing.assert_allclose(
    da_grpo(*group([1] * 8), psi_when_wrong=when, right_above=1.0)[0], [wanted] * 8, atol=1e-6
  )
  np.testing.assert_array_equal(
    da_grpo(*group([4] * 8), psi_when_wrong=when), da_grpo(*group([4] * 8))
  )
  np.testing.assert_array_equal(da_grpo(*group(MIXED), psi_when_wrong=when), da_grpo(*group(MIXED)))


@pytest.mark.parametrize(
  'name, mean',
  [
    ('dr_grpo', lambda row, i: sum(row) / len(row)),
    ('rloo', lambda row, i: (sum(row) - row[i]) / (len(row) - 1)),
  ],
)
def test_centred_estimators_equal_a_transcript(name, mean):
  rewards = np.random.default_rng(0).integers(-3, 5, (20, 8)).astype(np.float32)
  result = advantages.ADVANTAGES[name](rewards, np.zeros((20, 8, 2)), np.ones((20, 8, 2)))
  wanted = [[reward - mean(row, i) for i, reward in enumerate(row)] for row in rewards.tolist()]
  np.testing.assert_allclose(result, np.array(wanted)[:, :, None].repeat(2, axis=2), atol=1e-6)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=200)
def test_da_grpo_equals_a_transcript(data):
  P, G, T = (data.draw(st.integers(1, most)) for most in (3, 6, 5))

  def pick(count, values):
    return [data.draw(st.sampled_from(values)) for _ in range(count)]

  rewards = np.float32(pick(P * G, [-3, 1, 4])).reshape(P, G)
  entropy = np.float32(pick(P * G * T, [0, 0.1, 0.7, 3, 9])).reshape(P, G, T)
  mask = np.float32(pick(P * G * T, [0, 1])).reshape(P, G, T)
  alpha, delta, multiplier = (
    data.draw(st.sampled_from(values)) for values in ([0, 0.1, 0.4], [0, 0.5, 1], [1.0, 2.0])
  )
  wanted = np.zeros((P, G, T))
  for p in range(P):
    row = rewards[p].astype(np.float64)
    mean, std = (row.mean(), row.std(ddof=1)) if G > 1 else (0, 1)
    uniform = row.max() == row.min() if G > 1 else row[0] == 0
    for g in range(G):
      for t in range(T):
        value = (
          multiplier * min(alpha * float(entropy[p, g, t]), delta)
          if uniform
          else (row[g] - mean) / (std + 1e-6)
        )
        wanted[p, g, t] = value * mask[p, g, t]
  result = da_grpo(rewards, entropy, mask, alpha=alpha, delta=delta, psi_multiplier=multiplier)
  np.testing.assert_allclose(result, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(rewards_PG=np.array([[1, np.nan]])), 'rewards are not finite'),
    (dict(entropy_PGT=np.full((1, 2, 3), np.inf)), 'entropies are not finite'),
    (dict(rewards_PG=np.zeros((1, 0))), 'empty group'),
    (dict(mask_PGT=np.ones((1, 3, 3))), 'disagree'),
    (dict(zero_test='paper'), 'zero_test'),
    (dict(psi_when_wrong='praise'), 'psi_when_wrong'),
    (dict(delta=-1.0), 'must not be negative'),
  ],
)
def test_bad_input_is_refused(change, message):
  arguments = (
    dict(rewards_PG=np.zeros((1, 2)), entropy_PGT=np.zeros((1, 2, 3)), mask_PGT=np.ones((1, 2, 3)))
    | change
  )
  with pytest.raises(ValueError, match=message):
    da_grpo(**arguments)


def test_estimators_by_name_take_their_own_options():
  config = dict(
    alpha=0.4,
    delta=1.0,
    zero_test='group',
    psi_multiplier=2.0,
    psi_when_wrong='ignore',
    right_above=0.0,
    lanes=3,
    signs_P=np.ones(1),
  )
  estimator = advantages.make_estimator('da_grpo', config)
  np.testing.assert_allclose(estimator(*group([4] * 8))[0, 0], (0.8, 2, 0, 1.6, 2, 2), rtol=1e-6)
  for name in advantages.ADVANTAGES:
    assert advantages.make_estimator(name, config)(*group(MIXED)).shape == (1, 8, 6)
  assert advantages.uses_entropy('rl_zvp') and not advantages.uses_entropy('rloo')
  with pytest.raises(ValueError, match="'grpo' is registered already"):
    advantages.register_estimator('grpo')(lambda rewards_PG, entropy_PGT, mask_PGT: mask_PGT)
  # A cell of a notebook that is run again replaces what it defined, and what that declared.
  first, second = (lambda *arrays: arrays[2] for _ in range(2))
  first.__module__ = second.__module__ = '__main__'
  try:
    advantages.register_estimator('cell', uses_entropy=True)(first)
    advantages.register_estimator('cell')(second)
    assert advantages.ADVANTAGES['cell'] is second and not advantages.uses_entropy('cell')
  finally:
    del advantages.ADVANTAGES['cell']
  with pytest.raises(ValueError, match="unknown estimator 'ppo'"):
    advantages.make_estimator('ppo', config)


def test_alpha_settles_where_its_measure_meets_the_target():
  """A policy whose entropy answers alpha within a few steps, from either side; the bounds hold
  where it never does.
  """
  for alpha in (0.02, 0.9):
    for _ in range(300):
      alpha = advantages.adapted_alpha(alpha, measured=2 * math.sqrt(alpha), target=0.8)
    assert alpha == pytest.approx(0.16, rel=1e-3)
  assert advantages.adapted_alpha(0.1, math.nan, 0.8) == 0.1
  assert advantages.adapted_alpha(0.1, 0.0, 0.8) == pytest.approx(0.1 * math.exp(0.1))
  assert (
    advantages.adapted_alpha(0.99, 0.0, 0.8) == 1.0
    and advantages.adapted_alpha(0.0101, 1e9, 0.8) == 0.01
  )
  with pytest.raises(ValueError, match='target = 0'):
    advantages.adapted_alpha(0.1, 1.0, 0.0)


def test_word_tokens_mark_every_token_of_a_word():
  pieces = ['So', ' wa', 'IT', ', the at', 'tri', 'bute', ' is', ' how', 'ev', 'er', 'wait', '']
  marked = [
    piece
    for piece, hit in zip(
      pieces, advantages.word_tokens(pieces, ('wait', 'but', 'however')), strict=True
    )
    if hit
  ]
  assert marked == [' wa', 'IT', 'bute', ' how', 'ev', 'er', 'wait']
  assert advantages.word_tokens([], ('wait',)).shape == (0,)
  with pytest.raises(ValueError, match='empty word'):
    advantages.word_tokens(pieces, ('wait', ''))


@hypothesis.given(st.lists(st.text('abc', max_size=3), max_size=12))
def test_word_tokens_equal_a_search_by_character(pieces):
  text = ''.join(pieces)
  word = 'ab'
  covered = [
    any(text[i - k : i - k + 2] == word for k in range(2) if i >= k) for i in range(len(text))
  ]
  owner = [number for number, piece in enumerate(pieces) for _ in piece]
  wanted = [
    any(hit for hit, who in zip(covered, owner, strict=True) if who == number)
    for number in range(len(pieces))
  ]
  assert advantages.word_tokens(pieces, (word,)).tolist() == wanted


def test_overlong_penalty():
  """The released DAPO script's numbers: buffer 1,024 of 4,096."""
  lengths = np.array([1, 3072, 3584, 4096, 5000])
  result = advantages.overlong_penalty(lengths, max_tokens=4096, buffer=1024)
  np.testing.assert_array_equal(result, [0, 0, -0.5, -1, -1])
  np.testing.assert_array_equal(
    advantages.overlong_penalty(lengths, max_tokens=4096, buffer=1024, penalty=0.5), result / 2
  )
  with pytest.raises(ValueError, match='buffer = 0'):
    advantages.overlong_penalty(lengths, max_tokens=4096, buffer=0)


def test_dynamic_sampling_selects_groups():
  rewards = np.array([[4, 4], [4, 1], [-3, -3], [3.590909, 3.590909], [1, 4], [4, 4], [0, 1]])

  def select(wanted, **options):
    return advantages.select_groups(rewards, wanted, **options).tolist()

  assert select(3) == [1, 4, 6] and select(2) == [1, 4]
  assert select(8) == [1, 4, 6]  # too few: the caller samples more prompts
  assert select(4, uniform_share=0.5) == [0, 1, 2, 4]
  assert select(4, uniform_share=1.0) == [0, 1, 2, 3]
  with pytest.raises(ValueError, match='uniform_share'):
    select(4, uniform_share=1.5)


@hypothesis.given(st.lists(st.floats(-4, 4), min_size=2, max_size=8), st.integers(0, 3))
def test_one_precision_decides_where_a_group_has_variance(rewards, shift):
  """Sampling and metrics see rewards in float64, estimators in float32: all must see one group."""
  rewards_PG = np.array([rewards, [rewards[0]] * len(rewards)])
  # Differences that float32 cannot hold, as summing a reward's parts in another order makes them.
  rewards_PG[1, 0] += shift * 1e-12
  mask_PGT = np.ones((*rewards_PG.shape, 1))
  uniform_P1 = advantages.uniform_groups(rewards_PG)
  np.testing.assert_array_equal(uniform_P1, advantages.uniform_groups(np.float32(rewards_PG)))
  entropy_PGT = mask_PGT.copy()
  psi_PGT = advantages.psi_part(
    functools.partial(advantages.da_grpo_advantages, alpha=0.1),
    advantages.da_grpo_advantages(rewards_PG, entropy_PGT, mask_PGT, alpha=0.1),
    rewards_PG,
    mask_PGT,
  )
  np.testing.assert_array_equal(
    psi_PGT[:, :, 0] != 0, np.broadcast_to(uniform_P1, psi_PGT.shape[:2])
  )
  kept = advantages.select_groups(rewards_PG, 2)
  assert set(kept) == set(np.flatnonzero(~uniform_P1[:, 0]))
