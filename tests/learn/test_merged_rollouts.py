"""Rollouts that agree are trained once: a merged tree gives what single responses give."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.learn import advantages, grpo, objectives, optimizer, psi_gradient

DA_GRPO = functools.partial(advantages.da_grpo_advantages, alpha=0.1, delta=0.5)
CAPACITY = 48
ROWS = 6
METRICS = ('loss', 'pg_loss', 'kl', 'uniform_kl', 'clip_share', 'entropy', 'importance', 'weight')


def numbers(tokens, name):
  """One number in [0, 1) for each prefix of the tokens, the same wherever the prefix occurs."""
  result = []
  for stop in range(1, len(tokens) + 1):
    seed = [sum(name.encode()), *tokens[:stop].tolist()]
    result.append(np.random.default_rng(seed).random())
  return np.float32(result)


def response(prompt, tokens):
  """A response whose values are functions of what stands before, as those of one policy are."""
  prompt = np.asarray(prompt, np.int32)
  tokens = np.asarray(tokens, np.int32)
  own = np.concatenate([prompt, tokens])

  def of(name, low, high):
    return low + (high - low) * numbers(own, name)[len(prompt) :]

  old = of('old', -4.0, -2.0)
  return grpo.Response(
    prompt,
    tokens,
    behaviour_logp=old + of('behaviour', -0.4, 0.4),
    old_logp=old,
    entropy=of('entropy', 0.0, 3.0),
    ref_logp=old + of('reference', -0.5, 0.5),
  )


@st.composite
def groups(draw):
  """Two groups of four rollouts of one or two turns.

  They are made of two different tokens, so that prefixes meet. A second turn shows all of the first
  one, and the reply to it.
  """

  def tokens(least, most):
    return draw(st.lists(st.integers(3, 4), min_size=least, max_size=most))

  rollouts = []
  for group in range(2):
    prompt = [group, *tokens(6, 6)]
    for _ in range(4):
      first = tokens(1, 5)
      made = [response(prompt, first)]
      if draw(st.booleans()):
        made.append(response([*prompt, *first, 7], tokens(1, 4)))
      rollouts.append(made)
  rewards = draw(st.lists(st.sampled_from([-3.0, 1.0, 4.0]), min_size=8, max_size=8))
  made = grpo.with_advantages(rollouts, np.float32(rewards).reshape(2, 4), DA_GRPO)
  flat = [each for responses in made for each in responses]
  return [
    dataclasses.replace(each, sequence=number, updated=1.0) for number, each in enumerate(flat)
  ]


def trees(responses, names, aggregation='token'):
  """(merged, not merged) with these values, of the same shape."""
  laid = []
  for merge in (True, False):
    tree = grpo.pack_responses(responses, CAPACITY, rows_multiple=ROWS, merge=merge)
    assert tree.rows == ROWS
    laid.append(grpo.lay_values(tree, responses, names, aggregation))
  return laid


def batch(tree, accumulate):
  return tree.batch(budget=ROWS * CAPACITY // accumulate, accumulate=accumulate)


@functools.cache
def step(config, **options):
  return grpo.make_grpo_step(config, optax.sgd(1.0), objectives.PolicyLoss(**options))


TERMS = dict(kl_coefficient=0.3, importance_cap=1.2, uniform_kl=0.7)


@pytest.mark.parametrize(
  'options, accumulate',
  [
    (dict(objective='ppo', dual_clip=1.5, **TERMS), 1),
    (dict(objective='ppo', aggregation='sequence', **TERMS), 2),
    (dict(objective='ppo', kl_coefficient=0.3, kl_estimator='k2', clip_high=0.3), 3),
    (dict(objective='cispo', aggregation='dr', max_tokens=9, kl_coefficient=0.1), 2),
  ],
  ids=['ppo-token', 'ppo-sequence', 'ppo-k2', 'cispo-dr'],
)
@settings(max_examples=12, deadline=None)
@given(responses=groups())
def test_merged_rollouts_give_loss_metrics_and_gradient_of_single_ones(
  config, params, responses, options, accumulate
):
  loss = objectives.PolicyLoss(**options)
  assert loss.merges
  made = []
  for tree in trees(responses, loss.extras, loss.aggregation):
    state = optimizer.init_state(params, optax.sgd(1.0))
    state, metrics = step(config, **options)(state, batch(tree, accumulate))
    made.append((jax.tree.map(np.subtract, params, state.params), metrics))
  (grads, metrics), (flat_grads, flat_metrics) = made
  assert metrics.keys() == flat_metrics.keys()
  for name in set(METRICS) & metrics.keys():
    np.testing.assert_allclose(
      metrics[name], flat_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name
    )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, grads, flat_grads)


@functools.cache
def psi_norm(config, aggregation):
  return psi_gradient.make_psi_norm(config, aggregation=aggregation)


@pytest.mark.parametrize('aggregation', ['token', 'sequence'])
@settings(max_examples=12, deadline=None)
@given(responses=groups())
def test_psi_of_merged_rollouts_adds_up(config, params, responses, aggregation):
  names = {'psi', 'sequence_weight'}
  norms = [
    psi_norm(config, aggregation)(params, batch(tree, 2))
    for tree in trees(responses, names, aggregation)
  ]
  np.testing.assert_allclose(*norms, rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(responses=groups())
def test_scores_of_merged_rollouts_come_back_to_all_of_them(config, params, responses):
  scored = []
  for tree in trees(responses, frozenset()):
    passed = score_pass(config)
    both = grpo.score_rows(passed, params, tree, ROWS, ROWS * CAPACITY)
    scored.append([np.concatenate(grpo.gather_values(tree, responses, part)) for part in both])
  for merged, flat in zip(*scored, strict=True):
    np.testing.assert_allclose(merged, flat, rtol=1e-5, atol=1e-5)


@functools.cache
def score_pass(config):
  return grpo.make_score_pass(config)


@settings(max_examples=25)
@given(responses=groups())
def test_each_prefix_is_stored_once_and_weighs_what_was_sampled(responses):
  # Longer prompts, since rows of 512 tokens merge no less than 16.
  responses = [
    dataclasses.replace(each, prompt=np.r_[each.prompt[:1], np.full(15, 9), each.prompt[1:]])
    for each in responses
  ]
  prefixes = {}
  for each in responses:
    own = (*each.prompt.tolist(), *each.tokens.tolist())
    for stop in range(1, len(own) + 1):
      counted = prefixes.setdefault(own[:stop], 0)
      prefixes[own[:stop]] = counted + (stop > len(each.prompt))
  tree = grpo.pack_responses(responses, 512, merge=True)
  assert tree.live == len(prefixes)
  # In depth-first order, which is that of sorted prefixes.
  wanted = [prefixes[prefix] for prefix in sorted(prefixes)]
  np.testing.assert_array_equal(tree.weight[0, : tree.live], wanted)


@given(st.integers(0, 1000), st.integers(2, 8))
def test_rollouts_that_all_differ_take_what_they_took(seed, size):
  rng = np.random.default_rng(seed)
  responses = []
  for _ in range(4):
    prompt = rng.integers(0, 23, 20).astype(np.int32)
    for first in rng.permutation(23)[:size]:
      tokens = np.r_[first, rng.integers(0, 23, rng.integers(1, 5))].astype(np.int32)
      none = np.zeros(len(tokens), np.float32)
      responses.append(grpo.Response(prompt, tokens, none, none, none))
  merged, single = (grpo.pack_responses(responses, 512, merge=merge) for merge in (True, False))
  assert (merged.live, merged.rows) == (single.live, single.rows)
  np.testing.assert_array_equal(np.sort(merged.weight.ravel()), np.sort(single.weight.ravel()))


def test_answers_that_come_back_as_context_are_stored_once():
  prompt = list(range(10))
  first = response(prompt, [11, 12, 13])
  second = response([*prompt, 11, 12, 13, 14, 15], [16, 17])
  tree = grpo.pack_responses([first, second], 64, merge=True)
  assert tree.live == 17
  np.testing.assert_array_equal(np.flatnonzero(tree.weight[0]), [10, 11, 12, 15, 16])
  assert grpo.pack_responses([first, second], 64).live == 20


def test_groups_larger_than_a_row_are_found():
  """Four responses of 20 tokens to a prompt of 30; the second group says twice the same."""
  rng = np.random.default_rng(0)
  made = []
  for distinct in (4, 2):
    prompt = rng.integers(0, 1000, 30)
    drawn = rng.integers(0, 1000, (distinct, 20))
    made.append([response(prompt, drawn[place % distinct]) for place in range(4)])
  flat = [each for group in made for each in group]
  for capacity, merge, wanted in (
    (128, True, []),
    (80, True, [110]),
    (80, False, [110, 110]),
    (60, True, [110, 70]),
  ):
    tree = grpo.pack_responses(flat, capacity, merge=merge)
    assert grpo.cut_groups(tree, made, merge=merge) == wanted
