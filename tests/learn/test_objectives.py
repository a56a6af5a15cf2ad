"""Objectives and the terms beside them: values and gradients against transcripts in float64."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dcore_jax.learn import objectives
from dcore_jax.learn.advantages import options_of
from dcore_jax.learn.objectives import PolicyLoss

M = 300
UNUSED = 40


@pytest.fixture(scope='module')
def batch():
  """Loss tokens of 12 sequences, in no order, with some unused places at the end; extremes among
  them.
  """
  rng = np.random.default_rng(0)
  old = rng.normal(-2, 1, M)
  logp = old + rng.normal(0, 0.3, M)
  advantage = rng.normal(0.3, 1, M)
  advantage[30:60] = 0
  # far beyond the bound on the log ratio
  old[:5] = logp[:5] - 40
  advantage[:5] = -1
  old[5:8] = logp[5:8] + 30
  advantage[5:8] = 1
  values = dict(
    advantage=advantage,
    old_logp=old,
    ref_logp=old + rng.normal(0, 1, M),
    behaviour_logp=old + rng.normal(0, 1, M),
  )
  values = {name: array.astype(np.float32) for name, array in values.items()} | {
    'sequence': rng.integers(0, 12, M, np.int32)
  }
  values |= objectives.advantage_sides(values['advantage'])
  values['updated'] = np.ones(M, np.float32)
  weight = np.ones(M, np.float32)
  weight[-UNUSED:] = 0
  return logp.astype(np.float32), weight, values


def clip(x, low, high):
  return min(max(x, low), high)


def by_sequence(logp, weight, values):
  """The mean log ratio of each token's sequence."""
  gaps = {}
  for lp, w, old, number in zip(logp, weight, values['old_logp'], values['sequence'], strict=True):
    if w:
      gaps.setdefault(int(number), []).append(float(lp) - float(old))
  return [np.mean(gaps[int(number)]) for number in values['sequence']]


def largest_covariances(logp, weight, values, share):
  used = np.flatnonzero(weight)
  a = values['advantage'][used].astype(np.float64)
  lp = logp[used].astype(np.float64)
  covariance = (a - a.mean()) * (lp - lp.mean())
  chosen = np.zeros(len(logp))
  chosen[used[np.argsort(-covariance, kind='stable')[: max(1, int(len(used) * share))]]] = 1
  return chosen


def sequence_weights(weight, sequence):
  """The share of each token in its sequence, float32."""
  lengths = np.bincount(sequence, weights=weight)
  return (weight / np.maximum(lengths, 1)[sequence]).astype(np.float32)


def transcript(loss, logp, weight, values):
  """(loss, metrics, d loss / d logp) one token at a time, as sums divided once."""
  sequence_ratio = by_sequence(logp, weight, values)
  held = largest_covariances(logp, weight, values, loss.cov_share)
  per_token, slope, clipped, kl, kl_slope, importance = (np.zeros(len(logp)) for _ in range(6))
  for i, (lp, old, a) in enumerate(
    zip(
      logp.astype(np.float64),
      values['old_logp'].astype(np.float64),
      values['advantage'].astype(np.float64),
      strict=True,
    )
  ):
    gap = lp - old
    r = np.exp(clip(gap, -20, 20))
    moves = abs(gap) < 20
    if loss.objective == 'gspo':
      r = np.exp(min(sequence_ratio[i], 10))
      moves = sequence_ratio[i] < 10
    bounded = clip(r, 1 - loss.clip_low, 1 + loss.clip_high)
    if loss.objective in ('ppo', 'gspo'):
      per_token[i] = max(-a * r, -a * bounded)
      slope[i] = -a * r * moves
      clipped[i] = -a * bounded > -a * r
      if clipped[i]:
        slope[i] = 0
      if loss.objective == 'ppo' and a < 0 and per_token[i] > -loss.dual_clip * a:
        per_token[i] = -loss.dual_clip * a
        slope[i] = 0
    elif loss.objective == 'cispo':
      per_token[i] = -bounded * a * lp
      slope[i] = -bounded * a
      clipped[i] = bounded != r
    else:
      per_token[i] = -a * r + held[i] * loss.cov_penalty * abs(gap)
      slope[i] = -a * r * moves + held[i] * loss.cov_penalty * np.sign(gap)
      clipped[i] = held[i]
    importance[i] = 1
    if loss.importance_cap:
      mu = float(values['behaviour_logp'][i])
      importance[i] = min(np.exp(clip(old - mu, -20, 20)), loss.importance_cap)
    d = clip(float(values['ref_logp'][i]) - lp, -20, 20)
    estimate, change = {
      'k1': (-d, 1),
      'k2': (d * d / 2, -d),
      'k3': (np.exp(d) - d - 1, 1 - np.exp(d)),
    }[loss.kl_estimator]
    kl[i] = clip(estimate, -10, 10)
    kl_slope[i] = change * (abs(estimate) < 10) * (abs(d) < 20)
  lengths = {n: weight[values['sequence'] == n].sum() for n in set(values['sequence'].tolist())}
  count = sum(length > 0 for length in lengths.values())
  share = {
    'token': lambda i: 1 / weight.sum(),
    'sequence': lambda i: 1 / lengths[int(values['sequence'][i])] / count,
    'dr': lambda i: 1 / (count * loss.max_tokens),
  }[loss.aggregation]
  share = np.array([share(i) if weight[i] else 0 for i in range(len(weight))])
  pg = (share * importance * per_token).sum()
  penalty = (share * kl).sum()
  gradient = share * (importance * slope + loss.kl_coefficient * kl_slope)
  return pg + loss.kl_coefficient * penalty, (pg, penalty, clipped, importance), gradient


