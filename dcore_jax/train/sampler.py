"""Rollouts of a step: sampled in waves, kept in a journal, scored, and selected (DAPO's rounds)."""

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dcore_jax.config import RlSection
from dcore_jax.learn import advantages, controls
from dcore_jax.rollout.divided import Recalled, Recorder, divide, is_divided, sample_share
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.streams import Counted, Stream
from dcore_jax.train.checksum import tree_sum
from dcore_jax.train.journal import JournaledWave, RolloutJournal
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

# Folder of the journal of measurements, beside those of the stages' checkpoints.
MEASURED = 'measured'
_MEASURED = 2**32 - 1  # the random stream of measurements; no step has this number


class SampledStep(NamedTuple):
  """What a step learns from.

  Attributes:
    batch: the scored groups.
    judging: seconds that scoring took.
    asked: figures of all groups that were asked, if some were left out, and of a fleet.
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
    measured: where rollouts of held-out items are kept, so that stages which measure the same
      weights sample them once; None keeps none.
  """

  def __init__(
    self,
    engine: Engine,
    source: RolloutSource,
    order: PromptOrder,
    config: RlSection,
    journal: RolloutJournal | None = None,
    measured: RolloutJournal | None = None,
  ):
    self._engine = engine
    self._source = source
    self._order = order
    self._config = config
    self._journal = journal
    self._measured = measured
    # One seed for order and sampling: a run is repeated by one number.
    self._sampling = sampling_params(config, order.seed)

  def answers(self, items: Sequence[int]) -> int | None:
    """Returns how many completions `measure` samples; None where that is not known before."""
    if self._source.responses > 1:
      return None
    return len(items) * self._config.group

  def __enter__(self) -> 'Sampler':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Lets go of what is under way; one engine has nothing under way between two steps."""

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
        batch = self._signed(parts[0], step, range(config.prompts))
        return SampledStep(batch=batch, judging=judging, asked={})
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
    groups = np.sort(np.concatenate([kept, filling]))
    batch = self._signed(take_groups(parts, groups), step, groups)
    return SampledStep(batch=batch, judging=judging, asked=asked)

  def _signed(self, batch: RolloutBatch, step: int, places: Sequence[int]) -> RolloutBatch:
    """Draws the signs of the groups, each by its place among all that the step has asked."""
    signs_P = controls.group_signs(self._order.seed, step, places)
    return dataclasses.replace(batch, signs_P=signs_P)

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
    weights = self._origin() if self._journal else 0
    # File numbers go on over the turns of a step.
    waves_before = turn * -(-len(chosen) // wave)
    rollouts = []
    for first in range(0, len(chosen), wave):
      items = chosen[first : first + wave]
      number = waves_before + first // wave
      engine = self._serving(step, number)
      file = None
      if self._journal:
        file = self._file(engine, step, number, items, weights)
      # Items are numbered over all turns of the step, so that a further turn has streams of its
      # own.
      places = range(turn * len(chosen) + first, turn * len(chosen) + first + len(items))
      rollouts += self._sample(engine, items, step, places, file)
    return rollouts

  def _origin(self) -> int:
    """Returns the sum over the bits of the weights that rollouts are made with."""
    # An engine of one host's devices is not on the trainer's mesh, which is in context.
    alone = jax.set_mesh(None) if is_divided(self._engine) else contextlib.nullcontext()
    with alone:
      return int(tree_sum(self._engine.params))

  def _serving(self, step: int, wave: int) -> Engine:
    """Returns what makes the rollouts of a wave of a step."""
    del step, wave  # one engine makes all
    return self._engine

  def _file(
    self, engine: Engine, step: int, wave: int, items: list[int], weights: int
  ) -> JournaledWave:
    """Returns the file of a wave."""
    return self._journal.wave(step, wave, self._fingerprint(engine, items, weights))

  def _fingerprint(self, engine: Engine, items: Sequence[int], weights: int) -> int:
    """Returns a number that is made of all that rollouts depend on."""
    origin = (
      weights,
      self._source.fingerprint,
      list(items),
      self._config.group,
      self._sampling,
      engine.max_len,
    )
    # The text of these values is part of the file format: another order would be another run.
    return zlib.crc32(repr(origin).encode())

  def measured(
    self, items: Sequence[int], told: Callable[[int], None] | None = None
  ) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns (`rollout_metrics`, `prompt_means`) of held-out items, see `measure`."""
    batch = self.measure(items, told)
    return rollout_metrics(batch), prompt_means(batch)

  def measure(
    self, items: Sequence[int], told: Callable[[int], None] | None = None
  ) -> RolloutBatch:
    """Samples and scores a group of each item, from the same streams always.

    The stream of an item is its own, whichever others are asked. `told` is called with 1 for each
    completion that is sampled here and now.
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
    engine = self._measuring()
    file = None
    if self._measured:
      fingerprint = self._fingerprint(engine, items, self._origin())
      # Its own file for each policy: an earlier one may be measured again.
      file = self._measured.wave(fingerprint, 0, fingerprint)
    # Without the length penalty: measurements compare policies by the task's own reward.
    rollouts = self._sample(engine, items, _MEASURED, streams, file, told)
    return self._source.judge(items, rollouts)

  def _measuring(self) -> Engine:
    """Returns what makes the rollouts of measurements, with the newest weights."""
    return self._engine

  def _sample(
    self,
    engine: Engine,
    items: Sequence[int],
    step: int,
    streams: Sequence[int],
    file: JournaledWave | None = None,
    told: Callable[[int], None] | None = None,
  ) -> list[Rollout]:
    """Samples a group of each item, or reads what an earlier process has sampled.

    `streams` number the items among those of the step; `told` hears of each completion.
    """
    repeated = []
    keys = []
    for item, stream in zip(items, streams, strict=True):
      # The rollouts of a group stand side by side, so that the engine computes their prompt once.
      for g in range(self._config.group):
        repeated.append(item)
        # A random stream is named by what is asked, so that waves and lanes do not matter.
        keys.append((step, stream, g))

    def sample(engine: Engine | Stream, numbers: Sequence[int]) -> list[Rollout]:
      if told and not isinstance(engine, Recalled):
        engine = Counted(engine, told)
      chosen = [repeated[number] for number in numbers]
      return self._source.sample(engine, chosen, [keys[n] for n in numbers], self._sampling)

    if file is None:
      return divide(engine, len(keys), sample)
    made = file.read()
    if made is None and not is_divided(engine):
      recorder = Recorder(engine)
      rollouts = sample(recorder, range(len(keys)))
      file.write(recorder.made)
      return rollouts
    if made is None:
      made = sample_share(engine, len(keys), sample)
      file.write(made)
    recalled = Recalled(made, lanes=engine.lanes, max_len=engine.max_len)
    return sample(recalled, range(len(keys)))
