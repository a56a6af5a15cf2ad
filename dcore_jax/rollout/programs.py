"""What the executors share: draws, and how programs are counted and compiled.

Letters as in passes.py.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.rollout import sampling
from dcore_jax.rollout.sampling import Alternatives, Rule, SamplingParams

# Compilations of each program. The body of a traced function runs once for each of them, which is
# where they are counted.
traces = collections.Counter()
# Programs that are compiled side by side; each takes the memory of a compiler.
_COMPILERS = min(4, os.cpu_count() or 1)


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


def no_draws(count: int) -> DrawInputs:
  """Returns inputs of so many draws from row 0, greedy, which nobody asked for."""
  return DrawInputs(
    row_A=np.zeros(count, np.int32),
    key_A2=np.zeros((count, 2), np.uint32),
    index_A=np.zeros(count, np.int32),
    rule=jax.tree.map(lambda number: np.zeros(count, number.dtype), SamplingParams().rule()),
    target_A=np.zeros(count, np.int32),
    scoring=np.bool_(False),
    listing=np.bool_(False),
  )


def some_draws(inputs: DrawInputs, places: slice | Sequence[int], count: int) -> DrawInputs:
  """Returns the draws at some places, filled up to `count`; flags are taken as they are."""

  def fill(blank_A: np.ndarray, given_A: np.ndarray) -> np.ndarray:
    if not np.ndim(given_A):
      return given_A
    chosen_A = given_A[places]
    blank_A[: len(chosen_A)] = chosen_A
    return blank_A

  return jax.tree.map(fill, no_draws(count), inputs)


def pieces(inputs: DrawInputs | None, most: int) -> Iterator[slice]:
  """Yields the places of draws that are made together, at most so many; None: there are none."""
  count = 0 if inputs is None else len(inputs.row_A)
  for first in range(0, count, most):
    yield slice(first, min(first + most, count))


def joined(parts: Sequence[tuple[int, Drawn]]) -> Drawn | None:
  """Returns what several calls drew, (how many draws, what) each, without what filled them up.

  None where there were none.
  """
  cut = [jax.tree.map(lambda x, used=used: np.asarray(x)[:used], drawn) for used, drawn in parts]
  return jax.tree.map(lambda *found: np.concatenate(found), *cut) if cut else None


def compile_all(
  lowered: Sequence[Callable[[], jax.stages.Lowered]], progress: Callable[[int, int], None]
) -> None:
  """Compiles programs side by side; `progress` gets (those that are ready, all).

  A later call of such a program finds it compiled.
  """
  progress(0, len(lowered))
  with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
    waiting = [pool.submit(lambda lower=lower: lower().compile()) for lower in lowered]
    try:
      for ready, one in enumerate(concurrent.futures.as_completed(waiting), start=1):
        one.result()
        progress(ready, len(lowered))
    finally:
      # Whoever is told may want to stop.
      pool.shutdown(cancel_futures=True)
