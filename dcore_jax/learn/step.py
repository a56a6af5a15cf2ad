"""The parts that the supervised step and the policy-gradient step share: scores of loss tokens,
sums of gradients.

Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a micro-batch, D hidden.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcore_jax import sharding, tokentree
from dcore_jax.learn import head
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution

Metrics = dict[str, jax.Array]
_DEFAULT_EXECUTION = Execution()


def loss_token_states(
  params: Any,
  config: DecoderConfig,
  micro: tokentree.RowBatch,
  execution: Execution = _DEFAULT_EXECUTION,
) -> jax.Array:
  """Computes the hidden states that predict the loss tokens of one micro-batch -> [M, D].

  The leaves of `micro` come without their leading axis A.
  """
  hidden_RTD = decoder.hidden_states(
    params, config, micro.tokens, micro.position, micro.end, execution
  )

  def pick(hidden_RTD: jax.Array, parent_M: jax.Array) -> jax.Array:
    return hidden_RTD.reshape(-1, hidden_RTD.shape[-1])[parent_M]

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    # `parent` counts from the first row of each device, so each picks from its own rows and no
    # hidden state moves.
    rows = sharding.partition_spec(('batch',), hidden_RTD.shape[:1], mesh)
    pick = jax.shard_map(pick, in_specs=(rows, rows), out_specs=rows, check_vma=False)
  return pick(hidden_RTD, micro.parent)


def token_scores(
  params: Any,
  config: DecoderConfig,
  micro: tokentree.RowBatch,
  *,
  temperature: float = 1.0,
  execution: Execution = _DEFAULT_EXECUTION,
) -> tuple[jax.Array, jax.Array]:
  """Scores the loss tokens of one micro-batch -> (log-probability, entropy), each [M], in nats."""
  hidden_MD = loss_token_states(params, config, micro, execution)
  return head.log_probs_and_entropy(
    hidden_MD, decoder.head_matrix(params), micro.target, temperature, used_M=micro.weight
  )


def accumulate(
  loss: Callable[[Any, tokentree.RowBatch], tuple[jax.Array, Any]],
  params: Any,
  batch: tokentree.RowBatch,
) -> tuple[Any, Any]:
  """Sums the gradient and the auxiliary sums of `loss` over micro-batches -> (gradient, sums),
  undivided.

  `loss(params, micro)` gives (sum over tokens, auxiliary sums). The caller divides once by the
  total weight, so that the result does not depend on how the rows were split. Micro-batches without
  weight are skipped: batches of unequal size may be filled up to one shape, which is compiled once.
  """
  gradient = jax.grad(loss, has_aux=True)
  first = jax.tree.map(lambda leaf: leaf[0], batch)
  if batch.weight.shape[0] == 1:
    # Without zeros to add to, which are a second gradient in memory.
    return gradient(params, first)
  shapes = jax.eval_shape(gradient, params, first)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def add_micro_batch(total, micro):
    def added():
      return jax.tree.map(jnp.add, total, gradient(params, micro))

    return jax.lax.cond(jnp.any(micro.weight != 0), added, lambda: total), None

  total, _ = jax.lax.scan(add_micro_batch, zeros, batch)
  return total
