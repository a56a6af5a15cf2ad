"""The decoder against itself: cache against rows, packed forests against separate rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig

CONFIG = DecoderConfig(
  vocab_size=61,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=10,
  rope_theta=1000.0,
  initializer_range=0.2,
)
EXTEND = jax.jit(decoder.extend, static_argnames=('config', 'span'), donate_argnames='cache')
HIDDEN = jax.jit(decoder.hidden_states, static_argnames=('config', 'execution'))


@functools.cache
def params():
  fresh = decoder.init_params(CONFIG, jax.random.key(1))
  leaves, treedef = jax.tree.flatten(fresh)
  noise = [
    0.1 * jax.random.normal(jax.random.key(index), leaf.shape) for index, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(
    treedef, [leaf + extra for leaf, extra in zip(leaves, noise, strict=True)]
  )


def rows(tokens):
  """hidden_states of plain causal rows, as numpy."""
  tokens = jnp.asarray(tokens)
  B, T = tokens.shape
  position = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  return np.asarray(HIDDEN(params(), CONFIG, tokens, position, jnp.full((B, T), T)))


def some_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape)


def test_prefill_extends_and_decode_steps_equal_one_row():
  tokens = some_tokens(3, 14)
  want = rows(tokens)
  cache = decoder.init_cache(CONFIG, 3, 24)
  got = []
  for start, stop in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 14)):
    starts = jnp.full((3,), start)
    hidden, cache = EXTEND(
      params(), CONFIG, cache, jnp.asarray(tokens[:, start:stop]), starts, span=16
    )
    got.append(hidden)
  np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-5)


def test_right_padded_lanes_with_different_starts():
  lengths = np.array([3, 7, 5])
  tokens = some_tokens(3, 12)
  want = rows(tokens)
  padded = np.where(np.arange(8)[None] < lengths[:, None], tokens[:, :8], 60)
  cache = decoder.init_cache(CONFIG, 3, 16)
  hidden, cache = EXTEND(params(), CONFIG, cache, jnp.asarray(padded), jnp.zeros(3, jnp.int32))
  for lane, length in enumerate(lengths):
    np.testing.assert_allclose(hidden[lane, :length], want[lane, :length], atol=1e-5)
  for step in range(
    5
  ):  # each lane decodes from its own length, over the slots where padding was written
    at = lengths + step
    token = tokens[np.arange(3), at]
    hidden, cache = EXTEND(
      params(), CONFIG, cache, jnp.asarray(token)[:, None], jnp.asarray(at), span=12
    )
    np.testing.assert_allclose(hidden[:, 0], want[np.arange(3), at], atol=1e-5)


@pytest.mark.parametrize('held', ['stacked', 'turned'])
def test_lanes_that_are_extended_by_single_tokens_equal_whole_rows(held):
  """Each lane from its own length on, behind what was read as a row."""
  lengths = np.array([7, 4, 1])
  tokens = some_tokens(3, 10, seed=1)
  _, filled = EXTEND(
    params(),
    CONFIG,
    decoder.init_cache(CONFIG, 3, 12),
    jnp.asarray(tokens[:, :7]),
    jnp.zeros(3, int),
  )
  cache = decoder.KVCache(tuple(filled.k), tuple(filled.v))
  weights = decoder.turn(params()) if held == 'turned' else params()
  step = jax.jit(decoder.extend_each, static_argnums=1)
  for slot in range(3):
    at = lengths + slot
    token_B = jnp.asarray(tokens[np.arange(3), at])
    hidden, cache = step(weights, CONFIG, cache, token_B, jnp.asarray(at))
    np.testing.assert_allclose(
      decoder.logits(weights, hidden), hidden @ decoder.head_matrix(params()).T, atol=1e-5
    )
    for lane in range(3):
      whole = tokens[lane, : at[lane] + 1]
      np.testing.assert_allclose(hidden[lane], rows(whole[None])[0, -1], atol=1e-5)
  # Beyond the lanes nothing is written.
  _, after = step(weights, CONFIG, cache, token_B, jnp.full(3, 12))
  jax.tree.map(np.testing.assert_array_equal, after, cache)


@pytest.mark.parametrize('start, T', [(8, 1), (100, 1), (6, 4), (8, 3)])
def test_writes_beyond_the_cache_are_dropped(start, T):
  cache = decoder.init_cache(CONFIG, 2, 8)
  cache = jax.tree.map(lambda x: x + 1, cache)
  starts = jnp.array([start, 0])
  _, after = EXTEND(params(), CONFIG, cache, jnp.asarray(some_tokens(2, T)), starts)
  kept = min(start, 8)
  np.testing.assert_array_equal(after.k[:, 0, :, :kept], 1)
  np.testing.assert_array_equal(after.v[:, 0, :, :kept], 1)
  assert not np.any(np.all(np.asarray(after.v[:, 1, :, :T]) == 1, axis=-1))
  np.testing.assert_array_equal(after.v[:, 1, :, T:], 1)


@pytest.mark.parametrize('span', [0, 9])
def test_span_outside_the_cache_is_refused(span):
  with pytest.raises(ValueError, match='span'):
    decoder.extend(
      params(),
      CONFIG,
      decoder.init_cache(CONFIG, 1, 8),
      jnp.zeros((1, 1), jnp.int32),
      jnp.zeros(1, jnp.int32),
      span=span,
    )


def test_the_cache_is_updated_in_place():
  cache = decoder.init_cache(CONFIG, 4, 4096)
  bytes_of_cache = cache.k.nbytes + cache.v.nbytes
  lowered = EXTEND.lower(
    params(), CONFIG, cache, jnp.zeros((4, 1), jnp.int32), jnp.zeros(4, jnp.int32), span=16
  )
  memory = lowered.compile().memory_analysis()
  assert memory.alias_size_in_bytes >= bytes_of_cache
  assert memory.temp_size_in_bytes < bytes_of_cache / 10


EXECUTIONS = [
  decoder.Execution(),
  decoder.Execution(remat='full'),
  decoder.Execution(unroll=False),
  decoder.Execution(attention='reference', unroll=False),
]


@pytest.mark.parametrize('execution', EXECUTIONS)
def test_packed_forest_equals_separate_rows(execution):
  """A trunk of 4 with two branches (3 and 2 tokens), a second root of 3 tokens, and padding, in one
  row.
  """
  tokens = some_tokens(15, seed=3)
  end = np.array([9, 9, 9, 9, 7, 7, 7, 9, 9, 12, 12, 12, 13, 14, 15])
  position = np.array([0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 0, 0, 0])
  packed = np.asarray(HIDDEN(params(), CONFIG, tokens[None], position[None], end[None], execution))[
    0
  ]
  for path in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7, 8], [9, 10, 11]):
    np.testing.assert_allclose(packed[path], rows(tokens[path][None])[0], atol=1e-5)


def test_gradients_agree_with_and_without_remat_and_unrolling():
  tokens = jnp.asarray(some_tokens(2, 6))
  position = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))

  def loss(values, execution):
    return jnp.sum(
      jnp.sin(
        decoder.hidden_states(values, CONFIG, tokens, position, jnp.full((2, 6), 6), execution)
      )
    )

  want = jax.jit(jax.grad(functools.partial(loss, execution=EXECUTIONS[-1])))(params())
  for execution in EXECUTIONS[:-1]:
    got = jax.jit(jax.grad(functools.partial(loss, execution=execution)))(params())
    # Entries reach 26, where float32 has steps of 2e-6: sums in another order differ by more than
    # 2e-5 on some CPUs.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5), got, want)


def test_unknown_executions_are_refused():
  with pytest.raises(ValueError, match="execution.remat = 'sometimes'"):
    decoder.Execution(remat='sometimes')
  with pytest.raises(ValueError, match="attention = 'flush' is not one of 'auto', 'blockwise'"):
    decoder.Execution(attention='flush')


def test_padding_that_nothing_may_see_gives_finite_gradients():
  end = jnp.array([[2, 2, 0, 0]])

  def total(values):
    position = jnp.zeros((1, 4), jnp.int32)
    return jnp.sum(
      decoder.hidden_states(values, CONFIG, jnp.zeros((1, 4), jnp.int32), position, end)
    )

  assert all(
    bool(jnp.all(jnp.isfinite(leaf)))
    for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params()))
  )


def test_bfloat16_parameters_stay_close():
  tokens = jnp.asarray(some_tokens(2, 9))
  position = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
  halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
  hidden = HIDDEN(halves, CONFIG, tokens, position, jnp.full((2, 9), 9))
  assert hidden.dtype == jnp.bfloat16
  np.testing.assert_allclose(hidden.astype(jnp.float32), rows(tokens), atol=0.25)


def test_init_follows_the_abstract_tree_and_the_key():
  untied = DecoderConfig(**{**CONFIG.__dict__, 'tie_word_embeddings': False})
  specs = decoder.abstract_params(untied, jnp.bfloat16)
  drawn = decoder.init_params(untied, jax.random.key(0), jnp.bfloat16)
  assert jax.tree.structure(specs) == jax.tree.structure(drawn)
  for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(drawn), strict=True):
    assert (spec.shape, spec.dtype) == (leaf.shape, leaf.dtype) and len(spec.axes) == len(
      spec.shape
    )
  assert sum(leaf.size for leaf in jax.tree.leaves(drawn)) == untied.param_count
  assert decoder.head_matrix(drawn) is drawn['head']
  assert float(jnp.std(drawn['layers']['up'].astype(jnp.float32))) == pytest.approx(0.2, rel=0.05)
  assert not np.array_equal(drawn['layers']['up'], drawn['layers']['gate'])
  again = decoder.init_params(untied, jax.random.key(0), jnp.bfloat16)
  jax.tree.map(np.testing.assert_array_equal, drawn, again)
