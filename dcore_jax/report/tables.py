"""Tables, cards and sentences of the report, from a summary."""

from collections.abc import Callable
from typing import Any

from dcore_jax.progress import format_seconds
from dcore_jax.report.figures import (
  Stages,
  entry,
  estimate,
  kind_label,
  kinds_of,
  number,
  percent,
  plain,
  shown,
)
from dcore_jax.statistics import format_interval


def headline(stages: Stages) -> str:
  """What the run changed, in one line."""
  rights = [entry(stage, 'accuracy', 'sequential') for stage in stages.values()]
  rights = [value for value in rights if value is not None]
  if len(rights) < 2:
    return 'A D-CORE run'
  return f'{percent(rights[0], 0)} of sequential tasks right before, {percent(rights[-1], 0)} after'


def lede(summary: dict[str, Any]) -> str:
  """What was run and how long it took, in one sentence."""
  seconds = {name: number(value) for name, value in (summary.get('seconds') or {}).items()}
  total = sum(value for value in seconds.values() if value is not None)
  if not total:
    return ''
  names = ', '.join(_stage_name(name) for name in seconds)
  return f'{names[:1].upper()}{names[1:]}: {format_seconds(total)} in all.'


def _stage_name(name: str) -> str:
  """'evaluate_sft' as a person writes it."""
  acronyms = {'sft': 'SFT', 'rl': 'RL', 'da': 'DA', 'grpo': 'GRPO', 'hf': 'HF'}
  return ' '.join(acronyms.get(word, word) for word in name.split('_')).replace(
    'DA GRPO', 'DA-GRPO'
  )


