"""Advantages and objectives against the golden values of the released code and plain numpy transcripts."""
import jax
import numpy as np
import pytest

from dcore_jax.learn import objectives

MIXED = [4, 4, 4, 4, -2, -2, 1, 1]
ENTROPY = (1, 10, 0, 2, 3, 4)


def group(rewards, entropy=ENTROPY):
  rewards = np.array([rewards], np.float32)
  entropy = np.broadcast_to(np.float32(entropy), (*rewards.shape, len(entropy)))
  return rewards, entropy, np.ones(entropy.shape, np.float32)


@pytest.mark.parametrize('name', ['grpo', 'da_grpo', 'rl_zvp'])
def test_group_with_variance(name):
  result = objectives.ADVANTAGES[name](*group(MIXED))
  np.testing.assert_allclose(result.total[0, :, 0], [.8461] * 4 + [-1.4102] * 2 + [-.2820] * 2, atol=5e-5)
  assert not result.psi.any()


@pytest.mark.parametrize('multiplier, golden', [(2.0, (.2, 1, 0, .4, .6, .8)), (1.0, (.1, .5, 0, .2, .3, .4))])
@pytest.mark.parametrize('zero_test', ['group', 'token'])
@pytest.mark.parametrize('reward', [4, -3, 0])
def test_psi_replaces_the_vanished_advantage(multiplier, golden, zero_test, reward):
  """psi is blind to the sign of the reward; 2 is what the released code executes, 1 what the paper says."""
  result = objectives.da_grpo_advantages(
      *group([reward] * 8), alpha=0.1, delta=0.5, zero_test=zero_test, psi_multiplier=multiplier)
  np.testing.assert_allclose(result.total[0], [golden] * 8, rtol=1e-6)
  np.testing.assert_array_equal(result.psi, result.total)
  assert not objectives.grpo_advantages(*group([reward] * 8)).total.any()


def test_rounded_mean_hides_a_uniform_group_from_the_token_test_only():
  arrays = group([3.590909090909091] * 8)
  released = objectives.da_grpo_advantages(*arrays, zero_test='token')
  np.testing.assert_allclose(released.total, 0.3158, atol=5e-5)
  assert not released.psi.any()
  assert objectives.da_grpo_advantages(*arrays, zero_test='group').total.max() == np.float32(0.5)


def test_rollout_at_the_group_mean_gets_psi_by_the_token_test_only():
  arrays = group([4, -2, 1, 1, 4, -2, 1, 1])
  assert (objectives.da_grpo_advantages(*arrays, zero_test='token').psi[0, :, 0] > 0).tolist() == [0, 0, 1, 1] * 2
  assert not objectives.da_grpo_advantages(*arrays, zero_test='group').psi.any()


def test_standardisation_rounds_as_torch_does():
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(0)
  whole, parts = rng.integers(-3, 5, (500, 1)), rng.integers(0, 9, (500, 8)) / rng.integers(1, 12, (500, 1))
  rewards = np.float32(whole + parts)
  rewards[::2] = rewards[::2, :1]
  result = objectives.da_grpo_advantages(rewards, np.zeros((500, 8, 1)), np.ones((500, 8, 1)), zero_test='token')
  for row, reward in zip(result.total[..., 0], torch.tensor(rewards)):
    np.testing.assert_allclose(row, (reward - reward.mean()) / (reward.std() + 1e-6), rtol=1e-5, atol=1e-6)


def test_mask_and_single_rollouts():
  rewards, entropy, mask = group([2.0])
  mask[..., 4:] = 0
  result = objectives.da_grpo_advantages(rewards, entropy, mask)
  np.testing.assert_allclose(result.total[0, 0], [2, 2, 2, 2, 0, 0], rtol=1e-5)
  zero = objectives.da_grpo_advantages(rewards * 0, entropy, mask)
  np.testing.assert_allclose(zero.total[0, 0], [.1, .5, 0, .2, 0, 0], rtol=1e-6)


