"""Makes the tables, cards and sentences of the report from a summary."""

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
  """Returns one line about what the run changed."""
  # Sequential tasks are those that the method is about: they need a plan.
  rights = [entry(stage, 'accuracy', 'sequential') for stage in stages.values()]
  rights = [value for value in rights if value is not None]
  # One model alone has not changed anything.
  if len(rights) < 2:
    return 'A D-CORE run'
  return f'{percent(rights[0], 0)} of sequential tasks right before, {percent(rights[-1], 0)} after'


def lede(summary: dict[str, Any]) -> str:
  """Returns one sentence about what was run and how long it took."""
  seconds = {name: number(value) for name, value in (summary.get('seconds') or {}).items()}
  total = sum(value for value in seconds.values() if value is not None)
  # Without times there is nothing to say.
  if not total:
    return ''
  names = ', '.join(_stage_name(name) for name in seconds)
  return f'{names[:1].upper()}{names[1:]}: {format_seconds(total)} in all.'


def _stage_name(name: str) -> str:
  """Writes a stage's name as a person would: 'evaluate_sft' is 'evaluate SFT'."""
  # Names of stages are made of config words, all in lower case.
  acronyms = {'sft': 'SFT', 'rl': 'RL', 'da': 'DA', 'grpo': 'GRPO', 'hf': 'HF'}
  return ' '.join(acronyms.get(word, word) for word in name.split('_')).replace(
    'DA GRPO', 'DA-GRPO'
  )


def cards(summary: dict[str, Any], stages: Stages, rl_rows: list[dict]) -> list[dict[str, str]]:
  """Makes the cards at the top of the page: a figure at the start and at the end of the run."""
  cards = []

  def change(
    title: str, note: str, read: Callable[[dict], float | None], show: Callable[[float | None], str]
  ) -> None:
    # First and last are of the stages that were measured, whichever these are.
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
  # The first step shows what GRPO would leave unused before training changes it.
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
  """Returns the values of a field in the rows that have one."""
  values = [number(row.get(field)) for row in rows]
  return [value for value in values if value is not None]


def accuracy_table(stages: Stages) -> list[dict[str, Any]]:
  """Returns rows {'label', 'cells': [{'stage', 'text', 'share', 'low', 'high', 'interval'}]}.

  Shares are in per cent; without an interval `low` is None, and `interval` says why.
  """
  rows = []
  for kind in kinds_of(stages):
    cells = []
    for name, stage in stages.items():
      share = entry(stage, 'accuracy', kind)
      # Bars are drawn from the share; the estimate adds the interval if there is one.
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
    # A kind that nobody was measured on would be a row of dashes.
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
    # A kind that one comparison lacks still has its row.
    pairs.append(by_kind)
    kinds.update(dict.fromkeys(by_kind))
  # The page then has no table of changes.
  if not kinds:
    return None
  rows = []
  for kind in kinds:
    cells = [shown(by_kind.get(kind), 1, 100) for by_kind in pairs]
    rows.append({'label': kind_label(kind), 'cells': cells})
  return {'steps': steps, 'rows': rows}


