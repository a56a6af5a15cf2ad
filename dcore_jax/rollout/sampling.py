"""How a next token is drawn: the rule, the random numbers, and its log-probability.

A token is found by inverting the cumulative distribution on two levels: first a block of the
vocabulary, then a token inside it. That needs two uniform numbers for each lane instead of one
Gumbel number for each vocabulary entry. Truncation (top-k, then top-p, then min-p) finds its
threshold by bisection over the bit patterns of the probabilities, which is exact and does not sort
the vocabulary. Every lane has a rule of its own.

Letters as in passes.py, and C blocks of the vocabulary, E entries of a row that is searched.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Mode = Literal['greedy', 'full', 'truncated']
KEY_IMPL = 'threefry2x32'  # pinned: a rollout must not change with jax's default generator
TOP = 20  # most alternatives that are reported with a token, as many as OpenAI allows
# The bit pattern of 1.0. Probabilities relative to the most likely token lie in [0, 1].
_ONE_BITS = 0x3F800000


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The rule tokens are drawn by, and where a rollout ends.

  Attributes:
    temperature: logits are divided by it; 0 is greedy, which no truncation changes.
    top_p: keeps the fewest most likely tokens that hold this share of what top-k left; 1 keeps all.
    top_k: keeps this many most likely tokens; 0 keeps all.
    max_tokens: tokens to sample at most.
    seed: of the random streams.
    min_p: keeps tokens at least this likely relative to the most likely one; 0 keeps all.
    stop: texts that end a rollout with the token that completes one of them.

  Raises:
    ValueError: a value out of its range.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  max_tokens: int = 512
  seed: int = 0
  min_p: float = 0.0
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    ranges = {
      'temperature': 0 <= self.temperature < math.inf,
      'top_p': 0 < self.top_p <= 1,
      'top_k': self.top_k >= 0,
      'max_tokens': self.max_tokens >= 1,
      'seed': self.seed >= 0,
      'min_p': 0 <= self.min_p <= 1,
      'stop': isinstance(self.stop, tuple)
      and all(isinstance(text, str) and text for text in self.stop),
    }
    for name, valid in ranges.items():
      if not valid:
        raise ValueError(f'sampling: {name} = {getattr(self, name)!r} is out of range')

  @property
  def mode(self) -> Mode:
    """What kind of distribution it draws from."""
    if self.temperature == 0:
      return 'greedy'
    truncates = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
    return 'truncated' if truncates else 'full'

  def rule(self) -> 'Rule':
    """Returns the numbers of one lane: numpy scalars."""
    # Numbers of each lane, as arguments: no rule is compiled in.
    return Rule(
      temperature_B=np.float32(self.temperature),
      top_p_B=np.float32(self.top_p),
      top_k_B=np.int32(self.top_k),
      min_p_B=np.float32(self.min_p),
    )


class Rule(NamedTuple):
  """The lanes' rules as a compiled program takes them: changing the numbers compiles nothing."""

  temperature_B: jax.Array | np.ndarray
  top_p_B: jax.Array | np.ndarray
  top_k_B: jax.Array | np.ndarray  # int32
  min_p_B: jax.Array | np.ndarray


def request_key(seed: int, key_id: Sequence[int]) -> np.ndarray:
  """Returns uint32[2], the random key of one rollout: a hash of (seed, *key_id).

  Raises:
    ValueError: a part of `key_id` outside 0..2^32-1.
  """
  if any(not 0 <= part < 2**32 for part in key_id):
    raise ValueError(f'key_id {tuple(key_id)} has a part outside 0..2^32-1')
  # SeedSequence hashes: keys of neighbouring samples or steps have nothing in common.
  sequence = np.random.SeedSequence(seed, spawn_key=tuple(int(part) for part in key_id))
  return sequence.generate_state(2)


def token_keys(key_B2: jax.Array, index_B: jax.Array) -> jax.Array:
  """Returns typed keys [B]: each lane's key with the index of its next token folded in."""
  # fold_in and not split: the key of a token depends on its index alone, and not on how many draws
  # there were before.
  return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl=KEY_IMPL), index_B)


def uniforms(keys_B: jax.Array) -> jax.Array:
  """Returns float32 [B, 2] in [0, 1): one number for each level of the draw."""
  return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: SamplingParams) -> 'Draw':
  """Draws a token for each lane.

  Args:
    logits_BV: logits, any float type.
    keys_B: typed random keys, one for each draw (`token_keys`).
    sampling: the rule.
  """
  rule = jax.tree.map(lambda number: jnp.full(logits_BV.shape[:1], number), sampling.rule())
  return draw(logits_BV, uniforms(keys_B), rule, jnp.bool_(False))


class Alternatives(NamedTuple):
  """The most likely tokens at a place, the first of equals first.

  Their log-probabilities are those of the policy that drew there (`Draw.logprob_B` where one of
  them was drawn), and -inf for tokens that truncation left out.
  """

  token_BJ: jax.Array | np.ndarray  # int32
  logprob_BJ: jax.Array | np.ndarray  # float32, falling


