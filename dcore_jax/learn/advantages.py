"""Advantages: how much better than expected a token was, by estimator name (method 3.3, 3.6).

Pure numpy on the host, where rewards and old entropies live; nothing differentiates through them. Every estimator is
(rewards_PG, entropy_PGT, mask_PGT, **options) -> advantages_PGT: rewards [P, G] of each rollout, entropies (nats) of the
old policy's distribution that produced each token, mask 1 on response tokens; the result is float32, 0 outside the
mask. An estimator's options are its keyword-only arguments, in the config fields of section `rl` by the same names.
All raise ValueError for shapes that disagree, an empty group, or values that are not finite.
Letters: P prompts, G rollouts of a prompt's group, T response tokens.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_EPSILON = np.float32(1e-6)  # beside the standard deviation
_ZETA = np.float32(1e-8)  # the paper's threshold, eq. 6

Estimator = Callable[..., np.ndarray]
ADVANTAGES: dict[str, Estimator] = {}


def _register(name: str) -> Callable[[Estimator], Estimator]:
  def add(function: Estimator) -> Estimator:
    ADVANTAGES[name] = function
    return function

  return add


def options_of(function: Callable[..., Any]) -> tuple[str, ...]:
  """Names of the keyword-only arguments."""
  return tuple(
    name
    for name, kind in inspect.signature(function).parameters.items()
    if kind.kind is kind.KEYWORD_ONLY
  )


def make_estimator(name: str, config: Mapping[str, Any]) -> Estimator:
  """One of `ADVANTAGES` with its options taken from the fields of the same names; ValueError for an unknown name."""
  if name not in ADVANTAGES:
    raise ValueError(f'unknown estimator {name!r}; expected one of {sorted(ADVANTAGES)}')
  return functools.partial(
    ADVANTAGES[name], **{option: config[option] for option in options_of(ADVANTAGES[name])}
  )


def uses_entropy(name: str) -> bool:
  """Whether psi is a part of the estimator's result."""
  return 'alpha' in options_of(ADVANTAGES[name])


# --- from rewards alone ------------------------------------------------------------------------------------------------------


