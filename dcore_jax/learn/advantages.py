"""Advantages: how much better than expected a token was (docs/method.md, sections 3.3 and 3.6).

Pure numpy on the host, where rewards and entropies of the old policy live; nothing differentiates
through them. `learn.psi` makes DA-GRPO's inside of the compiled step: what is here is then what it
is compared with, and what metrics of psi read.

An estimator is a function (rewards_PG, entropy_PGT, mask_PGT, *, options) ->
advantages_PGT: the reward of each rollout, the entropy in nats of the old policy's distribution
that produced each token, and a mask that is 1 on response tokens. The result is float32, and 0
outside the mask. Its options are keyword-only arguments with defaults. `register_estimator` enters
it under a name that `rl.estimator` may then have, also from outside this package.

All estimators here raise ValueError for shapes that disagree, an empty group, or values that are
not finite. Letters: P prompts, G rollouts of a prompt, T response tokens of a rollout.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_EPSILON = np.float32(1e-6)  # added to the standard deviation, as the released code does
_ZETA = np.float32(1e-8)  # the paper's threshold below which an advantage vanishes, D-CORE, eq. 6

Estimator = Callable[..., np.ndarray]
# Open registries: a config file may import a module that adds to them.
ADVANTAGES: dict[str, Estimator] = {}
_USE_ENTROPY: set[str] = set()
_USE_TEACHER: set[str] = set()


class GroupParts(NamedTuple):
  """What an estimator with psi says of rollouts before it looks at their tokens, each [P, G].

  The advantage of a token is where(zero, weight min(alpha H, delta), relative).

  Attributes:
    relative_PG: group-relative advantages, float32.
    zero_PG: bool, where psi takes their place.
    weight_PG: factor of psi, float32.
  """

  relative_PG: np.ndarray
  zero_PG: np.ndarray
  weight_PG: np.ndarray


_PARTS: dict[str, Callable[..., GroupParts]] = {}


def register_estimator(
  name: str,
  *,
  uses_entropy: bool = False,
  uses_teacher: bool = False,
  parts: Callable[..., GroupParts] | None = None,
) -> Callable[[Estimator], Estimator]:
  """Returns a decorator that makes an estimator known as `name`.

  Args:
    name: what `rl.estimator` is set to.
    uses_entropy: whether the result has a part that comes from entropies (psi). The loop then
      measures the gradient norm of that part, and may adapt `rl.alpha` to it.
    uses_teacher: whether it reads, in the place of entropies, by how much the teacher finds each
      token more likely than the policy that drew it (nats).
    parts: (rewards_PG, **options) -> `GroupParts`, from which the compiled step makes the same
      advantages. Without it they are made on the host.

  Raises:
    ValueError: another function has this name.
  """

  def register(function: Estimator) -> Estimator:
    # The same function may be registered again; another one would replace it unseen. A cell of a
    # notebook that is run again defines its function anew.
    known = ADVANTAGES.get(name, function)
    rewritten = known.__module__ == function.__module__ == '__main__'
    if known is not function and not rewritten:
      raise ValueError(f'an advantage estimator {name!r} is registered already')
    ADVANTAGES[name] = function
    # What an earlier definition declared holds no longer.
    _USE_ENTROPY.discard(name)
    _PARTS.pop(name, None)
    # The loop measures psi's part of the gradient for these alone: it costs a backward pass.
    if uses_entropy:
      _USE_ENTROPY.add(name)
    if uses_teacher:
      _USE_TEACHER.add(name)
    if parts is not None:
      _PARTS[name] = parts
    return function

  return register


def options_of(function: Callable[..., Any]) -> tuple[str, ...]:
  """Names of the keyword-only arguments."""
  names = []
  for name, parameter in inspect.signature(function).parameters.items():
    # Positional arguments are the data, keyword-only ones the options.
    if parameter.kind is parameter.KEYWORD_ONLY:
      names.append(name)
  return tuple(names)


def make_estimator(name: str, options: Mapping[str, Any]) -> Estimator:
  """Binds those of the options that the estimator takes; the others of its own keep their defaults.

  Raises:
    ValueError: no estimator has this name.
  """
  # The names are listed, since a forgotten import looks like a misspelt name.
  if name not in ADVANTAGES:
    raise ValueError(f'unknown estimator {name!r}; expected one of {sorted(ADVANTAGES)}')
  function = ADVANTAGES[name]
  # Options of other estimators are there too, and one that the section lacks is not.
  taken = {option: options[option] for option in options_of(function) if option in options}
  return functools.partial(function, **taken)


def make_parts(name: str, options: Mapping[str, Any]) -> Callable[[np.ndarray], GroupParts] | None:
  """Binds options as `make_estimator` does -> rewards_PG -> parts; None where there are none.

  `psi_when_wrong = 'punish'` has none: psi then depends on the rollout's other tokens.
  """
  function = _PARTS.get(name)
  if function is None or options.get('psi_when_wrong') == 'punish':
    return None
  taken = {option: options[option] for option in options_of(function) if option in options}
  return functools.partial(function, **taken)


def uses_entropy(name: str) -> bool:
  """Tells whether the estimator's result has a part that comes from entropies, psi."""
  return name in _USE_ENTROPY


