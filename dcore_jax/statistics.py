"""Estimates shares, means and paired differences with their uncertainty.

The unit of an estimate is what was drawn independently: a task if one model is measured, a run (a
seed) if settings are compared. Rollouts of one prompt and prompts of one task are not independent,
and therefore no units. An estimate is JSON data:

    {'mean', 'standard_error', 'interval': [low, high], 'n', 'unit'}

with 'difference' in place of 'mean' if two measurements are compared. The interval holds the true
value in 95 % of the cases. One unit has neither a standard error nor an interval (both None). Units
with equal values have no standard error either; their interval covers the different units that the
sample may have missed.
"""

import functools
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
_RESAMPLES = 10_000  # the ends of an interval of 95 % then vary by a fiftieth of its width
_BATCH = 500  # resamples drawn at once: 4 MB of counts for a thousand tasks

Bounds = tuple[float, float]


def wilson_interval(share: float, n: int) -> Bounds:
  """Computes the 95 % Wilson score interval of a share of `n` trials.

  It is right also near 0 and 1, where the normal one has no width.

  Raises:
    ValueError: no trials, or no share.
  """
  if n < 1 or not 0 <= share <= 1:
    raise ValueError(f'no interval for share={share} of n={n}')
  # A share of trials is a whole number of them: `round` removes the rounding of the division.
  found = scipy.stats.binomtest(round(share * n), n).proportion_ci(_LEVEL, method='wilson')
  # A share that was rounded before it came here must still lie inside.
  return min(float(found.low), share), max(float(found.high), share)


def standard_error(values: Sequence[float]) -> float | None:
  """Computes the standard error of a mean; None for a single value and for equal values."""
  return _standard_error(np.asarray(values, np.float64), None)


def estimate_share(share: float, n: int, *, unit: str = TASKS) -> dict[str, Any]:
  """Estimates a share of `n` units; one unit has no interval.

  Raises:
    ValueError: no units, or no share.
  """
  interval = wilson_interval(share, n)
  # The variance of values 0 and 1 with n - 1 in its denominator, divided by n.
  spread = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0
  return {
    'mean': share,
    # A spread of 0 is a sample of equal units, and no certainty.
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
  """Estimates the mean of measurements.

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
  # The number of units, not of values, gives the degrees of freedom.
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
  # Equal values: the t interval would have no width.
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
  """Estimates the mean of after - before, as 'difference', of the same units measured twice.

  What makes one task harder than another is in both measurements and cancels. Rollouts of one
  prompt are not independent: give their mean. Prompts of one task are not independent either: name
  their task in `clusters`.

  Args:
    before, after: as many measurements each, at least one.
    unit, clusters: see `estimate_mean`.
    bounds: the least and the largest possible measurement, which no interval exceeds. Without them
      the range of the measurements stands in where all differences are equal, and only there.

  Raises:
    ValueError: measurements that are no pairs.
  """
  # Checked first, because numpy would broadcast a single measurement.
  if len(before) != len(after) or not len(before):
    raise ValueError(f'{len(before)} and {len(after)} measurements are no pairs')
  first = np.asarray(before, np.float64)
  second = np.asarray(after, np.float64)
  both = np.concatenate([first, second])
  low, high = bounds or (both.min(), both.max())
  # A difference lies between minus and plus the range of the measurements.
  largest = float(max(high, both.max()) - min(low, both.min()))
  # Measurements that are all one value, without known bounds, do not say what others could be.
  reach = (-largest, largest) if largest else None
  estimate = functools.partial(estimate_mean, second - first, unit=unit, clusters=clusters)
  found = estimate(bounds=reach if bounds else None)
  if bounds is None and found['standard_error'] is None:
    found = estimate(bounds=reach)
  # Verdicts 0 and 1 have an interval of their own that holds for few changes. It needs independent
  # pairs, so clusters keep the general one.
  if found['n'] == first.size > 1 and np.isin(both, (0, 1)).all():
    found['interval'] = _paired_shares(first, second)
  # The name says which of the two a number is, so that nobody reads a gain as a score.
  return {'difference': found.pop('mean')} | found


def bootstrap_difference(
  before: Sequence[float],
  after: Sequence[float],
  *,
  unit: str = TASKS,
  clusters: Sequence[str] | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Estimates as `paired_difference`, with a bootstrap interval over the units.

  It is for measurements with long tails, such as lengths, whose mean is far from normal. The ends
  are percentiles of the differences of samples that are drawn from the units with replacement. For
  few units they lie further out than 2.5 % and 97.5 %, since samples of n units spread too little,
  by sqrt((n - 1) / n), and by normal quantiles instead of t's (Hesterberg 2015, arXiv:1411.5279,
  section 4.1.2).

  Args:
    before, after, unit, clusters: see `paired_difference`.
    seed: of the samples; equal seeds give equal intervals.

  Raises:
    ValueError: measurements that are no pairs.
  """
  found = paired_difference(before, after, unit=unit, clusters=clusters)
  # Samples of equal units, or of one, are all the same: they say nothing of what was missed.
  if found['standard_error'] is None:
    return found
  differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
  owners = list(clusters) if clusters is not None else range(len(differences))
  _, place = np.unique(owners, return_inverse=True)
  sums = np.bincount(place, weights=differences)
  sizes = np.bincount(place)
  random = np.random.default_rng(seed)
  means = []
  for _ in range(_RESAMPLES // _BATCH):
    # How often each unit is drawn. A unit brings all its measurements with it.
    counts = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=_BATCH)
    means.append(counts @ sums / (counts @ sizes))
  n = len(sums)
  wide = math.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 + _LEVEL) / 2, n - 1)
  tail = float(scipy.stats.norm.sf(wide))
  low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
  # The percentiles of a very lopsided sample may leave its own mean outside.
  difference = found['difference']
  found['interval'] = [min(float(low), difference), max(float(high), difference)]
  return found


