"""Measures how long a stage compiles, as jax reports it."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

# Compiling by XLA, or reading the program from the cache in place of that.
_EVENT = '/jax/core/compile/backend_compile_duration'


@dataclasses.dataclass
class CompileTime:
  """Seconds during which some thread compiled; several at once count once."""

  seconds: float = 0.0


class Intervals:
  """Spans of time that may overlap, kept as their union."""

  def __init__(self):
    # Apart from each other, in ascending order.
    self._apart: list[tuple[float, float]] = []

  def add(self, start: float, end: float) -> None:
    """Adds a span that ends no earlier than any that was added before."""
    # So that only spans at the end of the list can touch it.
    while self._apart and self._apart[-1][1] >= start:
      start = min(start, self._apart.pop()[0])
    self._apart.append((start, end))

  def covered(self, begin: float, end: float) -> float:
    """Returns how much of a span they cover."""
    inside = 0.0
    for start, stop in self._apart:
      inside += max(0.0, min(stop, end) - max(start, begin))
    return inside


class _Listener:
  """Notes when this process compiles. jax keeps a listener for ever, so there is one."""

  def __init__(self):
    self._lock = threading.Lock()
    self._known = False
    self._intervals = Intervals()

  def listen(self) -> None:
    if not self._known:
      self._known = True
      jax.monitoring.register_event_duration_secs_listener(self._take)

  def _take(self, event: str, seconds: float, **_: Any) -> None:
    if event == _EVENT:
      # jax tells of it once it is over.
      with self._lock:
        now = time.perf_counter()
        self._intervals.add(now - seconds, now)

  def covered(self, begin: float, end: float) -> float:
    with self._lock:
      return self._intervals.covered(begin, end)


_LISTENER = _Listener()


@contextlib.contextmanager
def compiling() -> Iterator[CompileTime]:
  """Measures for how long something is compiled inside; that is at most the time of the block."""
  _LISTENER.listen()
  begin = time.perf_counter()
  measured = CompileTime()
  try:
    yield measured
  finally:
    measured.seconds = _LISTENER.covered(begin, time.perf_counter())
