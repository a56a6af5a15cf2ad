"""How likely the tokens of a prompt are under the model itself.

A pass of its own, without the engine's trunks: a trunk keeps keys and values, and not the hidden
states that log-probabilities come from. Teachers of a distillation and multiple-choice
benchmarks ask for this.

Letters as in device.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device
from dcore_jax.rollout.lane_table import InFlight
from dcore_jax.rollout.requests import PromptScores
from dcore_jax.rollout.sampling import TOP, Alternatives
from dcore_jax.rollout.sizes import bucket, bucket_ladder

# Tokens. A longer prompt goes through the model in pieces, so that the scores of attention stay
# below 512 x max_len for each head.
_PIECE = 512
# Tokens. Their logits are in memory at once: 64 of a vocabulary of 151,936 are 39 MB.
_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class ScoringShape:
  """What a scoring program is compiled for, beside the length of the prompt.

  Attributes:
    config: the model's configuration.
    top: alternatives to be given with each token; 0 for none.
    placement: how caches are split over a mesh (`device.cache_placement`).
  """

  config: DecoderConfig
  top: int
  placement: NamedSharding | None


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
  """Scores the prompts of rollouts that wait for it.

  Attributes:
    call: runs a device program (the engine counts what it compiles).
    params: the model's parameters.
    config: its configuration.
    max_len: the longest prompt that may come.
    placement: how caches are split over a mesh (`device.cache_placement`).
  """

  call: Callable[..., Any]
  params: decoder.Params
  config: DecoderConfig
  max_len: int
  placement: NamedSharding | None

  def score_first(self, waiting: Sequence[InFlight]) -> int:
    """Scores the first prompt that is not scored, for all rollouts of it that want the same.

    Returns:
      Tokens of that prompt; 0 where no prompt waits for it.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    # One prompt a step, so that scoring a long prompt does not hold up all lanes for several steps.
    first = next((rollout for rollout in waiting if rollout.unscored), None)
    if first is None:
      return 0
    scores = _first_alternatives(self.score(first.prompt, first.prompt_top), first.prompt_top)
    for rollout in waiting:
      same = rollout.unscored and rollout.prompt_top == first.prompt_top
      # The choices of a request share their prompt, which goes through the model once.
      if rollout is first or same and np.array_equal(rollout.prompt, first.prompt):
        rollout.prompt_scores = scores
    return len(first.prompt)

  def score(self, prompt: np.ndarray, top: int) -> PromptScores:
    """Scores a prompt int32 [n], n >= 1, with at least `top` alternatives where there are any.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    n = len(prompt)
    # Of the ladder, so that few programs are compiled; of whole pieces, where there are several.
    length = bucket(bucket_ladder(self.max_len), n)
    if length > _PIECE:
      length = -(-length // _PIECE) * _PIECE
    tokens_T = np.zeros(length, np.int32)
    tokens_T[:n] = prompt
    # All alternatives that there may be, however many are wanted: each number would be a program.
    most = min(TOP, self.config.vocab_size) if top else 0
    shape = ScoringShape(config=self.config, top=most, placement=self.placement)
    scored = jax.device_get(self.call(score, self.params, tokens_T, shape=shape))
    # The last token predicts what is sampled, and what lies behind it is padding.
    scored = jax.tree.map(lambda number_T: number_T[: n - 1], scored)
    if np.isnan(scored.logprobs).any():
      raise FloatingPointError('the model gives log-probabilities that are not a number')
    return scored


@functools.partial(jax.jit, static_argnames='shape')
def score(params: decoder.Params, tokens_T: jax.Array, *, shape: ScoringShape) -> PromptScores:
  """Scores the token behind each token of a row; the last place means nothing.

  Args:
    params: the model's parameters.
    tokens_T: token ids, padded on the right; of whole pieces where T is more than one.
    shape: what is compiled in.
  """
  device.traces['score'] += 1
  T = len(tokens_T)
  piece = min(T, _PIECE)
  cache = decoder.init_cache(shape.config, 1, T, params['embed'].dtype)
  if shape.placement is not None:
    cache = jax.lax.with_sharding_constraint(cache, decoder.KVCache(*[shape.placement] * 2))

  def extend(cache: decoder.KVCache, start: jax.Array) -> tuple[decoder.KVCache, jax.Array]:
    tokens_1T = jax.lax.dynamic_slice_in_dim(tokens_T, start, piece)[None]
    hidden_1TD, cache = decoder.extend(params, shape.config, cache, tokens_1T, start[None])
    return cache, hidden_1TD[0]

  _, hidden_PTD = jax.lax.scan(extend, cache, jnp.arange(0, T, piece))  # P pieces
  hidden_TD = hidden_PTD.reshape(T, -1)
  # The token behind each place is the one that its hidden state predicts.
  next_T = jnp.roll(tokens_T, -1)

  def look(place: tuple[jax.Array, jax.Array]) -> PromptScores:
    hidden_D, token = place
    logits_V = decoder.logits(params, hidden_D[None])[0].astype(jnp.float32)
    logprob_V = jax.nn.log_softmax(logits_V)
    logprob = logprob_V[token]
    top = None
    if shape.top:
      logprob_J, token_J = jax.lax.top_k(logprob_V, shape.top)
      top = Alternatives(token_J, logprob_J)
    # Equals count as less likely: the first of the most likely tokens has rank 1.
    return PromptScores(logprob, jnp.sum(logprob_V > logprob).astype(jnp.int32) + 1, top)

  scored = jax.lax.map(look, (hidden_TD, next_T), batch_size=_CHUNK)
  if shape.placement is None:
    return scored
  # Every host reads all of the scores, so that each holds a whole copy of them.
  return jax.lax.with_sharding_constraint(scored, NamedSharding(shape.placement.mesh, jax.P()))


def _first_alternatives(scores: PromptScores, count: int) -> PromptScores:
  """Returns scores with the first `count` alternatives of each token, None for 0."""
  # The program has computed none, or the caller of this prompt wants none.
  if not count:
    return scores._replace(top=None)
  token_BJ, logprob_BJ = scores.top
  return scores._replace(top=Alternatives(token_BJ[:, :count], logprob_BJ[:, :count]))
