"""Optimizers by name: schedules, decay masks, Muon on stacked matrices, skipped steps."""

import jax
import numpy as np
import optax
import pytest

from dcore_jax.learn import optimizer


def updated(tx, params, grads):
  """(state before, state after one update, metrics)."""
  state = optimizer.init_state(params, tx)
  return state, *jax.jit(lambda state, grads: optimizer.apply_gradients(tx, state, grads))(
    state, grads
  )


def noise(params):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)


def test_cosine_schedule_with_warmup_and_floor():
  rate = optimizer.Schedule('cosine', warmup=0.1, floor=0.01, total_steps=100).rate(1.0)
  values = np.array([rate(step) for step in range(101)])
  assert 0 < values[0] < values[5] < values[9] < 1 and values.argmax() == 10
  np.testing.assert_allclose([values[10], values[55], values[100]], [1, 0.505, 0.01], atol=1e-6)


def test_constant_schedule_with_warmup():
  rate = optimizer.Schedule(warmup=0.5, total_steps=8).rate(2.0)
  np.testing.assert_allclose(
    [rate(step) for step in range(6)], [0.4, 0.8, 1.2, 1.6, 2, 2], rtol=1e-6
  )


def test_weight_decay_spares_norms(params):
  tx = optimizer.make_optimizer('adamw', 0.1, weight_decay=0.5)
  _, state, _ = updated(tx, params, jax.tree.map(np.zeros_like, params))
  np.testing.assert_allclose(state.params['embed'], params['embed'] * 0.95, rtol=1e-6)
  np.testing.assert_array_equal(state.params['layers']['q_norm'], params['layers']['q_norm'])
  np.testing.assert_array_equal(state.params['final_norm'], params['final_norm'])


def test_muon_orthogonalises_each_layer_for_itself():
  """Layer 1 of the update does not depend on layer 0's gradient, and its matrix has nearly equal
  singular values.
  """
  shapes = {'embed': (5, 8), 'layers': {'q': (2, 8, 2, 4), 'o': (2, 2, 4, 8), 'gate': (2, 8, 12)}}
  params = jax.tree.map(
    lambda shape: np.zeros(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  grads = noise(params)

  def triple(g):
    return np.concatenate([3 * g[:1], g[1:]])

  tx = optimizer.make_optimizer('muon', 1.0, adam_learning_rate=1e-3)
  update = jax.jit(
    lambda grads: optimizer.apply_gradients(tx, optimizer.init_state(params, tx), grads)[0].params
  )
  plain = update(grads)
  scaled = update(grads | {'layers': jax.tree.map(triple, grads['layers'])})
  for name, shape in {'q': (8, 8), 'o': (8, 8), 'gate': (8, 12)}.items():
    first = plain['layers'][name][1]
    second = scaled['layers'][name][1]
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    singular = np.linalg.svd(np.reshape(first, shape), compute_uv=False)
    assert singular.max() / singular.min() < 3
  # Adam's first step is its own learning rate.
  np.testing.assert_allclose(np.abs(plain['embed']), 1e-3, rtol=1e-4)


def test_muon_nadam_is_what_the_organism_was_made_with(params):
  """optax's own Muon, to the bit; 'muon' differs from it in Adam's parameters alone."""
  grads = [noise(params), noise(jax.tree.map(lambda leaf: leaf + 1, params))]
  options = dict(learning_rate=0.1, weight_decay=0.01, b2=0.95, clip=1e9, adam_learning_rate=1e-3)

  def trained(tx):
    state = optimizer.init_state(params, tx)
    for each in grads:
      state, _ = optimizer.apply_gradients(tx, state, each)
    return state.params

  theirs = optax.contrib.muon(
    0.1,
    weight_decay=0.01,
    adam_b2=0.95,
    muon_weight_dimension_numbers=optimizer._muon_axes,
    adam_learning_rate=1e-3,
  )
  published = trained(optax.chain(optax.clip_by_global_norm(1e9), theirs))
  nadam = trained(optimizer.make_optimizer('muon_nadam', **options))
  jax.tree.map(np.testing.assert_array_equal, nadam, published)
  muon = trained(optimizer.make_optimizer('muon', **options))
  adam = trained(optimizer.make_optimizer('adamw', 1e-3, b2=0.95, clip=1e9))
  for name, moved in muon['layers'].items():
    same_as = nadam if name in optimizer._MUON_AXES else adam
    np.testing.assert_array_equal(moved, same_as['layers'][name])
  np.testing.assert_array_equal(muon['embed'], adam['embed'])
  first = optimizer.make_optimizer('muon_nadam', **options)
  moved = updated(first, params, grads[0])[1].params['embed'] - params['embed']
  np.testing.assert_allclose(np.abs(moved).max(), 1.47e-3, rtol=0.01)


def test_a_clip_of_0_does_not_clip(params):
  """As in torch; its state is that of any other clip, so that checkpoints fit."""
  grads = noise(params)
  moved = {}
  for clip in (0.0, 1e9):
    tx = optimizer.make_optimizer('adamw', 1.0, clip=clip)
    _, moved[clip], _ = updated(tx, params, grads)
  jax.tree.map(np.testing.assert_array_equal, moved[0.0], moved[1e9])
  assert np.abs(moved[0.0].params['embed'] - params['embed']).max() > 0.9


def test_non_finite_gradient_changes_nothing_but_the_count(params):
  tx = optimizer.make_optimizer('adamw', 0.1)
  grads = noise(params)
  grads['embed'][0, 0] = np.nan
  before, after, metrics = updated(tx, params, grads)
  assert metrics['skipped'] == 1 and after.step == 1
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.opt_state),
    (before.params, before.opt_state),
  )