def change_probability(gained: int, lost: int) -> float:
  """Computes the p value of McNemar's exact test.

  It is the probability of changes at least as lopsided as these, if each unit that changed were as
  likely gained as lost. No changes give 1.

  Raises:
    ValueError: a negative number.
  """
  if min(gained, lost) < 0:
    raise ValueError(f'{gained} gained and {lost} lost units')
  # Units that stayed as they were say nothing of the direction of a change.
  return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def difference_probability(estimate: Mapping[str, Any]) -> float | None:
  """Computes the two-sided p value of Student's t test that a mean, or a difference, is 0.

  None where the estimate has no standard error: a single unit, or equal ones.
  """
  error = estimate.get('standard_error')
  if not error or estimate['n'] < 2:
    return None
  value = estimate.get('difference', estimate.get('mean'))
  return float(2 * scipy.stats.t.sf(abs(value) / error, estimate['n'] - 1))


def holm(probabilities: Sequence[float]) -> list[float]:
  """Adjusts p values for their number, so that any false rejection stays rare (Holm 1979).

  The k-th smallest of m is multiplied by m - k + 1, and none falls below a smaller one's.
  """
  adjusted = [0.0] * len(probabilities)
  largest = 0.0
  for rank, place in enumerate(np.argsort(probabilities, kind='stable')):
    scaled = min(1.0, (len(probabilities) - rank) * probabilities[place])
    largest = max(largest, scaled)
    adjusted[place] = largest
  return adjusted


