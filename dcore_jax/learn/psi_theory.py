"""What psi does in the mean, computed exactly on the smallest case there is (docs/psi.md).

A prompt has one undecided token. The policy draws action a of K with probability p[a], and after it
the answer is right with probability r[a], so that q = P(right) = sum p r. G rollouts make a group.
Every group that can occur is enumerated, and the project's own estimators and losses say what its
gradient is: no sampling, but for Adam. Letters: P groups, G rollouts of a group, K actions.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.learn import advantages, objectives

GROUP = 8  # the paper's
# Advantages [P, G] of (rewards_PG, drawn actions_PG).
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


# --- rules ---


def of_estimator(name: str, **options: float | str) -> Rule:
  """The rule of a registered estimator, for tokens whose entropy is 1 nat."""
  estimator = advantages.make_estimator(name, options)

  def rule(rewards_PG: np.ndarray, actions_PG: np.ndarray) -> np.ndarray:
    ones_PG1 = np.ones((*rewards_PG.shape, 1))
    return estimator(rewards_PG, ones_PG1, ones_PG1)[:, :, 0]

  return rule


# psi is 1: a constant of the state, as H is.
PUBLISHED = of_estimator('da_grpo', alpha=1.0, delta=1.0)
WRONG_IGNORED = of_estimator('da_grpo', alpha=1.0, delta=1.0, psi_when_wrong='ignore')
GRPO = of_estimator('grpo')


def psi_alone(rule: Rule) -> Rule:
  """The part of a rule that GRPO does not have."""
  return lambda rewards_PG, actions_PG: rule(rewards_PG, actions_PG) - GRPO(rewards_PG, actions_PG)


def placebo(rule: Rule, seed: int = 0) -> Rule:
  """The rule with a random sign for each group: of the same size, and 0 in the mean."""
  rng = np.random.default_rng(seed)

  def signed(rewards_PG: np.ndarray, actions_PG: np.ndarray) -> np.ndarray:
    signs_P1 = rng.choice((-1.0, 1.0), (len(rewards_PG), 1))
    return signs_P1 * rule(rewards_PG, actions_PG)

  return signed


def added(*rules: Rule, weights: Sequence[float]) -> Rule:
  """The weighted sum of rules, such as GRPO and 0.12 psi."""

  def total(rewards_PG: np.ndarray, actions_PG: np.ndarray) -> np.ndarray:
    parts = [rule(rewards_PG, actions_PG) for rule in rules]
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))

  return total


def every_group(rewards_PG: np.ndarray, actions_PG: np.ndarray) -> np.ndarray:
  """psi = 1 whatever the rewards."""
  return np.ones(rewards_PG.shape)


def on_the_word(rewards_PG: np.ndarray, actions_PG: np.ndarray) -> np.ndarray:
  """psi as published where action 0 was drawn, and nowhere else."""
  return psi_alone(PUBLISHED)(rewards_PG, actions_PG) * (actions_PG == 0)


# --- exact means ---


def mean_gradient(
  p: Sequence[float], r: Sequence[float], rule: Rule, group: int = GROUP
) -> np.ndarray:
  """E[(1 / G) sum_i A_i grad log p(a_i)] with respect to the logits of the actions, [K]."""
  weight_P, gradient_PK = _gradients(p, r, rule, group)
  return weight_P @ gradient_PK


def gradient_size(
  p: Sequence[float], r: Sequence[float], rule: Rule, group: int = GROUP
) -> np.ndarray:
  """Root of the mean square of a group's gradient, [K]: its size, whatever its mean is."""
  weight_P, gradient_PK = _gradients(p, r, rule, group)
  return np.sqrt(weight_P @ np.square(gradient_PK))


