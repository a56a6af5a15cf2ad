"""Supervised fine-tuning on token trees: -E log pi(Y | C, Q) over the tokens that carry weight (paper eq. 1).

Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a micro-batch, D hidden.
"""
import dataclasses
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcore_jax import tokentree
from dcore_jax.learn import head
from dcore_jax.learn import optimizer
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig

TrainState = optimizer.TrainState
Metrics = dict[str, jax.Array]


def token_scores(params: Any, config: DecoderConfig, micro: tokentree.RowBatch, *, temperature: float = 1.0,
                 remat: str = 'none', unroll: bool | int = True) -> tuple[jax.Array, jax.Array]:
  """(log-probability, entropy) [M] of the loss tokens of one micro-batch (leaves without the axis A)."""
  hidden_RTD = decoder.hidden_states(
      params, config, micro.tokens, micro.position, micro.end, remat=remat, unroll=unroll)
  hidden_MD = hidden_RTD.reshape(-1, hidden_RTD.shape[-1])[micro.parent]
  return head.log_probs_and_entropy(hidden_MD, decoder.head_matrix(params), micro.target, temperature)


def accumulate(loss: Callable[[Any, tokentree.RowBatch], tuple[jax.Array, Any]], params: Any,
               batch: tokentree.RowBatch) -> tuple[Any, Any]:
  """Sums the gradient and the auxiliary sums of `loss` over the micro-batches -> (gradient, sums), undivided.

  `loss(params, micro)` gives (sum over tokens, auxiliary sums). Whoever calls divides once by the total weight, so that
  the result does not depend on how the rows were split. Micro-batches without weight are skipped: batches of unequal
  size may be filled up to one shape, which is compiled once.
  """
  gradient = jax.grad(loss, has_aux=True)
  parts = batch.weight.shape[0]
  if parts == 1:
    return gradient(params, jax.tree.map(lambda leaf: leaf[0], batch))
  shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda leaf: leaf[0], batch))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def step(total, micro):
    add = lambda: jax.tree.map(jnp.add, total, gradient(params, micro))
    return jax.lax.cond(jnp.any(micro.weight != 0), add, lambda: total), None

  return jax.lax.scan(step, zeros, batch)[0]


def make_sft_step(config: DecoderConfig, tx: optax.GradientTransformation, *, remat: str = 'none',
                  unroll: bool | int = True
                  ) -> Callable[[TrainState, tokentree.RowBatch], tuple[TrainState, Metrics]]:
  """The jitted step (state, batch) -> (state, metrics); the state is donated.

  Metrics: loss (nats per unit of weight), weight, grad_norm, skipped (1: the gradient was not finite, nothing changed).
  """
  def loss_sum(params, micro):
    logp_M, _ = token_scores(params, config, micro, remat=remat, unroll=unroll)
    loss = -jnp.sum(micro.weight * logp_M)
    return loss, (loss, jnp.sum(micro.weight))

  def sft_step(state, batch):
    grads, (loss, weight) = accumulate(loss_sum, state.params, batch)
    scale = 1 / jnp.maximum(weight, 1e-8)  # a batch without loss tokens has gradient 0, not NaN
    state, metrics = optimizer.apply_gradients(tx, state, jax.tree.map(lambda g: g * scale, grads))
    return state, metrics | {'loss': loss * scale, 'weight': weight}

  return jax.jit(sft_step, donate_argnums=0)


def make_sft_loss(config: DecoderConfig, *,
                  unroll: bool | int = True) -> Callable[[Any, tokentree.RowBatch], jax.Array]:
  """The jitted held-out loss (params, batch) -> float32[2]: (sum, weight) over all micro-batches."""
  def part(params, micro):
    logp_M, _ = token_scores(params, config, micro, unroll=unroll)
    return jnp.stack([-jnp.sum(micro.weight * logp_M), jnp.sum(micro.weight)])

  return jax.jit(lambda params, batch: jax.lax.map(lambda micro: part(params, micro), batch).sum(axis=0))


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of constant shape over packed rows; each epoch visits every row once, in an order of (seed, epoch).

  Where the rows do not fill the batches, empty ones are shuffled in. `len()` counts the batches of all epochs.
  """
  tree: tokentree.TokenTree
  rows: int
  epochs: int
  seed: int
  accumulate: int
  budget: int

  @property
  def per_epoch(self) -> int:
    return self.tree.rows // self.rows

  def __len__(self) -> int:
    return self.epochs * self.per_epoch

  def __iter__(self) -> Iterator[tokentree.RowBatch]:
    return self.start(0)

  def start(self, step: int) -> Iterator[tokentree.RowBatch]:
    """The batches from `step` on: what a resumed run continues with."""
    order = np.zeros(0, np.int64)
    for index in range(step, len(self)):
      epoch, place = divmod(index, self.per_epoch)
      if place == 0 or index == step:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.tree.rows)
      chosen = order[place * self.rows:(place + 1) * self.rows]
      yield self.tree.batch(chosen, budget=self.budget, accumulate=self.accumulate)


def batches(sequences: Sized[tokentree.Sequence], *, capacity: int, rows: int, epochs: int, seed: int,
            accumulate: int = 1, pad_id: int = 0) -> Batches:
  """Packs the sequences once, `rows` rows of `capacity` tokens a batch; `.tree` tells what was merged and dropped."""
  if rows < 1 or epochs < 0 or rows % accumulate:
    raise ValueError(f'rows = {rows}, epochs = {epochs}, accumulate = {accumulate} do not make batches')
  tree = tokentree.pack(sequences, capacity, rows, pad_id)
  if not tree.rows:
    raise ValueError(f'no sequence fits in {capacity} tokens ({len(tree.dropped)} are longer)')
  return Batches(tree, rows, epochs, seed, accumulate, tree.loss_budget(rows // accumulate))
