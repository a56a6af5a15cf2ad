"""What every benchmark shares: interleaved timing, and the JSON lines they print."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def interleaved(
  functions: dict[str, Callable[[], Any]], rounds: int, warm: int = 1
) -> dict[str, float]:
  """Median seconds of each function over `rounds` rounds, in each of which all run in turn, after
  `warm` unmeasured ones.

  Whatever else the machine does meets all of them alike, so that ratios hold where seconds drift.
  """
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for number in range(warm + rounds):
    for name, function in functions.items():
      started = time.perf_counter()
      jax.block_until_ready(function())
      if number >= warm:
        seconds[name].append(time.perf_counter() - started)
  return {name: statistics.median(values) for name, values in seconds.items()}


def line(  # noqa: PLR0913 - the fields of one JSON line
  case: str,
  peer: str,
  ours: float | None,
  theirs: float | None,
  unit: str,
  *,
  wanted: float | None = None,
  bound: float | None = None,
  better: str = 'less',
  **more: Any,
) -> None:
  """Prints one JSON object on stdout.

  Args:
    case, peer: what was measured, against whom.
    ours, theirs: the figures, in `unit`.
    wanted: the ratio that is asked for; ratio > 1 means that ours is better.
    bound: what the hardware allows, in `unit`.
    better: 'less' or 'more'.
    more: further fields.
  """

  def times_better(one: float | None, other: float | None) -> float | None:
    """How many times better `one` is; None where either is missing."""
    if not (one and other):
      return None
    return other / one if better == 'less' else one / other

  record = {
    'case': case,
    'peer': peer,
    'ours': ours,
    'theirs': theirs,
    'unit': unit,
    'ratio': times_better(ours, theirs),
    'wanted': wanted,
    'bound': bound,
    'share_of_bound': times_better(ours, bound),
    **more,
  }
  print(json.dumps({name: _rounded(value) for name, value in record.items()}), flush=True)


def skipped(case: str, peer: str, reason: str) -> None:
  """The line of a peer that is not installed."""
  print(json.dumps({'case': case, 'peer': peer, 'skipped': reason}), flush=True)


def say(text: str) -> None:
  """Progress for people, on stderr."""
  print(text, file=sys.stderr, flush=True)


def _rounded(value: Any) -> Any:
  if isinstance(value, (float, np.floating)):
    return float(f'{value:.4g}')
  return value