def ours(loss, logp, weight, values):
  """(loss, parts), d loss / d logp, by what a step calls."""
  weight_M, total = objectives.aggregate(
    weight, sequence_weights(weight, values['sequence']), loss.aggregation, loss.max_tokens
  )
  values = loss.with_statistic(logp, weight, values) if loss.scope else values

  def mean(logp):
    value, parts = loss.sums(logp, jnp.zeros(M), weight_M, values)
    return value / total, jax.tree.map(lambda part: part / total, parts)

  return jax.jit(jax.value_and_grad(mean, has_aux=True))(logp)


CASES = [
  dict(),
  dict(clip_high=0.28, dual_clip=10.0),
  dict(aggregation='sequence', importance_cap=2.0),
  dict(
    objective='gspo', clip_low=3e-4, clip_high=4e-4, aggregation='sequence', kl_coefficient=0.001
  ),
  dict(objective='gspo', clip_low=0.2, clip_high=0.2),
  dict(objective='kl_cov', cov_share=0.02),
  dict(objective='kl_cov'),
  dict(objective='cispo', clip_high=0.28, importance_cap=5.0),
  dict(aggregation='dr', max_tokens=50),
  dict(kl_coefficient=0.5),
  dict(kl_coefficient=0.5, kl_estimator='k2'),
  dict(kl_coefficient=0.5, kl_estimator='k1', aggregation='dr'),
]


