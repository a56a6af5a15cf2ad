"""The step of supervised fine-tuning on token trees: -E log pi(Y | C, Q) over the tokens that carry
weight (D-CORE, eq. 1).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcore_jax import tokentree
from dcore_jax.learn import head, lora, optimizer
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
  # The loss twice: `accumulate` differentiates the first, and returns only what stands beside it.
  return loss, (loss, jnp.sum(micro.weight))


def make_sft_step(
  config: DecoderConfig, tx: optax.GradientTransformation, execution: Execution = _DEFAULT_EXECUTION
) -> Callable[[optimizer.TrainState, tokentree.RowBatch], tuple[optimizer.TrainState, Metrics]]:
  """Makes the jitted step (state, batch, frozen) -> (state, metrics); the state is donated.

  Under LoRA `frozen` is what the adapters in the state stand beside; otherwise it is None.

  Metrics: loss (nats per unit of weight), weight, grad_norm, skipped (1: the gradient was not
    finite, nothing changed).
  """

  def sft_step(state, batch, frozen=None):
    def loss_sum(params, micro):
      return _nll_sum(lora.attach(frozen, params), config, micro, execution)

    grads, (loss, weight) = accumulate(loss_sum, state.params, batch)
    # The floor makes a batch without loss tokens give a gradient of 0 instead of NaN.
    scale = 1 / jnp.maximum(weight, 1e-8)
    state, metrics = optimizer.apply_gradients(
      tx, state, jax.tree.map(lambda g: g * scale, grads), offload='optimizer' in execution.offload
    )
    return state, metrics | {'loss': loss * scale, 'weight': weight}

  return jax.jit(sft_step, donate_argnums=0)


def mean_loss(
  params: Any,
  config: DecoderConfig,
  tree: tokentree.TokenTree,
  execution: Execution = _DEFAULT_EXECUTION,
) -> float:
  """Computes the loss of all rows of a tree, in nats per unit of weight, without training."""

  @jax.jit
  def losses(params, batch):
    # One micro-batch: a tree that is only looked at is small.
    micro = jax.tree.map(lambda array: array[0], batch)
    return _nll_sum(params, config, micro, execution)[1]

  loss, weight = losses(params, tree.batch())
  return float(loss) / max(float(weight), 1e-8)
