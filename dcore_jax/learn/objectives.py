"""Advantages and policy objectives: pure functions of arrays.

Advantages are numpy on the host, where rewards and old entropies live; nothing differentiates through them.
Objectives are jax and return (sum over tokens, sum of weights) pairs that are divided once, by whoever adds them up.
Letters: P prompts, G rollouts of a prompt's group, T response tokens, M loss tokens.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_EPSILON = np.float32(1e-6)  # beside the standard deviation
_LOG_RATIO_BOUND = 20.0  # e^20 = 5e8: beyond, a ratio says nothing and may overflow
_KL_BOUND = 10.0

Pair = tuple[jax.Array, jax.Array]


class Advantages(NamedTuple):
  """Per-token advantages [P, G, T], float32, 0 outside the mask.

  `psi` is the entropy-driven part of `total`: where it is not 0 the group-relative part is 0.
  """
  total: np.ndarray
  psi: np.ndarray


ADVANTAGES: dict[str, Callable[..., Advantages]] = {}


def _register(name: str) -> Callable:
  def add(function: Callable[..., Advantages]) -> Callable[..., Advantages]:
    ADVANTAGES[name] = function
    return function
  return add


@_register('grpo')
def grpo_advantages(rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray) -> Advantages:
  """A = (R - mean) / (std + 1e-6) over the group, std with ddof 1 (paper eq. 2; method 3.3). Entropies are not used."""
  rewards_PG, entropy_PGT, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  relative_PG = np.where(_uniform(rewards_PG), 0, _standardised(rewards_PG)).astype(np.float32)
  return Advantages(relative_PG[:, :, None] * mask_PGT, np.zeros_like(mask_PGT))


@_register('dr_grpo')
def dr_grpo_advantages(rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray) -> Advantages:
  """A = R - mean, without the division that favours groups of little variance (Liu et al. 2025, Dr. GRPO)."""
  rewards_PG, entropy_PGT, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  mean_P1 = _mean(rewards_PG) if rewards_PG.shape[1] > 1 else np.float32(0)
  relative_PG = np.where(_uniform(rewards_PG), 0, rewards_PG - mean_P1).astype(np.float32)
  return Advantages(relative_PG[:, :, None] * mask_PGT, np.zeros_like(mask_PGT))


@_register('da_grpo')
def da_grpo_advantages(rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray, *, alpha: float = 0.1,
                       delta: float = 0.5, zero_test: str = 'group', psi_multiplier: float = 1.0) -> Advantages:
  """Diversity-aware GRPO: where the group-relative advantage vanishes, psi = min(alpha H, delta) replaces it (eq. 6-8).

  Args:
    rewards_PG: one reward per rollout.
    entropy_PGT: entropies (nats) of the old policy's distribution that produced each token.
    mask_PGT: 1 on response tokens.
    alpha: weight of the entropy.
    delta: cap of psi.
    zero_test: 'group': psi on groups whose rewards are all equal, the paper's intent. 'token': wherever the float32
      advantage is exactly 0, as released; that adds rollouts at their group's mean, and misses groups whose mean rounds
      (eight rewards of 3.590909 give 0.3158).
    psi_multiplier: 1 as published; 2 as released, where an aliased tensor receives psi twice.

  Raises:
    ValueError: shapes that disagree, an empty group, or values that are not finite.
  """
  if not (alpha >= 0 and delta >= 0):
    raise ValueError(f'alpha = {alpha} and delta = {delta} must not be negative')
  rewards_PG, entropy_PGT, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  relative_PG, zero_PG = _zero_advantages(rewards_PG, zero_test)
  psi_PGT = psi_multiplier * np.minimum(alpha * entropy_PGT, delta) * zero_PG[:, :, None] * mask_PGT
  return _combined(relative_PG, psi_PGT, mask_PGT)


@_register('rl_zvp')
def rl_zvp_advantages(rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray, *, alpha: float = 0.1,
                      zero_test: str = 'group', psi_multiplier: float = 1.0) -> Advantages:
  """RL with zero-variance prompts (Le et al. 2025; method 3.6): a sign-aware psi.

  Where the advantage vanishes: alpha H for a reward above 0, else alpha (H - max H of the rollout), which is never
  positive. Arguments as for `da_grpo_advantages`.
  """
  rewards_PG, entropy_PGT, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  relative_PG, zero_PG = _zero_advantages(rewards_PG, zero_test)
  entropy_PGT = entropy_PGT * mask_PGT
  highest_PG1 = entropy_PGT.max(axis=2, keepdims=True, initial=0)
  shaped_PGT = np.where(rewards_PG[:, :, None] > 0, entropy_PGT, entropy_PGT - highest_PG1)
  return _combined(relative_PG, psi_multiplier * alpha * shaped_PGT * zero_PG[:, :, None] * mask_PGT, mask_PGT)


def _checked(rewards_PG, entropy_PGT, mask_PGT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  rewards_PG, entropy_PGT, mask_PGT = (np.asarray(array, np.float32) for array in (rewards_PG, entropy_PGT, mask_PGT))
  if rewards_PG.ndim != 2 or not rewards_PG.size:
    raise ValueError(f'rewards have shape {rewards_PG.shape}, expected [prompts, rollouts] with no empty group')
  if mask_PGT.shape[:2] != rewards_PG.shape or mask_PGT.ndim != 3 or entropy_PGT.shape != mask_PGT.shape:
    raise ValueError(f'rewards {rewards_PG.shape}, entropies {entropy_PGT.shape} and mask {mask_PGT.shape} disagree')
  if not np.isfinite(rewards_PG).all():
    raise ValueError('rewards are not finite')
  if not np.isfinite(entropy_PGT).all():
    raise ValueError('entropies are not finite')
  return rewards_PG, entropy_PGT, mask_PGT


def _mean(rewards_PG: np.ndarray) -> np.ndarray:
  """[P, 1], summed in order in float32 as torch does for a group; numpy's pairwise sum rounds differently."""
  return np.add.accumulate(rewards_PG, axis=1)[:, -1:] / np.float32(rewards_PG.shape[1])