@pytest.mark.parametrize(
  'options', CASES, ids=lambda options: ','.join(f'{k}={v}' for k, v in options.items()) or 'ppo'
)
def test_losses_equal_a_transcript(batch, options):
  loss = PolicyLoss(**options)
  wanted, (pg, kl, clipped, importance), gradient = transcript(loss, *batch)
  (value, parts), grads = ours(loss, *batch)
  np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(parts['pg_loss'], pg, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(grads, gradient, rtol=1e-5, atol=1e-6)
  assert ('kl' in parts) == bool(loss.kl_coefficient) and ('importance' in parts) == bool(
    loss.importance_cap
  )
  if loss.kl_coefficient:
    np.testing.assert_allclose(parts['kl'], kl, rtol=1e-6)
  if loss.aggregation == 'token':
    weight = batch[1]
    np.testing.assert_allclose(
      parts['clip_share'], (weight * clipped).sum() / weight.sum(), rtol=1e-6
    )
    if loss.importance_cap:
      np.testing.assert_allclose(
        parts['importance'], (weight * importance).sum() / weight.sum(), rtol=1e-6
      )


@pytest.mark.parametrize('objective', sorted(objectives.OBJECTIVES))
def test_gradient_is_the_slope_of_the_loss(batch, objective):
  """Central differences in float64, where the loss is smooth; GSPO's and CISPO's stopped gradients
  are of a surrogate, which the transcript checks: here a whole sequence moves together, which is
  what GSPO's form stands for.
  """
  logp, weight, values = (jax.tree.map(lambda x: x[8:-UNUSED], part) for part in batch)
  loss = PolicyLoss(objective=objective, clip_low=0.999, clip_high=100.0, dual_clip=1e6)
  direction = np.float64(values['sequence'] == 3)

  with jax.enable_x64(True):
    double = {
      name: np.float64(array) if name != 'sequence' else array for name, array in values.items()
    }

    def value(shift):
      moved = np.float64(logp) + shift * direction
      extras = (
        loss.with_statistic(moved, weight, double)
        if objective == 'gspo'
        else {**double, 'high_covariance': held}
      )
      return loss.sums(moved, jnp.zeros(len(logp)), np.float64(weight), extras)[0]

    held = objectives.high_covariance(np.float64(logp), weight, double)
    fixed = loss.with_statistic(np.float64(logp), weight, double) if loss.scope else double
    slopes = jax.grad(lambda x: loss.sums(x, jnp.zeros(len(logp)), np.float64(weight), fixed)[0])(
      jnp.float64(logp)
    )
    difference = (value(1e-6) - value(-1e-6)) / 2e-6
    if objective == 'cispo':  # the ratio is a constant to it; the whole loss would also move it
      difference = -(
        direction * double['advantage'] * np.exp(np.float64(logp) - double['old_logp'])
      ).sum()
    np.testing.assert_allclose((slopes * direction).sum(), difference, rtol=1e-6)


def test_on_policy_all_objectives_give_the_policy_gradient():
  """At ratio 1 nothing is clipped, and d loss / d logp = -A, whatever is done to ratios."""
  old = np.float32([-1, -2, -3])
  advantage = np.float32([1, -2, 0.5])
  values = {
    'advantage': advantage,
    'old_logp': old,
    'sequence': np.zeros(3, np.int32),
    'updated': np.zeros(3, np.float32),
  } | objectives.advantage_sides(advantage)
  for objective in objectives.OBJECTIVES:
    loss = PolicyLoss(objective=objective, cov_share=1.0)
    # Exactly, or as two passes of one policy differ by their rounding: no objective may make more
    # of that than it is.
    for passed in (old, old + np.float32([1e-6, -1e-6, 1e-6])):
      fixed = loss.with_statistic(passed, np.ones(3), values) if loss.scope else values

      def total(logp, loss=loss, fixed=fixed):
        return loss.sums(logp, np.zeros(3), np.ones(3), fixed)[0]

      grad = jax.grad(total)(passed)
      np.testing.assert_allclose(grad, -advantage, rtol=1e-5)


def test_an_objective_from_outside_gets_the_options_that_the_section_has(batch, monkeypatch):
  monkeypatch.setattr(objectives, 'OBJECTIVES', dict(objectives.OBJECTIVES))
  logp, weight, values = batch

  @objectives.register_objective('toy', needs=frozenset({'uniform'}))
  def toy(logp_M, values, *, clip_low=0.0, scale=3.0):
    return -scale * clip_low * values['advantage'] * logp_M, jnp.zeros_like(logp_M)

  loss = PolicyLoss(objective='toy', clip_low=0.5)
  assert loss.extras == {'advantage', 'old_logp', 'uniform'} and loss.scope is None
  total, _ = loss.sums(logp, jnp.zeros_like(logp), weight, values)
  np.testing.assert_allclose(total, -1.5 * (weight * values['advantage'] * logp).sum(), rtol=1e-4)
  with pytest.raises(ValueError, match="'ppo' is registered already"):
    objectives.register_objective('ppo')(toy)
  with pytest.raises(ValueError, match='belong together'):
    objectives.register_objective('other', scope='micro-batch')
  with pytest.raises(ValueError, match='cannot be merged'):
    objectives.register_objective(
      'other', statistic=objectives.high_covariance, scope='mini-batch', merges=True
    )


MERGING = sorted(name for name, each in objectives.OBJECTIVES.items() if each.merges)


@pytest.mark.parametrize('name', MERGING)
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_the_sides_of_a_node_are_all_that_a_loss_that_merges_needs(name, data):
  """Loss, its slope and clipped share of a token with several advantages, against single tokens."""
  # Quarters, among which there are zeros, and no numbers so small that their products vanish.
  quarters = st.integers(-12, 12)
  gap = data.draw(quarters) / 4
  advantages = np.float32(data.draw(st.lists(quarters, min_size=1, max_size=6))) / 4
  loss = PolicyLoss(objective=name, clip_low=0.1, clip_high=0.3, dual_clip=2.0)
  function = objectives.OBJECTIVES[name].loss
  options = {option: getattr(loss, option) for option in options_of(function)}
  old = np.full(len(advantages), -2, np.float32)
  logp = jnp.float32(old + gap)

  def single(logp):
    each, clipped = function(logp, {'advantage': advantages, 'old_logp': old}, **options)
    return each.sum(), clipped.sum()

  count = np.float32([len(advantages)])
  sides = objectives.advantage_sides(advantages)
  node = {side: values.mean(keepdims=True) for side, values in sides.items()}

  def merged(logp):
    total, parts = loss.sums(logp, jnp.zeros(1), count, {'old_logp': old[:1], **node})
    return total, parts['clip_share']

  (wanted, clipped), slope = jax.value_and_grad(single, has_aux=True)(logp)
  (total, share), own_slope = jax.value_and_grad(merged, has_aux=True)(logp[:1])
  np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(own_slope.sum(), slope.sum(), rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(share, clipped, rtol=1e-6)


@pytest.mark.parametrize(
  'kind, wanted', [('k1', [1.0, -10, 10]), ('k2', [0.5, 10, 10]), ('k3', [np.exp(-1), 10, 10])]
)
def test_kl_estimates_are_bounded(kind, wanted):
  logp = np.float32([0, -100, 100])
  ref = np.float32([-1, 100, -100])
  value, slope = jax.vjp(lambda logp: objectives.kl_estimate(logp, ref, kind), logp)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  assert np.isfinite(slope(jnp.ones(3))[0]).all()


def test_kl_estimators_agree_on_average():
  """Over samples of the policy all three estimate the same KL; k2 and k3 vary less."""
  rng = np.random.default_rng(0)
  logits, ref_logits = rng.normal(0, 0.3, (2, 20))
  log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (logits, ref_logits))
  drawn = rng.choice(20, 400_000, p=np.exp(log_p))
  exact = (np.exp(log_p) * (log_p - log_q)).sum()
  for kind, tolerance in (
    ('k1', 0.03),
    ('k2', 0.1),
    ('k3', 0.03),
  ):  # k2 is biased by the third moment
    estimate = objectives.kl_estimate(jnp.float32(log_p[drawn]), jnp.float32(log_q[drawn]), kind)
    assert abs(float(estimate.mean()) / exact - 1) < tolerance


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=50)
def test_aggregations_equal_their_definitions(data):
  sequences = data.draw(
    st.lists(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=5), min_size=1, max_size=5)
  )
  flat = sum(sequences, [])
  wanted = {
    'token': np.mean(flat),
    'sequence': np.mean([np.mean(row) for row in sequences]),
    'dr': np.sum(flat) / (len(sequences) * 7),
  }
  order = np.array(data.draw(st.permutations(range(25))))  # 25 places, unused ones among them

  def place(x):
    return np.pad(x, (0, 25 - len(flat)))[order]

  number = place(np.repeat(np.arange(len(sequences), dtype=np.int32), list(map(len, sequences))))
  for how, mean in wanted.items():
    used = place(np.ones(len(flat), np.float32))
    weight, total = objectives.aggregate(used, sequence_weights(used, number), how, 7)
    np.testing.assert_allclose(
      (weight * place(np.float32(flat))).sum() / total, mean, rtol=1e-5, atol=1e-6
    )


