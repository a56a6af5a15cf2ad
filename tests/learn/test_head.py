"""The chunked head against the plain form: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax import sharding
from dcore_jax.learn import head, token_chunks


def plain(hidden, matrix, targets, temperature):
  log_p = jax.nn.log_softmax(hidden @ matrix.T / temperature)
  return jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0], -(jnp.exp(log_p) * log_p).sum(
    axis=1
  )


def problem(M=37, D=16, V=53):
  keys = jax.random.split(jax.random.key(0), 3)
  return (
    jax.random.normal(keys[0], (M, D)),
    jax.random.normal(keys[1], (V, D)),
    jax.random.randint(keys[2], (M,), 0, V),
  )


@pytest.mark.parametrize('chunk', [None, 37, 10, 1])
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_equals_the_plain_form(chunk, temperature):
  hidden, matrix, targets = problem()
  ours = head.log_probs_and_entropy(hidden, matrix, targets, temperature, chunk)
  for value, expected in zip(ours, plain(hidden, matrix, targets, temperature), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('chunk', [None, 10])
@pytest.mark.parametrize('scales', [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)])
def test_gradients_through_both_results(chunk, scales):
  hidden, matrix, targets = problem()
  weight = jnp.linspace(-1, 2, len(targets))

  def total(function):
    def scalar(hidden, matrix):
      results = function(hidden, matrix)
      return sum(
        scale * (weight * result).sum()
        for scale, result in zip(scales, results, strict=True)
        if scale
      )

    return jax.grad(scalar, (0, 1))

  ours = total(lambda h, m: head.log_probs_and_entropy(h, m, targets, 0.7, chunk))(hidden, matrix)
  expected = total(lambda h, m: plain(h, m, targets, 0.7))(hidden, matrix)
  for value, wanted in zip(ours, expected, strict=True):
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=2e-5)


def test_entropy_is_never_negative_and_bounded():
  hidden, matrix, targets = problem(M=200)
  for scale in (1e-3, 1, 1e3):
    logp, entropy = head.log_probs_and_entropy(hidden * scale, matrix, targets)
    assert np.isfinite(logp).all()
    assert (np.asarray(entropy) >= 0).all() and (np.asarray(entropy) <= np.log(53) + 1e-5).all()


def test_bfloat16_accumulates_in_float32():
  hidden, matrix, targets = (
    x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in problem()
  )
  logp, entropy = head.log_probs_and_entropy(hidden, matrix, targets, chunk=10)
  wanted = plain(hidden.astype(jnp.float32), matrix.astype(jnp.float32), targets, 1.0)
  assert logp.dtype == entropy.dtype == jnp.float32
  np.testing.assert_allclose(logp, wanted[0], atol=1e-4)
  grads = jax.grad(lambda h, m: head.log_probs_and_entropy(h, m, targets)[0].sum(), (0, 1))(
    hidden, matrix
  )
  assert all(grad.dtype == jnp.bfloat16 for grad in grads)


def test_whole_logits_never_exist():
  """With chunks, no array of the compiled forward and backward pass is as large as the logits."""
  M = 64
  V = 999
  hidden, matrix, targets = problem(M, 16, V)

  def loss(h, m):
    return head.log_probs_and_entropy(h, m, targets, chunk=8)[0].sum()

  text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, matrix).compile().as_text()
  assert f'[{M},{V}]' not in text and f'[8,8,{V}]' not in text and f'[8,{V}]' in text


def test_chunks_without_a_used_token_are_skipped():
  hidden, matrix, targets = problem()
  hidden = hidden.at[20:].set(jnp.nan)  # what would come of them is not a number
  used = (jnp.arange(37) < 15) / 3

  def score(h, m):
    return head.log_probs_and_entropy(h, m, targets, 0.7, 10, used)

  def total(scores):
    return jnp.sum(jnp.where(used > 0, scores[0] - 0.3 * scores[1], 0))

  scores = score(hidden, matrix)
  grads = jax.grad(lambda *x: total(score(*x)), (0, 1))(hidden, matrix)
  safe = hidden.at[20:].set(0)
  wanted = jax.grad(lambda *x: total(plain(*x, targets, 0.7)), (0, 1))(safe, matrix)
  for value, expected in zip(scores, plain(safe, matrix, targets, 0.7), strict=True):
    np.testing.assert_allclose(value[:15], expected[:15], rtol=1e-5, atol=1e-5)
    assert not value[20:].any()
  for value, expected in zip(grads, wanted, strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def weighted(logp, entropy, values):
  """A loss that is not linear in its scores, so that its gradient has to be taken where the scores
  are.
  """
  weight, shift = values
  loss = -jnp.sum(weight * (jnp.exp(logp - shift) + logp))
  bonus = 0 if entropy is None else 0.3 * jnp.sum(weight * entropy**2)
  return loss - bonus, {'weight': jnp.sum(weight), 'logp': jnp.sum(weight * logp)}


@pytest.mark.parametrize('chunk', [None, 10, 1])
@pytest.mark.parametrize('entropy', ['none', 'value', 'gradient'])
def test_token_loss_equals_the_plain_form(chunk, entropy):
  hidden, matrix, targets = problem()
  values = jnp.linspace(0, 2, len(targets)), jnp.linspace(-4, -3, len(targets))

  def wanted(hidden, matrix):
    logp, spread = plain(hidden, matrix, targets, 0.7)
    spread = {'none': None, 'value': jax.lax.stop_gradient(spread), 'gradient': spread}[entropy]
    return weighted(logp, spread, values)

  options = head.LossOptions(temperature=0.7, entropy=entropy, chunk=chunk)

  def ours(hidden, matrix):
    return head.token_loss(weighted, hidden, matrix, targets, values, options)

  np.testing.assert_allclose(
    ours(hidden, matrix)[0], wanted(hidden, matrix)[0], rtol=1e-5
  )  # without differentiation
  (loss, sums), grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(hidden, matrix)
  (loss_, sums_), grads_ = jax.value_and_grad(wanted, (0, 1), has_aux=True)(hidden, matrix)
  np.testing.assert_allclose(loss, loss_, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), sums, sums_)
  for value, expected in zip(grads, grads_, strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)


def test_chunks_for_a_tpu_are_whole_tiles(monkeypatch):
  """37 tokens in chunks of 19 would be split across its tiles, which takes its compiler minutes."""
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  monkeypatch.setitem(token_chunks._CHUNK_ENTRIES, 'tpu', 16 * 53)
  hidden, matrix, targets = problem()
  values = (jnp.linspace(-1, 2, 37), jnp.linspace(0, 1, 37))

  def loss(hidden, matrix):
    options = head.LossOptions(entropy='gradient')
    return head.token_loss(weighted, hidden, matrix, targets, values, options)[0]

  def scores(hidden, matrix):
    return weighted(*head.log_probs_and_entropy(hidden, matrix, targets), values)[0]

  wanted = jax.value_and_grad(
    lambda *args: weighted(*plain(*args, targets, 1.0), values)[0], (0, 1)
  )(hidden, matrix)
  for ours in (loss, scores):
    assert 'f32[2,32,16]' in str(jax.make_jaxpr(ours)(hidden, matrix))
    value, grads = jax.value_and_grad(ours, (0, 1))(hidden, matrix)
    for array, expected in zip((value, *grads), (wanted[0], *wanted[1]), strict=True):
      np.testing.assert_allclose(array, expected, rtol=1e-5, atol=2e-5)


def test_chunks_without_values_are_skipped():
  """Hidden states of NaN would reach the sums and every gradient if their chunk were computed."""
  hidden, matrix, targets = problem()
  weight = jnp.ones(37).at[20:].set(0)
  poisoned = hidden.at[20:].set(jnp.nan)
  options = head.LossOptions(chunk=10, entropy='value')

  def loss(h, m):
    return head.token_loss(weighted, h, m, targets, (weight, -3 * weight), options)[0]

  for value, wanted in zip(
    jax.grad(loss, (0, 1))(poisoned, matrix), jax.grad(loss, (0, 1))(hidden, matrix), strict=True
  ):
    np.testing.assert_array_equal(value, wanted)
  assert loss(poisoned, matrix) == loss(hidden, matrix)


def test_token_loss_scales_its_gradient_and_takes_bfloat16():
  hidden, matrix, targets = (
    x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in problem()
  )
  values = jnp.ones(len(targets)), jnp.full(len(targets), -3.0)
  options = head.LossOptions(chunk=10)

  def loss(factor):
    return lambda h, m: factor * head.token_loss(weighted, h, m, targets, values, options)[0]

  once, thrice = (jax.grad(loss(factor), (0, 1))(hidden, matrix) for factor in (1.0, 3.0))
  for a, b in zip(once, thrice, strict=True):
    assert a.dtype == b.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      3 * a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=1e-3
    )


def test_a_tenth_of_the_memory_at_the_full_vocabulary():
  """Of the temporaries of the plain loss, at 2,048 tokens of Qwen3's vocabulary; compiled only."""
  M = 2048
  D = 64
  V = 151_936
  shapes = [
    jax.ShapeDtypeStruct((M, D), jnp.float32),
    jax.ShapeDtypeStruct((V, D), jnp.float32),
    jax.ShapeDtypeStruct((M,), jnp.int32),
  ]

  def nll(logp, _, weight):
    return (-jnp.sum(weight * logp), ())

  def fused(h, m, t):
    return head.token_loss(nll, h, m, t, jnp.ones(M))[0]

  def scored(h, m, t):
    return -head.log_probs_and_entropy(h, m, t)[0].sum()

  def whole(h, m, t):
    return -plain(h, m, t, 1.0)[0].sum()

  bytes_ = [
    jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    for f in (fused, scored, whole)
  ]
  assert 10 * bytes_[0] < bytes_[2] and 10 * bytes_[1] < bytes_[2]