def _standardised(rewards_PG: np.ndarray) -> np.ndarray:
  """A rollout alone in its group has mean 0 and deviation 1 by convention."""
  if rewards_PG.shape[1] == 1:
    return rewards_PG / (1 + _EPSILON)
  centred_PG = rewards_PG - _mean(rewards_PG)
  variance_P1 = np.square(centred_PG).sum(axis=1, keepdims=True, dtype=np.float64) / (rewards_PG.shape[1] - 1)
  return centred_PG / (np.sqrt(variance_P1).astype(np.float32) + _EPSILON)


def _uniform(rewards_PG: np.ndarray) -> np.ndarray:
  """[P, 1] bool: all rewards of the group equal. A single rollout counts when its reward, hence its advantage, is 0."""
  if rewards_PG.shape[1] == 1:
    return rewards_PG == 0
  return (rewards_PG == rewards_PG[:, :1]).all(axis=1, keepdims=True)


def _zero_advantages(rewards_PG: np.ndarray, zero_test: str) -> tuple[np.ndarray, np.ndarray]:
  """(group-relative advantage, where it counts as vanished), both [P, G]."""
  relative_PG = _standardised(rewards_PG)
  if zero_test == 'token':
    return relative_PG, relative_PG == 0
  if zero_test == 'group':
    zero_PG = np.broadcast_to(_uniform(rewards_PG), rewards_PG.shape)
    return np.where(zero_PG, np.float32(0), relative_PG), zero_PG
  raise ValueError(f"unknown zero_test {zero_test!r}; expected 'group' or 'token'")


def _combined(relative_PG: np.ndarray, psi_PGT: np.ndarray, mask_PGT: np.ndarray) -> Advantages:
  psi_PGT = psi_PGT.astype(np.float32)
  return Advantages(relative_PG[:, :, None] * mask_PGT + psi_PGT, psi_PGT)


def clipped_objective(logp_M: jax.Array, old_logp_M: jax.Array, advantage_M: jax.Array, weight_M: jax.Array, *,
                      clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 3.0) -> tuple[Pair, Pair]:
  """PPO's pessimistic loss with dual clip -> ((sum, weight) of the loss, (sum, weight) of the clipped tokens' share).

  r = exp(logp - old_logp), the log ratio bounded by 20; loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and
  for A < 0 at most -A dual_clip (Schulman et al. 2017; Ye et al. 2020; method 3.4).
  """
  ratio_M = jnp.exp(jnp.clip(logp_M - old_logp_M, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND))
  plain_M = -advantage_M * ratio_M
  clipped_M = -advantage_M * jnp.clip(ratio_M, 1 - clip_low, 1 + clip_high)
  loss_M = jnp.maximum(plain_M, clipped_M)
  loss_M = jnp.where(advantage_M < 0, jnp.minimum(loss_M, -advantage_M * dual_clip), loss_M)
  total = jnp.sum(weight_M)
  return (jnp.sum(weight_M * loss_M), total), (jnp.sum(weight_M * (clipped_M > plain_M)), total)


def kl_penalty(logp_M: jax.Array, ref_logp_M: jax.Array, weight_M: jax.Array) -> Pair:
  """(sum, weight) of the k3 estimate exp(d) - d - 1, d = ref - logp bounded by 20, k3 by 10 (Schulman 2020)."""
  gap_M = jnp.clip(ref_logp_M - logp_M, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
  k3_M = jnp.clip(jnp.exp(gap_M) - gap_M - 1, -_KL_BOUND, _KL_BOUND)
  return jnp.sum(weight_M * k3_M), jnp.sum(weight_M)