def test_covariance_counts_used_tokens_only(batch):
  logp, weight, values = batch
  chosen = objectives.high_covariance(logp, weight, values, cov_share=0.1)
  assert chosen.sum() == (M - UNUSED) // 10 and not chosen[-UNUSED:].any()
  assert objectives.high_covariance(logp, weight, values).sum() == 1  # at least one
  assert not objectives.high_covariance(logp, 0 * weight, values).any()
  same = {name: np.zeros(M, np.float32) for name in ('advantage',)}
  assert objectives.high_covariance(logp, weight, same, cov_share=0.1)[
    :26
  ].all()  # ties: the earlier


def test_extras_say_what_a_batch_must_bring():
  sides = {'advantage_up', 'advantage_down', 'share_up', 'share_down', 'old_logp'}
  assert PolicyLoss().extras == PolicyLoss(objective='cispo').extras == sides
  assert PolicyLoss(kl_coefficient=0.1, importance_cap=2.0).extras == sides | {
    'ref_logp',
    'behaviour_logp',
  }
  assert PolicyLoss(objective='gspo').extras == {'advantage', 'old_logp', 'sequence'}
  for how in ('sequence', 'dr'):
    assert PolicyLoss(aggregation=how).extras == sides | {'sequence_weight'}
  assert PolicyLoss(objective='kl_cov', uniform_kl=0.1).extras == {
    'advantage',
    'old_logp',
    'updated',
    'uniform',
  }


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(objective='grpo'), "unknown objective 'grpo'"),
    (dict(aggregation='mean'), 'unknown aggregation'),
    (dict(kl_estimator='k4'), 'unknown kl_estimator'),
    (dict(clip_low=-0.1), 'clip_low'),
    (dict(dual_clip=1.0), 'dual_clip'),
    (dict(kl_coefficient=np.nan), 'kl_coefficient'),
  ],
)
def test_senseless_losses_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    PolicyLoss(**options)
