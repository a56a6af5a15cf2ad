"""Rollouts of a step from a fleet of servers, collected while earlier steps are learned from."""

import concurrent.futures
import dataclasses

import numpy as np

from dcore_jax.config import RlSection
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.fleet import Fleet, Serving
from dcore_jax.train.checksum import tree_sum
from dcore_jax.train.journal import RolloutJournal
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.rollout_batch import Rollout
from dcore_jax.train.sampler import SampledStep, Sampler
from dcore_jax.train.sources import RolloutSource


def make_sampler(
  engine: Engine | Fleet,
  source: RolloutSource,
  order: PromptOrder,
  config: RlSection,
  journal: RolloutJournal | None = None,
  measured: RolloutJournal | None = None,
) -> Sampler:
  """Returns the sampler for an engine of this process, or for a fleet, which does not keep what it
  measures.
  """
  if isinstance(engine, Fleet):
    return FleetSampler(engine, source, order, config, journal)
  return Sampler(engine, source, order, config, journal, measured)


class FleetSampler(Sampler):
  """Collects the steps in their order on a thread, as far ahead as `rl.fleet.staleness` allows.

  The weights with which step s begins have the version s + 1 (`rollout.fleet`). A token of step s
  is of a version s + 1 - staleness or newer, and of 1 at least.

  What was collected is in the journal, wave by wave, with the versions. A process that goes on
  after a kill reads it, and so makes the updates that the killed one made. A wave that is not there
  is collected, which makes all later ones those of another run: they are deleted.

  Args:
    fleet: where rollouts are made.
    source, order, config, journal: see `Sampler`.
  """

  def __init__(
    self,
    fleet: Fleet,
    source: RolloutSource,
    order: PromptOrder,
    config: RlSection,
    journal: RolloutJournal | None = None,
  ):
    super().__init__(fleet, source, order, config, journal)
    self._fleet = fleet
    self._steps = config.steps
    self._section = config.fleet
    # Weights of which the last publication is missing lack that many updates more.
    self._ahead = config.fleet.staleness + 1 - config.fleet.publish_every
    # The journal knows a run by what it began with: later weights follow from what is in it.
    self._begun_with = int(tree_sum(fleet.params))
    # One thread, because later steps build on the journal of earlier ones.
    self._collector = concurrent.futures.ThreadPoolExecutor(1, 'rollouts')
    self._collected: dict[int, concurrent.futures.Future[SampledStep]] = {}
    self._newest = 1  # the version that the next step begins with
    self._published = 0
    self._counts = dataclasses.replace(fleet.counts)

  def step(self, step: int) -> SampledStep:
    """Returns what a step learns from, and has the servers begin with the steps behind it."""
    self._newest = step + 1
    if not self._published or step % self._section.publish_every == 0:
      self._publish()
    for later in range(step, min(step + self._ahead + 1, self._steps)):
      if later not in self._collected:
        self._collected[later] = self._collector.submit(super().step, later)
    sampled = self._collected.pop(step).result()
    # Whoever measures now does so after this step's update.
    self._newest = step + 2
    ages = self._ages(sampled.batch.rollouts, step)
    figures = {'staleness': float(ages.mean()), 'staleness_max': int(ages.max())}
    return sampled._replace(asked=sampled.asked | figures | self._news())

  def close(self) -> None:
    """Ends what is being collected, and lets the servers go."""
    for future in self._collected.values():
      future.cancel()
    self._fleet.close()
    self._collector.shutdown()

  def _publish(self) -> None:
    if self._published != self._newest:
      self._published = self._newest
      self._fleet.publish(self._newest)

  def _origin(self) -> int:
    return self._begun_with

  def _serving(self, step: int, wave: int) -> Serving:
    oldest = max(1, step + 1 - self._section.staleness)

    def begun() -> None:
      if self._journal:
        self._journal.forget_behind(step, wave)

    return self._fleet.serving(oldest, begun)

  def _measuring(self) -> Serving:
    self._publish()
    return self._fleet.serving(self._newest)

  def _ages(self, rollouts: list[Rollout], step: int) -> np.ndarray:
    """Returns by how many updates each token's weights are older than those of its step."""
    versions = []
    for rollout in rollouts:
      versions += [completion.versions for _, completion in rollout.exchanges]
    # An episode whose first prompt was too long has no response.
    return step + 1 - np.concatenate(versions or [np.full(1, step + 1)])

  def _news(self) -> dict[str, int]:
    """Returns what has happened at the servers since the last step."""
    now = dataclasses.replace(self._fleet.counts)
    news = {'fleet_alive': self._fleet.alive}
    for field in dataclasses.fields(now):
      news[f'fleet_{field.name}'] = getattr(now, field.name) - getattr(self._counts, field.name)
    self._counts = now
    return news
