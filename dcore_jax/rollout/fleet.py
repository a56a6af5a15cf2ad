"""Rollouts from a fleet of OpenAI-compatible servers, with the interface of our own engine.

Weights are published as Hugging Face directories, which servers take up while they answer. A
request says how old the weights may be that answer it; an answer says for each token which version
drew it. Servers come and go: what a server owes is asked of another one, and a server that comes
back is given the newest weights before it is asked.

The number of a version is that of the training step that begins with these weights, counted from 1;
0 is what a server was started with.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio.from_thread
import jax
import jax.numpy as jnp
from absl import logging

from dcore_jax.config import FleetSection
from dcore_jax.learn.lora import merge_stack
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import ModelFiles, save_checkpoint
from dcore_jax.models.projections import is_adapted
from dcore_jax.rollout.fleet_endpoint import Busy, Endpoint, Failed, Limits, Weights
from dcore_jax.rollout.requests import Completion, Request, RequestSource, Tag
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.streams import Stream

_TICK_SECONDS = 0.1  # between two looks at who is slow, gone or back
# Published directories that stay: a server may still be reading the last but one.
_KEPT = 2
# Failures of one request, over all servers, after which it is the request that is at fault.
_MOST_FAILURES = 16


@dataclasses.dataclass
class FleetCounts:
  """What has happened since the fleet was made.

  Attributes:
    answered: requests that were answered.
    failed: attempts that gave no answer that can be used.
    hedged: requests that were asked of a second server, because the first was slow.
    stale: answers that were thrown away because their weights were too old.
    gone: times that a server was given up.
  """

  answered: int = 0
  failed: int = 0
  hedged: int = 0
  stale: int = 0
  gone: int = 0


class Fleet:
  """Servers, their weights, and what is asked of them.

  Args:
    params: the weights to begin with.
    config: the model's configuration.
    section: config section `rl.fleet`.
    limits: what answers have to keep to.
    folder: where weights are published.
    files: what a published directory holds beside the weights.
    api_key: what the servers ask for.

  Attributes:
    params: a copy of the newest weights, as they are published.
    counts: what has happened.
  """

  def __init__(
    self,
    params: decoder.Params,
    config: DecoderConfig,
    section: FleetSection,
    *,
    limits: Limits,
    folder: pathlib.Path,
    files: ModelFiles,
    api_key: str,
  ):
    self.max_len = limits.max_len
    self.max_new = limits.max_new
    self.counts = FleetCounts()
    self._config = config
    self._section = section
    self._folder = folder
    self._files = files
    self._endpoints = [Endpoint(url, section, api_key, limits) for url in section.endpoints]
    self.params: Any = None
    self.update(params)
    self._latest: Weights | None = None
    self._closed = False
    self._seen = time.monotonic()  # when a server could be asked last
    # Guards `under_way` of the servers and the counts, which several streams change.
    self._lock = threading.Lock()
    # One thread, so that versions are published in their order.
    self._publisher = concurrent.futures.ThreadPoolExecutor(1, 'publisher')
    self._publishing: concurrent.futures.Future | None = None
    self._exit = contextlib.ExitStack()
    # Made with the first version: a run that ends before it leaves no thread behind.
    self._portal: anyio.from_thread.BlockingPortal | None = None

  @property
  def lanes(self) -> int:
    """Requests under way at all servers together."""
    return len(self._endpoints) * self._section.concurrency

  @property
  def hedge_factor(self) -> float:
    """`rl.fleet.hedge`."""
    return self._section.hedge

  @property
  def reasons(self) -> dict[str, str]:
    """What went wrong last at each server, by its address."""
    return {endpoint.url: endpoint.reason for endpoint in self._endpoints}

  @property
  def alive(self) -> int:
    """Servers that can be asked."""
    return sum(endpoint.ready for endpoint in self._endpoints)

  # --- weights ------------------------------------------------------------------------------------

  def update(self, params: decoder.Params) -> None:
    """Takes the newest weights, as `Engine.update` does; servers get them by `publish`."""
    # A copy, because the trainer donates its own to its next update.
    dtype = jnp.dtype(self._section.dtype)
    self.params = jax.tree.map(lambda leaf: _copy(leaf, dtype), params, is_leaf=is_adapted)

  def publish(self, version: int) -> None:
    """Begins to give the weights of the last `update` to all servers, as this version.

    Raises:
      OSError: an earlier version could not be written.
    """
    self._check()
    if self._portal is None:
      self._portal = self._exit.enter_context(anyio.from_thread.start_blocking_portal())
      self._portal.start_task_soon(self._keep)
      self._seen = time.monotonic()
    self._publishing = self._publisher.submit(self._write, self.params, version)

  def _write(self, params: decoder.Params, version: int) -> None:
    target = self._folder / f'v{version:08d}'
    save_checkpoint(
      target, self._config, params, self._files, dtype=self._section.dtype, overwrite=True
    )
    self._latest = Weights(version, target.absolute())
    for old in sorted(self._folder.glob('v' + 8 * '[0-9]'), key=_written)[:-_KEPT]:
      shutil.rmtree(old, ignore_errors=True)

  async def _keep(self) -> None:
    """Sees that servers that are there have the newest weights, as long as the fleet lives."""
    tasks = set()
    turn = asyncio.Lock()
    while not self._closed:
      for endpoint in self._endpoints:
        latest = self._latest
        if latest and not endpoint.syncing and endpoint.due and endpoint.version != latest.version:
          endpoint.syncing = True
          task = asyncio.create_task(self._sync(endpoint, latest, turn))
          tasks.add(task)
          task.add_done_callback(tasks.discard)
      await asyncio.sleep(_TICK_SECONDS)
    for task in tasks:
      task.cancel()
    for endpoint in self._endpoints:
      await endpoint.close()

  async def _sync(self, endpoint: Endpoint, latest: Weights, turn: asyncio.Lock) -> None:
    try:
      await endpoint.sync(latest, turn)
    except Failed as error:
      # Without the weights of this version it may still answer what older ones may.
      self._note(endpoint, error)
    except Exception as error:  # a command that is not there, for example
      self._note(endpoint, Failed(f'{type(error).__name__}: {error}'))
    finally:
      endpoint.syncing = False

  # --- rollouts -----------------------------------------------------------------------------------

  def serving(self, version: int, begun: Callable[[], None] = lambda: None) -> 'Serving':
    """Returns the fleet for requests that weights of this version, or newer ones, may answer.

    Args:
      version: the oldest one.
      begun: is called when a stream of it begins.
    """
    return Serving(self, version, begun)

  def choose(self, version: int, usual: Endpoint | None, other: set[Endpoint]) -> Endpoint | None:
    """Takes a place at a server, and returns which; None where there is none now.

    Args:
      version: the oldest weights that it may have.
      usual: is asked where it has room, since it has read most of the prompt.
      other: those that work on the request already.
    """
    with self._lock:
      fitting = [
        endpoint
        for endpoint in self._endpoints
        if endpoint not in other and endpoint.free() and endpoint.version >= version
      ]
      if not fitting:
        return None
      least = min(fitting, key=lambda endpoint: endpoint.under_way)
      found = usual if usual in fitting else least
      found.under_way += 1
      return found

  def ask(
    self, endpoint: Endpoint, request: Request, sampling: SamplingParams
  ) -> concurrent.futures.Future:
    """Asks a server that `choose` has returned, whose place is free when the future is done.

    Raises:
      ConnectionError: the fleet is closed.
    """
    try:
      future = self._portal.start_task_soon(endpoint.ask, request, sampling)
    except RuntimeError as error:  # closed by another thread
      raise ConnectionError('the fleet is closed') from error

    def release(_: concurrent.futures.Future) -> None:
      with self._lock:
        endpoint.under_way -= 1

    future.add_done_callback(release)
    return future

  def note(self, endpoint: Endpoint, error: Failed) -> None:
    """Notes that a server has failed to answer."""
    self.count('failed')
    self._note(endpoint, error)

  def _note(self, endpoint: Endpoint, error: Failed) -> None:
    before = endpoint.ready
    endpoint.failed(error)
    if before and not endpoint.ready:
      self.count('gone')
      logging.warning('%s is asked no more for now: %s', endpoint.url, endpoint.reason)

  def count(self, name: str) -> None:
    """Adds 1 to one of the counts."""
    with self._lock:
      setattr(self.counts, name, getattr(self.counts, name) + 1)

  def look(self) -> None:
    """Looks at the whole fleet, here and there, while somebody waits for it.

    Raises:
      ConnectionError: no server could be asked for `rl.fleet.patience` seconds, or the fleet is
        closed.
      OSError: weights could not be published.
    """
    self._check()
    now = time.monotonic()
    if self.alive:
      self._seen = now
    # One that nothing is wrong with is on its way: it loads its first weights, or is restarted.
    elif all(self.reasons.values()) and now - self._seen > self._section.patience:
      reasons = '; '.join(f'{url}: {reason}' for url, reason in self.reasons.items())
      raise ConnectionError(
        f'no server of rl.fleet could be asked for {self._section.patience:g} s ({reasons})'
      )

  def _check(self) -> None:
    if self._closed:
      raise ConnectionError('the fleet is closed')
    # An error of the publisher's thread is raised on the one that would wait for ever.
    if self._publishing is not None and self._publishing.done():
      self._publishing.result()

  def close(self) -> None:
    """Asks nothing any more; streams that are open end with an error."""
    self._closed = True
    self._publisher.shutdown()
    # Waits for the keeper, and for requests that were cancelled.
    self._exit.close()


class Serving(Stream):
  """A fleet for those who only sample; has `lanes`, too."""

  def __init__(self, fleet: Fleet, version: int, begun: Callable[[], None]):
    self.max_len = fleet.max_len
    self.lanes = fleet.lanes
    self._fleet = fleet
    self._version = version
    self._begun = begun

  def stream(
    self, source: RequestSource, sampling: SamplingParams
  ) -> Iterator[tuple[Tag, Completion]]:
    """Does what `Engine.stream` does, with whichever servers there are.

    Raises:
      ValueError: stop strings, or a prompt without room for an answer.
      ConnectionError: there is no server for too long, or none can answer a request.
      OSError: weights could not be published.
    """
    if sampling.stop:
      raise ValueError(f'a fleet is asked without stop strings, not with {sampling.stop}')
    self._begun()
    yield from _Collection(self._fleet, self._version, sampling).run(source)


@dataclasses.dataclass(eq=False)
class _Asked:
  """A request, and the servers that work on it: each with its future and when it was asked."""

  tag: Tag
  request: Request
  failures: int = 0
  hedged: bool = False
  tries: dict[concurrent.futures.Future, tuple[Endpoint, float]] = dataclasses.field(
    default_factory=dict
  )


class _Collection:
  """One stream: what waits to be asked, and what is under way."""

  def __init__(self, fleet: Fleet, version: int, sampling: SamplingParams):
    self._fleet = fleet
    self._version = version
    self._sampling = sampling
    self._waiting: collections.deque[_Asked] = collections.deque()
    self._open: dict[_Asked, None] = {}  # asked for and not answered, the oldest first
    self._finished: queue.SimpleQueue = queue.SimpleQueue()
    # Which server has read the prompt of a group or an episode.
    self._usual: dict[tuple[int, ...], Endpoint] = {}
    # Seconds of the longest answer of each server.
    self._longest: dict[Endpoint, float] = collections.defaultdict(float)

  def run(self, source: RequestSource) -> Iterator[tuple[Tag, Completion]]:
    """Yields what `Serving.stream` does."""
    try:
      while True:
        free = self._fleet.lanes - len(self._open)
        arrivals = source(free) if free > 0 else ()
        for tag, request in arrivals:
          asked = _Asked(tag, request)
          self._open[asked] = None
          self._waiting.append(asked)
        if not self._open:
          return
        self._ask()
        # Places that nobody else has a use for.
        if free > 0 and not arrivals and not self._waiting:
          self._hedge()
        try:
          asked, future = self._finished.get(timeout=_TICK_SECONDS)
        except queue.Empty:
          self._fleet.look()
          continue
        completion = self._take(asked, future)
        if completion is not None:
          yield asked.tag, completion
    finally:
      for asked in self._open:
        _cancel(asked)

  def _ask(self) -> None:
    """Asks what waits, as long as there are places."""
    while self._waiting and self._try(self._waiting[0]):
      self._waiting.popleft()

  def _try(self, asked: _Asked) -> bool:
    """Asks one more server for an answer; returns whether there was one with room."""
    # All rollouts of an item, and all turns of an episode, begin alike.
    item = asked.request.key_id[:2]
    working = {endpoint for endpoint, _ in asked.tries.values()}
    endpoint = self._fleet.choose(self._version, self._usual.get(item), working)
    if endpoint is None:
      return False
    self._usual[item] = endpoint
    future = self._fleet.ask(endpoint, asked.request, self._sampling)
    asked.tries[future] = endpoint, time.monotonic()
    future.add_done_callback(lambda future: self._finished.put((asked, future)))
    return True

  def _hedge(self) -> None:
    """Asks a second server where the first takes much longer than any other one has taken.

    Not longer than the usual answer: long answers would then be drawn twice, and the shorter of two
    be taken.
    """
    factor = self._fleet.hedge_factor
    if not factor:
      return
    now = time.monotonic()
    for asked in self._open:
      if asked.hedged or len(asked.tries) != 1:
        continue
      ((endpoint, began),) = asked.tries.values()
      others = [seconds for other, seconds in self._longest.items() if other is not endpoint]
      if others and now - began > factor * max(others) and self._try(asked):
        asked.hedged = True
        self._fleet.count('hedged')

  def _take(self, asked: _Asked, future: concurrent.futures.Future) -> Completion | None:
    """Returns the answer that has come; None where there is none, and it is asked for again."""
    endpoint, began = asked.tries.pop(future, (None, 0.0))
    # Another server was faster.
    if asked not in self._open or endpoint is None:
      return None
    try:
      completion = future.result()
    except Busy:
      endpoint.busy()
    except (Failed, concurrent.futures.CancelledError) as error:
      self._failed(asked, endpoint, error)
    else:
      if completion.versions.min() >= self._version:
        endpoint.answered()
        self._fleet.count('answered')
        self._longest[endpoint] = max(self._longest[endpoint], time.monotonic() - began)
        del self._open[asked]
        _cancel(asked)
        return completion
      # It has other weights than it was given: somebody has started it anew.
      endpoint.lose()
      self._fleet.count('stale')
    if not asked.tries:
      self._waiting.appendleft(asked)
    return None

  def _failed(self, asked: _Asked, endpoint: Endpoint, error: Exception) -> None:
    self._fleet.note(endpoint, Failed(str(error)) if not isinstance(error, Failed) else error)
    asked.failures += 1
    if asked.failures == _MOST_FAILURES:
      raise ConnectionError(
        f'request {asked.request.key_id} has failed {_MOST_FAILURES} times, at last at '
        f'{endpoint.url}: {endpoint.reason}'
      )


def _cancel(asked: _Asked) -> None:
  for future in list(asked.tries):
    future.cancel()


def _written(folder: pathlib.Path) -> float:
  # Not by the number: a run that went back to a checkpoint publishes smaller ones.
  return folder.stat().st_mtime


def _copy(value: Any, dtype: Any) -> jax.Array:
  if is_adapted(value):
    return merge_stack(value, dtype)
  return jnp.array(value, dtype, copy=True)