def cards(summary: dict[str, Any], stages: Stages, rl_rows: list[dict]) -> list[dict[str, str]]:
  """The few figures at the top: each says where the run started and where it ended."""
  cards = []

  def change(
    title: str, note: str, read: Callable[[dict], float | None], show: Callable[[float | None], str]
  ) -> None:
    values = [value for value in map(read, stages.values()) if value is not None]
    if values:
      cards.append(
        {
          'title': title,
          'note': note,
          'before': show(values[0]) if len(values) > 1 else '',
          'after': show(values[-1]),
        }
      )

  change(
    'Single calls right',
    'one call answers the query',
    lambda stage: entry(stage, 'accuracy', 'single'),
    lambda share: percent(share, 0),
  )
  change(
    'Lazy reasoning',
    'share of reasonings on sequential tasks',
    lambda stage: entry(stage, 'lazy_ratio', 'sequential'),
    lambda share: percent(share, 0),
  )
  change(
    'Reflections',
    'per response, all kinds',
    lambda stage: entry(stage, 'reflections_per_response'),
    plain,
  )
  silent = _measured(rl_rows, 'zero_variance_fraction')
  if silent:
    cards.append(
      {
        'title': 'Silent groups',
        'note': 'all rewards equal at the first RL step: no GRPO gradient',
        'before': '',
        'after': percent(silent[0], 0),
      }
    )
  rewards = _measured(rl_rows, 'reward')
  if rewards:
    # Single steps are noisy: the first and the last tenth.
    tenth = max(1, len(rewards) // 10)
    first = sum(rewards[:tenth]) / tenth
    last = sum(rewards[-tenth:]) / tenth
    cards.append(
      {
        'title': 'Reward',
        'note': 'first and last tenth of the RL steps',
        'before': plain(first, 2),
        'after': plain(last, 2),
      }
    )
  return cards


def _measured(rows: list[dict], field: str) -> list[float]:
  """Returns the values of a field where there are any."""
  values = [number(row.get(field)) for row in rows]
  return [value for value in values if value is not None]


def accuracy_table(stages: Stages) -> list[dict[str, Any]]:
  """Rows of {'label', 'cells': [{'stage', 'text', 'share', 'low', 'high', 'interval'}]}.

  Shares are in per cent; without an interval `low` is None, and `interval` says why.
  """
  rows = []
  for kind in kinds_of(stages):
    cells = []
    for name, stage in stages.items():
      share = entry(stage, 'accuracy', kind)
      found = estimate(stage, 'accuracy', kind) or {}
      cell = {
        'stage': name,
        'text': percent(share),
        'share': None if share is None else 100 * share,
        'low': None,
        'interval': format_interval(found, 1, 100) if 'n' in found else '',
      }
      if found.get('interval'):
        low, high = found['interval']
        cell |= {'low': 100 * low, 'high': 100 * high}
      cells.append(cell)
    if any(cell['share'] is not None for cell in cells):
      rows.append({'label': kind_label(kind), 'cells': cells})
  return rows


def changes(found: list[dict[str, Any]] | None) -> dict[str, Any] | None:
  """Returns {'steps': [(stage, stage)], 'rows': [{'label', 'cells': [text]}]}, points of accuracy.

  None where no two stages were compared.
  """
  steps = []
  pairs = []
  kinds: dict[str, None] = {}
  for change in found or ():
    by_kind = change.get('accuracy') or {}
    steps.append((change.get('from'), change.get('to')))
    pairs.append(by_kind)
    kinds.update(dict.fromkeys(by_kind))
  if not kinds:
    return None
  rows = []
  for kind in kinds:
    cells = [shown(by_kind.get(kind), 1, 100) for by_kind in pairs]
    rows.append({'label': kind_label(kind), 'cells': cells})
  return {'steps': steps, 'rows': rows}


def held_out(validation: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Rows of {'label', 'before', 'after', 'change', 'n'}: the prompts that reinforcement learning
  has set aside.
  """
  found = validation or {}
  rows = []
  for name, label, digits, scale in (
    ('reward', 'reward', 2, 1.0),
    ('right_fraction', 'right, %', 1, 100.0),
    ('reflections', 'reflections per response', 2, 1.0),
  ):
    if pair := (found.get('difference') or {}).get(name):
      values = [number((found.get(when) or {}).get(name)) for when in ('before', 'after')]
      before, after = (plain(None if value is None else scale * value, digits) for value in values)
      row = {
        'label': label,
        'before': before,
        'after': after,
        'change': shown(pair, digits, scale),
        'n': pair.get('prompts', pair['n']),
      }
      rows.append(row)
  return rows


def habit_table(stages: Stages) -> list[dict[str, Any]]:
  """Rows of {'label', 'group', 'cells': [text]}: how the model reasons, stage by stage."""
  # (label, field, kind, digits, scale, what stands behind the number)
  wanted: list[tuple[str, str, str | None, int, float, str]] = []
  for kind in kinds_of(stages):
    wanted.append((f'lazy, {kind_label(kind)}', 'lazy_ratio', kind, 1, 100, ' %'))
  wanted += [
    ('reflections per response', 'reflections_per_response', None, 2, 1, ''),
    ('reasoning tokens, mean', 'reasoning_tokens_mean', None, 0, 1, ''),
    ('plans unasked, several subtasks', 'decomposition_rate', None, 1, 100, ' %'),
  ]
  rows = []
  for label, field, kind, digits, scale, suffix in wanted:
    found = [estimate(stage, field, kind) for stage in stages.values()]
    if any(value is not None for value in found):
      cells = [shown(value, digits, scale, suffix) for value in found]
      rows.append({'label': label, 'group': field, 'cells': cells})
  return rows


def funnel(distill: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Bars of {'label', 'count', 'percent', 'role': seeds | dropped | kept}; [] where nothing was
  distilled.
  """
  seeds = number((distill or {}).get('seeds'))
  if not seeds:
    return []
  dropped = {
    reason: count for reason, count in (distill.get('dropped') or {}).items() if number(count)
  }
  bars = [('seeds', seeds, 'seeds')]
  bars += [
    (reason.replace('_', ' '), dropped[reason], 'dropped')
    for reason in sorted(dropped, key=lambda reason: -dropped[reason])
  ]
  bars += [('kept', number(distill.get('kept')) or 0, 'kept')]
  return [
    {'label': label, 'count': int(count), 'percent': min(100.0, 100 * count / seeds), 'role': role}
    for label, count, role in bars
  ]


def seconds(seconds: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Bars of {'label', 'text', 'percent'}: where the time went."""
  known = {name: value for name, value in (seconds or {}).items() if number(value) is not None}
  longest = max(known.values(), default=0) or 1
  return [
    {'label': _stage_name(name), 'text': format_seconds(value), 'percent': 100 * value / longest}
    for name, value in known.items()
  ]