def uses_teacher(name: str) -> bool:
  """Tells whether the estimator reads a teacher's log-probabilities."""
  return name in _USE_TEACHER


# --- estimators that read rewards alone ---


@register_estimator('grpo')
def grpo_advantages(
  rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """A = (R - mean) / (std + 1e-6) over the group, std with ddof 1 (D-CORE, eq. 2)."""
  rewards_PG, _, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  return spread(standardised(rewards_PG), rewards_PG, mask_PGT)


@register_estimator('dr_grpo')
def dr_grpo_advantages(
  rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """A = R - mean, without the division (Liu et al. 2025, Dr. GRPO).

  Dividing by the deviation favours groups whose rewards hardly differ.
  """
  rewards_PG, _, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  return spread(_centred(rewards_PG), rewards_PG, mask_PGT)


@register_estimator('rloo')
def rloo_advantages(
  rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """A = R - mean of the group's other rollouts = (R - mean) G / (G - 1) (Ahmadian et al. 2024)."""
  rewards_PG, _, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  # The group's mean includes the rollout itself; the factor makes it the mean of the others.
  G = rewards_PG.shape[1]
  return spread(_centred(rewards_PG) * np.float32(G / max(1, G - 1)), rewards_PG, mask_PGT)


# --- estimators with the entropy where rewards say nothing ---


def da_grpo_parts(
  rewards_PG: np.ndarray,
  *,
  zero_test: str = 'group',
  psi_multiplier: float = 1.0,
  psi_when_wrong: str = 'reinforce',
  right_above: float = 0.0,
) -> GroupParts:
  """The parts of `da_grpo_advantages`, with its options.

  Wrong rollouts have no weight unless they are reinforced.
  """
  rewards_PG = np.asarray(rewards_PG, np.float32)
  relative_PG, zero_PG = _zero_advantages(rewards_PG, zero_test)
  weight_PG = np.full(rewards_PG.shape, psi_multiplier, np.float32)
  if psi_when_wrong != 'reinforce':
    # 'ignore' leaves wrong rollouts without a gradient, as in GRPO.
    weight_PG = np.where(rewards_PG > right_above, weight_PG, np.float32(0))
  return GroupParts(relative_PG=relative_PG, zero_PG=zero_PG, weight_PG=weight_PG)


def check_scale(alpha: float, delta: float) -> None:
  """Raises ValueError for a weight or a bound of psi that is negative or no number."""
  # Written so that NaN is refused as well.
  if not (alpha >= 0 and delta >= 0):
    raise ValueError(f'alpha = {alpha} and delta = {delta} must not be negative')


# Options are keyword-only arguments, one each: the registry's contract.
@register_estimator('da_grpo', uses_entropy=True, parts=da_grpo_parts)
def da_grpo_advantages(  # noqa: PLR0913
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
  """Diversity-aware GRPO: psi = min(alpha H, delta) replaces vanished advantages (D-CORE, eq. 6-8).

  Args:
    rewards_PG: reward of each rollout.
    entropy_PGT: H, nats.
    mask_PGT: 1 on response tokens.
    alpha: weight of the entropy.
    delta: upper bound of psi.
    zero_test: where psi acts. 'group': on groups whose rewards are all equal, the paper's intent.
      'token': wherever the float32 advantage is exactly 0, as released; that adds rollouts at their
      group's mean, and misses groups whose mean rounds (eight rewards of 3.590909 give 0.3158).
      'below': wherever A < 1e-8, which is eq. 6 to the letter; that overwrites every negative
      advantage too.
    psi_multiplier: 1 as published; 2 as released, where an aliased tensor receives psi twice.
    psi_when_wrong: what happens to rollouts with a reward of at most `right_above` where psi acts.
      'reinforce': psi whatever the reward, as published. 'ignore': 0. 'punish': psi minus the
      rollout's largest psi, which is never positive, at least -delta, and closest to 0 on the least
      certain tokens.
    right_above: rewards above it count as right; the released RL-ZVP has 0 (the reward named
      'paper' is never negative).

  Raises:
    ValueError: an option that means nothing.
  """
  check_scale(alpha, delta)
  if psi_when_wrong not in ('reinforce', 'ignore', 'punish'):
    raise ValueError(
      f"unknown psi_when_wrong {psi_when_wrong!r}; expected 'reinforce', 'ignore' or 'punish'"
    )
  rewards_PG, entropy_PGT, mask_PGT = checked(rewards_PG, entropy_PGT, mask_PGT)
  parts = da_grpo_parts(
    rewards_PG,
    zero_test=zero_test,
    psi_multiplier=psi_multiplier,
    psi_when_wrong=psi_when_wrong,
    right_above=right_above,
  )
  # Eq. 7: the bound keeps single tokens of high entropy from dominating an update.
  psi_PGT = np.minimum(alpha * entropy_PGT * mask_PGT, delta)
  weighted_PGT = parts.weight_PG[:, :, None] * psi_PGT
  if psi_when_wrong == 'punish':
    # The maximum is over the rollout, so that its least certain token is not punished.
    wrong_PGT = psi_PGT - psi_PGT.max(axis=2, keepdims=True, initial=0)
    right_PG1 = rewards_PG[:, :, None] > right_above
    weighted_PGT = np.where(right_PG1, weighted_PGT, psi_multiplier * wrong_PGT)
  return choose(parts, weighted_PGT, mask_PGT)


def choose(parts: GroupParts, psi_PGT: np.ndarray, mask_PGT: np.ndarray) -> np.ndarray:
  """where(zero, psi, relative) on the tokens of the mask, float32 [P, G, T]."""
  # psi replaces the advantage and is never added to it: the two are not on one scale.
  chosen_PGT = np.where(parts.zero_PG[:, :, None], psi_PGT, parts.relative_PG[:, :, None])
  return (chosen_PGT * mask_PGT).astype(np.float32)


@register_estimator('rl_zvp', uses_entropy=True)
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
  """RL with zero-variance prompts (Le et al. 2025; docs/method.md, section 3.6).

  Where the advantage vanishes, a right rollout gets alpha H and a wrong one alpha (H - max H of the
  rollout): DA-GRPO without a cap, with `psi_when_wrong = 'punish'`. The options are those of
  `da_grpo_advantages`.
  """
  return da_grpo_advantages(
    rewards_PG,
    entropy_PGT,
    mask_PGT,
    alpha=alpha,
    # RL-ZVP has no cap.
    delta=np.inf,
    zero_test=zero_test,
    psi_multiplier=psi_multiplier,
    psi_when_wrong='punish',
    right_above=right_above,
  )


def psi_part(
  estimator: Estimator, advantages_PGT: np.ndarray, rewards_PG: np.ndarray, mask_PGT: np.ndarray
) -> np.ndarray:
  """What entropies contributed to an estimator's result [P, G, T].

  It is the difference to the result without them, exactly and not up to rounding: where psi acts it
  replaces the group-relative advantage.
  """
  # With entropies of 0 psi is 0 and all else is equal, whatever options the estimator has.
  return advantages_PGT - estimator(rewards_PG, np.zeros_like(advantages_PGT), mask_PGT)


def token_advantages(
  estimator: Estimator,
  rewards_PG: np.ndarray,
  entropies: Sequence[np.ndarray],
  psi_tokens: Sequence[np.ndarray] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Advantages of rollouts of unequal length, and the part of them that psi is.

  Args:
    estimator: one of `ADVANTAGES` with its options bound.
    rewards_PG: reward of each rollout.
    entropies: nats, an array for each rollout, prompt by prompt: rollout g of prompt p is number
      p x G + g.
    psi_tokens: bool arrays of the same lengths; tokens where they are False get no psi.

  Returns:
    (advantages, psi), float32 arrays of the same lengths as the entropies.

  Raises:
    ValueError: the rewards do not number the rollouts.
  """
  rewards_PG = np.asarray(rewards_PG)
  # numpy would reshape a wrong number of rows into other groups, if it divides.
  if rewards_PG.size != len(entropies):
    raise ValueError(f'{rewards_PG.size} rewards for {len(entropies)} rollouts')
  shape = rewards_PG.shape
  # The mask keeps padding out of the result.
  mask_PGT = _pad_groups([np.ones(len(entropy), bool) for entropy in entropies], shape)
  advantages_PGT = estimator(rewards_PG, _pad_groups(entropies, shape), mask_PGT)
  psi_PGT = psi_part(estimator, advantages_PGT, rewards_PG, mask_PGT)
  if psi_tokens is not None:
    # Relative advantages stay: only the part that psi is is taken away again.
    left_out_PGT = np.where(_pad_groups(psi_tokens, shape), np.float32(0), psi_PGT)
    advantages_PGT = advantages_PGT - left_out_PGT
    psi_PGT = psi_PGT - left_out_PGT
  lengths = [len(entropy) for entropy in entropies]
  return _cut_groups(advantages_PGT, lengths), _cut_groups(psi_PGT, lengths)


def _pad_groups(rows: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """Rollouts of unequal length -> [P, G, T], filled up with 0."""
  # Padding is only host memory: nothing of this shape goes to a device.
  longest = max(map(len, rows))
  padded = [np.pad(row, (0, longest - len(row))) for row in rows]
  return np.stack(padded).reshape(*shape, longest)


def _cut_groups(values_PGT: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
  """The inverse of `_pad_groups`."""
  rows = values_PGT.reshape(-1, values_PGT.shape[-1])
  return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def adapted_alpha(
  alpha: float,
  measured: float,
  target: float,
  *,
  rate: float = 0.1,
  low: float = 0.01,
  high: float = 1.0,
) -> float:
  """The next alpha of a controller that holds a measure at its target.

  Alpha grows while the measure is below the target: its logarithm moves by `rate` times the
  relative error, which counts as at most 1 either way. Alpha is the controller's whole state.

  Args:
    alpha: the present one.
    measured: what a larger alpha is taken to raise, e.g. the policy's entropy (nats a token) or
      reflections of a response. A value that is not finite changes nothing.
    target: what the measure is to be.
    rate: of the logarithm, a step.
    low: least alpha.
    high: largest alpha.

  Raises:
    ValueError: a target, rate or bounds that cannot work.
  """
  if not (target > 0 and rate > 0 and 0 < low <= high):
    raise ValueError(
      f'target = {target}, rate = {rate} and bounds {low}..{high} must be positive and in order'
    )
  # A skipped step has no measure, and must not end the controller.
  if not np.isfinite(measured):
    return alpha
  # The bound on the error keeps one odd measurement from moving alpha by more than `rate`.
  error = np.clip((target - measured) / target, -1, 1)
  return float(np.clip(alpha * np.exp(rate * error), low, high))


def word_tokens(pieces: Sequence[str], words: Sequence[str]) -> np.ndarray:
  """Marks the tokens, given as their texts, that hold a part of one of the words -> bool [n].

  Words are found as substrings in any case (docs/method.md, section 3.7), also across tokens.

  Raises:
    ValueError: an empty word, which would be everywhere.
  """
  if not all(words):
    raise ValueError(f'an empty word is everywhere: {list(words)}')
  # Lowered piece by piece, because lower() may change the length of a text.
  lowered = [piece.lower() for piece in pieces]
  text = ''.join(lowered)
  sizes = np.array([len(piece) for piece in lowered], np.int64)
  ends = np.cumsum(sizes)
  # Token i is covered by the sum of change[: i + 1] many words.
  change = np.zeros(len(pieces) + 1, np.int64)
  for word in map(str.lower, words):
    start = text.find(word)
    while start >= 0:
      # The tokens that hold the word's first and last character.
      first, last = np.searchsorted(ends, [start, start + len(word) - 1], side='right')
      change[first] += 1
      change[last + 1] -= 1
      start = text.find(word, start + len(word))
  # A token without text, such as a special one, holds no part of a word.
  return (np.cumsum(change[:-1]) > 0) & (sizes > 0)


# --- rewards, before the advantage ---


def overlong_penalty(
  lengths: np.ndarray, *, max_tokens: int, buffer: int, penalty: float = 1.0
) -> np.ndarray:
  """What DAPO adds to the reward of a long response (Yu et al. 2025, eq. 13).

  0 up to max_tokens - buffer tokens, from there falling linearly to -penalty at max_tokens, and
  -penalty beyond. Float64, shaped like `lengths`.
  """
  if not 0 < buffer <= max_tokens:
    raise ValueError(f'buffer = {buffer} is outside 1..{max_tokens}, the longest response')
  # The released DAPO run has max_tokens 4,096 and buffer 1,024 (docs/method.md, section 3.6).
  excess = np.asarray(lengths, np.float64) - (max_tokens - buffer)
  return -penalty * np.clip(excess / buffer, 0, 1)


def select_groups(rewards_PG: np.ndarray, wanted: int, *, uniform_share: float = 0.0) -> np.ndarray:
  """DAPO's dynamic sampling: ascending indices of the first groups that are worth training on.

  Fewer than `wanted` call for more prompts. Groups of equal rewards, from which GRPO learns
  nothing, fill at most `uniform_share` of the batch: 0 is DAPO, 1 takes all as they come, and
  values between keep some groups for the psi of DA-GRPO.
  """
  if not 0 <= uniform_share <= 1:
    raise ValueError(f'uniform_share = {uniform_share} is a share, 0..1')
  uniform_P = uniform_groups(rewards_PG)[:, 0]
  # Uniform groups are taken in order until their room is used up.
  room = int(uniform_share * wanted)
  return np.flatnonzero(~uniform_P | (np.cumsum(uniform_P) <= room))[:wanted]


def uniform_groups(rewards_PG: np.ndarray) -> np.ndarray:
  """[P, 1] bool: all rewards of the group are equal, in float32.

  A rollout alone in its group counts when its reward, which then is its advantage, is 0. Sampling,
  metrics and estimators all ask here, and advantages are made from float32 rewards: rewards that
  differ in float64 alone must not be a group with variance to the one and without to the other.
  """
  rewards_PG = np.asarray(rewards_PG, np.float32)
  if rewards_PG.shape[1] == 1:
    return rewards_PG == 0
  # Exact equality: a tolerance on rewards or advantages would depend on their scale.
  return (rewards_PG == rewards_PG[:, :1]).all(axis=1, keepdims=True)


# --- parts of the estimators ---


def checked(
  rewards_PG: np.ndarray, entropy_PGT: np.ndarray, mask_PGT: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The arguments of an estimator as float32, or ValueError."""
  rewards_PG = np.asarray(rewards_PG, np.float32)
  entropy_PGT = np.asarray(entropy_PGT, np.float32)
  mask_PGT = np.asarray(mask_PGT, np.float32)
  if rewards_PG.ndim != 2 or not rewards_PG.size:
    raise ValueError(
      f'rewards have shape {rewards_PG.shape}, expected [prompts, rollouts] with no empty group'
    )
  same_groups = mask_PGT.ndim == 3 and mask_PGT.shape[:2] == rewards_PG.shape
  if not same_groups or entropy_PGT.shape != mask_PGT.shape:
    raise ValueError(
      f'rewards {rewards_PG.shape}, entropies {entropy_PGT.shape} and '
      f'mask {mask_PGT.shape} disagree'
    )
  # One NaN would become the advantage of its whole group.
  if not np.isfinite(rewards_PG).all():
    raise ValueError('rewards are not finite')
  if not np.isfinite(entropy_PGT).all():
    raise ValueError('entropies are not finite')
  return rewards_PG, entropy_PGT, mask_PGT


def _centred(rewards_PG: np.ndarray) -> np.ndarray:
  """R - mean. A rollout alone in its group has mean 0 and deviation 1 by convention."""
  G = rewards_PG.shape[1]
  if G == 1:
    return rewards_PG
  # In float32 torch sums a group from left to right; numpy's pairwise sum rounds differently.
  total_P1 = np.add.accumulate(rewards_PG, axis=1)[:, -1:]
  return rewards_PG - total_P1 / np.float32(G)


def standardised(rewards_PG: np.ndarray) -> np.ndarray:
  """(R - mean) / (std + 1e-6)."""
  centred_PG = _centred(rewards_PG)
  G = rewards_PG.shape[1]
  if G == 1:
    # The convention of the released code: mean 0 and deviation 1 (docs/method.md, section 3.3).
    return centred_PG / (1 + _EPSILON)
  variance_P1 = np.square(centred_PG).sum(axis=1, keepdims=True, dtype=np.float64) / (G - 1)
  return centred_PG / (np.sqrt(variance_P1).astype(np.float32) + _EPSILON)


def spread(relative_PG: np.ndarray, rewards_PG: np.ndarray, mask_PGT: np.ndarray) -> np.ndarray:
  """Gives all tokens of a rollout its advantage -> [P, G, T].

  Groups of equal rewards get exactly 0, whatever their mean rounds to.
  """
  # Float noise would give such a group advantages of up to 0.32 (docs/method.md, section 3.3).
  exact_PG = np.where(uniform_groups(rewards_PG), np.float32(0), relative_PG)
  return exact_PG[:, :, None] * mask_PGT


def _zero_advantages(rewards_PG: np.ndarray, zero_test: str) -> tuple[np.ndarray, np.ndarray]:
  """(group-relative advantage, where psi replaces it), both [P, G]."""
  relative_PG = standardised(rewards_PG)
  if zero_test == 'group':
    return relative_PG, np.broadcast_to(uniform_groups(rewards_PG), rewards_PG.shape)
  if zero_test == 'token':
    return relative_PG, relative_PG == 0
  if zero_test == 'below':
    return relative_PG, relative_PG < _ZETA
  raise ValueError(f"unknown zero_test {zero_test!r}; expected 'group', 'token' or 'below'")
