"""What psi contributes to an update: the norm of its gradient, and its angle to GRPO's.

Both are of a first step, where the ratios are 1: the gradient of the mean of -A log pi, aggregated
as the step's, with one part of the advantage for A. They say how large psi's share of an update is
and where it points; most of a single gradient is noise, and two noises are at right angles.
Letters: C loss tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dcore_jax import tokentree
from dcore_jax.learn import head, lora, objectives
from dcore_jax.learn.step import accumulate, loss_token_states
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution

_DEFAULT_EXECUTION = Execution()


def make_psi_norm(
  config: DecoderConfig,
  *,
  temperature: float = 1.0,
  execution: Execution = _DEFAULT_EXECUTION,
  aggregation: str = 'token',
  max_tokens: int = 4096,
) -> Callable[..., jax.Array]:
  """The jitted (params, batch, frozen) -> norm of psi's own gradient in a first step.

  psi is an extra of the batch. It costs a backward pass: meant for measuring on one mini-batch how
  much of an update is due to psi. `frozen` is as for the step.
  """
  gradient = _part_gradient(config, temperature, execution)

  def psi_norm(params, batch, frozen=None):
    weighted, total = _weighted(batch, {'psi'}, aggregation, max_tokens)
    norm = optax.global_norm(gradient(params, weighted, 'psi', frozen))
    return norm / jnp.maximum(total, 1e-8)

  return jax.jit(psi_norm)


def make_psi_cosine(
  config: DecoderConfig,
  *,
  temperature: float = 1.0,
  execution: Execution = _DEFAULT_EXECUTION,
  aggregation: str = 'token',
  max_tokens: int = 4096,
) -> Callable[..., jax.Array]:
  """The jitted (params, batch, frozen) -> cosine between psi's and the other advantages' gradients.

  The extras are 'psi' and 'without_psi'. It costs two backward passes, and the memory of two
  gradients. NaN where one of the two gradients is 0.
  """
  gradient = _part_gradient(config, temperature, execution)

  def psi_cosine(params, batch, frozen=None):
    # A cosine has no scale: the divisor of the mean is left out.
    weighted, _ = _weighted(batch, {'psi', 'without_psi'}, aggregation, max_tokens)
    ours = gradient(params, weighted, 'psi', frozen)
    others = gradient(params, weighted, 'without_psi', frozen)
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), ours, others)
    return sum(jax.tree.leaves(products)) / (optax.global_norm(ours) * optax.global_norm(others))

  return jax.jit(psi_cosine)


def _weighted(
  batch: tokentree.RowBatch, names: set[str], aggregation: str, max_tokens: int
) -> tuple[tokentree.RowBatch, jax.Array]:
  """(the batch with the weights of the aggregation, the divisor of their sum)."""
  # Only the other aggregations need to know how long a token's sequence is.
  needed = names if aggregation == 'token' else names | {'sequence_weight'}
  objectives.check_extras(batch.extras, needed)
  weight, total = objectives.aggregate(
    batch.weight, batch.extras.get('sequence_weight'), aggregation, max_tokens
  )
  return batch._replace(weight=weight), total


def _part_gradient(
  config: DecoderConfig, temperature: float, execution: Execution
) -> Callable[..., Any]:
  """(params, batch, name of a part, frozen) -> undivided gradient of the sum of -part log pi."""

  def objective(logp_C, _, values):
    weight_C, part_C = values
    # No clipping: at the first step no ratio has moved.
    return -jnp.sum(weight_C * part_C * logp_C), ()

  def gradient(trained, batch, name, frozen):
    def part_sum(trained, micro):
      params = lora.attach(frozen, trained)
      hidden_MD = loss_token_states(params, config, micro, execution)
      return head.token_loss(
        objective,
        hidden_MD,
        decoder.head_matrix(params),
        micro.target,
        (micro.weight, micro.extras[name]),
        head.LossOptions(temperature=temperature),
      )

    grads, _ = accumulate(part_sum, trained, batch)
    return grads

  return gradient
