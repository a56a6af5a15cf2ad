"""Attention over pages: the plain one against a softmax in numpy, the kernels against the plain one
in interpret mode, and both kernels compiled for accelerators.
"""

import functools
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
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.models.attention import pages, pages_gpu, pages_tpu
from dcore_jax.models.attention.reference import MASKED_SCORE

KERNELS = {'gpu': pages_gpu.partial_pages, 'tpu': pages_tpu.partial_pages}
LAYER = jnp.int32(1)


def drawn(*, R, K, T, H, P, C, dtype=jnp.float32, seed=0):  # noqa: PLR0913 - sizes
  """Queries and a cache of unit normal numbers, and reads of any lengths, with limits.

  Row 0 reads no page, and row 1 all P.
  """
  rng = np.random.default_rng(seed)
  N = R * P + 1
  q = jnp.asarray(rng.normal(size=(R, K, T, H)), dtype)
  k, v = (jnp.asarray(rng.normal(size=(2, N, K, C, H)), dtype) for _ in range(2))
  count_R = rng.integers(0, P + 1, R)
  count_R[:2] = (0, P)
  start_R = rng.integers(0, 100, R)
  return (
    q,
    k,
    v,
    reads(
      rng.permutation(N)[: R * P].reshape(R, P),
      start_R,
      count_R,
      start_R[:, None] + rng.integers(-5, P * C + 5, (R, T)),
      start_R + rng.integers(1, P * C + 5, R),
    ),
  )


def reads(*numbers):
  return pages.PageReads(*(jnp.asarray(x, jnp.int32) for x in numbers))


