"""What an engine is asked for and what it gives back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dcore_jax.rollout.sampling import TOP, Alternatives, SamplingParams

# Any value by which a caller of `Engine.stream` knows a rollout. The engine never looks into it.
Tag = Any


# Requests, completions and progress are compared by identity (eq=False): arrays have no single
# truth value for == to return.
@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One rollout to be made.

  Attributes:
    prompt: token ids, int [n] with n >= 1.
    key_id: names its random stream, e.g. (step, prompt, sample).
    max_tokens: tokens to sample at most; None: the sampling rule's number. Either is cut to what
      there is room for. 0 samples nothing: the prompt is scored, if that.
    top: alternatives to be reported with each token, at most `sampling.TOP`.
    prompt_top: the same for the tokens of the prompt; None: they are not scored.
  """

  prompt: np.ndarray
  # Ids of the stream, not its place: the same id draws the same tokens in any lane.
  key_id: tuple[int, ...]
  max_tokens: int | None = None
  top: int = 0
  prompt_top: int | None = None


# The engine asks a source with the number of free lanes, and gets up to that many requests.
RequestSource = Callable[[int], Sequence[tuple[Tag, Request]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
  """What was sampled, token by token: a trainer learns from exactly these ids.

  Attributes:
    tokens: int32 [m], the stop token included.
    logprobs: float32 [m], under the policy that sampled (after temperature and truncation).
    full_logprobs: float32 [m], before truncation: what a trainer computes at the same temperature.
    entropies: float32 [m], nats, of the distributions before truncation.
    finished: whether the last token is a stop token. Otherwise the budget was used up, or a stop
      string was completed.
    stop: the stop string that the last token completed, if any.
    prompt_len: tokens of the prompt.
    versions: int32 [m], number of the weights that drew each token, where a fleet of servers did
      (`rollout.fleet`); None of an engine, whose weights are those of the caller.
  """

  tokens: np.ndarray
  # Two log-probabilities a token: importance weights need the policy that drew, and the trainer
  # compares with the one before truncation.
  logprobs: np.ndarray
  # Kept although they could be recomputed: the entropy is there when the token is drawn.
  full_logprobs: np.ndarray
  entropies: np.ndarray
  finished: bool
  stop: str | None
  prompt_len: int
  versions: np.ndarray | None = None


class PromptScores(NamedTuple):
  """How likely the tokens of a prompt are, from the second one on: entry i is of token i + 1.

  They are the model's own probabilities, at temperature 1 and without truncation, whatever the rule
  of sampling is.

  Attributes:
    logprobs: float32 [n - 1].
    ranks: int32 [n - 1]; 1: no token is more likely.
    top: alternatives [n - 1, request's `prompt_top`]; None if the request asks for none.
  """

  logprobs: jax.Array | np.ndarray
  ranks: jax.Array | np.ndarray
  top: Alternatives | None


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
  """What one step drew for one rollout.

  Attributes:
    handle: the engine's number of the rollout.
    tokens: int32 [k].
    logprobs: float32 [k].
    full_logprobs: float32 [k].
    completion: all that was sampled, if the rollout has ended; else None. It has no alternatives,
      because the engine does not keep them.
    top: alternatives [k, request's `top`]; None if the request asks for none.
    prompt: the scores of the prompt, with the first progress, if the request asks for them.
    version: number of the weights that drew the tokens, as a server counts them; the engine itself
      does not count.
  """

  handle: int
  tokens: np.ndarray
  logprobs: np.ndarray
  full_logprobs: np.ndarray
  completion: Completion | None
  top: Alternatives | None = None
  prompt: PromptScores | None = None
  version: int = 0


@dataclasses.dataclass
class EngineStats:
  """Counts since the engine was made.

  Attributes:
    prefill_tokens: prompt tokens that went through the model, but for those drawn from.
    reused_tokens: prompt tokens whose keys and values were there from another rollout or an earlier
      turn.
    decoded_tokens: tokens handed out.
    passes: each reads the weights once.
    rows: tokens that went through the model, right and wrong guesses included.
    guessed_tokens: tokens that were guessed ahead.
    right_guesses: those of them that were what was drawn.
    slots_read: slots (keys and values of one token) that passes read.
    scored_tokens: tokens of prompts that were scored.
    compilations: programs compiled.
  """

  prefill_tokens: int = 0
  reused_tokens: int = 0
  decoded_tokens: int = 0
  passes: int = 0
  rows: int = 0
  guessed_tokens: int = 0
  right_guesses: int = 0
  slots_read: int = 0
  scored_tokens: int = 0
  compilations: int = 0

  @property
  def tokens_per_row(self) -> float:
    """Tokens handed out for each token that went through the model behind a prompt."""
    # Before the first pass there are no rows to divide by.
    return self.decoded_tokens / max(self.rows - self.prefill_tokens, 1)


def checked_prompt(request: Request, max_len: int, vocab: int) -> np.ndarray:
  """Returns the prompt of a request as int32.

  Raises:
    ValueError: it is no row of token ids, leaves no room in `max_len`, or has ids outside the
      vocabulary.
  """
  name = f'request {request.key_id}'
  tokens = np.asarray(request.prompt)
  # Text or floats would be cast to something that is no prompt.
  if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in 'iu':
    raise ValueError(
      f'{name}: a prompt is a row of at least one token id, got {tokens.dtype} {tokens.shape}'
    )
  # At least one slot must be left for a token that is sampled.
  if len(tokens) >= max_len:
    raise ValueError(
      f'{name}: a prompt of {len(tokens)} tokens leaves no room in max_len={max_len}'
    )
  # An id outside the vocabulary would be looked up at the last row, without an error.
  if tokens.min() < 0 or tokens.max() >= vocab:
    raise ValueError(
      f'{name}: token ids {tokens.min()}..{tokens.max()} exceed the vocabulary of {vocab}'
    )
  # A copy: the caller may change its array while the rollout waits.
  return tokens.astype(np.int32)


def checked_limit(request: Request, sampling: SamplingParams) -> int:
  """Returns how many tokens a request wants at most.

  Raises:
    ValueError: fewer than none, or more alternatives than there may be.
  """
  name = f'request {request.key_id}'
  # Programs that list alternatives are compiled for TOP of them.
  for top in (request.top, request.prompt_top or 0):
    if not 0 <= top <= TOP:
      raise ValueError(f'{name}: top={top} alternatives; there may be {TOP}')
  limit = sampling.max_tokens if request.max_tokens is None else request.max_tokens
  if limit < 0:
    raise ValueError(f'{name}: max_tokens={limit} must be at least 0')
  return limit
