"""Reinforcement steps: trees equal flat rows, scores come back by sequence, psi moves uniform
groups.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcore_jax import tokentree
from dcore_jax.learn import advantages, grpo, objectives, optimizer, psi_gradient

REWARDS = np.float32([[4, 4, -2, 1], [-3, -3, -3, -3]])  # the second group has no variance
DA_GRPO = functools.partial(advantages.da_grpo_advantages, alpha=0.1, delta=0.5)


def rollouts(seed=0):
  """Two groups of four responses of unequal length; what the engine reported is not read here."""
  rng = np.random.default_rng(seed)
  result = []
  for _ in range(REWARDS.shape[0]):
    prompt = rng.integers(0, 23, 12).astype(np.int32)
    for length in rng.integers(3, 9, REWARDS.shape[1]):
      tokens = rng.integers(0, 23, length).astype(np.int32)
      none = np.zeros(length, np.float32)
      result.append(grpo.Response(prompt, tokens, behaviour_logp=none, old_logp=none, entropy=none))
  return result


def whole_sequences(responses):
  """Prompt and response, with the weights of the loss."""
  result = []
  for response in responses:
    tokens = np.r_[response.prompt, response.tokens]
    weights = (np.arange(len(tokens)) >= len(response.prompt)).astype(np.float32)
    result.append(tokentree.TokenSequence(tokens, weights, len(response.prompt)))
  return result


def with_psi(responses, rewards, estimator, psi_tokens=None):
  """`grpo.with_advantages` of rollouts of one response each."""
  marks = None if psi_tokens is None else [[each] for each in psi_tokens]
  made = grpo.with_advantages([[each] for each in responses], rewards, estimator, marks)
  return [each for (each,) in made]


def with_advantage(tree, advantage_RT):
  """The tree with these advantages, in the forms that losses read."""
  return tree.with_extras(advantage=advantage_RT, **objectives.advantage_sides(advantage_RT))


@pytest.fixture(scope='module')
def scored(params, score_pass):
  """(responses, their sequences, tree with the extras of an off-policy step, old log-probabilities,
  entropies by sequence).
  """
  responses = rollouts()
  tree = grpo.pack_responses(responses, 48, rows_multiple=2)
  assert tree.dedup > 1.5
  logp, entropy = grpo.score_rows(score_pass, params, tree, 2)
  entropies = grpo.gather_values(tree, responses, entropy)
  responses = [
    dataclasses.replace(response, entropy=own)
    for response, own in zip(responses, entropies, strict=True)
  ]
  responses = with_psi(responses, REWARDS, DA_GRPO)
  laid = grpo.lay_values(tree, responses, {'advantage', 'psi', *objectives.SIDES})
  off_policy = laid.with_extras(
    old_logp=np.where(tree.weight, logp + 0.3, 0),
    ref_logp=np.where(tree.weight, logp - 0.2, 0),
  )
  sequences = whole_sequences(responses)
  return responses, sequences, off_policy, tree.gather(logp), tree.gather(entropy)


@pytest.fixture(scope='module')
def sgd_step(config, params):
  """(batch, options of the step) -> (gradient, metrics), read back through plain gradient descent
  of rate 1.
  """
  tx = optax.sgd(1.0)

  @functools.cache
  def made(**options):
    return grpo.make_grpo_step(config, tx, objectives.PolicyLoss(**options))

  def run(batch, **options):
    state, metrics = made(**options)(optimizer.init_state(params, tx), batch)
    return jax.tree.map(np.subtract, params, state.params), metrics

  return run


@pytest.fixture(scope='module')
def score_pass(config):
  return grpo.make_score_pass(config)


def test_scores_equal_flat_rows(params, scored, flat_scores, padded):
  _, sequences, _, logp, entropy = scored
  mask = padded(sequences, [sequence.weights for sequence in sequences])
  for ours, flat in zip(
    (logp, entropy), jax.jit(lambda p: flat_scores(p, sequences))(params), strict=True
  ):
    np.testing.assert_allclose(padded(sequences, ours), flat * mask, rtol=1e-5, atol=1e-5)


def test_advantages_land_on_their_tokens(scored):
  _, sequences, tree, _, entropy = scored
  rows = zip(
    sequences,
    tree.gather(tree.extras['advantage']),
    tree.gather(tree.extras['psi']),
    entropy,
    strict=True,
  )
  for index, (sequence, advantage, psi, entropies) in enumerate(rows):
    assert not advantage[:12].any() and len(advantage) == len(sequence.tokens)
    if index < 4:
      assert (advantage[12:] == advantage[12]).all() and not psi.any()
    else:
      np.testing.assert_allclose(advantage[12:], np.minimum(0.1 * entropies[12:], 0.5), rtol=1e-6)
      np.testing.assert_array_equal(advantage, psi)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_step_on_trees_equals_flat_rows(params, sgd_step, scored, flat_scores, padded, accumulate):
  _, sequences, tree, _, _ = scored
  mask, advantage, old, ref = (
    padded(sequences, tree.gather(values))
    for values in (
      tree.weight,
      tree.extras['advantage'],
      tree.extras['old_logp'],
      tree.extras['ref_logp'],
    )
  )

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
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), grads, wanted_grads
  )
  np.testing.assert_allclose(metrics['kl'], np.exp(-0.2) + 0.2 - 1, rtol=1e-4)
  np.testing.assert_allclose(metrics['weight'], mask.sum())
  negative = (mask * (advantage < 0)).sum() / mask.sum()  # ratio exp(-0.3) < 0.8 clips where A < 0
  np.testing.assert_allclose(metrics['clip_share'], negative, rtol=1e-5)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_psi_gradient_is_measured_apart(config, params, sgd_step, scored, accumulate):
  """It is the gradient of a step, on the policy that sampled, whose only advantage is psi; and a
  part of the whole one.
  """
  _, _, tree, logp, _ = scored
  on_policy = tree.with_extras(old_logp=tree.scatter(logp))
  norm = psi_gradient.make_psi_norm(config)(params, on_policy.batch(accumulate=accumulate))
  grads, _ = sgd_step(with_advantage(on_policy, tree.extras['psi']).batch())
  np.testing.assert_allclose(norm, optax.global_norm(grads), rtol=1e-4)
  _, mixed = sgd_step(on_policy.batch())
  assert 0 < norm < mixed['grad_norm']


def test_the_cosine_is_that_of_two_steps(config, params, sgd_step, scored):
  """One whose only advantage is psi, and one with the rest of it."""
  _, _, tree, logp, _ = scored
  on_policy = tree.with_extras(old_logp=tree.scatter(logp))
  rest_RT = tree.extras['advantage'] - tree.extras['psi']
  measured = on_policy.with_extras(without_psi=rest_RT).batch(accumulate=2)
  cosine = psi_gradient.make_psi_cosine(config)(params, measured)
  flat = []
  for part_RT in (tree.extras['psi'], rest_RT):
    grads, _ = sgd_step(with_advantage(on_policy, part_RT).batch())
    flat.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)]))
  wanted = flat[0] @ flat[1] / (np.linalg.norm(flat[0]) * np.linalg.norm(flat[1]))
  np.testing.assert_allclose(cosine, wanted, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope='module')
def wide(scored):
  """The same rollouts by sequence number and behaviour policy; the second group has advantage 0."""
  responses, sequences, tree, logp, _ = scored
  relative = tree.extras['advantage'] * (tree.extras['psi'] == 0)
  numbered = [
    dataclasses.replace(response, sequence=number, updated=1.0)
    for number, response in enumerate(responses)
  ]
  tree = grpo.lay_values(tree, numbered, {'sequence', 'sequence_weight', 'updated', 'uniform'})
  return sequences, with_advantage(tree, relative).with_extras(
    behaviour_logp=np.where(tree.weight, tree.scatter(logp) - 0.4, 0),
  )


def flat_loss(options, advantage, old, ref, behaviour, uniform_groups, mask):
  """The whole loss of rows [N, T] of unmerged sequences, and the statistics' part in it, in plain
  jax.
  """
  loss = objectives.PolicyLoss(**options)

  def mean(x):
    if loss.aggregation == 'token':
      return (mask * x).sum() / mask.sum()
    if loss.aggregation == 'sequence':
      return ((mask * x).sum(axis=1) / mask.sum(axis=1)).mean()
    return (mask * x).sum() / (len(mask) * loss.max_tokens)

  def total(logp, mean_log_p):
    still = jax.lax.stop_gradient
    ratio = jnp.exp(logp - old)
    if loss.objective == 'gspo':
      gap = (mask * (logp - old)).sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True)
      ratio = jnp.exp(still(gap) + logp - still(logp))
    bounded = jnp.clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    pg = jnp.maximum(-advantage * ratio, -advantage * bounded)
    if loss.objective == 'ppo':
      pg = jnp.where(advantage < 0, jnp.minimum(pg, -loss.dual_clip * advantage), pg)
    if loss.objective == 'cispo':
      pg = -still(bounded) * advantage * logp
    if loss.objective == 'kl_cov':

      def centred(x):
        return mask * (x - (mask * x).sum() / mask.sum())

      covariance = jnp.where(mask > 0, centred(advantage) * centred(still(logp)), -jnp.inf)
      least = jnp.sort(covariance, axis=None)[-max(1, int(mask.sum() * loss.cov_share))]
      pg = -advantage * ratio + (covariance >= least) * loss.cov_penalty * jnp.abs(logp - old)
    if loss.importance_cap:
      pg *= jnp.minimum(jnp.exp(old - behaviour), loss.importance_cap)
    k3 = jnp.exp(ref - logp) - (ref - logp) - 1
    uniform = uniform_groups * (-math.log(23) - mean_log_p)
    return mean(pg + loss.kl_coefficient * k3 + loss.uniform_kl * uniform)

  return total


EVERYTHING = dict(aggregation='sequence', kl_coefficient=0.3, importance_cap=1.2, uniform_kl=0.7)


@pytest.mark.parametrize(
  'options',
  [
    dict(objective='gspo', clip_low=0.2, clip_high=0.4, aggregation='sequence'),
    dict(objective='kl_cov', cov_share=0.1),
    dict(objective='cispo', importance_cap=1.2, aggregation='dr', max_tokens=9),
    EVERYTHING,
  ],
  ids=lambda options: options.get('objective', 'ppo'),
)
def test_losses_on_trees_equal_flat_rows(params, sgd_step, wide, flat_log_p, padded, options):
  """Micro-batches, chunks and packing leave every loss what it is on unmerged rows; KL-Cov ranks
  all micro-batches together.
  """
  sequences, tree = wide
  by_row = {name: padded(sequences, tree.gather(values)) for name, values in tree.extras.items()}
  total = flat_loss(
    options,
    by_row['advantage'],
    by_row['old_logp'],
    by_row['ref_logp'],
    by_row['behaviour_logp'],
    by_row['uniform'],
    padded(sequences, tree.gather(tree.weight)),
  )

  def loss(params):
    targets, log_p = flat_log_p(params, sequences)
    return total(jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0], log_p.mean(axis=2))

  wanted, wanted_grads = jax.jit(jax.value_and_grad(loss))(params)
  grads, metrics = sgd_step(tree.batch(accumulate=2), **options)
  np.testing.assert_allclose(metrics['loss'], wanted, rtol=1e-5)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), grads, wanted_grads
  )


@pytest.mark.parametrize('aggregation', ['sequence', 'dr'])
def test_shares_and_means_are_over_tokens_whatever_the_aggregation(sgd_step, wide, aggregation):
  batch = wide[1].batch(accumulate=2)
  by_token, other = (
    sgd_step(batch, importance_cap=1.2, aggregation=how, max_tokens=9)[1]
    for how in ('token', aggregation)
  )
  assert 0 < by_token['clip_share'] < 1
  for name in ('clip_share', 'entropy', 'importance', 'weight'):
    np.testing.assert_allclose(other[name], by_token[name], rtol=1e-5)
  assert abs(other['pg_loss'] - by_token['pg_loss']) > 1e-3


def test_uniform_kl_raises_entropy_where_psi_would(params, sgd_step, wide, score_pass):
  _, tree = wide
  silent = with_advantage(tree, 0 * tree.weight)

  def step(uniform):
    return sgd_step(silent.with_extras(uniform=uniform).batch(accumulate=2), **EVERYTHING)

  grads, metrics = step(np.ones_like(tree.weight))
  assert metrics['uniform_kl'] > 0 and metrics['pg_loss'] == 0
  bare = dataclasses.replace(tree, extras={})

  def entropy(params):
    return grpo.score_rows(score_pass, params, bare, 2)[1].sum()

  assert entropy(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)) > entropy(params)
  assert step(0 * tree.weight)[1]['uniform_kl'] == 0


def test_uniform_is_a_group_and_not_a_rollout_at_its_mean(scored):
  """Rewards 1 of 4, -2, 1, 1 are the mean: their advantage is 0, and they are no group without
  variance.
  """
  rewards = np.float32([[4, -2, 1, 1], [-3, -3, -3, -3]])
  responses = with_psi(scored[0], rewards, advantages.grpo_advantages)
  assert [response.uniform for response in responses] == [0] * 4 + [1] * 4
  zero = [not response.advantage.any() for response in responses]
  assert zero == [False] * 2 + [True] * 6


def test_psi_norm_aggregates_as_the_step_does(config, params, sgd_step, wide, scored):
  _, tree = wide
  tree = with_advantage(tree, tree.extras['psi']).with_extras(old_logp=tree.scatter(scored[3]))
  norm = psi_gradient.make_psi_norm(config, aggregation='sequence')(
    params, tree.batch(accumulate=2)
  )
  grads, _ = sgd_step(
    tree.batch(accumulate=2), aggregation='sequence', objective='gspo', clip_low=0.2, clip_high=0.4
  )
  np.testing.assert_allclose(norm, optax.global_norm(grads), rtol=1e-4)


def test_psi_on_chosen_tokens_only(scored):
  """Tokens that hold a reflective word keep their psi; the others of a uniform group have none, and
  relative ones stay.
  """
  responses = scored[0]
  words = {3: ' wait', 5: ' ho', 7: 'wever'}

  class Tokenizer:
    def batch_decode(self, ids, clean_up_tokenization_spaces):
      return [words.get(number, ' x') for (number,) in ids]

  marks = grpo.reflective_tokens(responses, Tokenizer(), ('wait', 'however'))
  for response, hit in zip(responses, marks, strict=True):
    tokens = response.tokens
    after = np.r_[tokens[1:], 0]
    before = np.r_[0, tokens[:-1]]
    wanted = (tokens == 3) | ((tokens == 5) & (after == 7)) | ((tokens == 7) & (before == 5))
    np.testing.assert_array_equal(hit, wanted)
  assert any(hit.any() for hit in marks)
  chosen = with_psi(responses, REWARDS, DA_GRPO, marks)
  for before, after, hit in zip(responses, chosen, marks, strict=True):
    np.testing.assert_array_equal(after.psi, before.psi * hit)
    wanted = np.where(before.psi != 0, after.psi, before.advantage)
    np.testing.assert_array_equal(after.advantage, wanted)


def test_micro_batches_without_weight_change_nothing(sgd_step, scored):
  _, sequences, tree, _, _ = scored
  wider = tokentree.pack(sequences, tree.capacity, rows_multiple=4 * tree.rows)
  filled = dataclasses.replace(
    tree,
    **{
      name: np.concatenate([getattr(tree, name), getattr(wider, name)[tree.rows :]])
      for name in ('tokens', 'position', 'parent', 'end', 'weight')
    },
    extras={},
  )

  def pad(values):
    return np.concatenate([values, np.zeros_like(wider.weight[tree.rows :])])

  filled = filled.with_extras(**{name: pad(values) for name, values in tree.extras.items()})
  assert not filled.weight[tree.rows :].any()
  wanted, _ = sgd_step(tree.batch(accumulate=2))
  grads, metrics = sgd_step(filled.batch(accumulate=filled.rows))
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), grads, wanted)
  np.testing.assert_allclose(metrics['weight'], tree.weight.sum())


def test_step_raises_good_responses_and_compiles_once(config, params, score_pass):
  responses = with_psi(rollouts(), REWARDS, advantages.grpo_advantages)
  tree = grpo.pack_responses(responses, 48, rows_multiple=2)
  logp, _ = grpo.score_rows(score_pass, params, tree, 2)
  tree = grpo.lay_values(tree, responses, objectives.SIDES).with_extras(old_logp=logp)
  tx = optimizer.make_optimizer('adamw', 1e-2)
  step = grpo.make_grpo_step(config, tx, objectives.PolicyLoss())
  state = optimizer.init_state(params, tx)
  for start in list(range(0, tree.rows, 2)) * 3:
    state, metrics = step(state, tree.batch([start, start + 1], budget=tree.loss_budget(2)))
  assert step._cache_size() == score_pass._cache_size() == 1
  after, _ = grpo.score_rows(score_pass, state.params, tree, 2)
  gain = [(new - old).sum() for new, old in zip(tree.gather(after), tree.gather(logp), strict=True)]
  assert min(gain[:2]) > 0 > gain[2]


def test_missing_extras_and_misfit_rewards_are_refused(params, sgd_step, score_pass, scored):
  responses, _, tree, _, _ = scored
  with pytest.raises(ValueError, match="lacks the extras \\['ref_logp'\\]"):
    on_policy = {name: array for name, array in tree.extras.items() if name != 'ref_logp'}
    sgd_step(dataclasses.replace(tree, extras=on_policy).batch(), kl_coefficient=0.5)
  with pytest.raises(ValueError, match='4 rewards for 8 rollouts'):
    with_psi(responses, REWARDS[:1], DA_GRPO)
  with pytest.raises(ValueError, match='rows_multiple=5'):
    grpo.score_rows(score_pass, params, tree, 5)