class Draw(NamedTuple):
  """Tokens, and how likely they were.

  Attributes:
    token_B: int32.
    logprob_B: float32, under the policy that drew: after temperature and truncation, renormalised.
      For greedy lanes this and the next two are of the distribution without a temperature.
    full_logprob_B: float32, before truncation: what a trainer computes at the same temperature.
    entropy_B: float32, nats, before truncation.
    top: alternatives, as many as may be asked for; zeros where none are wanted.
  """

  token_B: jax.Array
  logprob_B: jax.Array
  full_logprob_B: jax.Array
  entropy_B: jax.Array
  top: Alternatives


def draw(logits_BV: jax.Array, uniform_B2: jax.Array, rule: Rule, listing: jax.Array) -> Draw:
  """Draws as `sample` does, with random numbers given, and rules and `listing` as numbers.

  One program serves every rule; work that no lane wants is skipped when it runs. A NaN logit gives
  a NaN log-probability.

  Args:
    logits_BV: logits, any float type.
    uniform_B2: random numbers (`uniforms`).
    rule: of each lane.
    listing: bool [], whether alternatives are wanted; they are zeros where they are not.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  greedy_B = rule.temperature_B == 0
  # Less the maximum, exp cannot overflow, and the most likely token has mass 1 exactly.
  score_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  # A greedy lane has temperature 0, by which nothing can be divided.
  score_BV = score_BV / jnp.where(greedy_B, 1, rule.temperature_B)[:, None]
  full_BV = jnp.exp(score_BV)
  total_B = jnp.sum(full_BV, axis=-1)
  top_p_B = jnp.where(greedy_B, 1.0, rule.top_p_B)
  top_k_B = jnp.where(greedy_B, 0, rule.top_k_B)
  min_p_B = jnp.where(greedy_B, 0.0, rule.min_p_B)
  truncates = jnp.any((top_p_B < 1) | (top_k_B > 0) | (min_p_B > 0))

  def truncated() -> tuple[jax.Array, jax.Array]:
    mass_BV = truncate(full_BV, top_p_B=top_p_B, top_k_B=top_k_B, min_p_B=min_p_B)
    return mass_BV, jnp.sum(mass_BV, axis=-1)

  mass_BV, mass_B = jax.lax.cond(truncates, truncated, lambda: (full_BV, total_B))
  token_B = jax.lax.cond(
    jnp.all(greedy_B),
    lambda: jnp.zeros(len(greedy_B), jnp.int32),
    lambda: _invert(mass_BV, uniform_B2),
  )
  # Scores of at least 0 are those of the most likely tokens. The scan for them is skipped where no
  # lane is greedy.
  token_B = jax.lax.cond(
    jnp.any(greedy_B),
    lambda: jnp.where(greedy_B, _first(score_BV >= 0), token_B),
    lambda: token_B,
  )
  # Log-probabilities come from the scores and not from the masses, whose logarithm would be rounded
  # twice and is -inf where exp underflows.
  score_B = jnp.take_along_axis(score_BV, token_B[:, None], axis=-1)[:, 0]
  full_logprob_B = score_B - jnp.log(total_B)
  # A logit may be -inf, and 0 x -inf is no number.
  weighted_BV = jnp.where(full_BV == 0, 0, full_BV * score_BV)
  count = min(TOP, logits_BV.shape[1])

  def list_likeliest() -> Alternatives:
    # Where tokens are equally likely, top_k gives the first ones, as a greedy draw does.
    kept_BV = jnp.where(mass_BV > 0, score_BV, -jnp.inf)
    score_BJ, token_BJ = jax.lax.top_k(kept_BV, count)
    return Alternatives(token_BJ, score_BJ - jnp.log(mass_B)[:, None])

  return Draw(
    token_B=token_B,
    logprob_B=jnp.where(truncates, score_B - jnp.log(mass_B), full_logprob_B),
    full_logprob_B=full_logprob_B,
    entropy_B=jnp.log(total_B) - jnp.sum(weighted_BV, axis=-1) / total_B,
    top=jax.lax.cond(listing, list_likeliest, lambda: _no_alternatives(len(greedy_B), count)),
  )


def score(logits_BV: jax.Array, target_B: jax.Array) -> Draw:
  """Scores given tokens at temperature 1 without truncation, in the form of a draw.

  Args:
    logits_BV: float32 logits.
    target_B: int32, the tokens.

  Returns:
    `token_B` is the target's rank: 1 where no token is more likely.
  """
  logprob_BV = jax.nn.log_softmax(logits_BV)
  logprob_B = jnp.take_along_axis(logprob_BV, target_B[:, None], axis=-1)[:, 0]
  likelier_B = jnp.sum(logprob_BV > logprob_B[:, None], axis=-1)
  logprob_BJ, token_BJ = jax.lax.top_k(logprob_BV, min(TOP, logits_BV.shape[1]))
  return Draw(
    # Equals count as less likely: the first of the most likely tokens has rank 1.
    token_B=likelier_B.astype(jnp.int32) + 1,
    logprob_B=logprob_B,
    full_logprob_B=logprob_B,
    entropy_B=jnp.zeros_like(logprob_B),
    top=Alternatives(token_BJ, logprob_BJ),
  )


def _no_alternatives(rows: int, count: int) -> Alternatives:
  return Alternatives(
    token_BJ=jnp.zeros((rows, count), jnp.int32), logprob_BJ=jnp.zeros((rows, count), jnp.float32)
  )


def truncate(
  mass_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
  """Zeroes what top-k, then top-p and min-p leave out; tokens as likely as the last one kept stay.

  Args:
    mass_BV: float32 probabilities relative to the most likely token, in [0, 1].
    top_p_B: keep the fewest most likely tokens that hold this share of the mass that top-k left.
    top_k_B: keep this many tokens; 0 keeps all.
    min_p_B: keep tokens with at least this mass.
  """
  vocab = mass_BV.shape[1]
  # Non-negative floats are ordered as their bit patterns are: bisecting the patterns finds the
  # exact threshold.
  bits_BV = jax.lax.bitcast_convert_type(mass_BV, jnp.int32)

  def enough_tokens(threshold_B: jax.Array) -> jax.Array:
    """Whether top_k tokens are at least this likely."""
    return jnp.sum(bits_BV >= threshold_B[:, None], axis=-1) >= top_k_B

  threshold_B = _largest(enough_tokens, (top_k_B > 0) & (top_k_B < vocab))
  kept_BV = jnp.where(bits_BV >= threshold_B[:, None], mass_BV, 0)
  wanted_B = top_p_B * jnp.sum(kept_BV, axis=-1)

  def enough_mass(threshold_B: jax.Array) -> jax.Array:
    """Whether tokens at least this likely hold the wanted mass."""
    return jnp.sum(jnp.where(bits_BV >= threshold_B[:, None], kept_BV, 0), axis=-1) >= wanted_B

  threshold_B = _largest(enough_mass, top_p_B < 1)
  likely_BV = (bits_BV >= threshold_B[:, None]) & (mass_BV >= min_p_B[:, None])
  return jnp.where(likely_BV, kept_BV, 0)


def _largest(holds: Callable[[jax.Array], jax.Array], wanted_B: jax.Array) -> jax.Array:
  """Returns int32 [B]: the largest bit pattern in 0..1.0 that `holds`.

  `holds` is true up to some pattern. Lanes that are not `wanted` get 0.
  """

  def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Halves the interval between a pattern that holds and one that does not."""
    low_B, high_B = bounds
    middle_B = (low_B + high_B + 1) // 2
    true_B = holds(middle_B)
    return jnp.where(true_B, middle_B, low_B), jnp.where(true_B, high_B, middle_B - 1)

  low_B = jnp.zeros(wanted_B.shape, jnp.int32)
  # Where no lane truncates in this way, the scans over the vocabulary are skipped.
  halvings = jnp.where(jnp.any(wanted_B), _ONE_BITS.bit_length(), 0)
  found_B, _ = jax.lax.fori_loop(0, halvings, halve, (low_B, low_B + _ONE_BITS))
  return jnp.where(wanted_B, found_B, 0)


