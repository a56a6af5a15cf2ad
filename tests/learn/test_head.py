"""The chunked head against the plain form: values and gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.learn import head


def plain(hidden, matrix, targets, temperature):
  log_p = jax.nn.log_softmax(hidden @ matrix.T / temperature)
  return jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0], -(jnp.exp(log_p) * log_p).sum(axis=1)


def problem(M=37, D=16, V=53):
  keys = jax.random.split(jax.random.key(0), 3)
  return jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (V, D)), jax.random.randint(keys[2], (M,), 0, V)


@pytest.mark.parametrize('chunk', [None, 37, 10, 1])
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_equals_the_plain_form(chunk, temperature):
  hidden, matrix, targets = problem()
  ours = head.log_probs_and_entropy(hidden, matrix, targets, temperature, chunk)
  for value, expected in zip(ours, plain(hidden, matrix, targets, temperature)):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('chunk', [None, 10])
@pytest.mark.parametrize('scales', [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)])
def test_gradients_through_both_results(chunk, scales):
  hidden, matrix, targets = problem()
  weight = jnp.linspace(-1, 2, len(targets))

  def total(function):
    def scalar(hidden, matrix):
      results = function(hidden, matrix)
      return sum(scale * (weight * result).sum() for scale, result in zip(scales, results) if scale)
    return jax.grad(scalar, (0, 1))

  ours = total(lambda h, m: head.log_probs_and_entropy(h, m, targets, 0.7, chunk))(hidden, matrix)
  expected = total(lambda h, m: plain(h, m, targets, 0.7))(hidden, matrix)
  for value, wanted in zip(ours, expected):
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=2e-5)


def test_entropy_is_never_negative_and_bounded():
  hidden, matrix, targets = problem(M=200)
  for scale in (1e-3, 1, 1e3):
    logp, entropy = head.log_probs_and_entropy(hidden * scale, matrix, targets)
    assert np.isfinite(logp).all()
    assert (np.asarray(entropy) >= 0).all() and (np.asarray(entropy) <= np.log(53) + 1e-5).all()


def test_bfloat16_accumulates_in_float32():
  hidden, matrix, targets = (x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in problem())
  logp, entropy = head.log_probs_and_entropy(hidden, matrix, targets, chunk=10)
  wanted = plain(hidden.astype(jnp.float32), matrix.astype(jnp.float32), targets, 1.0)
  assert logp.dtype == entropy.dtype == jnp.float32
  np.testing.assert_allclose(logp, wanted[0], atol=1e-4)
  grads = jax.grad(lambda h, m: head.log_probs_and_entropy(h, m, targets)[0].sum(), (0, 1))(hidden, matrix)
  assert all(grad.dtype == jnp.bfloat16 for grad in grads)


def test_whole_logits_never_exist():
  """With chunks, no array of the compiled forward and backward pass is as large as the logits."""
  M, V = 64, 999
  hidden, matrix, targets = problem(M, 16, V)
  loss = lambda h, m: head.log_probs_and_entropy(h, m, targets, chunk=8)[0].sum()
  text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, matrix).compile().as_text()
  assert f'[{M},{V}]' not in text and f'[8,8,{V}]' not in text and f'[8,{V}]' in text


def test_empty_input():
  _, matrix, _ = problem()
  logp, entropy = head.log_probs_and_entropy(jnp.zeros((0, 16)), matrix, jnp.zeros((0,), jnp.int32))
  assert logp.shape == entropy.shape == (0,)


def test_refuses_greedy_temperature_and_empty_chunks():
  with pytest.raises(ValueError, match='temperature'):
    head.log_probs_and_entropy(*problem(), temperature=0.0)
  with pytest.raises(ValueError, match='chunk'):
    head.log_probs_and_entropy(*problem(), chunk=0)
