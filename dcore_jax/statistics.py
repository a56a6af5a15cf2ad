"""Estimates with their uncertainty: shares, means and paired differences.

The unit of an estimate is what was drawn independently: a task where one model is measured, a run
(a seed) where settings are compared. Rollouts of a prompt and prompts of a task are no units. An
estimate is JSON data:

    {'mean', 'standard_error', 'interval': [low, high], 'n', 'unit'}

with 'difference' in place of 'mean' where two measurements are compared. The interval holds the
true value in 95 % of the cases. One unit has neither a standard error nor an interval (both None).
Nor have units that are all alike a standard error; their interval says how many others the sample
may have missed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

TASKS = 'tasks'
RUNS = 'runs'
_LEVEL = 0.95
# Spreads below this share of the values are rounding: 0.1 + 0.2 is not the 0.3 of another run.
_ROUNDING = 1e-12

Bounds = tuple[float, float]


def wilson_interval(share: float, n: int) -> Bounds:
  """95 % Wilson score interval of a share of `n` trials.

  It is right also near 0 and 1, where the normal one has no width.

  Raises:
    ValueError: no trials, or no share.
  """
  if n < 1 or not 0 <= share <= 1:
    raise ValueError(f'no interval for share={share} of n={n}')
  found = scipy.stats.binomtest(round(share * n), n).proportion_ci(_LEVEL, method='wilson')
  # A share that was rounded before it came here must still lie inside.
  return min(float(found.low), share), max(float(found.high), share)


def standard_error(values: Sequence[float]) -> float | None:
  """Of the mean; None for a single value, and for values that are all alike."""
  return _standard_error(np.asarray(values, np.float64), None)


def estimate_share(share: float, n: int, *, unit: str = TASKS) -> dict[str, Any]:
  """A share of `n` units as an estimate; one unit has no interval.

  Raises:
    ValueError: no units, or no share.
  """
  interval = wilson_interval(share, n)
  spread = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0
  return {
    'mean': share,
    'standard_error': spread or None,
    'interval': list(interval) if n > 1 else None,
    'n': n,
    'unit': unit,
  }


def estimate_mean(
  values: Sequence[float],
  *,
  unit: str = TASKS,
  clusters: Sequence[str] | None = None,
  bounds: Bounds | None = None,
) -> dict[str, Any]:
  """The mean of measurements as an estimate.

  Args:
    values: at least one.
    unit: what the units are called.
    clusters: names the unit of each measurement, where units have several. None: each its own.
    bounds: the least and the largest value that a measurement can have, if there are such.

  Raises:
    ValueError: no values, or not as many units.
  """
  found = np.asarray(values, np.float64)
  if not found.size or (clusters is not None and len(clusters) != found.size):
    units = 'units of their own' if clusters is None else f'{len(clusters)} units'
    raise ValueError(f'no mean of {found.size} values of {units}')
  n = found.size if clusters is None else len(set(clusters))
  mean = float(found.mean())
  if bounds is not None:
    # A value beyond the bounds disproves them.
    bounds = (min(bounds[0], float(found.min())), max(bounds[1], float(found.max())))
  error = _standard_error(found, clusters)
  interval = None
  if error is not None:
    # Few units: Student's t, which for 2 runs is 6.5 times as wide as a normal one.
    half = float(scipy.stats.t.ppf((1 + _LEVEL) / 2, n - 1)) * error
    interval = _within([mean - half, mean + half], bounds)
  elif n > 1:
    interval = _unseen(mean, n, bounds)
  return {'mean': mean, 'standard_error': error, 'interval': interval, 'n': n, 'unit': unit}


def paired_difference(
  before: Sequence[float],
  after: Sequence[float],
  *,
  unit: str = TASKS,
  clusters: Sequence[str] | None = None,
  bounds: Bounds | None = None,
) -> dict[str, Any]:
  """The mean of after - before as an estimate 'difference', of the same units measured twice.

  What makes one task harder than another is in both measurements and cancels. Rollouts of one
  prompt are not independent: of such, give means by prompt. Prompts of one task are not either:
  name their task in `clusters`.

  Args:
    before, after: as many measurements each, at least one.
    unit, clusters: see `estimate_mean`.
    bounds: the least and the largest measurement that there can be; the range of those that there
      are by default.

  Raises:
    ValueError: measurements that are no pairs.
  """
  if len(before) != len(after) or not len(before):
    raise ValueError(f'{len(before)} and {len(after)} measurements are no pairs')
  first = np.asarray(before, np.float64)
  second = np.asarray(after, np.float64)
  both = np.concatenate([first, second])
  low, high = bounds or (both.min(), both.max())
  largest = float(max(high, both.max()) - min(low, both.min()))
  # Measurements that are all one value, without known bounds, do not say what others could be.
  reach = (-largest, largest) if largest else None
  found = estimate_mean(second - first, unit=unit, clusters=clusters, bounds=reach)
  if found['n'] == first.size > 1 and np.isin(both, (0, 1)).all():
    found['interval'] = _paired_shares(first, second)
  return {'difference': found.pop('mean')} | found


def _standard_error(values: np.ndarray, clusters: Sequence[str] | None) -> float | None:
  """Of the mean of values [n] in G clusters, whose sums of deviations are independent.

  With each value a cluster this is the usual standard error.
  """
  deviations = values - values.mean()
  if clusters is not None:
    _, place = np.unique(list(clusters), return_inverse=True)
    deviations = np.bincount(place, weights=deviations)
  n = len(deviations)
  if n < 2:
    return None
  error = math.sqrt(n / (n - 1) * float(np.sum(deviations**2))) / values.size
  return error if error > _ROUNDING * float(np.abs(values).max()) else None


def _unseen(value: float, n: int, bounds: Bounds | None) -> list[float] | None:
  """The interval of a mean whose `n` units all gave `value`; None without known bounds.

  As many units as a sample of n misses with a probability of 2.5 % may have the least, or the
  largest value: Clopper and Pearson's bound of no successes (rule of three).
  """
  if bounds is None:
    return None
  low, high = bounds
  missed = float(scipy.stats.binomtest(0, n).proportion_ci(_LEVEL, method='exact').high)
  return [value - missed * max(0.0, value - low), value + missed * max(0.0, high - value)]


def _within(interval: list[float], bounds: Bounds | None) -> list[float]:
  if bounds is None:
    return interval
  return [max(interval[0], float(bounds[0])), min(interval[1], float(bounds[1]))]


def _paired_shares(before: np.ndarray, after: np.ndarray) -> list[float]:
  """The interval of the difference of two shares of the same n units, values 0 or 1.

  It combines Wilson's intervals of the share that was gained and of the share that was lost, which
  correlate negatively (the method of variance estimates recovery, Zou and Donner 2008). Units that
  all stayed as they were leave it with a width, which the normal one has not.
  """
  n = len(before)
  gained = float(np.mean(after > before))
  lost = float(np.mean(after < before))
  gained_low, gained_high = wilson_interval(gained, n)
  lost_low, lost_high = wilson_interval(lost, n)
  stayed = (1 - gained) * (1 - lost)
  correlation = -math.sqrt(gained * lost / stayed) if stayed else 0.0

  def reach(one: float, other: float) -> float:
    return math.sqrt(one**2 - 2 * correlation * one * other + other**2)

  low = gained - lost - reach(gained - gained_low, lost_high - lost)
  high = gained - lost + reach(gained_high - gained, lost - lost_low)
  return _within([low, high], (-1.0, 1.0))


# --- as text ---


def format_estimate(
  estimate: Mapping[str, Any], digits: int = 3, scale: float = 1.0, suffix: str = ''
) -> str:
  """An estimate as '0.68 [0.59, 0.75] (128 tasks)'; a difference has its sign.

  Args:
    estimate: also of an earlier program, without an interval or a unit.
    digits: behind the point.
    scale: what numbers are multiplied with, 100 for per cent.
    suffix: behind the first number.
  """
  sign = '+' if 'difference' in estimate else ''
  value = scale * estimate.get('difference', estimate.get('mean'))
  return f'{value:{sign}.{digits}f}{suffix} {format_interval(estimate, digits, scale)}'


def format_interval(estimate: Mapping[str, Any], digits: int = 3, scale: float = 1.0) -> str:
  """What stands behind the number: '[0.59, 0.75] (128 tasks)', or that there is no interval."""
  sign = '+' if 'difference' in estimate else ''
  n = int(estimate['n'])
  unit = estimate.get('unit', TASKS)
  counted = f'{n:,} {unit if n != 1 else unit.removesuffix("s")}'
  interval = interval_of(estimate)
  if interval is not None:
    low, high = (f'{scale * bound:{sign}.{digits}f}' for bound in interval)
    return f'[{low}, {high}] ({counted})'
  alike = ', all alike' if n > 1 else ''
  return f'({counted}{alike}: no interval)'


def interval_of(estimate: Mapping[str, Any]) -> list[float] | None:
  """The interval of an estimate.

  Files of earlier programs have only its half width or a standard error, which makes it Student's.
  """
  if 'interval' in estimate:
    return estimate['interval']
  half = estimate.get('half_width')
  error = estimate.get('standard_error')
  if not half and error and estimate['n'] > 1:
    half = float(scipy.stats.t.ppf((1 + _LEVEL) / 2, estimate['n'] - 1)) * error
  if not half:
    return None
  value = estimate.get('difference', estimate.get('mean'))
  return [value - half, value + half]
