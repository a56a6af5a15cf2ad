"""Policies beside the one that is trained: the frozen reference, and the teacher.

The teacher of self-distillation is the policy itself with the reference answer in its prompt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dcore_jax.learn import grpo
from dcore_jax.learn.grpo import Response
from dcore_jax.learn.optimizer import HOST, check_offload
from dcore_jax.models.decoder import Execution
from dcore_jax.tokentree import TokenTree

Params = Any


class Reference:
  """The frozen policy of the KL term: a copy in the dtype of computation.

  With `execution.offload` it lies in host memory while it is not needed.

  Args:
    params: the policy.
    execution: how the training passes run.
    copied: False for a policy that no update changes, LoRA's base: it is used as it is.

  Raises:
    ValueError: offloading where there is no such memory, or of what is not copied.
  """

  def __init__(self, params: Params, execution: Execution, *, copied: bool = True):
    if not copied:
      if 'reference' in execution.offload:
        raise ValueError('execution.offload: under LoRA the reference policy is the base itself')
      self._held = params
      self._placed = jax.tree.map(lambda leaf: leaf.sharding, params)
      return
    # The reference is only scored, so that two bytes a number suffice where the policy computes in
    # bfloat16.
    dtype = execution.dtype(params)
    # A copy even where the dtype is the same: the first update donates the parameters' memory.
    copied = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=True), params)
    # Where each array belongs on the devices, to bring it back after offloading.
    self._placed = jax.tree.map(lambda leaf: leaf.sharding, copied)
    self._held = copied
    if 'reference' in execution.offload:
      check_offload()
      self._held = jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), copied
      )

  def params(self) -> Params:
    """The parameters on the devices, for as long as the caller holds them."""
    # Nothing moves where the arrays are there already.
    return jax.device_put(self._held, self._placed)


def with_teacher_logp(
  responses: Sequence[Response],
  pack: Callable[[Sequence[Response]], TokenTree],
  score: Callable[[TokenTree], np.ndarray],
) -> tuple[list[Response], TokenTree]:
  """Gives responses their log-probabilities behind the teacher's prompts.

  The prompts are other ones while the tokens behind them are the same, so that the teacher's
  sequences are packed into a tree of their own.

  Args:
    responses: with `teacher_prompt`.
    pack: makes a tree.
    score: float32 [R, T], log-probabilities of the tokens of a tree under the policy.

  Returns:
    (the responses, in their order; the teacher's tree).
  """
  shown = []
  for response in responses:
    shown.append(dataclasses.replace(response, prompt=response.teacher_prompt))
  tree = pack(shown)
  logp = grpo.gather_values(tree, shown, score(tree))
  taught = []
  for response, teacher_logp in zip(responses, logp, strict=True):
    taught.append(dataclasses.replace(response, teacher_logp=teacher_logp))
  return taught, tree
