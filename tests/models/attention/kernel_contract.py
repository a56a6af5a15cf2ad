"""What every tree attention kernel must do, on a CPU in interpret mode; the tests of each kernel
call these.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models.attention import reference
from tests.models.attention.test_tree_blocks import random_ends

NAMES = ('out', 'dq', 'dk', 'dv')


def forests(T: int) -> np.ndarray:
  """Ends of three rows: a random forest, plain causal, many short trees with a tail of padding."""
  rng = np.random.default_rng(1)
  short = np.arange(1, T + 1)
  start = 0
  while start < T - 10:
    size = int(rng.integers(1, 10))
    short[start : start + size] = start + random_ends(rng, size)
    start += size
  return np.stack([random_ends(rng, T), np.full(T, T), short]).astype(np.int32)


def inputs(end: np.ndarray, N: int, K: int, H: int, dtype=jnp.float32):
  """Unit normal q, k, v, dout [B, T, heads, H]."""
  rng = np.random.default_rng(2)
  return [jnp.asarray(rng.standard_normal((*end.shape, heads, H)), dtype) for heads in (N, K, K, N)]


def out_and_gradients(attend, q, k, v, dout):
  """(out, dq, dk, dv) as float32 numpy arrays."""

  def both(q, k, v, dout):
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(dout)

  return [np.asarray(x, np.float32) for x in jax.jit(both)(q, k, v, dout)]


def reference_results(end, q, k, v, dout):
  """The same from the attention that holds every score."""
  mask_BTT = reference.tree_mask(jnp.asarray(end))
  return out_and_gradients(
    lambda q, k, v: reference.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask_BTT), q, k, v, dout
  )


def check_equals_the_reference(tree_attention, N, K, H, T, **options):
  end = forests(T)
  arrays = inputs(end, N, K, H)
  ours = out_and_gradients(
    lambda q, k, v: tree_attention(q, k, v, jnp.asarray(end), interpret=True, **options), *arrays
  )
  for name, value, wanted in zip(NAMES, ours, reference_results(end, *arrays), strict=True):
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def check_bfloat16_is_near_the_float32_reference(tree_attention, **options):
  """On inputs that bfloat16 holds exactly, so that only the kernel's own rounding is measured.

  bfloat16 keeps 8 bits: a rounded number is off by up to 2^-9 of itself. An entry of the result is
  rounded once, and so are the probabilities or their gradients in its sum, and the output that
  delta is taken from: 2^-7.4 where all three err the same way. Measured, of the largest entry:
  2^-8.7 (out), 2^-8.0 (dq), 2^-7.8 (dk), 2^-8.6 (dv), 0.018 at most.
  """
  end = forests(75)
  arrays = inputs(end, N=4, K=2, H=32, dtype=jnp.bfloat16)
  ours = out_and_gradients(
    lambda q, k, v: tree_attention(q, k, v, jnp.asarray(end), interpret=True, **options), *arrays
  )
  wanted = reference_results(end, *(x.astype(jnp.float32) for x in arrays))
  for name, value, exact in zip(NAMES, ours, wanted, strict=True):
    error = np.abs(value - exact).max() / np.abs(exact).max()
    assert error < 2**-7, (name, error)


def check_skips_invisible_blocks(tree_attention, block: int, **options):
  """Three trees of two blocks each: all that the second holds is NaN, and 0 x NaN would show
  anywhere it was touched.
  """
  T = 6 * block
  second = slice(2 * block, 4 * block)
  end = np.repeat([[2 * block, 4 * block, 6 * block]], 2 * block, axis=1).astype(np.int32)
  arrays = inputs(end, N=4, K=2, H=16)
  broken = [x.at[:, second].set(jnp.nan) for x in arrays]
  attend = jax.jit(
    lambda q, k, v: tree_attention(q, k, v, jnp.asarray(end), interpret=True, **options)
  )
  others = np.r_[0 : second.start, second.stop : T]
  results = zip(
    NAMES, out_and_gradients(attend, *broken), out_and_gradients(attend, *arrays), strict=True
  )
  for name, value, wanted in results:
    assert np.isfinite(wanted).all() and np.isnan(value[:, second]).all(), name
    np.testing.assert_array_equal(value[:, others], wanted[:, others], err_msg=name)


def compiled_footprints(
  kernel: str, target: str, package: str, lengths: list[int]
) -> list[dict[str, int]]:
  """What compile_kernel.py prints for each row length; skips where the compiler, a Python package,
  is not installed.
  """
  if importlib.util.find_spec(package) is None:
    pytest.skip(f'no compiler for {target}: pip install -e .[aot]')
  program = pathlib.Path(__file__).parent / 'compile_kernel.py'
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(program.parents[2])}
  done = subprocess.run(
    [sys.executable, str(program), kernel, target, *map(str, lengths)],
    env=environment,
    timeout=300,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return [json.loads(line) for line in done.stdout.splitlines()]
