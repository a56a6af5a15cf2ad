"""What those who only sample read of an engine, for all that can stand in its place."""

import abc
from collections.abc import Callable, Iterator, Sequence

from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Completion, Request, RequestSource, Tag
from dcore_jax.rollout.sampling import SamplingParams


class Stream(abc.ABC):
  """Has `generate`, `stream` and `max_len`, as `Engine` has."""

  max_len: int

  def generate(
    self,
    requests: Sequence[Request],
    sampling: SamplingParams,
    progress: Callable[[int], None] | None = None,
  ) -> list[Completion]:
    """Does what `Engine.generate` does, which is a loop over `stream` and can run on this one's."""
    # Called unbound: it needs nothing of an engine but `stream`.
    return Engine.generate(self, requests, sampling, progress)

  @abc.abstractmethod
  def stream(
    self, source: RequestSource, sampling: SamplingParams
  ) -> Iterator[tuple[Tag, Completion]]:
    """Does what `Engine.stream` does."""


class Counted(Stream):
  """An engine that tells of each completion as it comes.

  Args:
    engine: or what stands in its place.
    told: is called with 1.
  """

  def __init__(self, engine: Engine | Stream, told: Callable[[int], None]):
    self._engine = engine
    self._told = told
    self.max_len = engine.max_len

  def stream(
    self, source: RequestSource, sampling: SamplingParams
  ) -> Iterator[tuple[Tag, Completion]]:
    """Does what `Engine.stream` does."""
    for tag, completion in self._engine.stream(source, sampling):
      self._told(1)
      yield tag, completion
