"""Measures of psi on the mini-batches of a step, before their updates.

Letters: A micro-batches, M loss tokens of a micro-batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcore_jax import sharding
from dcore_jax.learn import grpo
from dcore_jax.learn.grpo import Response
from dcore_jax.tokentree import RowBatch, TokenTree

# The responses of each mini-batch, and its tree with the values that the loss reads.
Laid = Sequence[tuple[Sequence[Response], TokenTree]]


class Psi(NamedTuple):
  """What psi contributes to the first mini-batch that has any.

  Attributes:
    norm: of its gradient, on the device.
    share: the part of the mini-batch's loss tokens that the norm was divided by.
    place: number of the mini-batch.
    cosine: between psi's gradient and that of the other advantages, in the first mini-batch that
      has both; NaN where none has, None where it was not measured.
  """

  norm: jax.Array
  share: float
  place: int
  cosine: jax.Array | float | None = None


class PsiMeasure:
  """Measures psi's gradient: its norm, and its angle to GRPO's.

  Args:
    psi_norm: of `learn.psi_gradient.make_psi_norm`, with what is frozen under LoRA bound.
    psi_cosine: of `learn.psi_gradient.make_psi_cosine`, likewise.
    row_batch: cuts a tree into the micro-batches of a step.
    aggregation: of the loss.
  """

  def __init__(
    self,
    psi_norm: Callable[[Any, RowBatch], jax.Array],
    psi_cosine: Callable[[Any, RowBatch], jax.Array],
    row_batch: Callable[[TokenTree], RowBatch],
    aggregation: str,
  ):
    self._psi_norm = psi_norm
    self._psi_cosine = psi_cosine
    self._row_batch = row_batch
    self._aggregation = aggregation

  def norm(self, params: Any, minis: Laid) -> Psi:
    """Measures on the first mini-batch that has any psi, by one backward pass."""
    for place, (responses, tree) in enumerate(minis):
      # A group whose rewards differ has no psi under DA-GRPO; the first mini-batch may have none.
      if not any(response.psi.any() for response in responses):
        continue
      # What an aggregation needs beside it is on the tree already.
      laid = grpo.lay_values(tree, responses, {'psi'}, self._aggregation)
      batch = self._row_batch(laid)
      share = 1.0
      # Under other aggregations the weight of a token depends on its whole sequence.
      if self._aggregation == 'token':
        batch, share = only_psi(batch)
      norm = self._psi_norm(params, sharding.place_batch(batch, whole=True))
      return Psi(norm=norm, share=share, place=place)
    # Zeros on the device: a step without psi has the same metrics as any other.
    return Psi(norm=jnp.zeros(()), share=1.0, place=0)

  def cosine(self, params: Any, minis: Laid) -> jax.Array | float:
    """Measures on the first mini-batch with psi and other advantages, by two backward passes.

    NaN where no mini-batch has both.
    """
    parts = ('psi', 'without_psi')
    for responses, tree in minis:
      if all(any(getattr(each, name).any() for each in responses) for name in parts):
        laid = grpo.lay_values(tree, responses, set(parts), self._aggregation)
        batch = sharding.place_batch(self._row_batch(laid), whole=True)
        return self._psi_cosine(params, batch)
    return math.nan


def only_psi(batch: RowBatch) -> tuple[RowBatch, float]:
  """Leaves micro-batches without psi out -> (the batch, the share of the weight that is left).

  The backward pass skips micro-batches without weight. A norm over the rest was divided by the
  rest's weight only: times the share it is that of the whole mini-batch.
  """
  has_psi_A1 = batch.extras['psi'].any(axis=1, keepdims=True)
  weight_AM = batch.weight * has_psi_A1
  share = float(weight_AM.sum() / batch.weight.sum())
  return batch._replace(weight=weight_AM), share