def _invert(mass_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
  """Returns int32 [B]: the token at which the cumulative mass passes the uniform numbers."""
  rows, vocab = mass_BV.shape
  # Blocks about as long as there are blocks: then both levels are equally short.
  size = 2 ** math.ceil(math.log2(vocab) / 2)
  # The padding has no mass, so that no number can select it.
  mass_BCE = jnp.pad(mass_BV, ((0, 0), (0, -vocab % size))).reshape(rows, -1, size)
  block_B = _pass(jnp.sum(mass_BCE, axis=-1), uniform_B2[:, 0])
  mass_BE = jnp.take_along_axis(mass_BCE, block_B[:, None, None], axis=1)[:, 0]
  # NaN logits select the last entry of the last block, which may lie in the padding.
  return jnp.minimum(block_B * size + _pass(mass_BE, uniform_B2[:, 1]), vocab - 1)


def _pass(mass_BE: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """Returns int32 [B]: the first entry with mass whose cumulative mass exceeds the wanted share."""
  cumulative_BE = jnp.cumsum(mass_BE, axis=-1)
  # The total is the largest sum at an entry with mass, so that rounding can never select an entry
  # without any.
  total_B = jnp.max(jnp.where(mass_BE > 0, cumulative_BE, 0), axis=-1)
  return _first((mass_BE > 0) & (cumulative_BE > (uniform_B * total_B)[:, None]))


def _first(flag_BE: jax.Array) -> jax.Array:
  """Returns int32 [B]: the index of the first true flag, or the last index where none is.

  A plain reduction is faster than argmax on a CPU.
  """
  size = flag_BE.shape[-1]
  index_E = jnp.arange(size, dtype=jnp.int32)
  return jnp.minimum(jnp.min(jnp.where(flag_BE, index_E[None], size), axis=-1), size - 1)