def test_gradient_norm_is_global_and_reported_before_clipping(params):
  grads = noise(params)
  norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
  moved = {}
  for clip in (1e-8, 1e9):  # Adam's epsilon shows through a gradient clipped to its size
    _, state, metrics = updated(optimizer.make_optimizer('adamw', 1.0, clip=clip), params, grads)
    np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
    moved[clip] = np.abs(state.params['embed'] - params['embed']).max()
  assert moved[1e-8] < 0.5 and moved[1e9] > 0.9


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(name='sgd'), 'unknown optimizer'),
    (dict(name='muon'), 'needs adam_learning_rate'),
    (dict(name='adamw', adam_learning_rate=1.0), 'is for muon'),
    (dict(clip=-1.0), 'clip = -1.0 must be finite and not negative'),
    (dict(clip=float('nan')), 'clip = nan'),
    (dict(learning_rate=-1e-5), 'learning_rate = -1e-05'),
    (dict(weight_decay=-0.1), 'weight_decay = -0.1'),
    (dict(name='muon', adam_learning_rate=float('inf')), 'adam_learning_rate = inf'),
  ],
)
def test_bad_arguments_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    optimizer.make_optimizer(**arguments)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (dict(kind='linear'), 'unknown schedule'),
    (dict(kind='cosine'), 'total_steps'),
    (dict(warmup=5.0, total_steps=10), 'shares'),
  ],
)
def test_bad_schedules_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    optimizer.Schedule(**arguments)


def test_a_floor_is_for_schedules_that_fall():
  for warmup in (0.0, 0.1):
    with pytest.raises(ValueError, match='floor = 0.5'):
      optimizer.Schedule('constant', warmup=warmup, floor=0.5, total_steps=10)


@pytest.mark.parametrize(
  ('name', 'options', 'others'),
  [('adamw', {}, {()}), ('muon', dict(adam_learning_rate=1e-3), {(), (3,)})],
)
def test_moments_are_what_stands_beside_a_parameter(params, name, options, others):
  """Muon has coefficients, too: offloaded with the moments they would come back in another memory
  than they began in, and the step be compiled twice.
  """
  tx = optimizer.make_optimizer(name, 1e-2, **options)
  state = tx.init(params)
  moments = optimizer.moments(tx, state, params)
  assert jax.tree.structure(moments) == jax.tree.structure(state)
  marked = list(zip(jax.tree.leaves(moments), jax.tree.leaves(state), strict=True))
  size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
  assert size <= sum(leaf.size for moment, leaf in marked if moment) <= 2 * size
  assert {leaf.shape for moment, leaf in marked if not moment} == others
