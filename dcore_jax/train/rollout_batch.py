"""Scored groups of rollouts: what a reinforcement step learns from, and what is written down of it.

Letters: P prompts (items of a source), G rollouts of a prompt.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.evaluate.behaviour.lazy_reasoning import LOGGED_WORDS, count_reflections
from dcore_jax.learn import advantages
from dcore_jax.worlds.environment import Outcome
from dcore_jax.worlds.rollouts import Exchange


class Rollout(NamedTuple):
  """One attempt at an item.

  Attributes:
    exchanges: the prompt and the response of each turn, as token ids.
    texts: the responses as texts.
    outcome: a world's verdict; None if no world judged the rollout.
    teacher_prompt: the prompt with the reference in view, where a teacher reads it.
  """

  exchanges: list[Exchange]
  texts: list[str]
  outcome: Outcome | None = None
  teacher_prompt: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
  """P x G rollouts of one policy with their rewards, prompt by prompt.

  Attributes:
    kinds: P names, the kind of each item.
    rollouts: P x G rollouts, the groups one after the other.
    total_PG: the reward that is learned from.
    format_PG: the part of it for the form of the answer.
    correctness_PG: the part for its content.
    right_PG: bool, whether the answer is as good as the reference.
    signs_P: +1 or -1 for each group, drawn for the placebo of psi; None without it.
  """

  kinds: list[str]
  rollouts: list[Rollout]
  total_PG: np.ndarray
  format_PG: np.ndarray
  correctness_PG: np.ndarray
  right_PG: np.ndarray
  signs_P: np.ndarray | None = None

  def of(self, first: int, last: int) -> list[Rollout]:
    """Returns the rollouts of the prompts first .. last - 1."""
    group = self.total_PG.shape[1]
    return self.rollouts[first * group : last * group]


def take_groups(batches: Sequence[RolloutBatch], groups: Sequence[int]) -> RolloutBatch:
  """Takes groups by their numbers in the batches laid end to end.

  All batches have equally many rollouts in each group. Signs are drawn afterwards.
  """
  # Python lists, because rollouts are objects; the arrays of all batches are joined below.
  kinds = []
  rollouts_by_group = []
  for batch in batches:
    kinds += batch.kinds
    for place in range(len(batch.kinds)):
      rollouts_by_group.append(batch.of(place, place + 1))
  rollouts = []
  for group in groups:
    rollouts += rollouts_by_group[group]
  return RolloutBatch(
    kinds=[kinds[group] for group in groups],
    rollouts=rollouts,
    total_PG=np.concatenate([batch.total_PG for batch in batches])[groups],
    format_PG=np.concatenate([batch.format_PG for batch in batches])[groups],
    correctness_PG=np.concatenate([batch.correctness_PG for batch in batches])[groups],
    right_PG=np.concatenate([batch.right_PG for batch in batches])[groups],
  )


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
  """Figures of a step that its rollouts give by themselves.

  A group has zero variance where its rewards are exactly equal; a rollout alone in its group where
  its reward is 0 (`advantages.uniform_groups`).
  """
  # The same test as the estimators', so that the reported share is that of groups without gradient.
  zero_P = advantages.uniform_groups(batch.total_PG)[:, 0]
  # Equal rewards may also lie between right and wrong; such groups are in neither share.
  all_right_P = zero_P & batch.right_PG.all(axis=1)
  all_wrong_P = zero_P & ~batch.right_PG.any(axis=1)
  # An episode has several responses, and one that ended at once has none: means below are over
  # responses, not over rollouts.
  exchanges = []
  texts = []
  for rollout in batch.rollouts:
    exchanges += rollout.exchanges
    texts += rollout.texts
  lengths = np.array([len(completion.tokens) for _, completion in exchanges])
  # The share of answers that the token budget cut off, which say nothing about right or wrong.
  unfinished = [not completion.finished for _, completion in exchanges]
  # Two lists of words are counted: LOGGED_WORDS, and the default one, which measures lazy
  # reasoning.
  logged_words = [count_reflections(text, LOGGED_WORDS) for text in texts]
  lazy_words = [count_reflections(text) for text in texts]
  row = {
    'reward': float(batch.total_PG.mean()),
    'reward_format': float(batch.format_PG.mean()),
    'reward_correctness': float(batch.correctness_PG.mean()),
    'right_fraction': float(batch.right_PG.mean()),
    'zero_variance_fraction': float(zero_P.mean()),
    'all_right_fraction': float(all_right_P.mean()),
    'all_wrong_fraction': float(all_wrong_P.mean()),
    'reflections': float(np.mean(logged_words)),
    'reflections_lazy_words': float(np.mean(lazy_words)),
    'response_tokens': float(lengths.mean()),
    'response_tokens_max': int(lengths.max()),
    'prompt_tokens': float(np.mean([len(prompt) for prompt, _ in exchanges])),
    # 1 for single prompts, and the mean number of responses for episodes.
    'responses': len(exchanges) / len(batch.rollouts),
    'unfinished': float(np.mean(unfinished)),
  }
  by_kind = collections.defaultdict(list)
  for kind, rewards_G in zip(batch.kinds, batch.total_PG, strict=True):
    # Groups have equal sizes, so that the mean of their means is the mean over all rollouts.
    by_kind[kind].append(rewards_G.mean())
  for kind, means in by_kind.items():
    row[f'reward_{kind}'] = float(np.mean(means))
  return row


def prompt_means(batch: RolloutBatch) -> dict[str, list[float]]:
  """Means over the rollouts of every prompt, of what is compared between two policies.

  The same prompts under two policies are pairs, see `statistics.paired_difference`.
  """
  reflections = []
  for rollout in batch.rollouts:
    counts = [count_reflections(text, LOGGED_WORDS) for text in rollout.texts]
    # An episode whose first prompt was too long has no response, and no reflection.
    reflections.append(np.mean(counts) if counts else 0)
  values_by_name = {
    'reward': batch.total_PG,
    'right_fraction': batch.right_PG,
    'reflections': np.reshape(reflections, batch.total_PG.shape),
  }
  means = {}
  for name, values_PG in values_by_name.items():
    # In float64, so that the difference of two nearly equal means keeps its digits.
    means[name] = values_PG.mean(axis=1, dtype=np.float64).tolist()
  return means
