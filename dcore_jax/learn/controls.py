"""What DA-GRPO is compared with: a placebo of psi, and other uses of entropies and silent groups.

Each is an estimator of `rl.estimator` by the formula of its paper, see `learn.advantages` for the
contract. Two rivals are no estimators: `rl.entropy_bonus` and `rl.uniform_kl`, terms of the loss.
Letters: P prompts, G rollouts of a prompt, T response tokens of a rollout.
"""

from collections.abc import Sequence

import numpy as np

from dcore_jax.learn.advantages import (
  GroupParts,
  check_scale,
  checked,
  choose,
  da_grpo_parts,
  register_estimator,
  spread,
  standardised,
)

_SIGNS = 2**32 - 2  # the random stream of `group_signs`


def group_signs(seed: int, step: int, places: Sequence[int]) -> np.ndarray:
  """Draws +1 or -1 for each group, float32 [P], by the key (seed, step, place in the step)."""
  signs = []
  for place in places:
    # A key of its own for each group: which others are in the batch does not matter.
    bits = np.random.SeedSequence([seed, step, place, _SIGNS]).generate_state(1)[0]
    signs.append(1 if bits & 1 else -1)
  return np.float32(signs)


# --- a placebo ---


def psi_placebo_parts(
  rewards_PG: np.ndarray,
  *,
  signs_P: np.ndarray | None = None,
  zero_test: str = 'group',
  psi_multiplier: float = 1.0,
  psi_when_wrong: str = 'reinforce',
  right_above: float = 0.0,
) -> GroupParts:
  """The parts of `psi_placebo_advantages`, with its options."""
  parts = da_grpo_parts(
    rewards_PG,
    zero_test=zero_test,
    psi_multiplier=psi_multiplier,
    psi_when_wrong=psi_when_wrong,
    right_above=right_above,
  )
  # Nothing falls back to a fixed key: signs that nobody drew are an error.
  if signs_P is None or np.shape(signs_P) != (len(parts.weight_PG),):
    raise ValueError(f'{len(parts.weight_PG)} groups need a sign each, got {signs_P}')
  return parts._replace(weight_PG=parts.weight_PG * np.float32(signs_P)[:, None])


# Options are keyword-only arguments, one each: the registry's contract.
@register_estimator('psi_placebo', uses_entropy=True, parts=psi_placebo_parts)
def psi_placebo_advantages(  # noqa: PLR0913
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  signs_P: np.ndarray | None = None,
  alpha: float = 0.1,
  delta: float = 0.5,
  zero_test: str = 'group',
  psi_multiplier: float = 1.0,
  psi_when_wrong: str = 'reinforce',
  right_above: float = 0.0,
) -> np.ndarray:
  """DA-GRPO with psi of a random sign in each group: of the same size, and 0 in the mean.

  What differs from GRPO under the placebo as well is noise, or what an optimizer makes of noise.

  Args:
    rewards_PG: reward of each rollout.
    entropy_PGT: nats.
    mask_PGT: 1 on response tokens.
    signs_P: of `group_signs`.
    alpha: this and the others are options of `da_grpo_advantages`; 'punish' is not among them.
    delta: bound of psi.
    zero_test: where psi acts.
    psi_multiplier: factor of psi.
    psi_when_wrong: 'reinforce' or 'ignore'.
    right_above: rewards above it count as right.

  Raises:
    ValueError: not as many signs as groups, or an option that means nothing.
  """
  check_scale(alpha, delta)
  if psi_when_wrong not in ('reinforce', 'ignore'):
    raise ValueError(
      f"psi_when_wrong = {psi_when_wrong!r} has no placebo; expected 'reinforce' or 'ignore'"
    )
  rewards_PG, entropy_PGT, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  parts = psi_placebo_parts(
    rewards_PG,
    signs_P=signs_P,
    zero_test=zero_test,
    psi_multiplier=psi_multiplier,
    psi_when_wrong=psi_when_wrong,
    right_above=right_above,
  )
  psi_PGT = np.minimum(alpha * entropy_PGT * mask_PGT, delta)
  return choose(parts, parts.weight_PG[:, :, None] * psi_PGT, mask_PGT)


# --- entropies elsewhere than in silent groups ---


@register_estimator('top_entropy')
def top_entropy_advantages(
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  top_share: float = 0.2,
) -> np.ndarray:
  """GRPO on the tokens of highest entropy alone (Wang et al. 2025, 'Beyond the 80/20 rule').

  A 1[H >= tau], tau the quantile 1 - `top_share` of the entropies of the mini-batch; the others'
  advantages are 0. The divisor of the loss still counts all tokens, which changes its scale only.

  Raises:
    ValueError: a share outside of (0, 1].
  """
  if not 0 < top_share <= 1:
    raise ValueError(f'top_share = {top_share} is outside of (0, 1]')
  rewards_PG, entropy_PGT, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  relative_PGT = spread(standardised(rewards_PG), rewards_PG, mask_PGT)
  used = entropy_PGT[mask_PGT != 0]
  # Episodes may have no response at all.
  threshold = np.quantile(used, 1 - top_share) if used.size else 0
  return np.where(entropy_PGT >= threshold, relative_PGT, np.float32(0))


