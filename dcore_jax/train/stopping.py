"""How a run ends when it is told to: at the end of a training step, with a checkpoint.

Slurm, Kubernetes and clouds send SIGTERM some seconds before they kill, and a person presses
Ctrl-C. A training loop remembers the first of these signals until its step is over. All other work
keeps what it has done in journals, and ends at once. The second signal ends the process as if
nothing here existed, also in the middle of a compilation.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LATER = b'\nends after this step, with a checkpoint; a second signal ends it at once\n'


class Stopped(KeyboardInterrupt):
  """The process was told to end; `number` is the signal's."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StoppedTogether(Stopped):
  """All hosts end at the same step."""


class _Process:
  """What this process knows of signals, of which a process has one set."""

  handles = False  # whether signals come here
  in_steps = False  # whether a loop will look at what was asked
  asked: int | None = None  # the signal that came during a step


def handle_signals() -> None:
  """Lets SIGTERM and Ctrl-C raise `Stopped`, or wait for the end of a step.

  For programs, whose main thread calls it. Whoever uses this package from Python keeps their own
  handlers.
  """
  _Process.handles = True
  _Process.asked = None
  _set_handlers(_on_signal)


def _set_handlers(handler: Any) -> None:
  for number in _SIGNALS:
    # A shell lets what it starts in the background ignore the Ctrl-C that is meant for others.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
  del frame
  # A handler in Python waits for whatever C++ is at, such as minutes of compiling. The system's own
  # does not.
  _set_handlers(signal.SIG_DFL)
  if not _Process.in_steps:
    raise Stopped(number)
  _Process.asked = number
  # Not `print`: the signal may have come while the main thread was inside of it.
  os.write(2, _LATER)


@contextlib.contextmanager
def in_steps() -> Iterator[None]:
  """Lets the first signal wait, because the loop inside asks `asked` after every step."""
  if _Process.handles:
    # `jax.distributed` has put a handler of its own in the place of ours.
    handle_signals()
  _Process.in_steps = True
  try:
    yield
    # It came behind the last look: what follows would not end at all.
    if asked():
      stop()
  finally:
    _Process.in_steps = False


def asked() -> bool:
  """Whether any host was told to end: all of them write the checkpoint together."""
  # Programs that need no jax handle signals, too, and should not pay for its import (1 s).
  from dcore_jax import distributed

  return not distributed.everywhere(_Process.asked is None)


def stop() -> None:
  """Ends the run; what was asked for by another host counts as SIGTERM."""
  raise StoppedTogether(_Process.asked or signal.SIGTERM)
