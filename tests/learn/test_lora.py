"""Adapters: the base at first, gradients of merged weights, a full step at full rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.config import LoraSection
from dcore_jax.learn import grpo, head, lora, objectives, optimizer, psi_gradient, sft
from dcore_jax.models import decoder
from dcore_jax.models.decoder import Execution
from dcore_jax.models.projections import INPUTS

# What is taken off the parameters is the gradient.
SGD = optax.sgd(1.0)
SECTION = LoraSection(rank=3, alpha=6.0)


@pytest.fixture(scope='module')
def model(config):
  """Two layers, so that stacks are more than one matrix."""
  return dataclasses.replace(config, num_hidden_layers=2, model_type='qwen2')


@pytest.fixture(scope='module')
def base(model):
  rng = np.random.default_rng(0)

  def draw(spec):
    return rng.normal(1 if spec.init is None else 0, 0.3, spec.shape).astype(np.float32)

  return jax.tree.map(draw, decoder.abstract_params(model))


def adapters_of(model, section, seed=0):
  """Adapters of which both factors are away from zero."""
  rng = np.random.default_rng(seed)

  def draw(spec):
    return rng.normal(0, 0.3, spec.shape).astype(np.float32)

  return jax.tree.map(draw, lora.abstract_adapters(model, section))


def batch(extras=frozenset()):
  """Responses that share their prompts, on rows of a tree."""
  rng = np.random.default_rng(1)
  responses = []
  for _ in range(3):
    prompt = rng.integers(0, 23, 8).astype(np.int32)
    for _ in range(3):
      old = (-3 + 0.1 * rng.normal(size=5)).astype(np.float32)
      responses.append(
        grpo.Response(
          prompt,
          rng.integers(0, 23, 5).astype(np.int32),
          behaviour_logp=old,
          old_logp=old,
          entropy=-old,
          ref_logp=old,
          advantage=rng.normal(size=5).astype(np.float32),
          psi=rng.normal(size=5).astype(np.float32),
          uniform=float(len(responses) % 2),
          sequence=len(responses),
          updated=1.0,
        )
      )
  tree = grpo.pack_responses(responses, 32, rows_multiple=2)
  assert tree.dedup > 1.3
  return grpo.lay_values(tree, responses, extras).batch(accumulate=2)


def explicit(base, adapters, scale):
  """Weights with the products added to them, by an einsum of each matrix's own axes."""
  letters = 'dnhxy'
  layers = dict(base['layers'])
  for name, factors in adapters.items():
    ins = letters[: INPUTS[name]]
    outs = letters[INPUTS[name] : layers[name].ndim - 1]
    update = jnp.einsum(f'l{ins}r,lr{outs}->l{ins}{outs}', factors['a'], factors['b'])
    layers[name] = layers[name] + scale * update
  return {**base, 'layers': layers}


def close(got, want, tolerance=1e-5):
  def compare(one, other):
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)

  jax.tree.map(compare, got, want)


def loss_of_rows(params, model, rows):
  """The loss of a batch by autodiff of `decoder` and `head` alone, micro-batch by micro-batch."""
  total = 0.0
  for number in range(rows.tokens.shape[0]):
    micro = jax.tree.map(lambda leaf, number=number: leaf[number], rows)
    hidden = decoder.hidden_states(params, model, micro.tokens, micro.position, micro.end)
    hidden_MD = hidden.reshape(-1, hidden.shape[-1])[micro.parent]
    logits = jnp.einsum('md,vd->mv', hidden_MD, decoder.head_matrix(params))
    logp = jax.nn.log_softmax(logits)[jnp.arange(len(micro.target)), micro.target]
    total -= (micro.weight * logp).sum()
  return total / rows.weight.sum()


