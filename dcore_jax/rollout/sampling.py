"""How a next token is drawn: the rule, the random numbers, and the log-probability under the policy that drew it.

A token is found by inverting the cumulative distribution on two levels (a block of the vocabulary, then a token inside
it), which needs two uniform numbers a lane instead of one Gumbel number a vocabulary entry. Truncation (top-k, then
top-p) finds its threshold by bisection over the bit patterns of the probabilities: exact, and without sorting the
vocabulary.
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
_ONE_BITS = 0x3F800000  # the bit pattern of 1.0: probabilities relative to the most likely token lie in [0, 1]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The rule tokens are drawn by. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 truncate nothing; top-k acts
  before top-p.

  Raises:
    ValueError: a value out of its range.
  """
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  max_tokens: int = 512
  seed: int = 0

  def __post_init__(self):
    ranges = {'temperature': 0 <= self.temperature < math.inf, 'top_p': 0 < self.top_p <= 1, 'top_k': self.top_k >= 0,
              'max_tokens': self.max_tokens >= 1, 'seed': self.seed >= 0}
    for name, valid in ranges.items():
      if not valid:
        raise ValueError(f'sampling: {name} = {getattr(self, name)} is out of range')

  @property
  def mode(self) -> Mode:
    """Which program draws: the only part of the rule that is compiled in."""
    if self.temperature == 0:
      return 'greedy'
    return 'truncated' if self.top_p < 1 or self.top_k > 0 else 'full'

  def rule(self) -> 'Rule':
    return Rule(np.float32(self.temperature), np.float32(self.top_p), np.int32(self.top_k))


class Rule(NamedTuple):
  """The numbers of a rule as scalars that a compiled program takes: changing them compiles nothing."""
  temperature: jax.Array | np.float32
  top_p: jax.Array | np.float32
  top_k: jax.Array | np.int32


def request_key(seed: int, key_id: Sequence[int]) -> np.ndarray:
  """uint32[2], the random key of one rollout: a hash of (seed, *key_id).

  Raises:
    ValueError: a part of `key_id` outside 0..2^32-1.
  """
  if any(not 0 <= part < 2**32 for part in key_id):
    raise ValueError(f'key_id {tuple(key_id)} has a part outside 0..2^32-1')
  return np.random.SeedSequence(seed, spawn_key=tuple(int(part) for part in key_id)).generate_state(2)


def token_keys(key_B2: jax.Array, index_B: jax.Array) -> jax.Array:
  """Typed keys [B]: each lane's key with the index of the token to be drawn folded in."""
  return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl=KEY_IMPL), index_B)


def uniforms(keys_B: jax.Array) -> jax.Array:
  """float32 [B, 2] in [0, 1): one number for each level of the draw."""
  return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: SamplingParams) -> tuple[jax.Array, jax.Array]:
  """Draws a token a lane.

  Args:
    logits_BV: logits, any float type.
    keys_B: typed random keys, one for each draw (`token_keys`).
    sampling: the rule.

  Returns:
    (token_B int32, logprob_B float32): log-probabilities of the behaviour policy, that is after temperature and
    truncation, renormalised; for greedy decoding those of the untempered distribution.
  """
  return draw(logits_BV, uniforms(keys_B), sampling.rule(), sampling.mode)


def draw(logits_BV: jax.Array, uniform_B2: jax.Array, rule: Rule, mode: Mode) -> tuple[jax.Array, jax.Array]:
  """`sample` with random numbers given (`uniforms`) and the rule's traced; a NaN logit gives a NaN log-probability."""
  logits_BV = logits_BV.astype(jnp.float32)
  score_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  if mode == 'greedy':
    token_B = _first(score_BV >= 0)
    mass_BV = jnp.exp(score_BV)
  else:
    score_BV = score_BV / rule.temperature
    mass_BV = jnp.exp(score_BV)
    if mode == 'truncated':
      mass_BV = truncate(mass_BV, rule.top_p, rule.top_k)
    token_B = _invert(mass_BV, uniform_B2)
  score_B = jnp.take_along_axis(score_BV, token_B[:, None], axis=-1)[:, 0]
  return token_B, score_B - jnp.log(jnp.sum(mass_BV, axis=-1))


def truncate(mass_BV: jax.Array, top_p: jax.Array | float, top_k: jax.Array | int) -> jax.Array:
  """Zeroes what top-k, then top-p over the rest, leave out. Tokens as likely as the last one kept are kept too.

  Args:
    mass_BV: float32 probabilities relative to the most likely token, in [0, 1].
    top_p: keep the fewest most likely tokens that hold this share of the mass.
    top_k: keep this many tokens; 0 keeps all.
  """
  rows, vocab = mass_BV.shape
  # Non-negative floats are ordered as their bit patterns are, so bisecting the patterns finds the exact threshold.
  bits_BV = jax.lax.bitcast_convert_type(mass_BV, jnp.int32)

  def enough_tokens(threshold_B):
    return jnp.sum(bits_BV >= threshold_B[:, None], axis=-1) >= top_k

  threshold_B = _largest(enough_tokens, (top_k > 0) & (top_k < vocab), rows)
  kept_BV = jnp.where(bits_BV >= threshold_B[:, None], mass_BV, 0)
  wanted_B = top_p * jnp.sum(kept_BV, axis=-1)

  def enough_mass(threshold_B):
    return jnp.sum(jnp.where(bits_BV >= threshold_B[:, None], kept_BV, 0), axis=-1) >= wanted_B

  threshold_B = _largest(enough_mass, top_p < 1, rows)
  return jnp.where(bits_BV >= threshold_B[:, None], kept_BV, 0)


def _largest(holds: Callable[[jax.Array], jax.Array], wanted: jax.Array | bool, rows: int) -> jax.Array:
  """int32 [rows]: the largest bit pattern in 0..1.0 that `holds` (true up to some pattern); 0 if not `wanted`."""
  def halve(_, bounds):
    low_B, high_B = bounds
    middle_B = (low_B + high_B + 1) // 2
    true_B = holds(middle_B)
    return jnp.where(true_B, middle_B, low_B), jnp.where(true_B, high_B, middle_B - 1)
  low_B = jnp.zeros(rows, jnp.int32)
  halvings = jnp.where(wanted, _ONE_BITS.bit_length(), 0)
  return jax.lax.fori_loop(0, halvings, halve, (low_B, low_B + _ONE_BITS))[0]


def _invert(mass_BV: jax.Array, uniform_B2: jax.Array) -> jax.Array:
  """int32 [B]: where the cumulative mass passes the uniform numbers: first the block, then the token in it."""
  rows, vocab = mass_BV.shape
  width = 2 ** math.ceil(math.log2(vocab) / 2)  # about the square root: both levels are equally short
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
