"""Policy objectives: what a step minimises, as pure jax functions of the log-probabilities of loss
tokens.

An objective gives a loss a token, before weights; `PolicyLoss` adds importance weights, the KL
terms and the aggregation, and hands out sums over tokens that whoever adds them up divides once, so
that a result depends neither on micro-batches nor on the chunks of the head. Some objectives need
statistics at the current parameters of more tokens than a chunk holds: those are computed
beforehand, without gradient, and come as one more value a token. Letters: M loss tokens; A
micro-batches of them.

Rollouts that agree are one node of the token tree up to where they part, and a node has a
log-probability of its own and several advantages. A loss that is homogeneous in the advantage,
loss(c A) = c loss(A) for c >= 0, needs of them no more than the sum of the positive and that of the
negative ones: `Objective.merges` declares it, and `PolicyLoss` computes with these two sums.
"""

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.learn import psi
from dcore_jax.learn.advantages import options_of

_LOG_RATIO_BOUND = 20.0  # e^20 = 5e8: beyond, a ratio says nothing and may overflow
_SEQUENCE_LOG_RATIO_BOUND = 10.0  # GSPO's, from above only (docs/method.md, section 3.6)
# The released bound of the KL estimate (docs/method.md, section 3.4).
_KL_BOUND = 10.0

# Per loss token: advantage (or its sides, see `advantage_sides`), old_logp and what else a loss
# asks for: ref_logp, behaviour_logp, sequence (its number), sequence_weight (see `aggregate`),
# updated (1 where updates lie between the old policy and the present one), uniform (1 in a group
# whose rewards are all equal); with psi in the step, in place of advantages what `psi` makes them
# of.
Values = Mapping[str, jax.Array]

# What `advantage_sides` splits an advantage into.
SIDES = frozenset({'advantage_up', 'advantage_down', 'share_up', 'share_down'})


class Objective(NamedTuple):
  """A loss and the statistic that it needs.

  Attributes:
    loss: (logp_M, values, **options) -> (loss_M, clipped_M); clipped_M is 1 where a ratio was cut.
    statistic: (logp, weight, values, **options) -> a constant for each token, of the same shape. It
      comes to the loss as a value that is called as this function.
    scope: what the statistic is of: a micro-batch, which holds whole sequences, or the mini-batch.
    needs: values that a batch must bring, beside `advantage` and `old_logp`.
    merges: loss_M is homogeneous in the advantage, and clipped_M depends on its sign alone. Tokens
      of the same prefix may then be one loss token; what the loss reads beside the advantage must
      be the same for all of them, as log-probabilities are.
  """

  loss: Callable[..., tuple[jax.Array, jax.Array]]
  statistic: Callable[..., jax.Array] | None = None
  scope: Literal['micro-batch', 'mini-batch'] | None = None
  needs: frozenset[str] = frozenset()
  merges: bool = False


OBJECTIVES: dict[str, Objective] = {}


def register_objective(
  name: str,
  *,
  statistic: Callable[..., jax.Array] | None = None,
  scope: Literal['micro-batch', 'mini-batch'] | None = None,
  needs: frozenset[str] = frozenset(),
  merges: bool = False,
) -> Callable[[Callable], Callable]:
  """Returns a decorator that makes a loss known as `name`, also from outside this package.

  Args:
    name: what `rl.objective` is set to.
    statistic: see `Objective`, as the others.
    scope: given with a statistic and only then.
    needs: values that a batch must bring.
    merges: off where nobody has shown it to hold, as unmerged tokens are right for every loss.

  Options of the loss and of the statistic are keyword-only arguments: those that `PolicyLoss` has
  as fields get its values, the others keep their defaults.

  Raises:
    ValueError: another loss has this name, one of `statistic` and `scope` is missing, or a loss
      with a statistic is said to merge.
  """
  # A statistic without a scope would be computed nowhere, and the loss would miss its value.
  if (statistic is None) != (scope is None):
    raise ValueError(f'objective {name!r}: a statistic and its scope belong together')

  # A statistic is of single tokens, or of one sequence's.
  if merges and statistic:
    raise ValueError(f'objective {name!r} has a statistic, so that its tokens cannot be merged')

  def register(loss: Callable) -> Callable:
    # The same function may be registered again; another one would replace it unseen.
    if name in OBJECTIVES and OBJECTIVES[name].loss is not loss:
      raise ValueError(f'an objective {name!r} is registered already')
    OBJECTIVES[name] = Objective(
      loss=loss, statistic=statistic, scope=scope, needs=needs, merges=merges
    )
    return loss

  return register


