"""What the device programs of both kinds of engine share: the draws, and how they are counted.

Letters as in passes.py.
"""

import collections
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.rollout import sampling
from dcore_jax.rollout.sampling import Alternatives, Rule

# Compilations of each program. The body of a traced function runs once for each of them, which is
# where they are counted.
traces = collections.Counter()


class DrawInputs(NamedTuple):
  """What is drawn from some rows of a pass, or which tokens of theirs are scored.

  Attributes:
    row_A: int32, the row of the pass.
    key_A2: uint32, random key of the rollout.
    index_A: int32, number of the token in its completion: it chooses the random numbers, and not
      the pass. A rollout that waited or changed its neighbours draws the same.
    rule: the rollout's.
    target_A: int32, the token behind each row, where rows are scored.
    scoring: bool [], whether rows are scored instead.
    listing: bool [], whether any draw wants alternatives.
  """

  row_A: np.ndarray
  key_A2: np.ndarray
  index_A: np.ndarray
  rule: Rule
  target_A: np.ndarray
  scoring: np.ndarray
  listing: np.ndarray


class Drawn(NamedTuple):
  """What was drawn; where rows are scored, the target's log-probability and rank.

  Attributes:
    token_A: int32, the token; the target's rank, 1 for the likeliest.
    logprob_A: float32, under the policy that drew.
    full_logprob_A: float32, the same before truncation.
    entropy_A: float32, nats, before truncation.
    top: alternatives [A, TOP]; zeros where nobody wants any.
  """

  token_A: jax.Array | np.ndarray
  logprob_A: jax.Array | np.ndarray
  full_logprob_A: jax.Array | np.ndarray
  entropy_A: jax.Array | np.ndarray
  top: Alternatives


def draw_or_score(logits_AV: jax.Array, inputs: DrawInputs) -> Drawn:
  """Draws from logits [A, V], or scores a target in each."""
  logits_AV = logits_AV.astype(jnp.float32)

  def draw() -> Drawn:
    keys_A = sampling.token_keys(inputs.key_A2, inputs.index_A)
    drawn = sampling.draw(logits_AV, sampling.uniforms(keys_A), inputs.rule, inputs.listing)
    return Drawn(*drawn)

  def score() -> Drawn:
    return Drawn(*sampling.score(logits_AV, inputs.target_A))

  return jax.lax.cond(inputs.scoring, score, draw)
