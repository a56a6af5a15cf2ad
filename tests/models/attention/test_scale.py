"""Attention of prefill and decode in 16 bits: scores are those of the kernels that the policy is
trained with.
"""

import jax.numpy as jnp
import numpy as np

from dcore_jax.models.attention import reference

H = S = 128


def drawn():
  """(queries of 4 lanes, keys, probabilities in float64): scores of some tens, as trained models
  have.
  """
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(3 * rng.normal(size=size), jnp.bfloat16) for size in ((4, H), (4, S, H)))
  scores = np.einsum('bh,bsh->bs', *(np.asarray(x, np.float64) for x in (q, k))) / np.sqrt(H)
  weights = np.exp(scores - scores.max(axis=1, keepdims=True))
  return q, k, weights / weights.sum(axis=1, keepdims=True)


def check(found, wanted):
  """To bfloat16's rounding, once for the weights and once for the result, where they are not next
  to nothing.
  """
  large = wanted > 1e-3
  np.testing.assert_allclose(
    np.asarray(found, np.float64)[large], wanted[large], rtol=2.1 * 2.0**-8
  )


def test_prefill():
  q, k, wanted = drawn()
  values = jnp.broadcast_to(jnp.eye(S, dtype=jnp.bfloat16), (4, 1, S, S))
  check(
    reference.attend(q[:, None, None], k[:, None], values, jnp.ones((4, 1, S), bool))[:, 0, 0],
    wanted,
  )
