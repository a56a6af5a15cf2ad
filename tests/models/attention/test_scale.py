"""Attention of prefill and decode in 16 bits: scores are those of the kernels that the policy is
trained with.
"""

import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize('places', [1, 8])
def test_decoding(places):
  """All keys but the last in trunks, one a lane or all lanes at one."""
  q, k, wanted = drawn()
  if places == 8:  # the first lane's keys for all
    k = jnp.broadcast_to(k[:1], k.shape)
    scores = np.einsum('bh,bsh->bs', *(np.asarray(x, np.float64) for x in (q, k))) / np.sqrt(H)
    wanted = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted /= wanted.sum(axis=1, keepdims=True)
  values = jnp.broadcast_to(jnp.eye(S, dtype=jnp.bfloat16), (4, 1, S, S))
  trunks = slice(0, 4 if places == 1 else 1)
  lane_RW = jnp.arange(4)[:, None] if places == 1 else jnp.array([[0, 1, 2, 3, 0, 0, 0, 0]])
  sharing = reference.Sharing(jnp.full(lane_RW.shape[0], S - 1), lane_RW, jnp.arange(4))
  found = reference.attend_branches(
    q[:, None, None],
    k[trunks, None],
    values[trunks],
    k[:, None, -1:],
    values[:, :, -1:],
    sharing,
    jnp.ones(4, jnp.int32),
  )
  check(found[:, 0, 0], wanted)
