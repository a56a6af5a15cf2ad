"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34).

As in Hugging Face checkpoints, component h of the first half of a head is rotated together with
component h of the second half. Angles are computed in float32 whatever the model's dtype: bfloat16
has 8 significant bits, so position 257 would be rounded to 256.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Returns the angle of each pair in radians a token, float32 [H/2]: theta^(-2h/H).

  `scaling` slows pairs down for contexts longer than those of pretraining. 'linear' (Chen et al.
  2023, position interpolation) divides all angles by the factor. 'llama3' (Llama 3.1) counts the
  full turns of a pair over the pretraining context: pairs with more than high_freq_factor turns
  stay, those with fewer than low_freq_factor are divided, and in between the two are mixed linearly
  in the number of turns.
  """
  # float64 on the host: the slowest pair turns about 1e-6 radians a token, and an error is
  # multiplied by positions up to 131,072.
  frequency = np.float64(theta) ** -(np.arange(0, head_dim, 2) / head_dim)
  if scaling is None:
    return frequency.astype(np.float32)
  if scaling.rope_type == 'linear':
    return (frequency / scaling.factor).astype(np.float32)
  # A pair that has gone round during pretraining has been seen at every angle, and need not be
  # slowed.
  turns = scaling.original_max_position_embeddings * frequency / (2 * np.pi)
  low = scaling.low_freq_factor
  high = scaling.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return (frequency * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rope_tables(
  position_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns (cos, sin) of position * frequency, each float32 [B, T, 1, H/2].

  The axis of size 1 is that of the heads, which all share the angles.
  """
  # A constant of the compiled program: the frequencies depend on the configuration alone.
  frequency = jnp.asarray(frequencies(head_dim, theta, scaling))
  angle = position_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates every head by its token's angles, in float32; the result has the input's dtype."""
  # Halves, not neighbours, are paired: the checkpoints' q and k are stored in this order.
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTNH.dtype)