def test_with_new_adapters_the_model_is_the_base(model, base):
  drawn = lora.init_adapters(model, SECTION, 0)
  rows = batch()
  args = (model, rows.tokens[0], rows.position[0], rows.end[0])
  adapted = decoder.hidden_states(lora.attach(lora.Frozen(base, 2.0), drawn), *args)
  np.testing.assert_array_equal(adapted, decoder.hidden_states(base, *args))
  # Nothing is trained where both factors are zero.
  assert all(np.abs(factors['a']).max() > 0 for factors in drawn.values())


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_gradient_is_that_through_merged_weights(model, base, remat):
  adapters = adapters_of(model, SECTION)
  rows = batch()
  want = jax.grad(
    lambda factors: loss_of_rows(explicit(base, factors, lora.scale(SECTION)), model, rows)
  )(adapters)
  step = sft.make_sft_step(model, SGD, Execution(remat=remat, unroll=False))
  state = optimizer.init_state(jax.tree.map(jnp.array, adapters), SGD)
  after, metrics = step(state, rows, lora.Frozen(base, lora.scale(SECTION)))
  close(jax.tree.map(np.subtract, adapters, after.params), want)
  assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want))
  np.testing.assert_allclose(
    metrics['loss'], loss_of_rows(explicit(base, adapters, lora.scale(SECTION)), model, rows), 1e-5
  )


@pytest.mark.parametrize(
  'options',
  [{'kl_coefficient': 0.1}, {'objective': 'gspo'}, {'objective': 'kl_cov'}, {'uniform_kl': 0.1}],
)
def test_a_policy_step_is_that_of_merged_weights(model, base, options):
  """The full gradient of the merged weights, taken back to the factors by hand."""
  loss = objectives.PolicyLoss(**options)
  adapters = adapters_of(model, SECTION)
  factor = lora.scale(SECTION)
  rows = batch(loss.extras)
  step = grpo.make_grpo_step(model, SGD, loss)
  whole = jax.tree.map(jnp.array, explicit(base, adapters, factor))
  before = jax.device_get(whole)
  after, wanted = step(optimizer.init_state(whole, SGD), rows)
  grads = jax.tree.map(np.subtract, before, after.params)
  _, pull = jax.vjp(lambda factors: explicit(base, factors, factor), adapters)
  (want,) = pull(jax.tree.map(jnp.asarray, grads))
  state = optimizer.init_state(jax.tree.map(jnp.array, adapters), SGD)
  after, metrics = step(state, rows, frozen=lora.Frozen(base, factor))
  close(jax.tree.map(np.subtract, adapters, after.params), want)
  for name in wanted:
    if name != 'grad_norm':  # of fewer numbers
      np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_psi_norm_is_of_the_adapters(model, base):
  adapters = adapters_of(model, SECTION)
  rows = batch({'psi'})
  frozen = lora.Frozen(base, lora.scale(SECTION))

  def mean(factors):
    weighted = rows._replace(weight=rows.weight * rows.extras['psi'])
    params = explicit(base, factors, frozen.scale)
    return loss_of_rows(params, model, weighted) * weighted.weight.sum() / rows.weight.sum()

  want = optax.global_norm(jax.grad(mean)(adapters))
  np.testing.assert_allclose(
    psi_gradient.make_psi_norm(model)(adapters, rows, frozen), want, rtol=1e-5
  )


@pytest.mark.parametrize('name', ['q', 'o', 'down'])
def test_full_rank_is_a_full_step(model, base, name):
  """With A the identity, scale 1 and B zero, B moves as the matrix itself does."""
  shape = base['layers'][name].shape
  width = int(np.prod(shape[1 : 1 + INPUTS[name]]))
  section = LoraSection(rank=width, alpha=float(width), targets=(name,))
  specs = lora.abstract_adapters(model, section)[name]
  identity = np.broadcast_to(np.eye(width, dtype=np.float32), (shape[0], width, width))
  adapters = {name: {'a': identity.reshape(specs['a'].shape), 'b': np.zeros(specs['b'].shape)}}
  adapters = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), adapters)
  rows = batch()
  step = sft.make_sft_step(model, SGD)
  full, _ = step(optimizer.init_state(jax.tree.map(jnp.array, base), SGD), rows)
  state = optimizer.init_state(adapters, SGD)
  after, _ = step(state, rows, lora.Frozen(base, lora.scale(section)))
  moved = np.asarray(after.params[name]['b']).reshape(shape)
  want = full.params['layers'][name] - base['layers'][name]
  np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-5)
  assert np.abs(want).max() > 1e-3


