"""The entropy advantage psi inside of the compiled step (docs/method.md, section 3.3; docs/psi.md).

A rollout's advantage on a token is where(zero variance, w psi, A): A is group-relative, w a weight
of the rollout (1 as published), and psi = min(alpha sg(H), delta) of the token's entropy H, with sg
the stop-gradient. alpha and delta are arguments of the step, so that a sweep over them, or an
adaptive alpha, compiles once.

A merged token stands for several rollouts. H depends on the policy and on the prefix alone, which
they share, so that sum_i where(z_i, w_i psi, A_i) = sum_i (1 - z_i) A_i + psi sum_i z_i w_i: the
sums of A and of w, each split by sign, are all that a loss that merges needs, and no choice between
rollouts is left on the device. Letters: M loss tokens, A micro-batches of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Values = Mapping[str, jax.Array]

# Values of a token that one rollout has: its group-relative advantage, whether psi takes its place,
# and psi's weight.
OF_ROLLOUT = frozenset({'relative', 'zero_variance', 'psi_weight'})
# What `weight_sides` makes of psi's weight, for tokens that several rollouts share.
SIDES = frozenset({'psi_up', 'psi_down', 'psi_share_up', 'psi_share_down'})


class PsiScale(NamedTuple):
  """The numbers of psi = min(alpha H, delta), as arguments of a step."""

  alpha: jax.Array | np.ndarray
  delta: jax.Array | np.ndarray


def weight_sides(weight: np.ndarray) -> dict[str, np.ndarray]:
  """Splits weights of psi by their sign, float32 arrays of the same shape."""
  return {
    'psi_up': np.maximum(weight, 0).astype(np.float32),
    'psi_down': np.maximum(-weight, 0).astype(np.float32),
    'psi_share_up': (weight > 0).astype(np.float32),
    'psi_share_down': (weight < 0).astype(np.float32),
  }


def scale_values(scale: PsiScale, weight: jax.Array) -> dict[str, jax.Array]:
  """Gives every loss token alpha and delta, because the head reads values a token."""
  # Tokens that only fill a batch up keep zeros: chunks of nothing else are skipped.
  used = weight != 0
  return {
    'alpha': jnp.where(used, scale.alpha, 0).astype(jnp.float32),
    'delta': jnp.where(used, scale.delta, 0).astype(jnp.float32),
  }


def entropy_advantage(entropy: jax.Array, values: Values) -> jax.Array:
  """Computes psi = min(alpha sg(H), delta) (D-CORE, eq. 7)."""
  # psi is a weight of log-probabilities and no objective: without the stop-gradient the loss
  # -psi log pi would have the further gradient -alpha log pi grad H.
  return jnp.minimum(values['alpha'] * jax.lax.stop_gradient(entropy), values['delta'])


def with_advantage(values: Values, entropy: jax.Array, *, merged: bool) -> dict[str, jax.Array]:
  """Adds to `values` the advantage that a loss reads.

  Args:
    values: of each token; `OF_ROLLOUT`, or where tokens are merged `SIDES` and those of
      `objectives.advantage_sides` of the relative advantages, beside what `scale_values` gives.
    entropy: H of each token, nats.
    merged: whether a token may stand for several rollouts.
  """
  psi = entropy_advantage(entropy, values)
  if not merged:
    chosen = jnp.where(values['zero_variance'] != 0, values['psi_weight'] * psi, values['relative'])
    return {**values, 'advantage': chosen}
  # Where psi is 0 its rollouts have an advantage of 0, and are on neither side.
  acts = (psi > 0).astype(jnp.float32)
  return {
    **values,
    'advantage_up': values['advantage_up'] + psi * values['psi_up'],
    'advantage_down': values['advantage_down'] + psi * values['psi_down'],
    'share_up': values['share_up'] + acts * values['psi_share_up'],
    'share_down': values['share_down'] + acts * values['psi_share_down'],
  }