def cohens_kappa(
  first: Sequence[str], second: Sequence[str], *, clusters: Sequence[str], seed: int = 0
) -> dict[str, Any]:
  """Computes how far two judges agree beyond chance, with a bootstrap interval over the units.

  Args:
    first, second: the labels that each judge gave to the same things.
    clusters: the unit of each thing.
    seed: of the samples.

  Returns:
    {'kappa', 'interval', 'n'}: (p - e) / (1 - e) with p the share of equal labels and e what equal
    shares of labels would agree by chance (Cohen 1960), and n units. `kappa` is None where both
    gave one label alone, `interval` where there are no two units.

  Raises:
    ValueError: no labels, or not as many units.
  """
  if not len(first) == len(second) == len(clusters) or not len(first):
    raise ValueError(
      f'{len(first)} and {len(second)} labels of {len(clusters)} units are no judgements'
    )
  names, codes = np.unique([*first, *second], return_inverse=True)
  _, place = np.unique(list(clusters), return_inverse=True)
  units = int(place.max()) + 1
  # A table of labels for each unit: a sample of units is a weighted sum of them.
  tables = np.zeros((units, len(names), len(names)))
  np.add.at(tables, (place, codes[: len(first)], codes[len(first) :]), 1)
  kappa = _kappa(tables.sum(0)[None])[0]
  found = {'kappa': float(kappa) if np.isfinite(kappa) else None, 'interval': None, 'n': units}
  if units < 2 or found['kappa'] is None:
    return found
  random = np.random.default_rng(seed)
  kappas = []
  for _ in range(_RESAMPLES // _BATCH):
    counts = random.multinomial(units, np.full(units, 1 / units), size=_BATCH)
    kappas.append(_kappa(np.tensordot(counts, tables, 1)))
  # Samples of one label alone have no kappa.
  low, high = np.nanquantile(np.concatenate(kappas), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
  found['interval'] = [min(float(low), found['kappa']), max(float(high), found['kappa'])]
  return found


def _kappa(tables: np.ndarray) -> np.ndarray:
  """Computes kappa of tables [n, labels, labels] of counts; NaN where chance agrees wholly."""
  total = tables.sum((1, 2))
  agreed = np.trace(tables, axis1=1, axis2=2) / total
  chance = (tables.sum(1) * tables.sum(2)).sum(1) / total**2
  with np.errstate(invalid='ignore', divide='ignore'):
    return np.where(chance < 1, (agreed - chance) / (1 - chance), np.nan)


def _standard_error(values: np.ndarray, clusters: Sequence[str] | None) -> float | None:
  """Computes the standard error of the mean of values [n] in independent clusters.

  With each value a cluster this is the usual standard error.
  """
  # Values of one cluster may differ from the mean in the same direction. Their sum keeps that, and
  # it is the sums that are independent.
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
  """Computes the interval of a mean whose `n` units all have `value`; None without bounds.

  It is Clopper and Pearson's bound for no successes, the exact form of the rule of three.
  """
  if bounds is None:
    return None
  low, high = bounds
  # A share of this size is missed by a sample of n with a probability of 2.5 %. These units may
  # have the least value, or the largest.
  missed = float(scipy.stats.binomtest(0, n).proportion_ci(_LEVEL, method='exact').high)
  return [value - missed * max(0.0, value - low), value + missed * max(0.0, high - value)]


def _within(interval: list[float], bounds: Bounds | None) -> list[float]:
  if bounds is None:
    return interval
  return [max(interval[0], float(bounds[0])), min(interval[1], float(bounds[1]))]


def _paired_shares(before: np.ndarray, after: np.ndarray) -> list[float]:
  """Computes the interval of the difference of two shares of the same n units, values 0 or 1.

  It combines Wilson's intervals of the share that was gained and of the share that was lost, which
  correlate negatively (the method of variance estimates recovery, Zou and Donner 2008).
  """
  n = len(before)
  gained = float(np.mean(after > before))
  lost = float(np.mean(after < before))
  gained_low, gained_high = wilson_interval(gained, n)
  lost_low, lost_high = wilson_interval(lost, n)
  # Gained and lost exclude each other, as two cells of a multinomial. If all units gained, or all
  # lost, there is no correlation to estimate.
  stayed = (1 - gained) * (1 - lost)
  correlation = -math.sqrt(gained * lost / stayed) if stayed else 0.0

  def reach(one: float, other: float) -> float:
    return math.sqrt(one**2 - 2 * correlation * one * other + other**2)

  # Units that all stayed as they were still get a width here, which a normal interval has not.
  low = gained - lost - reach(gained - gained_low, lost_high - lost)
  high = gained - lost + reach(gained_high - gained, lost - lost_low)
  return _within([low, high], (-1.0, 1.0))


# --- as text ---


def format_estimate(
  estimate: Mapping[str, Any], digits: int = 3, scale: float = 1.0, suffix: str = ''
) -> str:
  """Writes an estimate as '0.68 [0.59, 0.75] (128 tasks)'; a difference has its sign.

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
  """Writes what follows the number: '[0.59, 0.75] (128 tasks)', or that there is no interval."""
  sign = '+' if 'difference' in estimate else ''
  n = int(estimate['n'])
  # Estimates without a unit are of earlier programs, whose units were tasks.
  unit = estimate.get('unit', TASKS)
  counted = f'{n:,} {unit if n != 1 else unit.removesuffix("s")}'
  interval = interval_of(estimate)
  if interval is not None:
    low, high = (f'{scale * bound:{sign}.{digits}f}' for bound in interval)
    return f'[{low}, {high}] ({counted})'
  alike = ', all alike' if n > 1 else ''
  return f'({counted}{alike}: no interval)'


def interval_of(estimate: Mapping[str, Any]) -> list[float] | None:
  """Returns the interval of an estimate.

  Files of earlier programs have only its half width or a standard error, which makes it Student's.
  """
  if 'interval' in estimate:
    return estimate['interval']
  half = estimate.get('half_width')
  error = estimate.get('standard_error')
  # A standard error of 0 or of one unit has no interval.
  if not half and error and estimate['n'] > 1:
    half = float(scipy.stats.t.ppf((1 + _LEVEL) / 2, estimate['n'] - 1)) * error
  if not half:
    return None
  value = estimate.get('difference', estimate.get('mean'))
  return [value - half, value + half]
