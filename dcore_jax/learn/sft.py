"""The step of supervised fine-tuning on token trees: -E log pi(Y | C, Q) over the tokens that carry
weight (D-CORE, eq. 1).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcore_jax import tokentree
from dcore_jax.learn import head, optimizer
from dcore_jax.learn.step import Metrics, accumulate, loss_token_states
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution

_DEFAULT_EXECUTION = Execution()


def _nll_sum(
  params: Any, config: DecoderConfig, micro: tokentree.RowBatch, execution: Execution
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Sums the negative log-likelihood of one micro-batch, in nats -> (sum, (sum, weight))."""

  def objective(logp_C, _, weight_C):
    return -jnp.sum(weight_C * logp_C), ()

  hidden_MD = loss_token_states(params, config, micro, execution)
  loss, _ = head.token_loss(
    objective, hidden_MD, decoder.head_matrix(params), micro.target, micro.weight
  )
  return loss, (loss, jnp.sum(micro.weight))


def make_sft_step(
  config: DecoderConfig, tx: optax.GradientTransformation, execution: Execution = _DEFAULT_EXECUTION
) -> Callable[[optimizer.TrainState, tokentree.RowBatch], tuple[optimizer.TrainState, Metrics]]:
  """Makes the jitted step (state, batch) -> (state, metrics); the state is donated.

  Metrics: loss (nats per unit of weight), weight, grad_norm, skipped (1: the gradient was not
    finite, nothing changed).
  """

  def sft_step(state, batch):
    def loss_sum(params, micro):
      return _nll_sum(params, config, micro, execution)

    grads, (loss, weight) = accumulate(loss_sum, state.params, batch)
    # The floor makes a batch without loss tokens give a gradient of 0 instead of NaN.
    scale = 1 / jnp.maximum(weight, 1e-8)
    state, metrics = optimizer.apply_gradients(
      tx, state, jax.tree.map(lambda g: g * scale, grads), offload='optimizer' in execution.offload
    )
    return state, metrics | {'loss': loss * scale, 'weight': weight}

  return jax.jit(sft_step, donate_argnums=0)
