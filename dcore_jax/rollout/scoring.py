"""Scores of prompts, collected piece by piece while the prompt is computed.

Letters as in passes.py.
"""

import numpy as np

from dcore_jax.rollout.programs import Drawn
from dcore_jax.rollout.requests import PromptScores
from dcore_jax.rollout.sampling import Alternatives

# Prompts whose scores are remembered: the choices of a request that wait for a lane ask again.
_REMEMBERED = 8


class PromptScoring:
  """The scores of prompts that are being computed, and of the last few that were."""

  def __init__(self):
    self._pieces: dict[int, list[Drawn]] = {}
    self._known: dict[bytes, PromptScores] = {}  # by the prompt, the oldest first

  def known(self, key: bytes) -> PromptScores | None:
    """Returns the scores of a prompt, if they are remembered."""
    return self._known.get(key)

  def forget(self) -> None:
    """Forgets the scores that are remembered."""
    self._known.clear()

  def add(self, row: int, scored: Drawn) -> None:
    """Takes the scores of the next tokens of a prompt.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    if np.isnan(scored.logprob_A).any():
      raise FloatingPointError('the model gives log-probabilities that are not a number')
    self._pieces.setdefault(row, []).append(scored)

  def take(self, row: int, key: bytes) -> PromptScores:
    """Returns all scores of a prompt, with all alternatives that there may be."""
    scores = self._joined(row)
    self._known[key] = scores
    if len(self._known) > _REMEMBERED:
      del self._known[next(iter(self._known))]
    return scores

  def _joined(self, row: int) -> PromptScores:
    pieces = self._pieces.pop(row, [])
    if not pieces:  # a prompt of one token
      empty = np.zeros(0, np.float32)
      none = Alternatives(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
      return PromptScores(logprobs=empty, ranks=np.zeros(0, np.int32), top=none)
    return PromptScores(
      logprobs=np.concatenate([piece.logprob_A for piece in pieces]),
      ranks=np.concatenate([piece.token_A for piece in pieces]),
      top=Alternatives(
        token_BJ=np.concatenate([piece.top.token_BJ for piece in pieces]),
        logprob_BJ=np.concatenate([piece.top.logprob_BJ for piece in pieces]),
      ),
    )

  def drop(self, row: int) -> None:
    """Forgets a prompt that nobody asks for any more."""
    self._pieces.pop(row, None)


def first_alternatives(scores: PromptScores, count: int) -> PromptScores:
  """Returns scores with the first `count` alternatives of each token, None for 0."""
  if not count:
    return scores._replace(top=None)
  token_BJ, logprob_BJ = scores.top
  return scores._replace(top=Alternatives(token_BJ[:, :count], logprob_BJ[:, :count]))
