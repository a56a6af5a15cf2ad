"""Rollouts of a step: sampled in waves, kept in a journal, scored, and selected (DAPO's rounds)."""

import dataclasses
import time
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.config import RlSection
from dcore_jax.learn import advantages
from dcore_jax.rollout.engine import Engine
from dcore_jax.train.checksum import tree_sum
from dcore_jax.train.journal import JournaledEngine, RolloutJournal
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.rl_options import length_penalty, sampling_params
from dcore_jax.train.rollout_batch import (
  Rollout,
  RolloutBatch,
  prompt_means,
  rollout_metrics,
  take_groups,
)
from dcore_jax.train.sources import RolloutSource

_MEASURED = 2**32 - 1  # the random stream of measurements; no step has this number


class SampledStep(NamedTuple):
  """What a step learns from.

  Attributes:
    batch: the scored groups.
    judging: seconds that scoring took.
    asked: figures of all groups that were asked, if some were left out; else none.
  """

  batch: RolloutBatch
  judging: float
  asked: dict[str, float]


class Sampler:
  """Samples and scores the rollouts of each step.

  Args:
    engine: where rollouts are made, with the weights that it has at that time.
    source: what is asked, and how answers are judged.
    order: which items each step asks; its seed is that of sampling, too.
    config: section `rl`.
    journal: where rollouts are kept until a checkpoint covers them; None keeps none.
  """

  def __init__(
    self,
    engine: Engine,
    source: RolloutSource,
    order: PromptOrder,
    config: RlSection,
    journal: RolloutJournal | None = None,
  ):
    self._engine = engine
    self._source = source
    self._order = order
    self._config = config
    self._journal = journal
    # One seed for order and sampling: a run is repeated by one number.
    self._sampling = sampling_params(config, order.seed)

  def step(self, step: int) -> SampledStep:
    """Samples, scores and selects the groups of a step.

    With `rl.dynamic_rounds`, more items are asked as long as too few groups have reward variance
    (DAPO's dynamic sampling). Where the rounds do not suffice, the first of the other groups fill
    the batch.
    """
    config = self._config
    parts = []
    judging = 0.0
    # Every round asks as many items as a step has, whose rollouts fill the engine's lanes.
    for turn in range(config.dynamic_rounds + 1):
      rollouts = self.rollouts(step, turn)
      began = time.monotonic()
      judged = self._source.judge(self._order.chosen(step, turn), rollouts)
      parts.append(self._penalised(judged))
      judging += time.monotonic() - began
      if not config.dynamic_rounds:
        return SampledStep(batch=parts[0], judging=judging, asked={})
      rewards_PG = np.concatenate([part.total_PG for part in parts])
      kept = advantages.select_groups(
        rewards_PG, config.prompts, uniform_share=config.uniform_share
      )
      if len(kept) == config.prompts:
        break
    # All rounds are used up, or there are enough groups: the filling is then empty.
    others = np.setdiff1d(np.arange(len(rewards_PG)), kept)
    filling = others[: config.prompts - len(kept)]
    asked = {
      'asked_groups': len(rewards_PG),
      'asked_zero_variance': float(advantages.uniform_groups(rewards_PG).mean()),
    }
    # In the order in which they were asked.
    batch = take_groups(parts, np.sort(np.concatenate([kept, filling])))
    return SampledStep(batch=batch, judging=judging, asked=asked)

  def _penalised(self, batch: RolloutBatch) -> RolloutBatch:
    """Adds DAPO's penalty for responses that come close to the limit, if the config asks for it.

    The longest response of a rollout counts.
    """
    if not self._config.overlong_buffer:
      return batch
    lengths = []
    for rollout in batch.rollouts:
      # An episode whose first prompt was too long has no response, and no penalty.
      own = [len(completion.tokens) for _, completion in rollout.exchanges]
      lengths.append(max(own, default=0))
    penalty = length_penalty(self._config, np.array(lengths)).astype(np.float32)
    # Only the reward that is learned from changes; format, correctness and right stay measurements.
    total_PG = batch.total_PG + penalty.reshape(batch.total_PG.shape)
    return dataclasses.replace(batch, total_PG=total_PG)

  def rollouts(self, step: int, turn: int = 0) -> list[Rollout]:
    """Samples one turn of a step, wave by wave, or reads what an earlier process has sampled."""
    chosen = self._order.chosen(step, turn)
    wave = self._config.wave
    # Rollouts of other weights must never be taken for these, e.g. after a fallback.
    weights = int(tree_sum(self._engine.params)) if self._journal else 0
    # File numbers go on over the turns of a step.
    waves_before = turn * -(-len(chosen) // wave)
    rollouts = []
    for first in range(0, len(chosen), wave):
      items = chosen[first : first + wave]
      engine = self._engine
      if self._journal:
        engine = self._journaled(step, waves_before + first // wave, items, weights)
      # Items are numbered over all turns of the step, so that a further turn has streams of its
      # own.
      places = range(turn * len(chosen) + first, turn * len(chosen) + first + len(items))
      rollouts += self._sample(engine, items, step, places)
    return rollouts

  def _journaled(self, step: int, wave: int, items: list[int], weights: int) -> JournaledEngine:
    """Returns the engine behind a wave's journal.

    The file's fingerprint is made of all that rollouts depend on.
    """
    origin = (
      weights,
      self._source.fingerprint,
      items,
      self._config.group,
      self._sampling,
      self._engine.max_len,
    )
    # The text of these values is part of the file format: another order would be another run.
    fingerprint = zlib.crc32(repr(origin).encode())
    return self._journal.engine(self._engine, step, wave, fingerprint)

  def measured(self, items: Sequence[int]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns (`rollout_metrics`, `prompt_means`) of held-out items, from the same streams always.

    The stream of an item is its own, whichever others are held out.
    """
    streams = []
    taken = set()
    for item in items:
      stream = self._source.labels[item].stream
      # Two items that are one prompt still need two streams.
      while stream in taken:
        stream = (stream + 1) % 2**32
      taken.add(stream)
      streams.append(stream)
    # Without the length penalty: measurements compare policies by the task's own reward.
    batch = self._source.judge(items, self._sample(self._engine, items, _MEASURED, streams))
    return rollout_metrics(batch), prompt_means(batch)

  def _sample(
    self,
    engine: Engine | JournaledEngine,
    items: Sequence[int],
    step: int,
    streams: Sequence[int],
  ) -> list[Rollout]:
    """Samples a group of each item; `streams` number the items among those of the step."""
    repeated = []
    keys = []
    for item, stream in zip(items, streams, strict=True):
      # The rollouts of a group stand side by side, so that the engine computes their prompt once.
      for g in range(self._config.group):
        repeated.append(item)
        # A random stream is named by what is asked, so that waves and lanes do not matter.
        keys.append((step, stream, g))
    return self._source.sample(engine, repeated, keys, self._sampling)