@register_estimator('entropy_shaped', uses_entropy=True)
def entropy_shaped_advantages(
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  alpha: float = 0.4,
  shaping_kappa: float = 2.0,
) -> np.ndarray:
  """A + min(alpha H, |A| / kappa) (Cheng et al. 2025, 'Reasoning with exploration').

  The bound keeps the sign of A, and leaves silent groups silent: the shape that DA-GRPO takes up
  for A = 0. The paper has alpha 0.4 and kappa 2 for GRPO.

  Raises:
    ValueError: a negative alpha, or kappa not above 1.
  """
  if not (alpha >= 0 and shaping_kappa > 1):
    raise ValueError(
      f'alpha = {alpha} must not be negative, shaping_kappa = {shaping_kappa} must be above 1'
    )
  rewards_PG, entropy_PGT, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  relative_PGT = spread(standardised(rewards_PG), rewards_PG, mask_PGT)
  bonus_PGT = np.minimum(alpha * entropy_PGT, np.abs(relative_PGT) / shaping_kappa)
  return (relative_PGT + bonus_PGT * mask_PGT).astype(np.float32)


# --- other scales of group-relative advantages ---


@register_estimator('ngrpo')
def ngrpo_advantages(
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  virtual_reward: float = 4.0,
) -> np.ndarray:
  """A = (R - mean) / (std + 1e-6) over the group and one virtual rollout (Nan et al. 2025, NGRPO).

  The virtual rollout has the largest reward there is. Groups that are wrong alike get negative
  advantages, groups with that reward throughout none. The deviation has G in its denominator, one
  less than there are rewards. The paper also clips negative advantages tighter than positive ones:
  `rl.clip_low` below `rl.clip_high`.

  Raises:
    ValueError: a reward above the virtual one.
  """
  rewards_PG, _, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  if rewards_PG.max() > virtual_reward:
    raise ValueError(
      f'a reward of {rewards_PG.max()} is above virtual_reward = {virtual_reward}, which is meant '
      'to be the largest there is'
    )
  virtual_P1 = np.full((len(rewards_PG), 1), virtual_reward, np.float32)
  relative_PG = standardised(np.concatenate([rewards_PG, virtual_P1], axis=1))[:, :-1]
  # Not `spread`, which silences groups of equal rewards: these are what NGRPO is about.
  best_P1 = (rewards_PG == virtual_P1).all(axis=1, keepdims=True)
  exact_PG = np.where(best_P1, np.float32(0), relative_PG)
  return exact_PG[:, :, None] * mask_PGT


@register_estimator('max_rl')
def max_rl_advantages(
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  right_above: float = 0.0,
) -> np.ndarray:
  """A = (r - mean) / mean, r = 1[R > right_above] (Tajwar et al. 2026, MaxRL).

  It estimates the gradient of log P(right), cut off at order G, where GRPO's division by the
  deviation has no such meaning. Groups that are wrong throughout get 0.
  """
  rewards_PG, _, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  right_PG = (rewards_PG > right_above).astype(np.float32)
  mean_P1 = right_PG.mean(axis=1, keepdims=True)
  # Nothing is right where the mean is 0, so that the numerator is 0 as well.
  relative_PG = (right_PG - mean_P1) / np.where(mean_P1, mean_P1, np.float32(1))
  return relative_PG[:, :, None] * mask_PGT


@register_estimator('positive_weighted')
def positive_weighted_advantages(
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  positive_weight: float = 0.5,
) -> np.ndarray:
  """GRPO whose positive advantages count `positive_weight` (Jin et al. 2025, arXiv 2511.05993).

  Positive advantages are what entropy collapses by; a weight below 1 holds it up. The weight is
  constant here.

  Raises:
    ValueError: a negative weight.
  """
  if not positive_weight >= 0:
    raise ValueError(f'positive_weight = {positive_weight} must not be negative')
  rewards_PG, _, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  relative_PGT = spread(standardised(rewards_PG), rewards_PG, mask_PGT)
  return np.where(relative_PGT > 0, np.float32(positive_weight) * relative_PGT, relative_PGT)


@register_estimator('self_distillation', uses_teacher=True)
def self_distillation_advantages(
  rewards_PG: np.ndarray, gap_PGT: np.ndarray, mask_PGT: np.ndarray, *, gap_bound: float = 10.0
) -> np.ndarray:
  """A_t = log p_teacher(y_t) - log p_old(y_t), bounded by +-gap_bound (OPSD, SDFT, SDPO).

  On tokens that the policy drew, A grad log p is in the mean -grad KL(policy || teacher) at each
  prefix: the k1 estimate, as an advantage that no gradient flows through. Rewards are not read.

  Args:
    rewards_PG: give the shape alone.
    gap_PGT: the difference of log-probabilities, nats.
    mask_PGT: where there are tokens.
    gap_bound: one token that the teacher finds impossible must not outweigh a batch.
  """
  _, gap_PGT, mask_PGT = checked(rewards_PG, gap_PGT, mask_PGT)
  return np.clip(gap_PGT, -np.float32(gap_bound), np.float32(gap_bound)) * mask_PGT