def test_rl_zvp_signs():
  right = objectives.rl_zvp_advantages(*group([4] * 8)).total[0, 0]
  wrong = objectives.rl_zvp_advantages(*group([-3] * 8)).total[0, 0]
  np.testing.assert_allclose(right, 0.1 * np.float32(ENTROPY), rtol=1e-6)
  np.testing.assert_allclose(wrong, 0.1 * (np.float32(ENTROPY) - 10), rtol=1e-6)


def test_dr_grpo_only_centres():
  result = objectives.dr_grpo_advantages(*group(MIXED))
  np.testing.assert_allclose(result.total[0, :, 0], np.float32(MIXED) - np.mean(MIXED), rtol=1e-6)


@pytest.mark.parametrize('change, message', [
    (dict(rewards_PG=np.array([[1, np.nan]])), 'rewards are not finite'),
    (dict(entropy_PGT=np.full((1, 2, 3), np.inf)), 'entropies are not finite'),
    (dict(rewards_PG=np.zeros((1, 0))), 'empty group'),
    (dict(mask_PGT=np.ones((1, 3, 3))), 'disagree'),
    (dict(zero_test='paper'), 'zero_test'),
    (dict(delta=-1.0), 'must not be negative'),
])
def test_bad_input_is_refused(change, message):
  arguments = dict(rewards_PG=np.zeros((1, 2)), entropy_PGT=np.zeros((1, 2, 3)), mask_PGT=np.ones((1, 2, 3))) | change
  with pytest.raises(ValueError, match=message):
    objectives.da_grpo_advantages(**arguments)


def transcript(logp, old, advantage, weight, low, high, c):
  loss = clipped = 0.0
  for lp, lo, a, w in zip(logp, old, advantage, weight):
    r = np.exp(np.clip(lp - lo, -20, 20))
    one, two = -a * r, -a * np.clip(r, 1 - low, 1 + high)
    value = max(one, two)
    if a < 0:
      value = min(value, -a * c)
    loss += w * value
    clipped += w * (two > one)
  return loss / weight.sum(), clipped / weight.sum()


def test_clipped_objective_equals_a_transcript():
  rng = np.random.default_rng(0)
  logp, old, advantage = rng.normal(-2, 1, (3, 400)).astype(np.float32)
  advantage = advantage + 2
  old[:5] = logp[:5] - 40  # far beyond the bound on the log ratio
  advantage[:5] = -1
  weight = rng.integers(0, 2, 400).astype(np.float32)
  (loss, total), (clipped, _) = objectives.clipped_objective(logp, old, advantage, weight, clip_low=0.2, clip_high=0.28)
  wanted = transcript(logp.astype(np.float64), old, advantage, weight, 0.2, 0.28, 3)
  np.testing.assert_allclose((loss / total, clipped / total), wanted, rtol=1e-6, atol=1e-6)


def test_kl_equals_a_transcript_and_is_bounded():
  rng = np.random.default_rng(1)
  logp, ref = rng.normal(-2, 1, (2, 200)).astype(np.float32)
  ref[0], logp[1] = 100, 100
  weight = np.ones(200, np.float32)
  gap = np.clip(ref.astype(np.float64) - logp, -20, 20)
  wanted = np.clip(np.exp(gap) - gap - 1, -10, 10).mean()
  total, count = objectives.kl_penalty(logp, ref, weight)
  np.testing.assert_allclose(total / count, wanted, rtol=1e-6)


def test_on_policy_gradient_is_the_advantage():
  """At ratio 1 nothing is clipped: d loss / d logp = -A."""
  old, advantage, weight = np.float32([-1, -2, -3]), np.float32([1, -2, 0.5]), np.ones(3, np.float32)
  grad = jax.grad(lambda logp: objectives.clipped_objective(logp, old, advantage, weight)[0][0])(old)
  np.testing.assert_allclose(grad, -advantage)
