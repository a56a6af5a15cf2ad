"""The rollouts of a step as the mini-batches of its optimizer steps, packed into rows.

Letters: P prompts, G rollouts of a prompt, R rows, T tokens in a row.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from dcore_jax import sharding
from dcore_jax.config import RlSection
from dcore_jax.learn import grpo
from dcore_jax.learn.grpo import Response
from dcore_jax.tokentree import RowBatch, TokenTree
from dcore_jax.train.rl_options import rows_multiple
from dcore_jax.train.rollout_batch import Rollout, RolloutBatch
from dcore_jax.train.sources import RolloutSource


@dataclasses.dataclass(frozen=True)
class MiniBatch:
  """The rollouts of one optimizer step.

  Attributes:
    rollouts: the responses of each rollout, prompt by prompt.
    rewards_PG: reward of each rollout.
    tree: all responses, packed, without values.
    signs_P: of the groups, see `RolloutBatch`.
  """

  rollouts: list[list[Response]]
  rewards_PG: np.ndarray
  tree: TokenTree
  signs_P: np.ndarray | None = None

  @property
  def responses(self) -> list[Response]:
    """All responses, in the order in which the tree has them."""
    return flat(self.rollouts)

  @property
  def groups(self) -> list[list[Response]]:
    """The responses of each prompt's rollouts together, in the order of the tree."""
    P, G = self.rewards_PG.shape
    return [flat(self.rollouts[p * G : (p + 1) * G]) for p in range(P)]

  def with_responses(self, responses: Sequence[Response]) -> 'MiniBatch':
    """The same rollouts with other values; `responses` are in the order of the property."""
    return dataclasses.replace(self, rollouts=self.by_rollout(responses))

  def by_rollout(self, values: Sequence[Any]) -> list[list[Any]]:
    """Cuts a list with one value a response, in the order of the tree, as the rollouts are."""
    result = []
    start = 0
    for responses in self.rollouts:
      result.append(list(values[start : start + len(responses)]))
      start += len(responses)
    return result


def flat(rollouts: Sequence[Sequence[Any]]) -> list[Any]:
  """Returns what all rollouts have, one behind the other."""
  together = []
  for responses in rollouts:
    together += responses
  return together


def sampled_responses(rollout: Rollout) -> list[Response]:
  """The responses of a rollout with what the engine has reported of their tokens."""
  responses = []
  for prompt, completion in rollout.exchanges:
    responses.append(
      Response(
        prompt=prompt,
        tokens=completion.tokens,
        # The engine's two numbers differ where sampling was truncated: one is of the truncated
        # policy, the other of the whole one, which a trainer computes.
        behaviour_logp=completion.logprobs,
        old_logp=completion.full_logprobs,
        entropy=completion.entropies,
        teacher_prompt=rollout.teacher_prompt,
      )
    )
  return responses


class Packer:
  """Packs rollouts into rows of which all steps of a run have the same number and length.

  Programs are compiled for shapes, and would be compiled anew for others.

  Args:
    config: section `rl`.
    source: what the rollouts answer; its longest prompts fix the rows of a step.
    max_new: tokens of a response at most, as the engine has it.
    pad_id: fills rows up; None for a tokenizer without one.
    merge: whether tokens that several rollouts of a prompt drew alike are packed once.

  Attributes:
    budget: loss tokens of a micro-batch.
  """

  def __init__(
    self,
    config: RlSection,
    source: RolloutSource,
    max_new: int,
    pad_id: int | None,
    *,
    merge: bool,
  ):
    # All places are budgeted: where prompts are shared, most tokens of a row are sampled ones.
    self.budget = config.rows * config.capacity
    self._config = config
    # Without a padding token any id will do, since padding weighs nothing.
    self._pad_id = pad_id or 0
    self._merge = merge
    # The longest response that the engine can give, all turns of an episode together.
    response = source.responses * min(config.max_tokens, max_new)
    self._rows = rows_multiple(config, source.longest_prompt, response)
    # The teacher's prompts are longer, and so may its rows be more.
    self._teacher_rows = rows_multiple(config, source.longest_teacher_prompt, response)
    self._warned_of_cuts = False

  def mini_batches(self, batch: RolloutBatch) -> list[MiniBatch]:
    """Splits a rollout batch into the mini-batches of its optimizer steps, and packs them."""
    # Prompts divide evenly over the updates, which `check_options` has made sure of.
    size = len(batch.kinds) // self._config.updates
    minis = []
    for first in range(0, len(batch.kinds), size):
      rollouts = [sampled_responses(made) for made in batch.of(first, first + size)]
      minis.append(
        # Groups stay whole: a mini-batch has complete prompts, and so all rewards of its groups.
        MiniBatch(
          rollouts=rollouts,
          rewards_PG=batch.total_PG[first : first + size],
          signs_P=None if batch.signs_P is None else batch.signs_P[first : first + size],
          tree=self.pack(flat(rollouts)),
        )
      )
    return minis

  def pack(self, responses: Sequence[Response]) -> TokenTree:
    """Packs responses behind their prompts."""
    return self._pack(responses, self._rows)

  def pack_taught(self, responses: Sequence[Response]) -> TokenTree:
    """The same behind the teacher's prompts."""
    return self._pack(responses, self._teacher_rows)

  def _pack(self, responses: Sequence[Response], rows: int) -> TokenTree:
    tree = grpo.pack_responses(
      responses, self._config.capacity, rows, self._pad_id, merge=self._merge
    )
    if tree.dropped:  # `check_options` has made sure that rollouts fit
      raise AssertionError(
        f'{len(tree.dropped)} rollouts are longer than rl.capacity = {self._config.capacity}'
      )
    return tree

  def row_batch(self, tree: TokenTree) -> RowBatch:
    """Cuts a tree into the micro-batches of an optimizer step."""
    accumulate = tree.rows // self._config.rows
    return tree.batch(budget=self.budget, accumulate=accumulate, shards=sharding.shards())

  def cut_groups(self, minis: Sequence[MiniBatch]) -> int:
    """Counts the groups that no row could hold, and warns of the first ones of a run."""
    sizes = []
    groups = 0
    for mini in minis:
      groups += len(mini.groups)
      sizes += grpo.cut_groups(mini.tree, mini.groups, merge=self._merge)
    if sizes and not self._warned_of_cuts:
      self._warned_of_cuts = True
      warnings.warn(
        f'{len(sizes)} of {groups} groups of rollouts need more than a row of rl.capacity = '
        f'{self._config.capacity} tokens, the largest {max(sizes)}: each of the rows that such a '
        'group is divided over computes its prompt again. A larger rl.capacity saves that, where '
        'it fits in memory. This is said once; the metric cut_groups counts them in every step.',
        stacklevel=2,
      )
    return len(sizes)
