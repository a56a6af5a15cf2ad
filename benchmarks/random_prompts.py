"""Prompts of random tokens for reinforcement steps of random models, whose answers are no text."""

from collections.abc import Sequence

import numpy as np

from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.train.rollout_batch import Rollout, RolloutBatch
from dcore_jax.train.sources import Prompt, Questions


class Words:
  """What our loop asks of a tokenizer, for texts of numbers."""

  pad_token_id = 0

  def batch_decode(self, rows: list[np.ndarray], skip_special_tokens: bool) -> list[str]:
    """Ids with spaces between."""
    del skip_special_tokens
    return [' '.join(map(str, row)) for row in rows]


def prompts(tokens_PT: np.ndarray) -> list[Prompt]:
  """Prompts of these tokens; their reference is read by nobody."""
  point = DecisionPoint('', 'single', (), 'nothing')
  return [Prompt(point, row) for row in tokens_PT]


class Numbers(Questions):
  """Prompts of random tokens; a response is worth as many as it has different tokens."""

  def __init__(self, prompts: Sequence[Prompt]):
    # References must be readable, although `judge` does without.
    super().__init__(Words(), prompts, 'toolrl')

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    """Scores responses by how many different tokens they have."""
    values_PG = np.float32([len(set(rollout.texts[0].split())) for rollout in rollouts]).reshape(
      len(chosen), -1
    )
    return RolloutBatch(
      kinds=[self.kinds[index] for index in chosen],
      rollouts=rollouts,
      total_PG=values_PG,
      format_PG=values_PG * 0,
      correctness_PG=values_PG,
      right_PG=values_PG > 30,
    )
