"""The uncertainty that goes with shares, means and differences."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_Z95 = 1.959963984540054  # two-sided 95 % of a normal


def wilson_interval(share: float, n: int) -> tuple[float, float]:
  """95 % Wilson score interval of a share of `n` trials: right also near 0 and 1, unlike the normal
  one.
  """
  if n < 1 or not 0 <= share <= 1:
    raise ValueError(f'no interval for share={share} of n={n}')
  z2 = _Z95**2 / n
  centre = (share + z2 / 2) / (1 + z2)
  half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
  # At 0 and 1 the bounds meet the share exactly; rounding must not put them a hair beyond.
  return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def standard_error(values: Sequence[float]) -> float | None:
  """Of the mean; None for a single value."""
  return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def paired_difference(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
  """{'difference': mean of after - before, its 'standard_error', 'n'} of the same tasks measured
  twice.

  What makes one task harder than another is in both measurements and cancels. Rollouts of one
  prompt are not independent: of such, give means by prompt.
  """
  if len(before) != len(after) or not len(before):
    raise ValueError(f'{len(before)} and {len(after)} measurements are no pairs')
  change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
  return {
    'difference': float(change.mean()),
    'standard_error': standard_error(change),
    'n': len(change),
  }


def format_difference(pair: dict[str, Any], digits: int = 3, scale: float = 1.0) -> str:
  """A `paired_difference` as '+0.12 ± 0.05', one standard error."""
  error = pair['standard_error']
  return f'{scale * pair["difference"]:+.{digits}f}' + (
    '' if error is None else f' ± {scale * error:.{digits}f}'
  )
