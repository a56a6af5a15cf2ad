"""Sums over the bits of arrays, computed where the arrays are: whether weights are still those that were stored or sampled with.

Each word of at most four bytes counts with an odd factor of its place, modulo 2^32, so that a single flipped bit always shows.
Integers wrap exactly: equal arrays have equal sums however they are split over devices and hosts. Nothing is gathered, and all
that comes to the host is the sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes


def _array_sum(array: jax.Array) -> jax.Array:
  if jnp.iscomplexobj(array):
    array = jnp.stack([array.real, array.imag], axis=-1)
  if array.dtype == bool:
    array = array.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(array, _WORDS[min(array.dtype.itemsize, 4)]).astype(
    jnp.uint32
  )
  # No reshape to one axis: of a split array that would be a copy on every device.
  place, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def array_sums(tree: Any) -> Any:
  """The tree with the uint32 sum of each of its arrays, which are in the memory of the same devices. In one program: on a CPU
  with several devices, programs that exchange something at the same time may wait for each other's threads for ever."""
  return jax.tree.map(_array_sum, tree)


@jax.jit
def tree_sum(tree: Any) -> jax.Array:
  """uint32 of a tree of arrays: their sums, each with an odd factor of its place."""
  sums = jnp.stack(jax.tree.leaves(array_sums(tree)))
  return jnp.sum(sums * (2 * jnp.arange(len(sums), dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def host_sum(array: np.ndarray) -> int:
  """uint32 of an array in numpy, the same as that of a jax array."""
  size = array.dtype.itemsize // (2 if array.dtype.kind == 'c' else 1)
  words = np.ascontiguousarray(array).reshape(-1).view(_WORDS[min(size, 4)]).astype(np.uint32)
  return int(np.sum(words * (2 * np.arange(words.size, dtype=np.uint32) + 1), dtype=np.uint32))
