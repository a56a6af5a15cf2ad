"""Reinforcement steps: trees equal flat rows, scores come back by sequence, psi moves uniform groups."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcore_jax import tokentree
from dcore_jax.learn import grpo
from dcore_jax.learn import objectives
from dcore_jax.learn import optimizer

REWARDS = np.float32([[4, 4, -2, 1], [-3, -3, -3, -3]])  # the second group has no variance
DA_GRPO = functools.partial(objectives.da_grpo_advantages, alpha=0.1, delta=0.5)


def rollouts(seed=0):
  """Two groups of four responses of unequal length; only the responses carry weight."""
  rng = np.random.default_rng(seed)
  result = []
  for _ in range(REWARDS.shape[0]):
    prompt = rng.integers(0, 23, 12)
    for length in rng.integers(3, 9, REWARDS.shape[1]):
      tokens = np.r_[prompt, rng.integers(0, 23, length)].astype(np.int32)
      result.append(tokentree.Sequence(tokens, (np.arange(len(tokens)) >= 12).astype(np.float32), 12))
  return result


@pytest.fixture(scope='module')
def scored(params, score_pass):
  """(sequences, tree with the extras of an off-policy step, old log-probabilities, entropies by sequence)."""
  sequences = rollouts()
  tree = tokentree.pack(sequences, 48, rows_multiple=2)
  assert tree.dedup > 1.5
  logp, entropy = grpo.score_rows(score_pass, params, tree, 2)
  advantage, psi = grpo.advantage_rows(tree, REWARDS, entropy, DA_GRPO)
  off_policy = tree.with_extras(advantage=advantage, psi=psi, old_logp=np.where(tree.weight, logp + 0.3, 0),
                                ref_logp=np.where(tree.weight, logp - 0.2, 0))
  return sequences, off_policy, tree.gather(logp), tree.gather(entropy)


@pytest.fixture(scope='module')
def sgd_step(config, params):
  """(batch, options of the step) -> (gradient, metrics), read back through plain gradient descent of rate 1."""
  tx = optax.sgd(1.0)
  made = functools.cache(lambda **options: grpo.make_grpo_step(config, tx, **options))

  def run(batch, **options):
    state, metrics = made(**options)(optimizer.init_state(params, tx), batch)
    return jax.tree.map(np.subtract, params, state.params), metrics
  return run


@pytest.fixture(scope='module')
def score_pass(config):
  return grpo.make_score_pass(config)


def test_scores_equal_flat_rows(params, scored, flat_scores, padded):
  sequences, _, logp, entropy = scored
  mask = padded(sequences, [sequence.weights for sequence in sequences])
  for ours, flat in zip((logp, entropy), jax.jit(lambda p: flat_scores(p, sequences))(params)):
    np.testing.assert_allclose(padded(sequences, ours), flat * mask, rtol=1e-5, atol=1e-5)


def test_advantages_land_on_their_tokens(scored):
  sequences, tree, _, entropy = scored
  rows = zip(sequences, tree.gather(tree.extras['advantage']), tree.gather(tree.extras['psi']), entropy)
  for index, (sequence, advantage, psi, entropies) in enumerate(rows):
    assert not advantage[:12].any() and len(advantage) == len(sequence.tokens)
    if index < 4:
      assert (advantage[12:] == advantage[12]).all() and not psi.any()
    else:
      np.testing.assert_allclose(advantage[12:], np.minimum(0.1 * entropies[12:], 0.5), rtol=1e-6)
      np.testing.assert_array_equal(advantage, psi)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_step_on_trees_equals_flat_rows(params, sgd_step, scored, flat_scores, padded, accumulate):
  sequences, tree, _, _ = scored
  mask, advantage, old, ref = (padded(sequences, tree.gather(values)) for values in (
      tree.weight, tree.extras['advantage'], tree.extras['old_logp'], tree.extras['ref_logp']))

  def loss(params):
    logp = flat_scores(params, sequences)[0]
    ratio = jnp.exp(logp - old)
    pg = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 0.8, 1.2))
    pg = jnp.where(advantage < 0, jnp.minimum(pg, -3 * advantage), pg)
    k3 = jnp.exp(ref - logp) - (ref - logp) - 1
    return (mask * (pg + 0.5 * k3)).sum() / mask.sum()

  wanted, wanted_grads = jax.jit(jax.value_and_grad(loss))(params)
  grads, metrics = sgd_step(tree.batch(accumulate=accumulate), kl_coefficient=0.5)
  np.testing.assert_allclose(metrics['loss'], wanted, rtol=1e-5)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), grads, wanted_grads)
  np.testing.assert_allclose(metrics['kl'], np.exp(-0.2) + 0.2 - 1, rtol=1e-4)
  np.testing.assert_allclose(metrics['weight'], mask.sum())
  negative = (mask * (advantage < 0)).sum() / mask.sum()  # ratio exp(-0.3) < 0.8 clips where A < 0
  np.testing.assert_allclose(metrics['clip_share'], negative, rtol=1e-5)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_psi_gradient_is_measured_apart(config, params, sgd_step, scored, accumulate):
  """It is the gradient of a step, on the policy that sampled, whose only advantage is psi; and a part of the whole one."""
  _, tree, logp, _ = scored
  on_policy = tree.with_extras(old_logp=tree.scatter(logp))
  norm = grpo.make_psi_norm(config)(params, on_policy.batch(accumulate=accumulate))
  grads, _ = sgd_step(on_policy.with_extras(advantage=tree.extras['psi']).batch())
  np.testing.assert_allclose(norm, optax.global_norm(grads), rtol=1e-4)
  _, mixed = sgd_step(on_policy.batch())
  assert 0 < norm < mixed['grad_norm']


def test_micro_batches_without_weight_change_nothing(sgd_step, scored):
  sequences, tree, _, _ = scored
  wider = tokentree.pack(sequences, tree.capacity, rows_multiple=4 * tree.rows)
  filled = dataclasses.replace(tree, **{name: np.concatenate([getattr(tree, name), getattr(wider, name)[tree.rows:]])
                                        for name in ('tokens', 'position', 'parent', 'end', 'weight')}, extras={})
  pad = lambda values: np.concatenate([values, np.zeros_like(wider.weight[tree.rows:])])
  filled = filled.with_extras(**{name: pad(values) for name, values in tree.extras.items()})
  assert not filled.weight[tree.rows:].any()
  wanted, _ = sgd_step(tree.batch(accumulate=2))
  grads, metrics = sgd_step(filled.batch(accumulate=filled.rows))
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), grads, wanted)
  np.testing.assert_allclose(metrics['weight'], tree.weight.sum())


def test_step_raises_good_responses_and_compiles_once(config, params, score_pass):
  sequences = rollouts()
  tree = tokentree.pack(sequences, 48, rows_multiple=2)
  logp, entropy = grpo.score_rows(score_pass, params, tree, 2)
  advantage, _ = grpo.advantage_rows(tree, REWARDS, entropy, objectives.grpo_advantages)
  tree = tree.with_extras(advantage=advantage, old_logp=logp)
  tx = optimizer.make_optimizer('adamw', 1e-2)
  step, state = grpo.make_grpo_step(config, tx), optimizer.init_state(params, tx)
  for start in list(range(0, tree.rows, 2)) * 3:
    state, metrics = step(state, tree.batch([start, start + 1], budget=tree.loss_budget(2)))
  assert step._cache_size() == score_pass._cache_size() == 1
  after, _ = grpo.score_rows(score_pass, state.params, tree, 2)
  gain = [(new - old).sum() for new, old in zip(tree.gather(after), tree.gather(logp))]
  assert min(gain[:2]) > 0 > gain[2]


def test_missing_extras_and_misfit_rewards_are_refused(params, sgd_step, score_pass, scored):
  _, tree, _, _ = scored
  with pytest.raises(ValueError, match="lacks the extras \\['ref_logp'\\]"):
    on_policy = {name: array for name, array in tree.extras.items() if name != 'ref_logp'}
    sgd_step(dataclasses.replace(tree, extras=on_policy).batch(), kl_coefficient=0.5)
  with pytest.raises(ValueError, match='rewards for 8 sequences'):
    grpo.advantage_rows(tree, REWARDS[:1], tree.weight, DA_GRPO)
  with pytest.raises(ValueError, match='rows_multiple=5'):
    grpo.score_rows(score_pass, params, tree, 5)