def test_unused_rows_of_the_embedding_are_trained_as_torch_trains_them():
  """Qwen3's embedding has 267 rows beyond its tokenizer; they are part of every softmax, here the
  last 5 of 53.
  """
  torch = pytest.importorskip('torch')
  hidden, matrix, targets = problem()
  targets = targets % 48

  def nll(logp, _, weight):
    return (-jnp.sum(weight * logp), ())

  weights = jnp.full(37, 1 / 37)
  options = head.LossOptions(chunk=10)
  grad = jax.grad(lambda m: head.token_loss(nll, hidden, m, targets, weights, options)[0])(matrix)
  theirs = torch.tensor(np.asarray(matrix), requires_grad=True)
  logits = torch.tensor(np.asarray(hidden)) @ theirs.T
  torch.nn.functional.cross_entropy(
    logits, torch.tensor(np.asarray(targets), dtype=torch.long)
  ).backward()
  assert np.abs(grad[48:]).max() > 1e-3
  np.testing.assert_allclose(grad, theirs.grad, atol=1e-6)


def test_empty_input():
  _, matrix, _ = problem()
  logp, entropy = head.log_probs_and_entropy(jnp.zeros((0, 16)), matrix, jnp.zeros((0,), jnp.int32))
  assert logp.shape == entropy.shape == (0,)


