"""DA-GRPO's choice inside of the compiled step against its host form, and where gradients stop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcore_jax.learn import advantages, grpo, head, objectives, optimizer
from dcore_jax.learn.psi import PsiScale
from tests.learn.test_merged_rollouts import batch, response, trees

# The second and third group ask the same, so that their rollouts share tokens and not rewards. In
# the first, 1 is the mean: by token, psi acts on two of four rollouts of one prompt.
REWARDS = np.float32([[4, 1, 1, -2], [-3, -3, -3, -3], [4, 4, 4, -2]])
PROMPTS = ([0, 3, 4], [1, 4, 4], [1, 4, 4])
TOKENS = ([3, 4, 3], [3, 3], [3, 4, 4, 4], [4])
PSI = {
  'published': {},
  'ignored': dict(psi_when_wrong='ignore'),
  'released': dict(zero_test='token', psi_multiplier=2.0),
  # The only one whose psi is negative, on groups 0 and 1.
  'placebo': dict(zero_test='token', signs_P=np.float32([-1, -1, 1])),
}


def rollouts(alpha, delta, words=False, **options):
  """Responses with whole advantages and with the parts of them."""
  made = []
  for prompt in PROMPTS:
    made += [[response(prompt, tokens)] for tokens in TOKENS]
  marks = None
  if words:
    marks = [[each.tokens == 3 for each in responses] for responses in made]
  options = options | {'alpha': alpha, 'delta': delta}
  name = 'psi_placebo' if 'signs_P' in options else 'da_grpo'
  estimator = advantages.make_estimator(name, options)
  parts = advantages.make_parts(name, options)(REWARDS)
  flat = []
  for number, (each,) in enumerate(grpo.with_advantages(made, REWARDS, estimator, marks, parts)):
    flat.append(dataclasses.replace(each, sequence=number, updated=1.0))
  return flat


@functools.cache
def compiled(config, **options):
  return grpo.make_grpo_step(config, optax.sgd(1.0), objectives.PolicyLoss(**options))


def stepped(config, params, responses, *, merge, scale=None, **options):
  """(gradient, metrics) of a step, read back through plain gradient descent of rate 1."""
  loss = objectives.PolicyLoss(**options)
  merged, single = trees(responses, loss.extras, loss.aggregation)
  state = optimizer.init_state(params, optax.sgd(1.0))
  step = compiled(config, **options)
  state, metrics = step(state, batch(merged if merge else single, 1), scale)
  return jax.tree.map(np.subtract, params, state.params), metrics


def scale_of(alpha, delta):
  return PsiScale(alpha=np.float32(alpha), delta=np.float32(delta))


@pytest.mark.parametrize('merge', [True, False])
@pytest.mark.parametrize('words', [False, True])
@pytest.mark.parametrize('case', PSI)
def test_the_step_chooses_what_the_host_form_does(config, params, case, words, merge):
  """To 1e-6 in values and gradients; delta binds on some tokens, and one program serves all."""
  for alpha in (0.1, 0.7):
    responses = rollouts(alpha, 0.5, words, **PSI[case])
    host = stepped(config, params, responses, merge=merge)
    ours = stepped(
      config, params, responses, merge=merge, scale=scale_of(alpha, 0.5), entropy_of='old'
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), ours, host)
  assert compiled(config, entropy_of='old')._cache_size() == 1


def test_objectives_that_do_not_merge_choose_alike(config, params):
  """KL-Cov ranks tokens by the advantage that the step has chosen."""
  responses = rollouts(0.4, 0.5)
  options = dict(objective='kl_cov', cov_share=0.3)
  host = stepped(config, params, responses, merge=False, **options)
  ours = stepped(
    config,
    params,
    responses,
    merge=False,
    scale=scale_of(0.4, 0.5),
    entropy_of='old',
    **options,
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), ours, host)


def test_a_scale_comes_with_parts_and_only_then(config, params):
  responses = rollouts(0.4, 0.5)
  with pytest.raises(ValueError, match="entropy_of = 'old' and a scale"):
    stepped(config, params, responses, merge=True, entropy_of='old')
  with pytest.raises(ValueError, match="entropy_of = '' and a scale"):
    stepped(config, params, responses, merge=True, scale=scale_of(1, 1))
  assert advantages.make_parts('da_grpo', {'psi_when_wrong': 'punish'}) is None


@pytest.fixture
def tokens():
  """Hidden states, a head and targets of 8 tokens, half of them with psi."""
  rng = np.random.default_rng(0)
  hidden_MD = np.float32(rng.normal(size=(8, 5)))
  head_VD = np.float32(rng.normal(size=(11, 5)))
  acts_M = np.float32(np.arange(8) % 2)
  values = {
    'advantage_up': 1 - acts_M,
    'advantage_down': 0 * acts_M,
    'share_up': 1 - acts_M,
    'share_down': 0 * acts_M,
    'psi_up': acts_M,
    'psi_down': 0 * acts_M,
    'psi_share_up': acts_M,
    'psi_share_down': 0 * acts_M,
    'alpha': np.full(8, 0.4, np.float32),
    'delta': np.full(8, 0.7, np.float32),
    'uniform': acts_M,
  }
  return hidden_MD, head_VD, rng.integers(0, 11, 8), values


def gradient_of(loss, tokens, entropy):
  """Gradients of `loss.sums` through the fused head, on the policy that sampled."""
  hidden_MD, head_VD, targets_M, values = tokens
  old_M, entropy_M = head.log_probs_and_entropy(hidden_MD, head_VD, targets_M)
  # Stale on purpose: where psi is of the current policy, nobody may read it.
  values = values | {'old_logp': old_M, 'entropy': 0.5 * entropy_M}
  ones_M = jnp.ones(len(targets_M))

  def total(hidden_MD, head_VD):
    return head.token_loss(
      lambda logp, entropy, values: loss.sums(logp, entropy, ones_M, values),
      hidden_MD,
      head_VD,
      targets_M,
      values,
      head.LossOptions(entropy=entropy, chunk=8),
    )[0]

  return jax.grad(total, argnums=(0, 1))(hidden_MD, head_VD)


def plain_gradient(tokens, *, stopped, bonus=0.0, on='all'):
  hidden_MD, head_VD, targets_M, values = tokens

  def total(hidden_MD, head_VD):
    log_p_MV = jax.nn.log_softmax(hidden_MD @ head_VD.T)
    logp_M = log_p_MV[jnp.arange(len(targets_M)), targets_M]
    entropy_M = -(jnp.exp(log_p_MV) * log_p_MV).sum(axis=1)
    held_M = jax.lax.stop_gradient(entropy_M) if stopped else entropy_M
    psi_M = jnp.minimum(0.4 * held_M, 0.7)
    advantage_M = jnp.where(values['psi_up'] != 0, psi_M, 1.0)
    ratio_M = jnp.exp(logp_M - jax.lax.stop_gradient(logp_M))
    with_bonus_M = values['uniform'] if on == 'uniform' else 1
    return -(advantage_M * ratio_M).sum() - bonus * (with_bonus_M * entropy_M).sum()

  return jax.grad(total, argnums=(0, 1))(hidden_MD, head_VD)


@pytest.mark.parametrize('entropy', ['value', 'gradient'])
def test_psi_of_the_current_policy_has_no_gradient_of_its_own(tokens, entropy):
  """The head gives its entropies with their gradient where a bonus asks for it: there the
  stop-gradient alone keeps psi a weight. Without it the gradient would be another.
  """
  ours = gradient_of(objectives.PolicyLoss(entropy_of='current'), tokens, entropy)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, ours, plain_gradient(tokens, stopped=True))
  without = plain_gradient(tokens, stopped=False)
  assert max(np.abs(a - b).max() for a, b in zip(ours, without, strict=True)) > 0.1


@pytest.mark.parametrize('on', ['all', 'uniform'])
def test_an_entropy_bonus_is_the_kl_to_the_uniform_distribution(tokens, on):
  """Its gradient is exact, whatever psi does beside it."""
  loss = objectives.PolicyLoss(entropy_of='current', entropy_bonus=0.3, entropy_bonus_on=on)
  ours = gradient_of(loss, tokens, 'gradient')
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, ours, plain_gradient(tokens, stopped=True, bonus=0.3, on=on))


def test_the_bonus_feeds_what_is_nearly_as_likely_and_the_uniform_kl_everything():
  """KL(policy || uniform) pushes plausible tokens, KL(uniform || policy) every id of the head."""
  logits_V = jnp.log(jnp.array([0.97] + [0.0015] * 20 + [1e-9] * 600))

  def reverse(logits_V):
    log_p_V = jax.nn.log_softmax(logits_V)
    return (jnp.exp(log_p_V) * (log_p_V + np.log(621))).sum()

  def forward(logits_V):
    return -(jax.nn.log_softmax(logits_V) + np.log(621)).mean()

  bonus_V, uniform_V = (-jax.grad(kl)(logits_V) for kl in (reverse, forward))
  assert bonus_V[1:21].sum() > 0.15 > 1e-4 > bonus_V[21:].sum()
  assert uniform_V[21:].sum() > 0.9 > 0.01 > uniform_V[1:21].sum()


def test_the_bonus_reaches_the_step(config, params):
  responses = rollouts(0.4, 0.5)
  zero = [dataclasses.replace(each, advantage=0 * each.advantage) for each in responses]
  _, metrics = stepped(config, params, zero, merge=True, entropy_bonus=0.3)
  np.testing.assert_allclose(metrics['entropy_bonus'], metrics['entropy'], rtol=1e-5)
  np.testing.assert_allclose(metrics['loss'], -0.3 * metrics['entropy'], rtol=1e-5)
  assert metrics['grad_norm'] > 1e-3