@_register('grpo')
def grpo_advantages(
  rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """A = (R - mean) / (std + 1e-6) over the group, std with ddof 1 (paper eq. 2)."""
  rewards_PG, _, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  return _spread(_standardised(rewards_PG), rewards_PG, mask_PGT)


@_register('dr_grpo')
def dr_grpo_advantages(
  rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """A = R - mean, without the division that favours groups of little variance (Liu et al. 2025, Dr. GRPO)."""
  rewards_PG, _, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  return _spread(_centred(rewards_PG), rewards_PG, mask_PGT)


@_register('rloo')
def rloo_advantages(
  rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """A = R - mean of the group's other rollouts = (R - mean) G / (G - 1) (Ahmadian et al. 2024)."""
  rewards_PG, _, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  G = rewards_PG.shape[1]
  return _spread(_centred(rewards_PG) * np.float32(G / max(1, G - 1)), rewards_PG, mask_PGT)


# --- with the entropy where rewards say nothing ------------------------------------------------------------------------------


@_register('da_grpo')
def da_grpo_advantages(
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  alpha: float = 0.1,
  delta: float = 0.5,
  zero_test: str = 'group',
  psi_multiplier: float = 1.0,
  psi_when_wrong: str = 'reinforce',
  right_above: float = 0.0,
) -> np.ndarray:
  """Diversity-aware GRPO: where the group-relative advantage vanishes, psi = min(alpha H, delta) replaces it (eq. 6-8).

  Args:
    rewards_PG, entropy_PGT, mask_PGT: see the module.
    alpha: weight of the entropy.
    delta: cap of psi.
    zero_test: 'group': psi on groups whose rewards are all equal, the paper's intent. 'token': wherever the float32
      advantage is exactly 0, as released; that adds rollouts at their group's mean, and misses groups whose mean rounds
      (eight rewards of 3.590909 give 0.3158). 'below': wherever A < 1e-8, eq. 6 to the letter; that overwrites every
      negative advantage too.
    psi_multiplier: 1 as published; 2 as released, where an aliased tensor receives psi twice.
    psi_when_wrong: what befalls rollouts with a reward of at most `right_above`. 'reinforce': psi, blind to the reward, as
      published; 'ignore': 0; 'punish': psi less the rollout's largest psi, which is never positive, at least -delta, and
      spares the tokens that were least certain.
    right_above: rewards above it count as right; the released RL-ZVP has 0 (`paper` rewards are never negative).
  """
  if not (alpha >= 0 and delta >= 0):
    raise ValueError(f'alpha = {alpha} and delta = {delta} must not be negative')
  if psi_when_wrong not in ('reinforce', 'ignore', 'punish'):
    raise ValueError(
      f"unknown psi_when_wrong {psi_when_wrong!r}; expected 'reinforce', 'ignore' or 'punish'"
    )
  rewards_PG, entropy_PGT, mask_PGT = _checked(rewards_PG, entropy_PGT, mask_PGT)
  relative_PG, zero_PG = _zero_advantages(rewards_PG, zero_test)
  psi_PGT = np.minimum(alpha * entropy_PGT * mask_PGT, delta)
  if psi_when_wrong != 'reinforce':
    spared_PGT = (
      psi_PGT - psi_PGT.max(axis=2, keepdims=True, initial=0) if psi_when_wrong == 'punish' else 0
    )
    psi_PGT = np.where(rewards_PG[:, :, None] > right_above, psi_PGT, spared_PGT)
  chosen_PGT = np.where(zero_PG[:, :, None], psi_multiplier * psi_PGT, relative_PG[:, :, None])
  return (chosen_PGT * mask_PGT).astype(np.float32)


@_register('rl_zvp')
def rl_zvp_advantages(
  rewards_PG: np.ndarray,
  entropy_PGT: np.ndarray,
  mask_PGT: np.ndarray,
  *,
  alpha: float = 0.1,
  zero_test: str = 'group',
  psi_multiplier: float = 1.0,
  right_above: float = 0.0,
) -> np.ndarray:
  """RL with zero-variance prompts (Le et al. 2025; method 3.6): DA-GRPO without a cap, that punishes.

  Where the advantage vanishes: alpha H of a right rollout, alpha (H - max H of the rollout) of a wrong one. Options as
  for `da_grpo_advantages`.
  """
  return da_grpo_advantages(
    rewards_PG,
    entropy_PGT,
    mask_PGT,
    alpha=alpha,
    delta=np.inf,
    zero_test=zero_test,
    psi_multiplier=psi_multiplier,
    psi_when_wrong='punish',
    right_above=right_above,
  )


def psi_part(
  estimator: Estimator, advantages_PGT: np.ndarray, rewards_PG: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """What entropies contributed to an estimator's result [P, G, T]: the difference to the result without them.

  Exact, not a rounded difference: where psi acts it replaces the group-relative advantage.
  """
  return advantages_PGT - estimator(rewards_PG, np.zeros_like(advantages_PGT), mask_PGT)


def adapted_alpha(
  alpha: float,
  measured: float,
  target: float,
  *,
  rate: float = 0.1,
  low: float = 0.01,
  high: float = 1.0,
) -> float:
  """The next alpha of a controller that holds a measure at its target: alpha grows while the measure is below it.

  The logarithm of alpha moves by `rate` times the relative error, which counts as at most 1 either way; alpha is its whole
  state. Measures: the policy's entropy (nats a token), or psi's share of the gradient norm. One that is not finite changes
  nothing.

  Raises:
    ValueError: a target, rate or bounds that cannot work.
  """
  if not (target > 0 and rate > 0 and 0 < low <= high):
    raise ValueError(
      f'target = {target}, rate = {rate} and bounds {low}..{high} must be positive and in order'
    )
  if not np.isfinite(measured):
    return alpha
  error = np.clip((target - measured) / target, -1, 1)
  return float(np.clip(alpha * np.exp(rate * error), low, high))


def word_tokens(pieces: Sequence[str], words: Sequence[str]) -> np.ndarray:
  """bool [n]: tokens, given as their texts, that hold a part of one of the words (substrings in any case, method 3.7)."""
  if not all(words):
    raise ValueError(f'an empty word is everywhere: {list(words)}')
  lowered = [piece.lower() for piece in pieces]
  text, sizes = ''.join(lowered), np.array([len(piece) for piece in lowered], np.int64)
  ends = np.cumsum(sizes)
  change = np.zeros(len(pieces) + 1, np.int64)
  for word in map(str.lower, words):
    start = text.find(word)
    while start >= 0:
      first, last = np.searchsorted(ends, [start, start + len(word) - 1], side='right')
      change[first] += 1
      change[last + 1] -= 1
      start = text.find(word, start + len(word))
  return (np.cumsum(change[:-1]) > 0) & (sizes > 0)


# --- rewards before the advantage --------------------------------------------------------------------------------------------


def overlong_penalty(
  lengths: np.ndarray, *, max_tokens: int, buffer: int, penalty: float = 1.0
) -> np.ndarray:
  """What DAPO adds to the reward of a long response (Yu et al. 2025, eq. 13): 0 up to max_tokens - buffer tokens, from there
  falling to -penalty at max_tokens and on. Float64, shaped like `lengths`."""
  if not 0 < buffer <= max_tokens:
    raise ValueError(f'buffer = {buffer} is outside 1..{max_tokens}, the longest response')
  excess = np.asarray(lengths, np.float64) - (max_tokens - buffer)
  return -penalty * np.clip(excess / buffer, 0, 1)


def select_groups(rewards_PG: np.ndarray, wanted: int, *, uniform_share: float = 0.0) -> np.ndarray:
  """DAPO's dynamic sampling: indices, in order, of the first groups to train on; fewer than `wanted` call for more prompts.

  Groups of equal rewards, from which GRPO learns nothing, fill at most `uniform_share` of the batch: 0 is DAPO, 1 takes all
  as they come, and between them DA-GRPO keeps some of both.
  """
  if not 0 <= uniform_share <= 1:
    raise ValueError(f'uniform_share = {uniform_share} is a share, 0..1')
  uniform_P = uniform_groups(np.asarray(rewards_PG))[:, 0]
  room = int(uniform_share * wanted)
  return np.flatnonzero(~uniform_P | (np.cumsum(uniform_P) <= room))[:wanted]


# --- pieces ------------------------------------------------------------------------------------------------------------------


def _checked(rewards_PG, entropy_PGT, mask_PGT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  rewards_PG, entropy_PGT, mask_PGT = (
    np.asarray(array, np.float32) for array in (rewards_PG, entropy_PGT, mask_PGT)
  )
  if rewards_PG.ndim != 2 or not rewards_PG.size:
    raise ValueError(
      f'rewards have shape {rewards_PG.shape}, expected [prompts, rollouts] with no empty group'
    )
  if (
    mask_PGT.shape[:2] != rewards_PG.shape
    or mask_PGT.ndim != 3
    or entropy_PGT.shape != mask_PGT.shape
  ):
    raise ValueError(
      f'rewards {rewards_PG.shape}, entropies {entropy_PGT.shape} and mask {mask_PGT.shape} disagree'
    )
  if not np.isfinite(rewards_PG).all():
    raise ValueError('rewards are not finite')
  if not np.isfinite(entropy_PGT).all():
    raise ValueError('entropies are not finite')
  return rewards_PG, entropy_PGT, mask_PGT


def _centred(rewards_PG: np.ndarray) -> np.ndarray:
  """R - mean, summed in order in float32 as torch does for a group; numpy's pairwise sum rounds differently. A rollout alone
  in its group has mean 0 and deviation 1 by convention."""
  if rewards_PG.shape[1] == 1:
    return rewards_PG
  return rewards_PG - np.add.accumulate(rewards_PG, axis=1)[:, -1:] / np.float32(
    rewards_PG.shape[1]
  )


def _standardised(rewards_PG: np.ndarray) -> np.ndarray:
  centred_PG = _centred(rewards_PG)
  if rewards_PG.shape[1] == 1:
    return centred_PG / (1 + _EPSILON)
  variance_P1 = np.square(centred_PG).sum(axis=1, keepdims=True, dtype=np.float64) / (
    rewards_PG.shape[1] - 1
  )
  return centred_PG / (np.sqrt(variance_P1).astype(np.float32) + _EPSILON)


def uniform_groups(rewards_PG: np.ndarray) -> np.ndarray:
  """[P, 1] bool: all rewards of the group are equal. A single rollout counts when its reward, hence its advantage, is 0."""
  if rewards_PG.shape[1] == 1:
    return rewards_PG == 0
  return (rewards_PG == rewards_PG[:, :1]).all(axis=1, keepdims=True)


def _spread(relative_PG: np.ndarray, rewards_PG: np.ndarray, mask_PGT: np.ndarray) -> np.ndarray:
  """One advantage for all tokens of a rollout; exactly 0 in groups whose rewards are equal, whatever the mean rounds to."""
  return np.where(uniform_groups(rewards_PG), np.float32(0), relative_PG)[:, :, None] * mask_PGT


def _zero_advantages(rewards_PG: np.ndarray, zero_test: str) -> tuple[np.ndarray, np.ndarray]:
  """(group-relative advantage, where psi replaces it), both [P, G]."""
  relative_PG = _standardised(rewards_PG)
  if zero_test == 'group':
    return relative_PG, np.broadcast_to(uniform_groups(rewards_PG), rewards_PG.shape)
  if zero_test == 'token':
    return relative_PG, relative_PG == 0
  if zero_test == 'below':
    return relative_PG, relative_PG < _ZETA
  raise ValueError(f"unknown zero_test {zero_test!r}; expected 'group', 'token' or 'below'")