def plain(q, k, v, reads, layer=1):
  """(top, total, out) with one query and one slot after the other, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  R, K, T, H = q.shape
  C = k.shape[3]
  top = np.full((R, K, T), MASKED_SCORE)
  total = np.zeros((R, K, T))
  out = np.zeros((R, K, T, H))
  for r, kk, t in np.ndindex(R, K, T):
    places = np.arange(int(reads.count_R[r]) * C)
    position = int(reads.start_R[r]) + places
    seen = position <= int(reads.position_RT[r, t])
    if reads.limit_R is not None:
      seen &= position < int(reads.limit_R[r])
    places = places[seen]
    if not len(places):
      continue
    page = np.asarray(reads.pages_RP)[r, places // C]
    scores = k[layer, page, kk, places % C] @ q[r, kk, t] / np.sqrt(H)
    top[r, kk, t] = scores.max()
    weights = np.exp(scores - scores.max())
    total[r, kk, t] = weights.sum()
    out[r, kk, t] = weights @ v[layer, page, kk, places % C]
  return pages.Partial(top, total, out)


def check(found, wanted, tolerance=1e-5):
  """Scores and the result to `tolerance`, sums relative to it: they are as large as the row."""
  np.testing.assert_allclose(found.top_RKT, wanted.top_RKT, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(found.total_RKT, wanted.total_RKT, rtol=tolerance, atol=tolerance)
  total = np.maximum(np.asarray(wanted.total_RKT), 1)[..., None]
  np.testing.assert_allclose(
    np.asarray(found.out_RKTH) / total, np.asarray(wanted.out_RKTH) / total, rtol=0, atol=tolerance
  )


@functools.cache
def compiled_reference():
  """Compiled once for the shapes of all examples."""
  return jax.jit(pages.reference)


# 3 queries take the way of matrix-vector products, 5 that of one matrix product.
@pytest.mark.parametrize('T', [3, 5])
@settings(max_examples=50)
@given(data=st.data())
def test_the_reference_is_a_softmax_over_what_is_seen(T, data):
  R, K, P, C, H = (2, 2, 3, 4, 6)
  q, k, v, _ = drawn(R=R, K=K, T=T, H=H, P=P, C=C)
  numbers = functools.partial(st.lists, max_size=R, min_size=R)
  start_R = data.draw(numbers(st.integers(0, 1000)))
  offset_RT = data.draw(numbers(st.lists(st.integers(-3, P * C + 3), min_size=T, max_size=T)))
  limit_R = data.draw(numbers(st.integers(-1, P * C + 1)))
  read = reads(
    # Rows may read the same page.
    data.draw(numbers(st.lists(st.integers(0, R * P), min_size=P, max_size=P))),
    start_R,
    data.draw(numbers(st.integers(0, P))),
    np.add(np.reshape(start_R, (R, 1)), offset_RT),
    np.add(start_R, limit_R),
  )
  found = compiled_reference()(q, k, v, LAYER, read)
  check(found, plain(q, k, v, read))


def test_without_a_limit_positions_alone_decide():
  q, k, v, read = drawn(R=3, K=1, T=2, H=8, P=4, C=4)
  read = read._replace(limit_R=None)
  check(pages.partial_pages(q, k, v, LAYER, read), plain(q, k, v, read))


@settings(max_examples=50)
@given(place=st.integers(0, 4), seed=st.integers(0, 3))
def test_two_places_joined_are_the_whole(place, seed):
  q, k, v, read = drawn(R=3, K=2, T=3, H=8, P=4, C=4, seed=seed)
  first = read._replace(count_R=jnp.minimum(read.count_R, place))
  # The pages behind `place` move to the front.
  rest = read._replace(
    pages_RP=jnp.roll(read.pages_RP, -place, axis=1),
    start_R=read.start_R + place * 4,
    count_R=jnp.maximum(read.count_R - place, 0),
  )
  attend = compiled_reference()
  parts = [attend(q, k, v, LAYER, part) for part in (first, rest)]
  whole = attend(q, k, v, LAYER, read)
  check(pages.merge_partials(*parts), whole)
  wanted = plain(q, k, v, read)
  np.testing.assert_allclose(
    pages.finish(pages.merge_partials(*parts)),
    wanted.out_RKTH / np.maximum(wanted.total_RKT, 1e-30)[..., None],
    atol=1e-5,
  )


# T of a decode step, of lanes that share a trunk, and of a piece of a prefill; heads of 48 are in
# pieces on a GPU, and pages of 128 slots have them in rows on a TPU.
SHAPES = [
  dict(R=3, K=2, T=4, H=48, P=5, C=16),
  dict(R=2, K=3, T=70, H=64, P=6, C=32),
  dict(R=2, K=1, T=5, H=16, P=3, C=128),
]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kernel', KERNELS)
def test_kernels_equal_the_reference(kernel, shape):
  q, k, v, read = drawn(**shape)
  kernel = functools.partial(KERNELS[kernel], interpret=True)
  wanted = jax.jit(pages.reference)(q, k, v, LAYER, read)
  check(jax.jit(kernel)(q, k, v, LAYER, read), wanted)


@pytest.mark.parametrize('kernel', KERNELS)
def test_kernels_in_bfloat16_are_near_the_float32_reference(kernel):
  q, k, v, read = drawn(R=3, K=2, T=4, H=48, P=5, C=16, dtype=jnp.bfloat16)
  found = jax.jit(functools.partial(KERNELS[kernel], interpret=True))(q, k, v, LAYER, read)
  # On inputs that bfloat16 holds exactly. The weights are rounded for their product alone: an
  # entry is off by 2^-9 of the sum of |weight * value|.
  wanted = plain(q, k, v, read)
  np.testing.assert_allclose(found.top_RKT, wanted.top_RKT, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found.total_RKT, wanted.total_RKT, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    pages.finish(found),
    wanted.out_RKTH / np.maximum(wanted.total_RKT, 1)[..., None],
    rtol=0,
    atol=2**-8,
  )


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_rows_of_any_length_in_steps_and_shares(seed):
  # Blocks of 16 queries, so that a row has two; shares of a page, and steps of two.
  q, k, v, read = drawn(R=3, K=1, T=20, H=16, P=5, C=16, seed=seed)
  wanted = compiled_reference()(q, k, v, LAYER, read)
  for kernel in sharing_kernels():
    check(kernel(q, k, v, LAYER, read), wanted)


@functools.cache
def sharing_kernels():
  return (
    jax.jit(functools.partial(pages_gpu.partial_pages, block_q=16, shares=3, interpret=True)),
    jax.jit(functools.partial(pages_tpu.partial_pages, block_q=16, step_pages=2, interpret=True)),
  )


def test_prepared_steps_change_nothing():
  q, k, v, read = drawn(R=3, K=2, T=4, H=16, P=5, C=16)
  kernel = jax.jit(functools.partial(pages_tpu.partial_pages, interpret=True))
  # Steps of other sizes than the program would choose: it takes what is prepared.
  prepared = pages_tpu.prepare(read, 2, k, step_pages=2)
  check(kernel(q, k, v, LAYER, prepared), kernel(q, k, v, LAYER, read))


@pytest.mark.parametrize('kernel', KERNELS)
def test_kernels_read_no_page_that_nobody_sees(kernel):
  """Such pages are NaN: 0 * NaN would show wherever one was touched."""
  q, k, v, read = drawn(R=4, K=2, T=4, H=16, P=6, C=16)
  attend = jax.jit(functools.partial(KERNELS[kernel], interpret=True))
  wanted = attend(q, k, v, LAYER, read)
  # In units of pages of the row: whole pages up to the last slot of any query.
  last_R = np.minimum(read.position_RT.max(axis=1), read.limit_R - 1) - read.start_R
  seen = set()
  for row, (last, count) in enumerate(zip(last_R, read.count_R, strict=True)):
    places = min(int(last) // 16 + 1, int(count))
    seen.update(np.asarray(read.pages_RP)[row, : max(places, 0)].tolist())
  unseen = jnp.asarray([page for page in range(k.shape[1]) if page not in seen])
  assert 0 < len(seen) and 0 < len(unseen)
  broken = [x.at[0].set(jnp.nan).at[1, unseen].set(jnp.nan) for x in (k, v)]
  for value, exact in zip(attend(q, *broken, LAYER, read), wanted, strict=True):
    np.testing.assert_array_equal(value, exact)


@pytest.mark.parametrize('kernel', KERNELS)
def test_int8_is_attention_over_the_numbers_it_stands_for(kernel):
  q, k, v, read = drawn(R=3, K=2, T=4, H=48, P=5, C=32)
  (k8, k_scale), (v8, v_scale) = (pages.quantize(x) for x in (k, v))
  wanted = plain(q, k8 * k_scale[..., None], v8 * v_scale[..., None], read)
  for attend in (pages.reference, functools.partial(KERNELS[kernel], interpret=True)):
    check(jax.jit(attend)(q, k8, v8, LAYER, read, k_scale, v_scale), wanted)


def test_quantizing_errs_by_half_a_scale_and_keeps_zeros():
  x = np.random.default_rng(0).normal(size=(50, 3, 64)).astype(np.float32)
  x[0] = 0
  numbers, scale = pages.quantize(jnp.asarray(x))
  assert numbers.dtype == jnp.int8 and scale.shape == (50, 3)
  np.testing.assert_allclose(scale, np.abs(x).max(axis=-1) / 127, rtol=1e-6)
  found = np.asarray(numbers, np.float32) * np.asarray(scale)[..., None]
  assert (np.abs(found - x) <= np.asarray(scale)[..., None] * 0.5001).all()
  assert (found[0] == 0).all() and (np.abs(numbers).max(axis=-1)[1:] == 127).all()


def test_writing_changes_one_slot_a_lane():
  cache = jnp.zeros((2, 5, 3, 4, 6))
  new = jnp.arange(2 * 3 * 6.0).reshape(2, 3, 6) + 1
  # The second lane's page is none.
  written = pages.write(cache, new, LAYER, jnp.asarray([4, 5]), jnp.asarray([2, 1]))
  np.testing.assert_array_equal(written, cache.at[1, 4, :, 2].set(new[0]))
  scales = pages.write(cache[..., 0], new[..., 0], LAYER, jnp.asarray([4, 0]), jnp.asarray([2, 1]))
  np.testing.assert_array_equal(scales[1, 0, :, 1], new[1, :, 0])


def test_what_does_not_fit_is_named():
  q, k, v, read = drawn(R=2, K=1, T=2, H=16, P=2, C=8)
  with pytest.raises(ValueError, match=r'do not make \[R, K, T, H\] and \[L, N, K, C, H\] twice'):
    pages.reference(q, k, v[:, 1:], LAYER, read)
  with pytest.raises(ValueError, match='are not of 1 rows of 2 queries'):
    pages.reference(q[:1], k, v, LAYER, read)
  numbers, scale = pages.quantize(k)
  with pytest.raises(ValueError, match='int8, and it alone, needs k_scale'):
    pages.reference(q, numbers, numbers, LAYER, read)
  with pytest.raises(ValueError, match='int8, and it alone, needs v_scale'):
    pages.reference(q, numbers, numbers, LAYER, read, scale)
  with pytest.raises(ValueError, match='pages of 8 slots and heads of 16: a tensor core wants'):
    pages_gpu.partial_pages(q, k, v, LAYER, read)
  with pytest.raises(
    ValueError, match='pages of 8 slots with heads of 16 float32: a TPU wants 128'
  ):
    pages_tpu.partial_pages(q, k, v, LAYER, read)
  _, k, _, _ = drawn(R=2, K=1, T=2, H=16, P=2, C=128)
  long = read._replace(pages_RP=jnp.zeros((2, 1 << 16), jnp.int32))
  with pytest.raises(ValueError, match='2 blocks of queries with 65536 pages take 589824 bytes'):
    pages_tpu.partial_pages(q, k, k, LAYER, long)
  huge = jax.ShapeDtypeStruct((2, (1 << 16) + 1, 1, 1 << 10, 16), jnp.int8)
  scales = jax.ShapeDtypeStruct(huge.shape[:4], jnp.float32)
  with pytest.raises(ValueError, match='2147516416 int8 keys: between 2'):
    jax.eval_shape(pages_gpu.partial_pages, q, huge, huge, LAYER, read, scales, scales)


def compiled(target: str, package: str, *cases: str) -> list[dict]:
  """What compile_pages.py prints for each case; skips where the compiler is not installed."""
  if importlib.util.find_spec(package) is None:
    pytest.skip(f'no compiler for {target}: pip install -e .[aot]')
  program = pathlib.Path(__file__).parent / 'compile_pages.py'
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(program.parents[3])}
  done = subprocess.run(
    [sys.executable, str(program), target, *cases],
    env=environment,
    timeout=300,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


# Keys and values are 1.2 GB and more. What is left are queries, lists and results.
@pytest.mark.parametrize(
  'target,package,slots',
  [('a100:1', 'jax_cuda12_plugin', 64), ('v5p:2x2x1', 'libtpu', 128)],
)
def test_compiles_and_copies_no_page(target, package, slots):
  cases = ('bfloat16:64:128:4', 'float32:64:128:4', 'bfloat16:128:64:32', f'int8:{slots}:128:4')
  for report in compiled(target, package, *cases):
    assert report['kernel'] and report['arguments'] > 1 << 30, report
    assert report['temporary'] < 8 << 20, report
