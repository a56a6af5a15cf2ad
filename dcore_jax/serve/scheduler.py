"""One thread that owns the engine: requests come and go from any other, and share its lanes.

A job is a group of rollouts that are asked for together (the choices of a request). Whatever
happens to one of them is told to the job's `deliver`, on the engine's thread, which therefore only
hands it on.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.rollout.engine import Engine, Progress, Request
from dcore_jax.rollout.sampling import SamplingParams

_LOOK_SECONDS = 0.1  # between two looks at how many programs are compiled

# Takes (which of the job's rollouts, what it drew or why it ends).
Deliver = Callable[[int, Progress | Exception], None]


class Overloaded(Exception):
  """As many rollouts wait as may."""


class Stopped(Exception):
  """The scheduler takes nothing any more: it was closed, or the engine failed, which is then the
  cause.
  """


class Job:
  """Rollouts asked for together; a ticket for `cancel`."""

  def __init__(self, deliver: Deliver):
    self.deliver = deliver
    # Place in the job -> the engine's handle, for rollouts that have not ended.
    self.handles: dict[int, int] = {}


class Scheduler:
  """Runs an engine for many callers.

  Args:
    engine: nobody else may touch it from now on, but for its sizes and its stats.
    max_waiting: rollouts that may wait for a lane.

  Attributes:
    version: number of the weights; 0 are those that the engine was made with.
  """

  def __init__(self, engine: Engine, max_waiting: int):
    if max_waiting < 0:
      raise ValueError(f'max_waiting = {max_waiting} cannot be')
    self.engine = engine
    self.max_waiting = max_waiting
    self.failure: Exception | None = None
    self.version = 0
    # Programs that are compiled, and all; all are 0 until the engine has counted them.
    self.programs = (0, 0)
    self._prepared = threading.Event()
    self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    # The lock guards `_in_flight` and `_closed`, which all threads change. All else is touched by
    # the engine's thread alone.
    self._lock = threading.Lock()
    self._in_flight = 0  # rollouts taken and not ended
    self._closed = False
    self._running = True
    self._jobs: dict[int, tuple[Job, int]] = {}  # by the engine's handle
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
    self._thread.start()

  @property
  def capacity(self) -> int:
    """Rollouts that can be in flight, those that wait included."""
    return self.engine.lanes + self.max_waiting

  @property
  def in_flight(self) -> int:
    """Rollouts that run or wait."""
    return self._in_flight

  @property
  def ready(self) -> bool:
    """Whether `prepare` is done."""
    return self._prepared.is_set()

  def prepare(self) -> None:
    """Lets the engine compile its programs, and returns at once; what is submitted waits for it."""
    self._commands.put(self._prepare)

  def wait_until_ready(self, progress: Callable[[int, int], None]) -> None:
    """Returns when `prepare` is done, or the engine's thread has ended.

    Args:
      progress: is called with (programs that are compiled, all), here and there.
    """
    while not self._prepared.wait(_LOOK_SECONDS) and self._thread.is_alive():
      progress(*self.programs)
    progress(*self.programs)

  def submit(self, requests: Sequence[Request], sampling: SamplingParams, deliver: Deliver) -> Job:
    """Takes all of the requests or none.

    `deliver` gets each rollout's progress until one with a completion, or an exception that ends
    it: ValueError where the engine refuses the request, Stopped.

    Raises:
      Overloaded: there is no room for so many now.
      Stopped: there will be none.
    """
    job = Job(deliver)
    with self._lock:
      if self._closed:
        raise Stopped('the engine takes no requests any more') from self.failure
      # A job is taken whole: with half of its choices waiting outside, it could never be answered.
      if self._in_flight + len(requests) > self.capacity:
        raise Overloaded(
          f'{self._in_flight} rollouts are in flight and {len(requests)} more asked for; '
          f'there is room for {self.capacity}'
        )
      self._in_flight += len(requests)
      # Inside of the lock, so that the command stands before `_stop` and is surely carried out.
      self._commands.put(functools.partial(self._admit, job, requests, sampling))
    return job

  def cancel(self, job: Job, place: int | None = None) -> None:
    """Frees the lanes of what has not ended yet of a job, or of one of its rollouts; nothing more
    is delivered of it.
    """
    # The engine is in the midst of a step, perhaps; its own thread cancels between two steps.
    self._commands.put(functools.partial(self._drop, job, place))

  def exchange(self, params: Any, version: int) -> concurrent.futures.Future:
    """Replaces the engine's weights between two steps; rollouts in flight go on under the new ones.

    Progress tells the version by which its tokens were drawn.

    Returns:
      A future of None. Its error is ValueError where the weights do not fit, which leaves the old
      ones in use, or Stopped.
    """
    done: concurrent.futures.Future = concurrent.futures.Future()
    with self._lock:
      if self._closed:
        raise self._stopped()
      self._commands.put(functools.partial(self._exchange, params, version, done))
    return done

  def close(self) -> None:
    """Ends every rollout (Stopped is delivered) and the thread."""
    with self._lock:
      self._closed = True
    self._commands.put(self._stop)
    self._thread.join()

  # --- on the engine's thread ---------------------------------------------------------------------

  def _run(self) -> None:
    try:
      while self._running:
        self._obey()
        if self._running and self.engine.busy:
          # One step for all lanes, then the commands again: a new request waits for one step at
          # most.
          for part in self.engine.step():
            self._report(part)
    except Exception as error:  # pylint: disable=broad-exception-caught
      # A donated buffer may be gone, so that this engine cannot go on.
      self.failure = error
      with self._lock:
        self._closed = True
      self._stop()
    self._obey_rest()

  def _obey(self) -> None:
    """Carries out what was asked for, and waits for it where the engine has nothing to do."""
    # Blocking here costs no CPU time while nobody asks; `close` sends a command too.
    if not self.engine.busy:
      self._commands.get()()
    while not self._commands.empty():
      self._commands.get()()

  def _obey_rest(self) -> None:
    """Carries out what was asked for before `_closed` was set and not read before the end."""
    while not self._commands.empty():
      self._commands.get()()

  def _prepare(self) -> None:
    # Closed meanwhile: the command to stop is the next that is carried out.
    with contextlib.suppress(Stopped):
      self.engine.prepare(self._count_programs)
      self._prepared.set()

  def _count_programs(self, ready: int, total: int) -> None:
    self.programs = ready, total
    # Whoever ends the server does not wait for what nobody will call.
    if self._closed:
      raise Stopped

  def _admit(self, job: Job, requests: Sequence[Request], sampling: SamplingParams) -> None:
    for place, request in enumerate(requests):
      # `close` may come between a job's submission and this: its rollouts still have to be told.
      if self._closed:
        self._end(job, place, self._stopped())
        continue
      try:
        handle = self.engine.submit(request, sampling)
      # The engine refuses this request, such as one with too long a prompt; the others of the job
      # go on.
      except ValueError as error:
        self._end(job, place, error)
      else:
        job.handles[place] = handle
        self._jobs[handle] = job, place

  def _exchange(self, params: Any, version: int, done: concurrent.futures.Future) -> None:
    if self._closed:
      done.set_exception(self._stopped())
      return
    try:
      self.engine.exchange(params)
    except Exception as error:
      done.set_exception(error)
      # Other weights are refused before anything is changed. Any other error leaves an engine
      # without weights.
      if isinstance(error, ValueError):
        return
      raise
    self.version = version
    done.set_result(None)

  def _report(self, part: Progress) -> None:
    job, place = self._jobs[part.handle]
    # Weights change between two steps alone: all of these tokens are of the present ones.
    part = dataclasses.replace(part, version=self.version)
    if part.completion is None:
      job.deliver(place, part)
    else:
      # Forgotten before it is delivered: the receiver may cancel the job at once.
      del self._jobs[part.handle], job.handles[place]
      self._end(job, place, part)

  def _drop(self, job: Job, place: int | None) -> None:
    for one in list(job.handles) if place is None else [place]:
      # A rollout that is not there has ended meanwhile.
      if one in job.handles:
        handle = job.handles.pop(one)
        del self._jobs[handle]
        self._count_down()
        if self.failure is None:
          self.engine.cancel(handle)

  def _end(self, job: Job, place: int, event: Progress | Exception) -> None:
    self._count_down()
    job.deliver(place, event)

  def _count_down(self) -> None:
    with self._lock:
      self._in_flight -= 1

  def _stop(self) -> None:
    self._running = False
    for handle, (job, place) in list(self._jobs.items()):
      del self._jobs[handle], job.handles[place]
      if self.failure is None:
        self.engine.cancel(handle)
      self._end(job, place, self._stopped())

  def _stopped(self) -> Stopped:
    reason = (
      'the engine has stopped' if self.failure is None else f'the engine failed: {self.failure}'
    )
    stopped = Stopped(reason)
    stopped.__cause__ = self.failure
    return stopped
