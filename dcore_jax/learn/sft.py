"""Supervised fine-tuning on token trees: -E log pi(Y | C, Q) over the tokens that carry weight (paper eq. 1).

Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a micro-batch, D hidden.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcore_jax import sharding, tokentree
from dcore_jax.learn import head, optimizer
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution

TrainState = optimizer.TrainState
Metrics = dict[str, jax.Array]


def loss_token_states(
  params: Any, config: DecoderConfig, micro: tokentree.RowBatch, execution: Execution = Execution()
) -> jax.Array:
  """[M, D]: the hidden states that predict the loss tokens of one micro-batch (leaves without the axis A)."""
  hidden_RTD = decoder.hidden_states(
    params, config, micro.tokens, micro.position, micro.end, execution
  )
  pick = lambda hidden_RTD, parent_M: hidden_RTD.reshape(-1, hidden_RTD.shape[-1])[parent_M]
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:  # each device picks from its own rows
    rows = sharding.partition_spec(('batch',), hidden_RTD.shape[:1], mesh)
    pick = jax.shard_map(pick, in_specs=(rows, rows), out_specs=rows, check_vma=False)
  return pick(hidden_RTD, micro.parent)


def token_scores(
  params: Any,
  config: DecoderConfig,
  micro: tokentree.RowBatch,
  *,
  temperature: float = 1.0,
  execution: Execution = Execution(),
) -> tuple[jax.Array, jax.Array]:
  """(log-probability, entropy) [M] of the loss tokens of one micro-batch."""
  hidden_MD = loss_token_states(params, config, micro, execution)
  return head.log_probs_and_entropy(
    hidden_MD, decoder.head_matrix(params), micro.target, temperature, used_M=micro.weight
  )


def accumulate(
  loss: Callable[[Any, tokentree.RowBatch], tuple[jax.Array, Any]],
  params: Any,
  batch: tokentree.RowBatch,
) -> tuple[Any, Any]:
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


def _nll_sum(
  params: Any, config: DecoderConfig, micro: tokentree.RowBatch, execution: Execution
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """(sum, (sum, weight)) of the negative log-likelihood, in nats."""

  def objective(logp_C, _, weight_C):
    return -jnp.sum(weight_C * logp_C), ()

  hidden_MD = loss_token_states(params, config, micro, execution)
  loss, _ = head.token_loss(
    objective, hidden_MD, decoder.head_matrix(params), micro.target, micro.weight
  )
  return loss, (loss, jnp.sum(micro.weight))


def make_sft_step(
  config: DecoderConfig, tx: optax.GradientTransformation, execution: Execution = Execution()
) -> Callable[[TrainState, tokentree.RowBatch], tuple[TrainState, Metrics]]:
  """The jitted step (state, batch) -> (state, metrics); the state is donated.

  Metrics: loss (nats per unit of weight), weight, grad_norm, skipped (1: the gradient was not finite, nothing changed).
  """

  def sft_step(state, batch):
    loss_sum = lambda params, micro: _nll_sum(params, config, micro, execution)
    grads, (loss, weight) = accumulate(loss_sum, state.params, batch)
    scale = 1 / jnp.maximum(weight, 1e-8)  # a batch without loss tokens has gradient 0, not NaN
    state, metrics = optimizer.apply_gradients(
      tx, state, jax.tree.map(lambda g: g * scale, grads), offload='optimizer' in execution.offload
    )
    return state, metrics | {'loss': loss * scale, 'weight': weight}

  return jax.jit(sft_step, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Batches:
  """Batches of constant shape over packed rows; each epoch visits every row once, in an order of (seed, epoch).

  A batch is a pure function of its number, which is all that a checkpoint has to remember. Where the rows do not fill the
  batches, empty ones are shuffled in. `len()` counts the batches of all epochs.

  Attributes:
    tree: all rows; every host packs the same ones.
    rows, epochs, seed, accumulate: as given to `batches`.
    budget: loss tokens of a micro-batch, of all hosts together.
    shards: devices along the batch, of all hosts together.
    host, hosts: this host yields the host-th of `hosts` equal parts of each micro-batch.
  """

  tree: tokentree.TokenTree
  rows: int
  epochs: int
  seed: int
  accumulate: int
  budget: int
  shards: int = 1
  host: int = 0
  hosts: int = 1

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
      chosen = order[place * self.rows : (place + 1) * self.rows].reshape(
        self.accumulate, self.hosts, -1
      )
      yield self.tree.batch(
        chosen[:, self.host].reshape(-1),
        budget=self.budget // self.hosts,
        accumulate=self.accumulate,
        shards=self.shards // self.hosts,
      )

  def prefetched(self, step: int, depth: int = 2) -> Iterator[tokentree.RowBatch]:
    """`start(step)`, made by a thread up to `depth` batches ahead: the host works while the device does."""
    source = self.start(step)
    with concurrent.futures.ThreadPoolExecutor(
      1
    ) as thread:  # one thread: the batches come in order
      waiting = collections.deque(thread.submit(next, source, None) for _ in range(depth))
      while (batch := waiting.popleft().result()) is not None:
        waiting.append(thread.submit(next, source, None))
        yield batch


def batches(
  sequences: Sized[tokentree.Sequence],
  *,
  capacity: int,
  rows: int,
  epochs: int,
  seed: int,
  accumulate: int = 1,
  pad_id: int = 0,
  shards: int = 1,
  host: int = 0,
  hosts: int = 1,
) -> Batches:
  """Packs the sequences once, `rows` rows of `capacity` tokens a batch; `.tree` tells what was merged and dropped.

  The rows of a micro-batch must divide over the shards, and the shards over the hosts.
  """
  if (
    rows < 1
    or epochs < 0
    or rows % (accumulate * shards)
    or shards % hosts
    or not 0 <= host < hosts
  ):
    raise ValueError(
      f'rows = {rows}, epochs = {epochs}, accumulate = {accumulate}, shards = {shards}, host = {host}, '
      f'hosts = {hosts} do not make batches'
    )
  tree = tokentree.pack(sequences, capacity, rows, pad_id)
  if not tree.rows:
    raise ValueError(f'no sequence fits in {capacity} tokens ({len(tree.dropped)} are longer)')
  budget = tree.loss_budget(rows // accumulate, shards)
  return Batches(tree, rows, epochs, seed, accumulate, budget, shards, host, hosts)
