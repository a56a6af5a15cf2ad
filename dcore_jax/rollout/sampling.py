"""How a next token is drawn: the rule, the random numbers, and the log-probability under the policy that drew it.

A token is found by inverting the cumulative distribution on two levels (a block of the vocabulary, then a token inside
it), which needs two uniform numbers a lane instead of one Gumbel number a vocabulary entry. Truncation (top-k, then
top-p, then min-p) finds its threshold by bisection over the bit patterns of the probabilities: exact, and without sorting
the vocabulary. Every lane has a rule of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Mode = Literal['greedy', 'full', 'truncated']
KEY_IMPL = 'threefry2x32'  # pinned: a rollout must not change with jax's default generator
TOP = 20  # most alternatives that are reported of a token, as many as OpenAI allows
_ONE_BITS = 0x3F800000  # the bit pattern of 1.0: probabilities relative to the most likely token lie in [0, 1]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The rule tokens are drawn by, and where a rollout ends. `temperature` 0 is greedy, which no truncation changes.

  Attributes:
    temperature: logits are divided by it.
    top_p: keeps the fewest most likely tokens that hold this share of what top-k left; 1 keeps all.
    top_k: keeps this many most likely tokens; 0 keeps all.
    min_p: keeps tokens at least this likely relative to the most likely one; 0 keeps all.
    max_tokens: tokens to sample at most.
    seed: of the random streams.
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
    """Which program draws: the only part of the rule that is compiled in. See `widest`."""
    if self.temperature == 0:
      return 'greedy'
    return 'truncated' if self.top_p < 1 or self.top_k > 0 or self.min_p > 0 else 'full'

  def rule(self) -> 'Rule':
    """Of one lane: numpy scalars."""
    return Rule(
      np.float32(self.temperature),
      np.float32(self.top_p),
      np.int32(self.top_k),
      np.float32(self.min_p),
    )


class Rule(NamedTuple):
  """The numbers of the lanes' rules, as a compiled program takes them: changing them compiles nothing."""

  temperature_B: jax.Array | np.ndarray
  top_p_B: jax.Array | np.ndarray
  top_k_B: jax.Array | np.ndarray  # int32
  min_p_B: jax.Array | np.ndarray


_MODES = ('greedy', 'full', 'truncated')  # each draws what those before it do, too


def widest(modes: Iterable[Mode]) -> Mode:
  """The mode that draws for lanes of all these modes together."""
  return max(modes, key=_MODES.index)


def request_key(seed: int, key_id: Sequence[int]) -> np.ndarray:
  """uint32[2], the random key of one rollout: a hash of (seed, *key_id).

  Raises:
    ValueError: a part of `key_id` outside 0..2^32-1.
  """
  if any(not 0 <= part < 2**32 for part in key_id):
    raise ValueError(f'key_id {tuple(key_id)} has a part outside 0..2^32-1')
  return np.random.SeedSequence(seed, spawn_key=tuple(int(part) for part in key_id)).generate_state(
    2
  )


def token_keys(key_B2: jax.Array, index_B: jax.Array) -> jax.Array:
  """Typed keys [B]: each lane's key with the index of the token to be drawn folded in."""
  return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl=KEY_IMPL), index_B)


def uniforms(keys_B: jax.Array) -> jax.Array:
  """float32 [B, 2] in [0, 1): one number for each level of the draw."""
  return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: SamplingParams) -> 'Draw':
  """Draws a token a lane.

  Args:
    logits_BV: logits, any float type.
    keys_B: typed random keys, one for each draw (`token_keys`).
    sampling: the rule.
  """
  rule = jax.tree.map(lambda number: jnp.full(logits_BV.shape[:1], number), sampling.rule())
  return draw(logits_BV, uniforms(keys_B), rule, sampling.mode)


class Alternatives(NamedTuple):
  """The most likely tokens at a place, the first of equals first, with their log-probabilities under the policy that drew there
  (`Draw.logprob_B` where one of them was drawn); -inf for what truncation left out."""

  token_BK: jax.Array | np.ndarray  # int32
  logprob_BK: jax.Array | np.ndarray  # float32, falling


class Draw(NamedTuple):
  """Tokens with their log-probabilities under the policy that drew them (after temperature and truncation, renormalised) and
  before truncation, as a trainer computes them at the same temperature, and the entropy there. Greedy lanes: of the untempered
  distribution."""

  token_B: jax.Array  # int32
  logprob_B: jax.Array  # float32
  full_logprob_B: jax.Array  # float32
  entropy_B: jax.Array  # float32, nats, before truncation
  top: Alternatives | None = None  # where they were asked for