def _gradients(
  p: Sequence[float], r: Sequence[float], rule: Rule, group: int
) -> tuple[np.ndarray, np.ndarray]:
  """Every group that can occur -> (its probability [P], its gradient [P, K])."""
  p_K = np.asarray(p, float)
  r_K = np.asarray(r, float)
  K = len(p_K)
  cells = [(action, right) for action in range(K) for right in (0, 1)]
  chance = np.array([p_K[a] * (r_K[a] if right else 1 - r_K[a]) for a, right in cells])
  counts = np.array(list(_compositions(group, len(cells))))
  ways = [math.factorial(group) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
  weight_P = np.array(ways) * np.prod(chance**counts, axis=1)
  drawn = np.array([np.repeat(np.arange(len(cells)), row) for row in counts])
  actions_PG = np.array([action for action, _ in cells])[drawn]
  rewards_PG = np.array([right for _, right in cells], float)[drawn]
  # grad log p(a) = e_a - p.
  score_PGK = np.eye(K)[actions_PG] - p_K
  advantages_PG = rule(rewards_PG, actions_PG)
  return weight_P, np.einsum('pg,pgk->pk', advantages_PG, score_PGK) / group


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
  if parts == 1:
    yield (total,)
    return
  for first in range(total + 1):
    for rest in _compositions(total - first, parts - 1):
      yield (first, *rest)


def uniform_factor(q: float, group: int = GROUP) -> float:
  """c(q) = q^(G - 1) - (1 - q)^(G - 1): psi as published moves by psi c(q) grad q."""
  return q ** (group - 1) - (1 - q) ** (group - 1)


def uniform_share(q: float | np.ndarray, group: int = GROUP) -> float | np.ndarray:
  """q^G + (1 - q)^G: the share of groups whose rewards are all equal."""
  return q**group + (1 - q) ** group


def sampled_uniform_share(rewards_PN: np.ndarray, group: int = GROUP) -> np.ndarray:
  """The share of uniform groups among all groups of G that N rollouts of a prompt can make, [P].

  It is an unbiased estimate of the probability that G rollouts have one reward.

  Raises:
    ValueError: fewer rollouts than a group has.
  """
  rewards_PN = np.asarray(rewards_PN, np.float32)
  N = rewards_PN.shape[1]
  if N < group:
    raise ValueError(f'{N} rollouts of a prompt make no group of {group}')
  shares = []
  for rewards_N in rewards_PN:
    _, counts = np.unique(rewards_N, return_counts=True)
    ways = sum(math.comb(int(count), group) for count in counts)
    shares.append(ways / math.comb(N, group))
  return np.array(shares)


def learn(
  p: Sequence[float],
  r: Sequence[float],
  rule: Rule,
  *,
  updates: int,
  rate: float = 0.1,
  runs: int = 64,
  seed: int = 0,
) -> np.ndarray:
  """Trains the undecided token by sampled groups and plain ascent -> q, [runs, updates + 1].

  Every run draws one group an update. The same seed draws the same random numbers for every rule.
  """
  rng = np.random.default_rng(seed)
  r_K = np.asarray(r, float)
  K = len(r_K)
  logits_PK = np.tile(np.log(np.asarray(p, float)), (runs, 1))
  shares = []
  for _ in range(updates + 1):
    p_PK = np.exp(logits_PK - logits_PK.max(axis=1, keepdims=True))
    p_PK /= p_PK.sum(axis=1, keepdims=True)
    shares.append(p_PK @ r_K)
    draws_PG1 = rng.random((runs, GROUP, 1))
    # The last edge is 1 up to rounding, and no draw may pass it.
    actions_PG = (draws_PG1 > np.cumsum(p_PK, axis=1)[:, None, :-1]).sum(axis=2)
    rewards_PG = (rng.random((runs, GROUP)) < r_K[actions_PG]).astype(float)
    score_PGK = np.eye(K)[actions_PG] - p_PK[:, None]
    advantages_PG = rule(rewards_PG, actions_PG)
    logits_PK = logits_PK + rate * np.einsum('pg,pgk->pk', advantages_PG, score_PGK) / GROUP
  return np.stack(shares, axis=1)


def grpo_factor(q: float, group: int = GROUP) -> float:
  """kappa(q): GRPO moves by kappa(q) grad q."""
  r = (q + 0.01, q - 0.01)
  return float(mean_gradient((0.5, 0.5), r, GRPO, group)[0]) / (0.5 * (r[0] - q))


def uniform_ascent(p: Sequence[float], r: Sequence[float], group: int = GROUP) -> np.ndarray:
  """(1 / G) grad P(all rewards of a group are equal) with respect to the logits, [K].

  P = q^G + (1 - q)^G, and grad q = p (r - q).
  """
  p_K = np.asarray(p, float)
  r_K = np.asarray(r, float)
  q = float(p_K @ r_K)
  return uniform_factor(q, group) * p_K * (r_K - q)


# --- what practice adds ---


def clipped_gradient(old: Sequence[float], now: Sequence[float]) -> np.ndarray:
  """Mean gradient of psi = 1 in a later mini-batch, through the project's clipped loss, [K].

  Actions are drawn from the old policy; the present one has moved.
  """
  old_K = jnp.asarray(old)

  def gain(logits_K: jax.Array) -> jax.Array:
    values = {'advantage': jnp.ones_like(old_K), 'old_logp': jnp.log(old_K)}
    loss_K, _ = objectives.ppo_loss(jax.nn.log_softmax(logits_K), values)
    return -jnp.sum(old_K * loss_K)

  return np.asarray(jax.grad(gain)(jnp.log(jnp.asarray(now))))


def length_bias(long: int, short: int, sequences: int, aggregation: str, p: float = 0.2) -> float:
  """Mean gradient of psi = 1 towards the longer of two continuations, by p (1 - p).

  Its scale is that of the mean length, so that -0.6 means: 60 % of the size of one token's own
  gradient, towards the shorter one. `aggregation` is 'token', 'sequence' or 'dr'.
  """
  mean_length = p * long + (1 - p) * short
  total = 0.0
  for n in range(sequences + 1):
    chance = math.comb(sequences, n) * p**n * (1 - p) ** (sequences - n)
    # Of n sequences that took the long way each has the score 1 - p, of the others -p.
    up, down = n * (1 - p), (sequences - n) * p
    if aggregation == 'token':
      gradient = (up - down) / (n * long + (sequences - n) * short)
    elif aggregation == 'sequence':
      gradient = (up / long - down / short) / sequences
    else:
      gradient = (up - down) / sequences
    total += chance * gradient
  return total * mean_length / (p * (1 - p))


def adam_drift(
  p: float, updates: int, runs: int = 4000, seed: int = 0, group: int = GROUP
) -> tuple[float, float]:
  """Mean step of Adam on the logit of a token of probability p, in learning rates an update.

  The policy is held fixed, all groups are uniform and psi is 1, so that gradients have mean 0.

  Returns:
    (mean, its standard error over `runs` runs).
  """
  rng = np.random.default_rng(seed)
  # The moments' rates are those of `optimizer.make_optimizer`.
  first = np.zeros(runs)
  second = np.zeros(runs)
  moved = np.zeros(runs)
  for update in range(1, updates + 1):
    gradient = rng.binomial(group, p, runs) / group - p
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    moved += first / (1 - 0.9**update) / (np.sqrt(second / (1 - 0.999**update)) + 1e-8)
  steps = moved / updates
  return float(steps.mean()), float(steps.std() / math.sqrt(runs))


def entropy_change(p: Sequence[float], step: float = 1.0, group: int = GROUP) -> float:
  """E[change of H] by one step of size `step` on psi = 1, two actions, all groups uniform."""
  p_K = np.asarray(p, float)
  changes = 0.0
  for n in range(group + 1):
    chance = math.comb(group, n) * p_K[0] ** n * p_K[1] ** (group - n)
    moved_K = p_K * np.exp(step * (np.array([n, group - n]) / group - p_K))
    changes += chance * (_entropy(moved_K / moved_K.sum()) - _entropy(p_K))
  return changes


def _entropy(p_K: np.ndarray) -> float:
  return float(-(p_K * np.log(p_K)).sum())


def kl_pushes() -> dict[str, dict[str, float]]:
  """Where the two KL terms push mass: on likely others, on unlikely tokens, on ids without one.

  The distribution is .97 on one token and .0015 on each of 20 others; the 640 ids are the
  organism's, 60 of them without a token.
  """
  p_V = np.full(640, 1e-9)
  p_V[0] = 0.97
  p_V[1:21] = 0.0015
  p_V /= p_V.sum()
  # Minus the gradients with respect to the logits.
  pushes = {
    'KL(uniform || policy)': 1 / 640 - p_V,
    'KL(policy || uniform)': -p_V * (np.log(p_V) + _entropy(p_V)),
  }
  places = {'likely': slice(1, 21), 'unlikely': slice(21, 580), 'no token': slice(580, 640)}
  return {
    name: {place: float(push_V[ids].sum()) for place, ids in places.items()}
    for name, push_V in pushes.items()
  }
