"""Checksums over the bits of arrays, computed where the arrays are.

They tell whether weights are still those that were stored, or sampled with. Each word of at most
four bytes is multiplied with an odd number that depends on its place, modulo 2^32, so that a single
flipped bit always shows. Integers wrap exactly: equal arrays have equal sums however they are split
over devices and hosts. Nothing is gathered; only the sum comes to the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by their size in bytes


def _array_sum(array: jax.Array) -> jax.Array:
  """uint32 checksum of one array."""
  if jnp.iscomplexobj(array):
    # Real and imaginary part are words of their own.
    array = jnp.stack([array.real, array.imag], axis=-1)
  if array.dtype == bool:
    array = array.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(array, _WORDS[min(array.dtype.itemsize, 4)]).astype(
    jnp.uint32
  )
  # Places are counted axis by axis: a reshape of a split array would copy all of it to every
  # device.
  place = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def array_sums(tree: Any) -> Any:
  """Returns the uint32 sum of each array of a tree; all arrays lie on the same devices."""
  # One program for all arrays: on a CPU with several devices, programs that exchange data at the
  # same time may wait for each other's threads for ever.
  return jax.tree.map(_array_sum, tree)


@jax.jit
def tree_sum(tree: Any) -> jax.Array:
  """uint32 checksum of a tree of arrays: their sums, multiplied as words are."""
  sums = jnp.stack(jax.tree.leaves(array_sums(tree)))
  return jnp.sum(sums * (2 * jnp.arange(len(sums), dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def host_sum(array: np.ndarray) -> int:
  """uint32 checksum of an array in numpy, the same as that of an equal jax array."""
  size = array.dtype.itemsize // (2 if array.dtype.kind == 'c' else 1)
  words = np.ascontiguousarray(array).reshape(-1).view(_WORDS[min(size, 4)]).astype(np.uint32)
  return int(np.sum(words * (2 * np.arange(words.size, dtype=np.uint32) + 1), dtype=np.uint32))