# --- statistics -----------------------------------------------------------------------------------


def sequence_log_ratio(logp: jax.Array, weight: jax.Array, values: Values) -> jax.Array:
  """Computes the mean of logp - old_logp over the loss tokens of each token's sequence.

  `values['sequence']` numbers the sequences.
  """
  # Padding has weight 0 and is no part of any sequence.
  return _sequence_mean(logp - values['old_logp'], weight != 0, values['sequence'])


def high_covariance(
  logp: jax.Array, weight: jax.Array, values: Values, *, cov_share: float = 0.002
) -> jax.Array:
  """Marks with 1 the tokens with the largest (A - mean A)(logp - mean logp), others with 0.

  They are the share `cov_share` of the loss tokens, at least one. Of equal ones the earlier count.
  """
  # The covariance is over the tokens of all micro-batches, so that they are laid end to end.
  used = weight.reshape(-1) != 0
  count = jnp.maximum(jnp.sum(used), 1)

  def centre(x):
    return jnp.where(used, x.reshape(-1) - jnp.sum(jnp.where(used, x.reshape(-1), 0)) / count, 0)

  # Unused places sort last.
  covariance = jnp.where(used, centre(values['advantage']) * centre(logp), -jnp.inf)
  order = jnp.argsort(covariance, descending=True, stable=True)
  # The number of tokens is known on the device only, so that a mask takes the place of a slice.
  chosen = jnp.arange(used.size) < jnp.maximum(jnp.floor(count * cov_share), 1)
  return jnp.zeros(used.size, jnp.float32).at[order].set(chosen & used[order]).reshape(logp.shape)


def _sequence_sum(x: jax.Array, sequence: jax.Array) -> jax.Array:
  """Sums by sequence number -> [number of tokens].

  The result has a constant shape: there cannot be more sequences than tokens.
  """
  return jax.ops.segment_sum(x.reshape(-1), sequence.reshape(-1), num_segments=sequence.size)


def _sequence_mean(x: jax.Array, used: jax.Array, sequence: jax.Array) -> jax.Array:
  total = _sequence_sum(jnp.where(used, x, 0), sequence)
  count = _sequence_sum(used.astype(jnp.float32), sequence)
  # Numbers without a token have count 0, and nobody reads their mean.
  return (total / jnp.maximum(count, 1))[sequence]


# --- objectives -----------------------------------------------------------------------------------


@register_objective('ppo', merges=True)
def ppo_loss(
  logp_M: jax.Array,
  values: Values,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float = 3.0,
) -> tuple[jax.Array, jax.Array]:
  """PPO's pessimistic loss with dual clip (Schulman et al. 2017; Ye et al. 2020).

  r = exp(logp - old_logp), the log ratio bounded by 20; loss = max(-A r, -A clip(r, 1 - clip_low, 1
  + clip_high)), and for A < 0 at most -A dual_clip (docs/method.md, section 3.4).
  """
  advantage_M = values['advantage']
  loss_M, clipped_M = _pessimistic(_ratio(logp_M, values), advantage_M, clip_low, clip_high)
  # Where the advantage is negative a ratio may grow without bound, and the loss with it.
  capped_M = jnp.minimum(loss_M, -advantage_M * dual_clip)
  return jnp.where(advantage_M < 0, capped_M, loss_M), clipped_M


