"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), halves paired as in Hugging Face checkpoints.

Component h of the first half of a head is rotated together with component h of the second half. Angles are computed
in float32 whatever the model's dtype: bfloat16 has 8 significant bits, so position 257 would be rounded to 256.
"""
import jax
import jax.numpy as jnp


def rope_tables(position_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) of the angles position * theta^(-2h/H), each float32 [B, T, 1, H/2] (the 1 is the head axis)."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = theta ** -exponent
  angle = position_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates every head by its token's angles, in float32; the result has the dtype of the input."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTNH.dtype)