def test_refuses_greedy_temperature_and_empty_chunks():
  with pytest.raises(ValueError, match='temperature'):
    head.log_probs_and_entropy(*problem(), temperature=0.0)
  with pytest.raises(ValueError, match='chunk'):
    head.log_probs_and_entropy(*problem(), chunk=0)
  with pytest.raises(ValueError, match="entropy = 'maybe'"):
    head.LossOptions(entropy='maybe')


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_kl_from_uniform_needs_no_logits(dtype, tolerance):
  """-logp - gap = KL(uniform || policy) = -log V - mean log p, with the gradient p - 1 / V of its
  logits.
  """
  hidden, matrix, targets = problem()
  hidden = hidden.astype(dtype)
  matrix = matrix.astype(dtype)

  def ours(hidden, matrix):
    logp, _ = head.log_probs_and_entropy(hidden, matrix, targets, 0.7)
    return -logp - head.uniform_gap(hidden, matrix, targets, 0.7)

  def wanted(hidden, matrix):
    log_p = jax.nn.log_softmax(
      jnp.einsum('md,vd->mv', hidden, matrix, preferred_element_type=jnp.float32) / 0.7
    )
    return -jnp.log(log_p.shape[1]) - log_p.mean(axis=1)

  np.testing.assert_allclose(
    ours(hidden, matrix), wanted(hidden, matrix), rtol=tolerance, atol=tolerance
  )
  assert (ours(hidden, matrix) >= 0).all()

  def gradients(function):
    return jax.grad(lambda *x: function(*x).sum(), (0, 1))(hidden, matrix)

  grads = gradients(ours)
  grads_ = gradients(wanted)
  for value, expected in zip(grads, grads_, strict=True):
    np.testing.assert_allclose(
      np.float32(value), np.float32(expected), rtol=tolerance, atol=10 * tolerance
    )
