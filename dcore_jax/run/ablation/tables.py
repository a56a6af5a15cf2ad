"""Tables of sweeps: estimates over runs, paired differences, verdicts, and their files.

A row of a table is JSON data:

    {'setting', 'seeds', 'figures': {name: estimate}, 'against_first': {name: difference},
     'published': {name: number}}

Estimates are those of `statistics`, with runs as units. A difference is paired by seed and
checkpoint; `against` names the setting that it is from, where that is not the first one. `p` is of
Student's t test, and `p_holm` is adjusted for the settings that are compared by the same figure.
"""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dcore_jax.files import replace_text
from dcore_jax.learn.rewards import BOUNDS as REWARDS
from dcore_jax.statistics import (
  RUNS,
  difference_probability,
  estimate_mean,
  format_estimate,
  holm,
  interval_of,
  paired_difference,
)

Row = dict[str, Any]
Key = tuple[int, int]
REJECTED = 0.05  # a probability below it is called a difference
# Differences of a row, and what a table calls them.
_CHANGES = {'against_first': 'change', 'against_placebo': 'against the placebo'}
_SHARES = ('_fraction', '_rate', '_rate_all')


def bounds_of(name: str) -> tuple[float, float] | None:
  """Returns the least and the largest value of a figure, where there are any."""
  # Bounds keep intervals of few runs inside what a figure can be.
  if name.startswith('accuracy') or name.endswith(_SHARES) or name == 'label_agreement':
    return 0.0, 1.0
  return REWARDS if name in ('reward', 'validation_reward') else None


def run_key(run: Mapping[str, Any]) -> Key:
  """Returns what runs of several settings are paired by."""
  # Runs of earlier programs know one checkpoint.
  return run.get('checkpoint', 0), run['seed']