@register_objective(
  'gspo',
  statistic=sequence_log_ratio,
  scope='micro-batch',
  needs=frozenset({'sequence'}),
)
def gspo_loss(
  logp_M: jax.Array, values: Values, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[jax.Array, jax.Array]:
  """GSPO's token form (Zheng et al. 2025): PPO's loss with the ratio s pi / sg(pi).

  s = exp(mean over the sequence of logp - old_logp) comes as `sequence_log_ratio`. Usual clips are
  3e-4 and 4e-4, and aggregation is by sequence.
  """
  # The value is that of the sequence's ratio, the gradient that of the token.
  log_ratio_M = values['sequence_log_ratio'] + logp_M - jax.lax.stop_gradient(logp_M)
  ratio_M = jnp.exp(jnp.minimum(log_ratio_M, _SEQUENCE_LOG_RATIO_BOUND))
  return _pessimistic(ratio_M, values['advantage'], clip_low, clip_high)


@register_objective(
  'kl_cov',
  statistic=high_covariance,
  scope='mini-batch',
  needs=frozenset({'updated'}),
)
def kl_cov_loss(
  logp_M: jax.Array, values: Values, *, cov_penalty: float = 0.1
) -> tuple[jax.Array, jax.Array]:
  """KL-Cov (Cui et al. 2025): -A r without a clip, and a penalty on the tokens of high covariance.

  The penalty is cov_penalty |logp - old_logp| where the statistic `high_covariance` is 1.
  These few tokens, whose probability and advantage rise together, account for most of the loss of
  entropy. On the first update of a rollout batch, where `updated` is 0, policy and old policy are
  one and the penalty is off: what differs there is the rounding of two passes, of which |.| would
  make a gradient of size cov_penalty and random sign.
  """
  held_M = values['high_covariance'] * values['updated']
  gap_M = logp_M - values['old_logp']
  # jnp.abs has slope 1 at 0, where this has slope 0.
  distance_M = jnp.sign(gap_M) * gap_M
  return -values['advantage'] * _ratio(logp_M, values) + cov_penalty * held_M * distance_M, held_M


@register_objective('cispo', merges=True)
def cispo_loss(
  logp_M: jax.Array, values: Values, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[jax.Array, jax.Array]:
  """CISPO (MiniMax-M1, 2025): -sg(clip(r)) A logp.

  A clipped ratio scales a token's gradient and never silences it.
  """
  # The ratio is a constant weight here; the gradient comes from logp alone.
  ratio_M = jax.lax.stop_gradient(_ratio(logp_M, values))
  bounded_M = jnp.clip(ratio_M, 1 - clip_low, 1 + clip_high)
  return -bounded_M * values['advantage'] * logp_M, (bounded_M != ratio_M).astype(jnp.float32)


def _ratio(logp_M: jax.Array, values: Values) -> jax.Array:
  # Bounded before exp: beyond the bound a float32 ratio may overflow to infinity.
  return jnp.exp(jnp.clip(logp_M - values['old_logp'], -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND))


def _pessimistic(
  ratio_M: jax.Array, advantage_M: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
  plain_M = -advantage_M * ratio_M
  # The larger loss of the two: a ratio may not earn more by leaving its range.
  clipped_M = -advantage_M * jnp.clip(ratio_M, 1 - clip_low, 1 + clip_high)
  return jnp.maximum(plain_M, clipped_M), (clipped_M > plain_M).astype(jnp.float32)


# --- terms beside the objective -------------------------------------------------------------------


def kl_estimate(logp_M: jax.Array, ref_logp_M: jax.Array, kind: str = 'k3') -> jax.Array:
  """Estimates KL(policy || reference) on each token (Schulman 2020).

  d = ref - logp is bounded by +-20 and the estimate by +-10: one token that the reference finds
  nearly impossible must not outweigh a batch.

  k1 = -d, unbiased, but as a loss its expected gradient is 0; k2 = d^2 / 2, whose gradient is the
  KL's; k3 = exp(d) - d - 1, never negative and of small variance (the paper's).
  """
  d_M = jnp.clip(ref_logp_M - logp_M, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
  if kind == 'k1':
    estimate_M = -d_M
  elif kind == 'k2':
    estimate_M = 0.5 * jnp.square(d_M)
  elif kind == 'k3':
    estimate_M = jnp.exp(d_M) - d_M - 1
  else:
    raise ValueError(f"unknown kind {kind!r}; expected 'k1', 'k2' or 'k3'")
  # Both bounds are the released ones. Outside them the gradient is 0.
  return jnp.clip(estimate_M, -_KL_BOUND, _KL_BOUND)


def importance_weights(old_logp_M: jax.Array, behaviour_logp_M: jax.Array, cap: float) -> jax.Array:
  """Computes min(pi_old / mu, cap): truncated importance sampling (Yao et al. 2025).

  It corrects for rollouts that another engine drew from a slightly different policy mu.
  """
  # Log-probabilities of two engines may differ by far on tokens that one of them finds impossible.
  gap_M = jnp.clip(old_logp_M - behaviour_logp_M, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
  return jnp.minimum(jnp.exp(gap_M), cap)


def aggregate(
  weight: jax.Array, sequence_weight: jax.Array | None, how: str, max_tokens: int
) -> tuple[jax.Array, jax.Array]:
  """Aggregates a mini-batch -> (weights of the loss tokens, divisor of their weighted sum).

  'token': the mean over tokens, as released. 'sequence': the mean over sequences of their token
  means, as printed in the paper. 'dr': the sum over tokens by the number of sequences x
  `max_tokens`, which no length biases (Dr. GRPO). `sequence_weight`, which 'token' does not need,
  is a token's share of its sequence, summed over the sequences that share the token.
  """
  # The divisor is that of the whole mini-batch: micro-batches of other sizes change nothing.
  if how == 'token':
    return weight, jnp.sum(weight)
  # The shares of each sequence sum to 1, so that all of them sum to the number of sequences.
  sequences = jnp.sum(sequence_weight)
  if how == 'sequence':
    return sequence_weight, sequences
  return weight, sequences * max_tokens


def check_extras(extras: Mapping[str, Any], needed: Set[str]) -> None:
  """Raises ValueError that names the values which a batch should have brought."""
  missing = needed - extras.keys()
  if missing:
    raise ValueError(f'the batch lacks the extras {sorted(missing)}')


def advantage_sides(advantage: np.ndarray) -> dict[str, np.ndarray]:
  """Splits advantages by their sign, float32 arrays of the same shape.

  advantage_up is max(A, 0), advantage_down max(-A, 0); share_up is 1 where A > 0, share_down where
  A < 0. Means of these over the rollouts of a node, unlike those of A itself, say what a loss that
  merges is there, and its share of clipped tokens.
  """
  return {
    'advantage_up': np.maximum(advantage, 0).astype(np.float32),
    'advantage_down': np.maximum(-advantage, 0).astype(np.float32),
    'share_up': (advantage > 0).astype(np.float32),
    'share_down': (advantage < 0).astype(np.float32),
  }


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
  """What a step minimises; hashable. Fields are config fields of section `rl` by the same names.

  Attributes:
    objective: a name of OBJECTIVES.
    clip_low: the ratio counts as at least 1 - clip_low.
    clip_high: it counts as at most 1 + clip_high.
    dual_clip: of `ppo_loss`.
    cov_share: of `high_covariance`.
    cov_penalty: of `kl_cov_loss`.
    aggregation: 'token', 'sequence' or 'dr', see `aggregate`.
    max_tokens: of a response, for 'dr'.
    kl_coefficient: of the KL to the reference policy; 0 needs none.
    kl_estimator: 'k1', 'k2' or 'k3'.
    uniform_kl: coefficient of KL(uniform || policy) on the tokens of groups whose rewards are all
      equal, where psi acts; both may act together. It pushes mass to all ids of the vocabulary
      alike, whatever they mean.
    entropy_bonus: coefficient of -H, the entropy of the present policy, with its exact gradient. It
      is that of KL(policy || uniform) = log V - H, which pushes mass to what is nearly as likely.
    entropy_bonus_on: 'all' tokens, or those of 'uniform' groups.
    importance_cap: > 0 weighs tokens by `importance_weights`.
    entropy_of: whose entropy psi is made of in the step: 'old' is the policy that sampled, as
      published; 'current' the policy that is updated. '': the batch brings whole advantages.

  Raises:
    ValueError: naming a field with a value that means nothing.
  """

  objective: str = 'ppo'
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 3.0
  cov_share: float = 0.002
  cov_penalty: float = 0.1
  aggregation: str = 'token'
  max_tokens: int = 4096
  kl_coefficient: float = 0.0
  kl_estimator: str = 'k3'
  uniform_kl: float = 0.0
  entropy_bonus: float = 0.0
  entropy_bonus_on: str = 'all'
  importance_cap: float = 0.0
  entropy_of: str = ''

  def __post_init__(self):
    _check_name('objective', self.objective, tuple(OBJECTIVES))
    _check_name('aggregation', self.aggregation, ('token', 'sequence', 'dr'))
    _check_name('kl_estimator', self.kl_estimator, ('k1', 'k2', 'k3'))
    _check_name('entropy_bonus_on', self.entropy_bonus_on, ('all', 'uniform'))
    _check_name('entropy_of', self.entropy_of, ('', 'old', 'current'))
    # Checked alike: no number of the loss may be negative, infinite or NaN.
    numbers = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.type in (int, float)
    }
    wrong = {
      name: value for name, value in numbers.items() if not (np.isfinite(value) and value >= 0)
    }
    if wrong:
      raise ValueError(f'fields of the loss must be finite and not negative: {wrong}')
    if self.dual_clip <= 1:
      raise ValueError(
        f'dual_clip = {self.dual_clip} must exceed 1, '
        'or it would hold back ratios that did not move'
      )

  @property
  def extras(self) -> frozenset[str]:
    """Values a batch must bring for each loss token."""
    # Only what the loss reads is put on the tree: each value is an array of the size of the batch.
    names = {'old_logp', *OBJECTIVES[self.objective].needs}
    if not self.entropy_of:
      names |= SIDES if self.merges else {'advantage'}
    else:
      names |= SIDES | psi.SIDES if self.merges else psi.OF_ROLLOUT
    if self.entropy_of == 'old':
      names.add('entropy')
    if self.kl_coefficient:
      # A reference policy costs a forward pass of each batch, which runs without the KL need not
      # make.
      names.add('ref_logp')
    if self.importance_cap:
      names.add('behaviour_logp')
    if self.uniform_kl or (self.entropy_bonus and self.entropy_bonus_on == 'uniform'):
      names.add('uniform')
    if self.aggregation != 'token':
      names.add('sequence_weight')
    return frozenset(names)

  @property
  def merges(self) -> bool:
    """Whether tokens of the same prefix may be one loss token of several rollouts.

    The objective decides alone: all terms beside it are linear in weights, whose sums are exact.
    """
    return OBJECTIVES[self.objective].merges

  @property
  def scope(self) -> str | None:
    """What the objective's statistic is of; None where it needs none."""
    return OBJECTIVES[self.objective].scope

  def with_statistic(
    self, logp: jax.Array, weight: jax.Array, values: Values, entropy: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    """Adds the objective's statistic to `values`.

    It is computed from log-probabilities [M] or [A, M] of the current parameters, and from their
    entropies where psi is made of these.
    """
    function = OBJECTIVES[self.objective].statistic
    read = self._with_advantage(values, entropy)
    statistic = function(logp, weight, read, **self._options(function))
    # The name of the function is the contract between a statistic and the loss that reads it.
    return {**values, function.__name__: jax.lax.stop_gradient(statistic)}

  def sums(
    self, logp_M: jax.Array, entropy_M: jax.Array, weight_M: jax.Array, values: Values
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums over tokens by their weights -> (loss, parts).

    Clip_share, entropy and importance are means over tokens: they are summed by
    values['token_weight'] where the aggregation has turned the weights into shares of a sequence.
    Of KL(uniform || policy) = -logp - gap it has the first half; `grpo` adds the gap, which depends
    on hidden states.
    """
    pg_M, clipped_M = self._objective(logp_M, self._with_advantage(values, entropy_M))

    # Sums and not means: they are added over chunks and micro-batches, and divided once.
    def summed(x_M):
      return jnp.sum(weight_M * x_M)

    def counted(x_M):
      return jnp.sum(values.get('token_weight', weight_M) * x_M)

    sums = {'clip_share': counted(clipped_M), 'entropy': counted(entropy_M)}
    if self.importance_cap:
      importance_M = importance_weights(
        values['old_logp'], values['behaviour_logp'], self.importance_cap
      )
      sums['importance'] = counted(importance_M)
      # The weights are constants: neither log-probability in them is the current policy's.
      pg_M *= importance_M
    loss = summed(pg_M)
    sums['pg_loss'] = loss
    if self.kl_coefficient:
      # The KL is in the loss and not in the reward (docs/method.md, section 3.4).
      sums['kl'] = summed(kl_estimate(logp_M, values['ref_logp'], self.kl_estimator))
      loss += self.kl_coefficient * sums['kl']
    if self.uniform_kl:
      sums['uniform_kl'] = -summed(values['uniform'] * logp_M)
      loss += self.uniform_kl * sums['uniform_kl']
    if self.entropy_bonus:
      bonus_M = entropy_M * values['uniform'] if self.entropy_bonus_on == 'uniform' else entropy_M
      sums['entropy_bonus'] = summed(bonus_M)
      loss -= self.entropy_bonus * sums['entropy_bonus']
    return loss, sums

  def _with_advantage(self, values: Values, entropy: jax.Array | None) -> Values:
    """The values with the advantage that the objective reads, where the step makes it."""
    if not self.entropy_of:
      return values
    if self.entropy_of == 'old':
      entropy = values['entropy']
    return psi.with_advantage(values, entropy, merged=self.merges)

  def _objective(self, logp_M: jax.Array, values: Values) -> tuple[jax.Array, jax.Array]:
    """(loss, share of it that is clipped) of the objective, each a mean over a token's rollouts."""
    function = OBJECTIVES[self.objective].loss
    options = self._options(function)
    if not self.merges:
      return function(logp_M, values, **options)

    def at(advantage: float) -> tuple[jax.Array, jax.Array]:
      same_M = jnp.full_like(logp_M, advantage)
      return function(logp_M, {**values, 'advantage': same_M}, **options)

    # By homogeneity the loss at A is |A| times that at its sign. Three evaluations cost a few
    # operations a token, where its logits took a product with the whole vocabulary.
    up_M, clipped_up_M = at(1.0)
    down_M, clipped_down_M = at(-1.0)
    _, clipped_zero_M = at(0.0)
    share_zero_M = 1 - values['share_up'] - values['share_down']
    return (
      values['advantage_up'] * up_M + values['advantage_down'] * down_M,
      values['share_up'] * clipped_up_M
      + values['share_down'] * clipped_down_M
      + share_zero_M * clipped_zero_M,
    )

  def _options(self, function: Callable[..., Any]) -> dict[str, Any]:
    # A function from outside may have options of its own, which keep their defaults.
    return {name: getattr(self, name) for name in options_of(function) if hasattr(self, name)}


def _check_name(field: str, name: str, known: tuple[str, ...]) -> None:
  # The config names these, so that a misspelt one is a person's mistake.
  if name not in known:
    raise ValueError(f'unknown {field} {name!r}; expected one of {known}')
