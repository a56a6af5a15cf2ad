"""Waiting for what other threads and processes do, without a bound that a slow machine misses."""

import pathlib
import time
from collections.abc import Callable

# Far beyond what any of it takes: it only ends a test whose condition never comes.
_PATIENCE = 600.0


def until(condition: Callable[[], object]) -> None:
  """Waits until it holds; a condition that never comes is a failure."""
  deadline = time.monotonic() + _PATIENCE
  while not condition():
    assert time.monotonic() < deadline, 'waited in vain'
    time.sleep(0.005)


def running(pid: int) -> bool:
  """Returns whether there is such a process, and more than a zombie of it."""
  try:
    status = pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8')
  except (FileNotFoundError, ProcessLookupError):
    return False
  return status.rpartition(')')[2].split()[0] != 'Z'