def estimates(runs: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
  """Estimates every figure over runs, by its name; values of None are left out."""
  figures = {}
  for name in dict.fromkeys(name for run in runs for name in run):
    known = [run[name] for run in runs if run.get(name) is not None]
    if known:
      figures[name] = estimate_mean(known, unit=RUNS, bounds=bounds_of(name))
  return figures


def paired(
  name: str, first: Mapping[Key, float | None], other: Mapping[Key, float | None]
) -> dict[str, Any] | None:
  """Estimates other - first over the runs that both have; None without such runs."""
  keys = [key for key in first if other.get(key) is not None and first[key] is not None]
  if not keys:
    return None
  before = [first[key] for key in keys]
  after = [other[key] for key in keys]
  found = paired_difference(before, after, unit=RUNS, bounds=bounds_of(name))
  probability = difference_probability(found)
  return found if probability is None else found | {'p': probability}


def contrast(
  first: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
  """Differences of two settings' runs, by figure; runs have 'figures'."""
  found = {}
  for name in mine[0]['figures']:
    before = {run_key(run): run['figures'].get(name) for run in first}
    after = {run_key(run): run['figures'].get(name) for run in mine}
    difference = paired(name, before, after)
    if difference:
      found[name] = difference
  return found


def add_holm(rows: Sequence[Row], field: str = 'against_first') -> None:
  """Adjusts the p values of each figure for the number of settings, in place."""
  by_name: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    for name, difference in row.get(field, {}).items():
      if 'p' in difference:
        by_name.setdefault(name, []).append(difference)
  for differences in by_name.values():
    adjusted = holm([difference['p'] for difference in differences])
    for difference, value in zip(differences, adjusted, strict=True):
      difference['p_holm'] = value


def make_table(
  settings: Sequence[str],
  runs: Sequence[Mapping[str, Any]],
  *,
  against: Mapping[str, str],
  published: Mapping[str, Mapping[str, float]],
) -> list[Row]:
  """Returns a row for each setting that has been run.

  Args:
    settings: their names, in the order of the rows.
    runs: with 'setting', 'seed', 'checkpoint' and 'figures'.
    against: for each setting the one that it is compared with; settings that are not there are
      compared with none.
    published: the paper's numbers of a setting.
  """
  rows = []
  for name in settings:
    mine = [run for run in runs if run['setting'] == name]
    # While a sweep runs, later settings have no row yet.
    if not mine:
      continue
    other = against.get(name)
    first = [run for run in runs if run['setting'] == other]
    rows.append(
      {
        'setting': name,
        'seeds': len(mine),
        'figures': estimates([run['figures'] for run in mine]),
        'against': other if first else None,
        'against_first': contrast(first, mine) if first else {},
        'published': dict(published.get(name, {})),
      }
    )
  add_holm(rows)
  return rows


# --- verdicts ---


class Claimed(NamedTuple):
  """A difference that a finding is about.

  Attributes:
    text: what differs from what.
    estimate: of the difference; None where it was not measured.
    sign: +1 where the finding says more, -1 where it says less.
    scale: what numbers are multiplied with, 100 for per cent.
  """

  text: str
  estimate: Mapping[str, Any] | None
  sign: int
  scale: float = 1.0


def verdict(finding: str, claims: Sequence[Claimed]) -> str:
  """Says in one line whether a finding holds here.

  It holds where each interval lies on the claimed side of 0, and does not where one lies on the
  other side. Anything else is not decided.
  """
  words = []
  sides = []
  for claim in claims:
    if claim.estimate is None:
      words.append(f'{claim.text}: not measured')
      sides.append(0)
      continue
    words.append(f'{claim.text}: {format_estimate(claim.estimate, 2, claim.scale)}')
    low, high = interval_of(claim.estimate) or (-1.0, 1.0)
    # The end that is nearer to 0, and the sign of the side that the interval lies on.
    sides.append(claim.sign if low > 0 else -claim.sign if high < 0 else 0)
  if min(sides) > 0:
    answer = 'holds here'
  elif min(sides) < 0:
    answer = 'does not hold here'
  else:
    answer = 'is not decided here'
  return f'{finding}: {answer} ({"; ".join(words)})'


def row_of(table: Sequence[Row], setting: str) -> Row | None:
  """Returns the row of a setting; None where it has not been run."""
  return next((row for row in table if row['setting'] == setting), None)


def difference_of(table: Sequence[Row], setting: str, name: str) -> dict[str, Any] | None:
  """Returns a setting's difference in a figure; None where there is none."""
  row = row_of(table, setting)
  return row['against_first'].get(name) if row else None


# --- files ---


def write_pages(workdir: pathlib.Path, content: Mapping[str, Any], panels: Sequence[str]) -> None:
  """Writes a suite's table as markdown, CSV and figure.

  Args:
    workdir: where <suite>.md, .csv and .png go.
    content: of the suite's file.
    panels: figures that are drawn, and that the markdown table shows.
  """
  base = workdir / content['suite']
  replace_text(base.with_suffix('.md'), markdown(content, panels))
  replace_text(base.with_suffix('.csv'), csv_text(content['table']))
  draw(content['table'], panels).savefig(base.with_suffix('.png'), dpi=120)


def markdown(content: Mapping[str, Any], panels: Sequence[str]) -> str:
  """Returns the table as a markdown page."""
  table = content['table']
  shown = [name for name in panels if any(name in row['figures'] for row in table)]
  published = list(dict.fromkeys(name for row in table for name in row['published']))
  # Prompts set aside are what changes are measured on, without the prefix.
  wanted = list(dict.fromkeys(name.removeprefix('validation_') for name in shown))
  changes = []
  for field, words in _CHANGES.items():
    for name in wanted:
      if any(name in row.get(field, {}) for row in table):
        changes.append((field, name, f'{name}, {words}'))
  head = ['setting', *shown, *(words for _, _, words in changes)]
  head += [f'paper: {name}' for name in published]
  lines = [f'# {content["suite"]}', '']
  if content.get('verdict'):
    lines += [content['verdict'] + '.', '']
  lines += ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for row in table:
    cells = [row['setting']]
    cells += [_estimate_cell(row['figures'].get(name), row) for name in shown]
    cells += [_estimate_cell(row.get(field, {}).get(name), row) for field, name, _ in changes]
    cells += [str(row['published'].get(name, '-')) for name in published]
    lines.append('| ' + ' | '.join(cells) + ' |')
  lines += [
    '',
    'In brackets: 95 % t-intervals over runs. Changes are paired by seed; p is by Holm.',
  ]
  return '\n'.join(lines) + '\n'


def _estimate_cell(estimate: Mapping[str, Any] | None, row: Row) -> str:
  if estimate is None:
    return '-'
  text = format_estimate({'n': row['seeds'], 'unit': RUNS} | estimate, 3)
  return f'{text}, p {estimate["p_holm"]:.3f}' if 'p_holm' in estimate else text


def csv_text(table: Sequence[Row]) -> str:
  """Returns one line for each number of the table."""
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(('setting', 'kind', 'figure', 'value', 'low', 'high', 'runs', 'p', 'p_holm'))
  for row in table:
    for kind in ('figures', *_CHANGES):
      for name, estimate in row.get(kind, {}).items():
        low, high = interval_of({'n': row['seeds']} | estimate) or ('', '')
        value = estimate.get('difference', estimate.get('mean'))
        runs = estimate.get('n', row['seeds'])
        probabilities = (estimate.get('p', ''), estimate.get('p_holm', ''))
        writer.writerow((row['setting'], kind, name, value, low, high, runs, *probabilities))
    for name, value in row['published'].items():
      writer.writerow((row['setting'], 'published', name, value, '', '', '', '', ''))
  return file.getvalue()


def draw(table: Sequence[Row], panels: Sequence[str]) -> Figure:
  """Draws bars with intervals for each of the panels, and the paper's numbers beside them."""
  published = list(dict.fromkeys(name for row in table for name in row['published']))
  shown = [name for name in panels if any(name in row['figures'] for row in table)]
  names = [row['setting'] for row in table]
  places = np.arange(len(table))
  with matplotlib.rc_context({'font.size': 8}):
    figure = Figure(figsize=(3.4 * max(1, len(shown) + bool(published)), 3.6), layout='constrained')
    axes = figure.subplots(1, max(1, len(shown) + bool(published)), squeeze=False)[0]
    for axis, name in zip(axes, shown, strict=False):
      means, errors = _bars(table, name)
      axis.bar(places, means, yerr=errors, color='#3b6ea5', capsize=3)
      axis.set_title(name.replace('_', ' '))
    for number, name in enumerate(published):
      values = [row['published'].get(name, np.nan) for row in table]
      width = 0.8 / len(published)
      axes[-1].bar(places + (number - (len(published) - 1) / 2) * width, values, width, label=name)
    if published:
      axes[-1].set_title('paper')
      axes[-1].legend()
    for axis in axes:
      axis.set_xticks(places, names, rotation=60, ha='right')
  return figure


def _bars(table: Sequence[Row], name: str) -> tuple[list[float], np.ndarray]:
  """Heights and error bars [2, rows] of a figure; NaN where there is none."""
  means = []
  errors = np.full((2, len(table)), np.nan)
  for place, row in enumerate(table):
    estimate = row['figures'].get(name)
    means.append(np.nan if estimate is None else estimate['mean'])
    interval = interval_of({'n': row['seeds']} | estimate) if estimate else None
    if interval:
      errors[:, place] = means[-1] - interval[0], interval[1] - means[-1]
  return means, errors


# --- for a terminal ---


def format_rows(content: Mapping[str, Any], panels: Sequence[str]) -> str:
  """Returns a table as lines of text: figures, changes, and the paper's numbers."""
  table = content['table']
  shown = [name for name in panels if any(name in row['figures'] for row in table)]
  lines = []
  for row in table:
    lines.append(row['setting'])
    for name in shown:
      line = f'  {name}'.ljust(30) + _estimate_cell(row['figures'].get(name), row).ljust(36)
      if name in row['against_first']:
        line += f'against {row["against"]}: {_estimate_cell(row["against_first"][name], row)}'
      lines.append(line.rstrip())
    if row['published']:
      numbers = ', '.join(f'{name} {value}' for name, value in row['published'].items())
      lines.append(f'  paper: {numbers}')
  return '\n'.join(lines)