@settings(deadline=None, max_examples=10)
@given(
  rank=st.integers(1, 5),
  alpha=st.floats(0.1, 8.0),
  targets=st.sets(st.sampled_from(tuple(INPUTS)), min_size=1),
  seed=st.integers(0, 3),
)
def test_merged_weights_compute_the_same(config, params, rank, alpha, targets, seed):
  section = LoraSection(rank=rank, alpha=alpha, targets=tuple(sorted(targets)))
  adapters = adapters_of(config, section, seed)
  assert set(adapters) == targets
  attached = lora.attach(lora.Frozen(params, lora.scale(section)), adapters)
  tokens = np.arange(6, dtype=np.int32)[None]
  args = (config, tokens, tokens, np.full_like(tokens, 6))
  merged = lora.merge(attached)
  close(merged, explicit(params, adapters, lora.scale(section)))
  # Sums of some ten products, whose order differs.
  close(decoder.hidden_states(attached, *args), decoder.hidden_states(merged, *args), 1e-4)


def test_merging_rounds_once(model, base):
  """The sum of a base of 16 bits is formed in float32."""
  adapters = adapters_of(model, SECTION)
  half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base)
  attached = lora.attach(lora.Frozen(half, 2.0), adapters)
  wide = explicit(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), adapters, 2.0)
  close(lora.merge(attached, jnp.float32), wide)
  merged = lora.merge(attached)
  assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
  exact = lora.merge(attached, jnp.float32)
  jax.tree.map(
    lambda one, other: np.testing.assert_array_equal(one, other.astype(jnp.bfloat16)), merged, exact
  )
  # What has no adapter is not copied.
  assert merged['embed'] is half['embed']


def test_joined_adapters_add_up(model, base):
  first = adapters_of(model, SECTION)
  second = adapters_of(model, SECTION, seed=1)
  both = lora.joined(first, second)
  assert both['q']['a'].shape[-1] == 2 * SECTION.rank
  close(explicit(base, both, 2.0), explicit(explicit(base, first, 2.0), second, 2.0))


def test_a_frozen_head_has_no_gradient(monkeypatch):
  """Its [V, D] in float32 would be 2.5 GB for Qwen3-8B; the hidden states' is the same."""
  rng = np.random.default_rng(0)
  hidden, matrix = rng.normal(size=(6, 8)), rng.normal(size=(23, 8))
  targets = rng.integers(0, 23, 6)
  weight = np.ones(6, np.float32)

  def loss(hidden, matrix):
    def objective(logp, _, weight):
      return -jnp.sum(weight * logp), ()

    options = head.LossOptions(chunk=2)
    return head.token_loss(objective, hidden, matrix, targets, weight, options)[0]

  args = (jnp.asarray(hidden, jnp.float32), jnp.asarray(matrix, jnp.float32))
  both = jax.grad(loss, argnums=(0, 1))(*args)
  np.testing.assert_allclose(jax.grad(loss)(*args), both[0], rtol=1e-6)
  made = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*args))
  assert 'f32[23,8] = broadcast_in_dim' in made.replace(':', ' ').replace('  ', ' ')
  alone = str(jax.make_jaxpr(jax.grad(loss))(*args))
  assert 'f32[23,8] = broadcast_in_dim' not in alone.replace(':', ' ').replace('  ', ' ')


def test_adam_and_muon_train_both_factors(model, base):
  for name, options in (('adamw', {}), ('muon', {'adam_learning_rate': 1e-2})):
    tx = optimizer.make_optimizer(name, 1e-2, weight_decay=0.1, **options)
    step = sft.make_sft_step(model, tx)
    state = optimizer.init_state(lora.init_adapters(model, SECTION, 0), tx)
    before = jax.device_get(state.params)
    rows = batch()
    frozen = lora.Frozen(base, lora.scale(SECTION))
    losses = []
    for _ in range(4):
      state, metrics = step(state, rows, frozen)
      losses.append(float(metrics['loss']))
    assert losses[-1] < losses[0], name
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
      assert np.abs(old - new).max() > 1e-4, name


@pytest.mark.parametrize('targets', [(), ('q', 'embed')])
def test_targets_must_be_matrices_of_a_layer(model, targets):
  with pytest.raises(ValueError, match='lora.targets'):
    lora.abstract_adapters(model, LoraSection(rank=2, targets=targets))
