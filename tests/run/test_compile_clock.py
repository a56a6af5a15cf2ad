"""What is compiled inside is measured once, and what is compiled outside is not."""

import concurrent.futures
import time

import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.run.compile_clock import Intervals, compiling


def test_only_what_is_inside_counts():
  ones = jnp.ones(3)
  with compiling() as first:
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 3)(ones))
  assert first.seconds > 0
  found = first.seconds
  function = jax.jit(lambda x: jnp.cos(x) * 5)
  jax.block_until_ready(function(ones))
  assert first.seconds == found
  with compiling() as second:
    jax.block_until_ready(function(ones))
  assert second.seconds == 0


def test_threads_side_by_side_take_no_longer_than_the_block():
  lowered = [jax.jit(lambda x, n=n: jnp.sin(x) + n).lower(jnp.ones(n + 3)) for n in range(6)]
  begin = time.perf_counter()
  with compiling() as measured, concurrent.futures.ThreadPoolExecutor(6) as pool:
    list(pool.map(lambda one: one.compile(), lowered))
  assert 0 < measured.seconds <= time.perf_counter() - begin


@given(
  st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12),
  st.integers(0, 30),
  st.integers(0, 30),
)
def test_a_moment_counts_once_however_many_compile_in_it(spans, begin, length):
  spans = sorted(((min(span), max(span)) for span in spans), key=lambda span: span[1])
  intervals = Intervals()
  seconds = set()
  for start, end in spans:
    intervals.add(start, end)
    seconds.update(range(start, end))
  inside = seconds & set(range(begin, begin + length))
  assert intervals.covered(begin, begin + length) == len(inside)
