import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcore_jax.train import checkpoint


def some_state(seed: int = 0):
  rng = np.random.default_rng(seed)
  params = {
    'embed': jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16),
    'layers': {'q': jnp.asarray(rng.standard_normal((2, 32, 4, 8)), jnp.float32)},
  }
  tiny = jnp.array([1e-45, -0.0, jnp.inf, jnp.nan], jnp.float32)
  return {
    'params': params,
    'opt_state': optax.adamw(1e-3).init(params),
    'odd_values': tiny,
    'key': jax.random.key(seed),
    'step': 7,
    'loss': 0.1,
    'done': True,
    'order': rng.permutation(50),
    'count': np.int64(2**40),
    'nothing_yet': np.zeros((0, 3), np.float32),
  }


def assert_bit_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert type(a) is type(b)
    if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a = jax.random.key_data(a)
      b = jax.random.key_data(b)
    a = np.asarray(a)
    b = np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def largest_file(folder):
  return max((f for f in folder.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)


def test_round_trip_is_bit_exact_and_values_of_the_example_are_not_used(tmp_path):
  state = some_state()
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.save(7, state, {'epoch': 1, 'row': 250})
  with checkpoint.Checkpoints(tmp_path) as opened:
    assert opened.latest_step() == 7
    tree, extra, step = opened.restore(some_state(seed=1))
  assert (extra, step) == ({'epoch': 1, 'row': 250}, 7)
  assert_bit_equal(tree, state)


def test_restores_into_an_abstract_tree(tmp_path):
  params = some_state()['params']
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, params)
    tree, extra, _ = checkpoints.restore(jax.eval_shape(lambda: params))
  assert extra == {}
  assert_bit_equal(tree, params)


def test_keeps_the_newest_and_replaces_an_equal_step(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest_step() is None and checkpoints.restore({'x': 1}) is None
    for step in (1, 2, 3):
      checkpoints.save(step, {'x': step})
    checkpoints.save(3, {'x': 33})
    assert checkpoints.all_steps() == [2, 3]
    assert checkpoints.restore({'x': 0})[0] == {'x': 33}
    assert checkpoints.restore({'x': 0}, step=2)[0] == {'x': 2}
    with pytest.raises(ValueError, match='already holds step 3'):
      checkpoints.save(2, {'x': 0})
    with pytest.raises(ValueError, match=r'no step 1; it has \[2, 3\]'):
      checkpoints.restore({'x': 0}, step=1)


def truncate(folder):
  file = largest_file(folder)
  file.write_bytes(file.read_bytes()[:100])


def flip_a_bit(folder):
  file = largest_file(folder)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def lose_the_record(folder):
  shutil.rmtree(folder / 'record')


# Orbax reads leaves concurrently: the others' failures are never looked at, and Python says so when
# they are collected.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', [truncate, flip_a_bit, lose_the_record])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
  older = some_state(1)
  newer = some_state(2)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, older, {'at': 1})
    checkpoints.save(2, newer, {'at': 2})
  damage(tmp_path / '2')
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match='cannot be read'):
      checkpoints.restore(older, step=2)
    with pytest.warns(UserWarning, match='going back to step 1'):
      tree, extra, step = checkpoints.restore(older)
    assert (extra, step) == ({'at': 1}, 1)
    assert_bit_equal(tree, older)
    # The step is free again, and the damaged files are still there to be looked at.
    checkpoints.save(2, newer)
    assert checkpoints.all_steps() == [1, 2] and (tmp_path / '2.unreadable').is_dir()
    assert_bit_equal(checkpoints.restore(older)[0], newer)
  gc.collect()  # here, not in whichever test comes next


def test_nothing_readable_starts_afresh_with_a_warning(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, some_state())
  truncate(tmp_path / '1')
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.warns(UserWarning, match='starting afresh'):
      assert checkpoints.restore(some_state()) is None


def test_a_sound_checkpoint_of_another_model_is_an_error_that_names_every_difference(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(4), 'old': 1})
    other = {'a': jnp.zeros((2, 4)), 'b': jnp.zeros(4, jnp.bfloat16), 'new': 1}
    with pytest.raises(ValueError) as error:
      checkpoints.restore(other)
    for part in (
      'new is missing',
      'old is not expected',
      'a is float32[2, 3], expected float32[2, 4]',
      'b is float32[4], expected bfloat16[4]',
    ):
      assert part in str(error.value)
    assert checkpoints.all_steps() == [1]


def test_text_is_refused_as_a_leaf(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match='note is a str'):
      checkpoints.save(1, {'note': 'hello'})
    assert checkpoints.latest_step() is None


def test_keeps_the_best_beside_the_newest(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step, score in enumerate((0.1, 0.9, 0.3, None, 0.9, 0.2, 0.4)):
      checkpoints.save(step, {'x': step}, score=score)
    assert checkpoints.best_step == 4
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.all_steps() == [4, 5, 6] and checkpoints.best_step == 4
    checkpoints.save(7, {'x': 7}, score=1.0)
    checkpoints.wait()
    assert checkpoints.all_steps() == [6, 7] and checkpoints.best_step == 7


def test_what_is_saved_may_be_donated_at_once(tmp_path):
  """Writing goes on in the background, on copies."""
  add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
  tree = {str(i): jnp.full((256, 1024), float(i)) for i in range(8)}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, tree)
    for _ in range(5):
      tree = add(tree)
    jax.block_until_ready(tree)
    restored, _, _ = checkpoints.restore(tree)
  for name, leaf in restored.items():
    np.testing.assert_array_equal(leaf, np.full((256, 1024), float(name)))


def test_a_manifest_without_sums_is_taken_as_it_is():
  """As checkpoints had it that carried a CRC-32."""
  values = {'a': np.arange(3), 'b': np.arange(4)}
  described = {'a': {'crc32': 7}, 'b': {'sum': 1}}
  with pytest.raises(ValueError, match='bytes of b'):
    checkpoint._check_sums(values, described)
  checkpoint._check_sums({'a': values['a']}, described)
