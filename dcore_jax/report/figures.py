"""Formats the numbers of a summary for a page; a missing number is a dash."""

import math
from typing import Any

from dcore_jax.statistics import estimate_share, format_estimate

# Estimators of other packages have no label here and are shown by their name.
STAGE_LABELS = {
  'base': 'base',
  'sft': 'after SFT',
  'grpo': 'after GRPO',
  'dr_grpo': 'after Dr. GRPO',
  'rloo': 'after RLOO',
  'rl_zvp': 'after RL-ZVP',
  'da_grpo': 'after DA-GRPO',
}

Stages = dict[str, dict[str, Any]]


def stage_label(name: str) -> str:
  """Returns what a stage is called on the page; any estimator may have trained it."""
  return STAGE_LABELS.get(name, f'after {name}')


def kind_label(kind: str) -> str:
  """Returns what a kind of task is called on the page."""
  return kind.replace('_', '-')


def kinds_of(stages: Stages) -> list[str]:
  """Returns the kinds of task that any stage was measured on, in the order of the first."""
  kinds: dict[str, None] = {}
  for stage in stages.values():
    # A dict keeps the order of insertion, which is that of the world.
    for field in ('accuracy', 'lazy_ratio'):
      kinds.update(dict.fromkeys(stage.get(field) or {}))
  return list(kinds)


def number(value: Any) -> float | None:
  """Returns a finite number, and None for what is missing, null or not a number."""
  # bool is an int in Python, and a flag is no figure. NaN cannot be drawn.
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
    return None
  return value


def entry(stage: dict[str, Any], field: str, kind: str | None = None) -> float | None:
  """Returns a figure of a stage, of one kind or of all; None if it was not measured."""
  value = stage.get(field)
  return number((value or {}).get(kind)) if kind else number(value)


def estimate(stage: dict[str, Any], field: str, kind: str | None = None) -> dict[str, Any] | None:
  """Returns the estimate of a figure, see `statistics`; None if there is no such figure.

  Stages of earlier programs have a number of tasks and no estimates. Without either the estimate is
  the figure alone.
  """
  value = entry(stage, field, kind)
  if value is None:
    return None
  found = (stage.get('intervals') or {}).get(field)
  # A figure by kind has its estimates by kind, too.
  if kind and found:
    found = found.get(kind)
  if found:
    return found
  n = entry(stage, 'n', kind) if kind else None
  # A share and its number of tasks are enough for an interval. Other figures have spreads that are
  # not known here.
  if field == 'accuracy' and n and 0 <= value <= 1:
    return estimate_share(value, int(n))
  return {'mean': value}


def shown(
  found: dict[str, Any] | None, digits: int = 1, scale: float = 1.0, suffix: str = ''
) -> str:
  """Writes an estimate with its interval if it has a number of units; a dash for None."""
  # A paired difference stands under another name than a mean.
  value = number((found or {}).get('difference', (found or {}).get('mean')))
  if value is None:
    return '–'
  # Without a number of units the text would promise an interval that is not there.
  if number(found.get('n')) is None:
    return f'{scale * value:,.{digits}f}{suffix}'
  return format_estimate(found, digits, scale, suffix)


def percent(share: float | None, digits: int = 1) -> str:
  """Writes a share as per cent, or a dash."""
  return '–' if share is None else f'{100 * share:.{digits}f} %'


def plain(value: float | None, digits: int = 1) -> str:
  """Writes a number, or a dash."""
  return '–' if value is None else f'{value:,.{digits}f}'