def draw(logits_BV: jax.Array, uniform_B2: jax.Array, rule: Rule, mode: Mode, top: int = 0) -> Draw:
  """`sample` with random numbers given (`uniforms`) and the rules traced, and with `top` alternatives; a NaN logit gives a NaN
  log-probability."""
  logits_BV = logits_BV.astype(jnp.float32)
  score_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  if mode == 'greedy':
    token_B = _first(score_BV >= 0)
    full_BV = mass_BV = jnp.exp(score_BV)
  else:
    greedy_B = rule.temperature_B == 0
    score_BV = score_BV / jnp.where(greedy_B, 1, rule.temperature_B)[:, None]
    full_BV = mass_BV = jnp.exp(score_BV)
    if mode == 'truncated':
      keep = [
        jnp.where(greedy_B, nothing, number) for nothing, number in zip((1.0, 0, 0.0), rule[1:])
      ]
      mass_BV = truncate(full_BV, *keep)
    token_B = _invert(mass_BV, uniform_B2)
    # Scores of at least 0 are those of the most likely tokens. The scan for them is spared where no lane is greedy.
    token_B = jax.lax.cond(
      jnp.any(greedy_B),
      lambda: jnp.where(greedy_B, _first(score_BV >= 0), token_B),
      lambda: token_B,
    )
  score_B = jnp.take_along_axis(score_BV, token_B[:, None], axis=-1)[:, 0]
  total_B = jnp.sum(full_BV, axis=-1)
  full_logprob_B = logprob_B = score_B - jnp.log(total_B)
  mean_score_B = (
    jnp.sum(jnp.where(full_BV == 0, 0, full_BV * score_BV), axis=-1) / total_B
  )  # a logit may be -inf
  entropy_B = jnp.log(total_B) - mean_score_B
  if mode == 'truncated':
    logprob_B = score_B - jnp.log(jnp.sum(mass_BV, axis=-1))
    score_BV = jnp.where(mass_BV > 0, score_BV, -jnp.inf)
  if not top:
    return Draw(token_B, logprob_B, full_logprob_B, entropy_B)
  score_BK, token_BK = jax.lax.top_k(score_BV, top)
  return Draw(
    token_B,
    logprob_B,
    full_logprob_B,
    entropy_B,
    Alternatives(token_BK, score_BK - jnp.log(jnp.sum(mass_BV, axis=-1, keepdims=True))),
  )


def truncate(
  mass_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
  """Zeroes what top-k, then top-p and min-p leave out. Tokens as likely as the last one kept are kept too.

  Args:
    mass_BV: float32 probabilities relative to the most likely token, in [0, 1].
    top_p_B: keep the fewest most likely tokens that hold this share of the mass that top-k left.
    top_k_B: keep this many tokens; 0 keeps all.
    min_p_B: keep tokens with at least this mass.
  """
  vocab = mass_BV.shape[1]
  # Non-negative floats are ordered as their bit patterns are, so bisecting the patterns finds the exact threshold.
  bits_BV = jax.lax.bitcast_convert_type(mass_BV, jnp.int32)

  def enough_tokens(threshold_B):
    return jnp.sum(bits_BV >= threshold_B[:, None], axis=-1) >= top_k_B

  threshold_B = _largest(enough_tokens, (top_k_B > 0) & (top_k_B < vocab))
  kept_BV = jnp.where(bits_BV >= threshold_B[:, None], mass_BV, 0)
  wanted_B = top_p_B * jnp.sum(kept_BV, axis=-1)

  def enough_mass(threshold_B):
    return jnp.sum(jnp.where(bits_BV >= threshold_B[:, None], kept_BV, 0), axis=-1) >= wanted_B

  threshold_B = _largest(enough_mass, top_p_B < 1)
  return jnp.where((bits_BV >= threshold_B[:, None]) & (mass_BV >= min_p_B[:, None]), kept_BV, 0)


def _largest(holds: Callable[[jax.Array], jax.Array], wanted_B: jax.Array) -> jax.Array:
  """int32 [B]: the largest bit pattern in 0..1.0 that `holds` (true up to some pattern); 0 for lanes that are not `wanted`."""

  def halve(_, bounds):
    low_B, high_B = bounds
    middle_B = (low_B + high_B + 1) // 2
    true_B = holds(middle_B)
    return jnp.where(true_B, middle_B, low_B), jnp.where(true_B, high_B, middle_B - 1)

  low_B = jnp.zeros(wanted_B.shape, jnp.int32)
  halvings = jnp.where(jnp.any(wanted_B), _ONE_BITS.bit_length(), 0)
  return jnp.where(
    wanted_B, jax.lax.fori_loop(0, halvings, halve, (low_B, low_B + _ONE_BITS))[0], 0
  )


def _invert(mass_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
  """int32 [B]: where the cumulative mass passes the uniform numbers: first the block, then the token in it."""
  rows, vocab = mass_BV.shape
  width = 2 ** math.ceil(
    math.log2(vocab) / 2
  )  # about the square root: both levels are equally short
  mass_BCW = jnp.pad(mass_BV, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
  block_B = _pass(jnp.sum(mass_BCW, axis=-1), uniform_B2[:, 0])
  mass_BW = jnp.take_along_axis(mass_BCW, block_B[:, None, None], axis=1)[:, 0]
  return jnp.minimum(block_B * width + _pass(mass_BW, uniform_B2[:, 1]), vocab - 1)


def _pass(mass_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """int32 [B]: the first entry with mass whose cumulative mass exceeds `uniform` of the total."""
  cumulative_BN = jnp.cumsum(mass_BN, axis=-1)
  # The total is the largest sum at an entry with mass, so that rounding can never select an entry without any.
  total_B = jnp.max(jnp.where(mass_BN > 0, cumulative_BN, 0), axis=-1)
  return _first((mass_BN > 0) & (cumulative_BN > (uniform_B * total_B)[:, None]))


def _first(flag_BN: jax.Array) -> jax.Array:
  """int32 [B]: index of the first true flag (the last if none is). A plain reduction: faster than argmax on a CPU."""
  size = flag_BN.shape[-1]
  index_N = jnp.arange(size, dtype=jnp.int32)
  return jnp.minimum(jnp.min(jnp.where(flag_BN, index_N[None], size), axis=-1), size - 1)
