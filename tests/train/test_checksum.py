"""Sums over bits: the same on the host, on a device and on many; every flipped bit shows."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.train import checksum

RNG = np.random.default_rng(0)
ARRAYS = [
  RNG.normal(size=(3, 4, 5)).astype(np.float32),
  RNG.normal(size=(7, 2)).astype(jnp.bfloat16),
  np.float32(2.5),
  RNG.integers(0, 9, (4, 3), np.int8),
  RNG.normal(size=5) > 0,
  RNG.integers(0, 2**32, (2, 2), np.uint32),
  (RNG.normal(size=(2, 3)) + 1j).astype(np.complex64),
  np.zeros((0, 3), np.float32),
]


@pytest.mark.parametrize('array', ARRAYS, ids=lambda array: f'{array.dtype}{list(array.shape)}')
def test_host_and_device_agree(array):
  assert int(checksum.array_sums(jnp.asarray(array))) == checksum.host_sum(np.asarray(array))


def test_values_of_eight_bytes_are_two_words():
  values = RNG.normal(size=(3, 2))
  with jax.enable_x64(True):
    assert int(checksum.array_sums(jnp.asarray(values))) == checksum.host_sum(values)
  assert checksum.host_sum(values) == checksum.host_sum(values.view(np.uint32))


def test_every_flipped_bit_and_every_exchange_shows():
  array = RNG.integers(0, 2**16, 12, np.uint16)
  sums = {checksum.host_sum(array)}
  for place in range(12):
    for bit in range(16):
      flipped = array.copy()
      flipped[place] ^= 1 << bit
      sums.add(checksum.host_sum(flipped))
  sums.add(checksum.host_sum(array[::-1]))
  assert len(sums) == 12 * 16 + 2


PROGRAM = textwrap.dedent("""
    import jax, jax.numpy as jnp, numpy as np
    from dcore_jax.train import checksum

    rng = np.random.default_rng(0)
    tree = {
      'a': rng.normal(size=(8, 16)).astype(np.float32),
      'b': rng.normal(size=(16, 8, 2)).astype(jnp.bfloat16),
    }
    mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.NamedSharding(mesh, jax.P('x', 'y'))
    split = jax.tree.map(lambda a: jax.device_put(a, place), tree)
    assert int(checksum.tree_sum(split)) == int(checksum.tree_sum(jax.tree.map(jnp.asarray, tree)))
    assert int(checksum.array_sums(split['b'])) == checksum.host_sum(tree['b'])
    text = checksum.tree_sum.lower(split).compile().as_text()
    assert 'all-gather' not in text and 'all-reduce' in text
""")


def test_split_arrays_have_the_sums_of_whole_ones_and_are_not_gathered():
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  subprocess.run([sys.executable, '-c', PROGRAM], check=True, env=environment)


def test_leaves_that_change_places_show():
  a = jnp.arange(3.0)
  b = jnp.arange(3.0) + 1
  assert int(checksum.tree_sum([a, b])) != int(checksum.tree_sum([b, a]))