def held_out(validation: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Returns rows {'label', 'before', 'after', 'change', 'n'} of the prompts that RL set aside."""
  found = validation or {}
  rows = []
  for name, label, digits, scale in (
    ('reward', 'reward', 2, 1.0),
    ('right_fraction', 'right, %', 1, 100.0),
    ('reflections', 'reflections per response', 2, 1.0),
  ):
    # Not every file has a difference for each of these metrics.
    if pair := (found.get('difference') or {}).get(name):
      # Values and their difference have one scale, so that a row can be checked by eye.
      values = [number((found.get(when) or {}).get(name)) for when in ('before', 'after')]
      before, after = (plain(None if value is None else scale * value, digits) for value in values)
      row = {
        'label': label,
        'before': before,
        'after': after,
        'change': shown(pair, digits, scale),
        # A reader expects prompts; the units of the interval are tasks, which are fewer.
        'n': pair.get('prompts', pair['n']),
      }
      rows.append(row)
  return rows


def habit_table(stages: Stages) -> list[dict[str, Any]]:
  """Returns rows {'label', 'group', 'cells': [text]} of how the model reasons in each stage."""
  # (label, field, kind, digits, scale, suffix of the number)
  wanted: list[tuple[str, str, str | None, int, float, str]] = []
  # Lazy reasoning has a row for each kind, as the paper reports it for groups of categories.
  for kind in kinds_of(stages):
    wanted.append((f'lazy, {kind_label(kind)}', 'lazy_ratio', kind, 1, 100, ' %'))
  wanted += [
    ('reflections per response', 'reflections_per_response', None, 2, 1, ''),
    ('reasoning tokens, mean', 'reasoning_tokens_mean', None, 0, 1, ''),
    ('plans unasked, several subtasks', 'decomposition_rate', None, 1, 100, ' %'),
  ]
  rows = []
  for label, field, kind, digits, scale, suffix in wanted:
    # A row with one measured stage is shown, with dashes for the others.
    found = [estimate(stage, field, kind) for stage in stages.values()]
    if any(value is not None for value in found):
      cells = [shown(value, digits, scale, suffix) for value in found]
      rows.append({'label': label, 'group': field, 'cells': cells})
  return rows


def suite_table(stages: Stages) -> dict[str, Any] | None:
  """Returns {'rows': [{'suite', 'label', 'cells': [text], 'floor', 'published'}], 'notes'}.

  None where no stage has figures of evaluation suites.
  """
  rows: dict[tuple[str, str, str], dict[str, Any]] = {}
  notes: dict[str, None] = {}
  for place, stage in enumerate(stages.values()):
    for suite, result in (stage.get('suites') or {}).items():
      for score in result.get('scores') or ():
        label = f'{kind_label(score["category"])}, {score["metric"]}'
        row = rows.setdefault(
          (suite, score['category'], score['metric']),
          # A stage without this figure has a dash.
          {'suite': suite, 'label': label, 'cells': [shown(None)] * len(stages)},
        )
        row['cells'][place] = shown(score['estimate'], 3)
        # Both are of the tasks and the model family, and the same in every stage.
        row['floor'] = plain(number(score.get('floor')), 3)
        row['published'] = plain(number(score.get('published')), 3)
      found = list(result.get('notes') or ())
      if left_out := result.get('left_out'):
        found.append(f'{len(left_out)} tasks without a verdict are in no figure.')
      notes.update(dict.fromkeys(f'{suite}, {list(stages)[place]}: {note}' for note in found))
  return {'rows': list(rows.values()), 'notes': list(notes)} if rows else None


def funnel(distill: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Bars of {'label', 'count', 'percent', 'role': seeds | dropped | kept}; [] where nothing was
  distilled.
  """
  seeds = number((distill or {}).get('seeds'))
  # Shares of no seeds have no width.
  if not seeds:
    return []
  # Reasons that dropped nothing would be bars without length.
  dropped = {
    reason: count for reason, count in (distill.get('dropped') or {}).items() if number(count)
  }
  bars = [('seeds', seeds, 'seeds')]
  bars += [
    (reason.replace('_', ' '), dropped[reason], 'dropped')
    # The most frequent reason comes first, because it is what a person would mend.
    for reason in sorted(dropped, key=lambda reason: -dropped[reason])
  ]
  bars += [('kept', number(distill.get('kept')) or 0, 'kept')]
  return [
    # A count above the number of seeds would leave the page.
    {'label': label, 'count': int(count), 'percent': min(100.0, 100 * count / seeds), 'role': role}
    for label, count, role in bars
  ]


def seconds(
  seconds: dict[str, Any] | None, compiling: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
  """Bars of {'label', 'text', 'compiling', 'percent'}: where the time went.

  Args:
    seconds: of each stage.
    compiling: of each stage, while some thread compiled, where it is known.
  """
  known = {name: value for name, value in (seconds or {}).items() if number(value) is not None}
  # Bars are relative to the longest stage; 1 keeps stages of 0 seconds from dividing by 0.
  longest = max(known.values(), default=0) or 1
  return [
    {
      'label': _stage_name(name),
      'text': format_seconds(value),
      'compiling': _compile_text((compiling or {}).get(name)),
      'percent': 100 * value / longest,
    }
    for name, value in known.items()
  ]


def _compile_text(value: Any) -> str:
  # Less is noise: every stage compiles a dozen small programs.
  found = number(value)
  return f'{format_seconds(found)} of compiling' if found and found >= 1 else ''


# Fields of an RL step's row, in the order in which the phases come.
_PHASES = {
  'seconds_rollout': 'rollouts',
  'seconds_rewards': 'rewards',
  'seconds_score': 'old policy',
  'seconds_reference': 'reference',
  'seconds_update': 'updates',
  'seconds_engine_update': 'weights to the engine',
}


def phases(rows: list[dict]) -> list[dict[str, Any]]:
  """Bars of {'label', 'text', 'percent'}: what the RL steps spent their time on, all together.

  Compiling, which the first step waits for, is inside of the phases. Phases that took nothing are
  left out; what no phase counts, such as checkpoints, is not shown.
  """
  totals = {label: sum(_measured(rows, field)) for field, label in _PHASES.items()}
  whole = sum(totals.values())
  return [
    {
      'label': label,
      'text': f'{format_seconds(value)}, {percent(value / whole, 0)}',
      'percent': 100 * value / whole,
    }
    for label, value in totals.items()
    if value > 0
  ]
