"""`report.html`: one page a person reads after a run; nothing in it is fetched from anywhere.

    python -m dcore_jax.report.report WORKDIR           render again from the files of a run
    python -m dcore_jax.report.report --check WORKDIR   only check its summary.json

A piece that is missing (a stage that was skipped) leaves its section with a note. Text that a model wrote goes through
Jinja's autoescaping; the only markup that is passed as such are our own charts.
"""

import argparse
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import markupsafe

from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.progress import format_seconds
from dcore_jax.report import plots
from dcore_jax.report.summary import KINDS, STAGES, validate_summary
from dcore_jax.statistics import format_difference, wilson_interval
from dcore_jax.train.metrics import read_metrics

STAGE_LABELS = {
  'base': 'base',
  'sft': 'after SFT',
  'grpo': 'after GRPO',
  'dr_grpo': 'after Dr. GRPO',
  'rloo': 'after RLOO',
  'rl_zvp': 'after RL-ZVP',
  'da_grpo': 'after DA-GRPO',
}
KIND_LABELS = {
  'single': 'single',
  'sequential': 'sequential',
  'parallel': 'parallel',
  'irrelevant': 'irrelevant',
  'multi_turn': 'multi-turn',
}
TRACES_FILE = 'traces.json'

# Table 3 of the paper: Qwen3-8B on BFCL v3 (live to multi-turn) and tau-bench (retail, airline), in per cent.
PUBLISHED_COLUMNS = ('Live', 'Non-live', 'Relev.', 'Irrelev.', 'Multi-turn', 'Retail', 'Airline')
PUBLISHED_ROWS = (
  ('base', (78.5, 88.8, 77.8, 79.1, 33.0, 34.7, 23.2)),
  ('+ self-distillation', (82.5, 86.5, 66.7, 89.7, 57.5, 42.0, 31.2)),
  ('+ GRPO', (75.6, 85.4, 72.2, 84.5, 67.4, 49.2, 41.2)),
  ('+ DA-GRPO, α = 0.1', (82.3, 86.4, 77.8, 89.4, 63.8, 50.7, 44.4)),
)

# What the lazy measure counts (method: section 5.4). It counts substrings; only whole words are marked for the reader.
_HESITATION = re.compile(r'\b(wait|but|alternatively|however)\b', re.IGNORECASE)
_THINK = re.compile(r'<think>(.*?)(?:</think>|\Z)', re.DOTALL)

Stages = dict[str, dict[str, Any]]


def write_report(
  workdir: str | os.PathLike,
  summary: dict[str, Any],
  metrics: list[dict[str, Any]],
  traces: list[dict[str, Any]],
) -> pathlib.Path:
  """Writes `workdir/report.html` and, for rendering it again, the traces as `workdir/traces.json`.

  Args:
    summary: as `validate_summary` describes; two further fields are shown where present: `run`, a flat dict of what
      was run (config, model, device, ...), and per stage `behaviours`, {thought type: times per response} (fig. 3a).
    metrics: rows of stage 'sft' (loss) and 'rl' (reward, entropy, zero_variance_fraction, all_right_fraction,
      all_wrong_fraction, reflections, grad_norm, psi_grad_norm, kl); those at hand are drawn.
    traces: {'query', 'kind', 'columns': [{'stage', 'messages': [{'role', 'content'}], 'correct', 'lazy'}]}.

  Returns:
    the path of the page.
  """
  workdir = pathlib.Path(workdir)
  page = render_report(summary, metrics, traces)
  workdir.mkdir(parents=True, exist_ok=True)
  write_json_atomic(workdir / TRACES_FILE, traces)
  path = workdir / 'report.html'
  beside = path.with_suffix('.partial')
  beside.write_text(page, encoding='utf-8')
  beside.replace(path)
  return path


def render_report(
  summary: dict[str, Any], metrics: list[dict[str, Any]], traces: list[dict[str, Any]]
) -> str:
  """The page as text; arguments as for `write_report`."""
  stages = _ordered_stages(summary)
  rl_rows = [row for row in metrics if row.get('stage') == 'rl'] or _rl_rows_of_summary(summary)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template('report.html.jinja').render(
    headline=_headline(stages),
    lede=_lede(summary),
    run=summary.get('run') or {},
    export=summary.get('export'),
    stages=list(stages),
    stage_labels=STAGE_LABELS,
    cards=_cards(summary, stages, rl_rows),
    accuracy=_accuracy_table(stages),
    changes=_changes(summary.get('changes')),
    habits=_habit_table(stages),
    stage_charts=_stage_charts(stages),
    funnel=_funnel(summary.get('distill')),
    sft_charts=_sft_charts([row for row in metrics if row.get('stage') == 'sft']),
    rl_charts=_rl_charts(rl_rows),
    held_out=_held_out((summary.get('rl') or {}).get('validation')),
    published_columns=PUBLISHED_COLUMNS,
    published_rows=PUBLISHED_ROWS,
    traces=[_trace(trace) for trace in traces],
    seconds=_seconds(summary.get('seconds')),
  )


# ---- numbers ----


def _ordered_stages(summary: dict[str, Any]) -> Stages:
  given = summary.get('stages') or {}
  return {
    name: given[name] or {} for name in (*STAGES, *(given.keys() - set(STAGES))) if name in given
  }


def _number(value: Any) -> float | None:
  """A finite number, or None for what is missing, null or not a number."""
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
    return None
  return value


def _entry(stage: dict[str, Any], field: str, kind: str | None = None) -> float | None:
  value = stage.get(field)
  return _number((value or {}).get(kind)) if kind else _number(value)


def _percent(share: float | None, digits: int = 1) -> str:
  return '–' if share is None else f'{100 * share:.{digits}f} %'


def _plain(value: float | None, digits: int = 1) -> str:
  return '–' if value is None else f'{value:,.{digits}f}'


def _headline(stages: Stages) -> str:
  rights = [_entry(stage, 'accuracy', 'sequential') for stage in stages.values()]
  rights = [value for value in rights if value is not None]
  if len(rights) < 2:
    return 'A D-CORE run'
  return (
    f'{_percent(rights[0], 0)} of sequential tasks right before, {_percent(rights[-1], 0)} after'
  )


def _lede(summary: dict[str, Any]) -> str:
  """What was run and how long it took, in one sentence."""
  seconds = {name: _number(value) for name, value in (summary.get('seconds') or {}).items()}
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


def _cards(summary: dict[str, Any], stages: Stages, rl_rows: list[dict]) -> list[dict[str, str]]:
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
    lambda stage: _entry(stage, 'accuracy', 'single'),
    lambda share: _percent(share, 0),
  )
  change(
    'Lazy reasoning',
    'share of reasonings on sequential tasks',
    lambda stage: _entry(stage, 'lazy_ratio', 'sequential'),
    lambda share: _percent(share, 0),
  )
  change(
    'Reflections',
    'per response, all kinds',
    lambda stage: _entry(stage, 'reflections_per_response'),
    _plain,
  )
  silent = [
    share
    for share in (_number(row.get('zero_variance_fraction')) for row in rl_rows)
    if share is not None
  ]
  if silent:
    cards.append(
      {
        'title': 'Silent groups',
        'note': 'all rewards equal at the first RL step: no GRPO gradient',
        'before': '',
        'after': _percent(silent[0], 0),
      }
    )
  rewards = [
    reward for reward in (_number(row.get('reward')) for row in rl_rows) if reward is not None
  ]
  if rewards:
    # Single steps are noisy: the first and the last tenth.
    tenth = max(1, len(rewards) // 10)
    first, last = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
    cards.append(
      {
        'title': 'Reward',
        'note': 'first and last tenth of the RL steps',
        'before': _plain(first, 2),
        'after': _plain(last, 2),
      }
    )
  return cards


def _accuracy_table(stages: Stages) -> list[dict[str, Any]]:
  """Rows of {'label', 'cells': [{'stage', 'text', 'share', 'low', 'high', 'n'}]}, shares in per cent."""
  rows = []
  for kind in KINDS:
    cells = []
    for name, stage in stages.items():
      share, n = _entry(stage, 'accuracy', kind), _entry(stage, 'n', kind)
      cell = {
        'stage': name,
        'text': _percent(share),
        'share': None if share is None else 100 * share,
        'low': None,
      }
      if share is not None and n and 0 <= share <= 1:
        low, high = wilson_interval(share, int(n))
        cell |= {'low': 100 * low, 'high': 100 * high, 'n': int(n)}
      cells.append(cell)
    if any(cell['share'] is not None for cell in cells):
      rows.append({'label': KIND_LABELS[kind], 'cells': cells})
  return rows


def _changes(changes: list[dict[str, Any]] | None) -> dict[str, Any] | None:
  """{'steps': [(stage, stage)], 'rows': [{'label', 'cells': [text]}]} in points of accuracy; None without two stages."""
  pairs = [change.get('accuracy') or {} for change in changes or ()]
  rows = [
    {
      'label': KIND_LABELS[kind],
      'cells': [_difference(by_kind.get(kind), 1, 100) for by_kind in pairs],
    }
    for kind in KINDS
    if any(kind in by_kind for by_kind in pairs)
  ]
  return (
    {'steps': [(change.get('from'), change.get('to')) for change in changes], 'rows': rows}
    if rows
    else None
  )


def _held_out(validation: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Rows of {'label', 'before', 'after', 'change', 'n'}: the prompts that reinforcement learning has set aside."""
  found, rows = validation or {}, []
  for name, label, digits, scale in (
    ('reward', 'reward', 2, 1.0),
    ('right_fraction', 'right, %', 1, 100.0),
    ('reflections', 'reflections per response', 2, 1.0),
  ):
    if pair := (found.get('difference') or {}).get(name):
      values = [_number((found.get(when) or {}).get(name)) for when in ('before', 'after')]
      before, after = (_plain(None if value is None else scale * value, digits) for value in values)
      change = _difference(pair, digits, scale)
      rows.append(
        {'label': label, 'before': before, 'after': after, 'change': change, 'n': pair['n']}
      )
  return rows


def _difference(pair: dict[str, Any] | None, digits: int, scale: float) -> str:
  return format_difference(pair, digits, scale) if pair else '–'


def _habit_table(stages: Stages) -> list[dict[str, Any]]:
  """Rows of {'label', 'group', 'cells': [text]}: how the model reasons, stage by stage."""
  wanted = [(f'lazy, {KIND_LABELS[kind]}', 'lazy_ratio', kind, _percent) for kind in KINDS]
  wanted += [
    ('reflections per response', 'reflections_per_response', None, lambda v: _plain(v, 2)),
    ('reasoning tokens, mean', 'reasoning_tokens_mean', None, lambda v: _plain(v, 0)),
    ('plans unasked, several subtasks', 'decomposition_rate', None, _percent),
  ]
  rows = []
  for label, field, kind, show in wanted:
    values = [_entry(stage, field, kind) for stage in stages.values()]
    if any(value is not None for value in values):
      rows.append({'label': label, 'group': field, 'cells': [show(value) for value in values]})
  return rows


def _funnel(distill: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Bars of {'label', 'count', 'percent', 'role': seeds | dropped | kept}; [] where nothing was distilled."""
  seeds = _number((distill or {}).get('seeds'))
  if not seeds:
    return []
  dropped = {
    reason: count for reason, count in (distill.get('dropped') or {}).items() if _number(count)
  }
  bars = [('seeds', seeds, 'seeds')]
  bars += [
    (reason.replace('_', ' '), dropped[reason], 'dropped')
    for reason in sorted(dropped, key=lambda reason: -dropped[reason])
  ]
  bars += [('kept', _number(distill.get('kept')) or 0, 'kept')]
  return [
    {'label': label, 'count': int(count), 'percent': min(100.0, 100 * count / seeds), 'role': role}
    for label, count, role in bars
  ]


def _seconds(seconds: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Bars of {'label', 'text', 'percent'}: where the time went."""
  known = {name: value for name, value in (seconds or {}).items() if _number(value) is not None}
  longest = max(known.values(), default=0) or 1
  return [
    {'label': _stage_name(name), 'text': format_seconds(value), 'percent': 100 * value / longest}
    for name, value in known.items()
  ]


# ---- charts ----


def _chart(title: str, note: str, svg: str) -> dict[str, Any]:
  return {'title': title, 'note': note, 'svg': markupsafe.Markup(svg)}


def _stage_charts(stages: Stages) -> list[dict[str, Any]]:
  charts = []
  lazy = {
    name: [_entry(stage, 'lazy_ratio', kind) for kind in KINDS] for name, stage in stages.items()
  }
  if any(value is not None for values in lazy.values() for value in values):
    svg = plots.grouped_bars(
      'lazy', [KIND_LABELS[kind] for kind in KINDS], lazy, STAGE_LABELS, percent=True
    )
    charts.append(
      _chart(
        'Lazy reasoning',
        'Share of reasonings that hesitate at length and still fail, by kind. '
        'The paper, fig. 7b: 45 % to 6 % on multi-turn tasks.',
        svg,
      )
    )
  behaviours = {name: stage.get('behaviours') or {} for name, stage in stages.items()}
  thoughts = list(dict.fromkeys(thought for counts in behaviours.values() for thought in counts))
  reflections = {
    name: [_entry(stage, 'reflections_per_response')] for name, stage in stages.items()
  }
  if thoughts:
    series = {
      name: [_number(counts.get(thought)) for thought in thoughts]
      for name, counts in behaviours.items()
    }
    charts.append(
      _chart(
        'Thought types',
        "Times per response, counted by phrases (compare the paper's fig. 3).",
        plots.grouped_bars('behaviours', thoughts, series, STAGE_LABELS, percent=False),
      )
    )
  elif any(values[0] is not None for values in reflections.values()):
    svg = plots.grouped_bars(
      'reflections', ['reflections per response'], reflections, STAGE_LABELS, percent=False
    )
    charts.append(
      _chart('Reflections', 'How often a response turns back on its own reasoning.', svg)
    )
  return charts


def _points(rows: list[dict], field: str) -> list[tuple[float, float]]:
  return [
    (row['step'], row[field])
    for row in rows
    if _number(row.get('step')) is not None and _number(row.get(field)) is not None
  ]


def _sft_charts(rows: list[dict]) -> list[dict[str, Any]]:
  loss = _points(rows, 'loss')
  if not loss:
    return []
  svg = plots.curves('sft-loss', {'loss': loss}, colours=['sft'])
  return [_chart('Fine-tuning loss', 'Nats per trained token.', svg)]


def _rl_charts(rows: list[dict]) -> list[dict[str, Any]]:
  charts = []

  def add(title: str, note: str, name: str, fields: dict[str, str], **options: Any) -> None:
    lines = {label: _points(rows, field) for field, label in fields.items()}
    lines = {label: points for label, points in lines.items() if points}
    if lines:
      charts.append(_chart(title, note, plots.curves(name, lines, **options)))

  add('Reward', 'Mean over the rollouts of a step.', 'rl-reward', {'reward': 'reward'})
  add('Entropy', 'Mean over generated tokens, in nats.', 'rl-entropy', {'entropy': 'entropy'})
  right, wrong = _points(rows, 'all_right_fraction'), _points(rows, 'all_wrong_fraction')
  title, note = (
    'Groups without variance',
    'All rollouts of a group have one reward: GRPO learns nothing from them.',
  )
  if right and [step for step, _ in right] == [step for step, _ in wrong]:
    charts.append(
      _chart(
        title,
        note,
        plots.stacked_shares(
          'rl-variance', {'all right': right, 'all wrong': wrong}, ('sft', 'da_grpo')
        ),
      )
    )
  else:
    add(title, note, 'rl-variance', {'zero_variance_fraction': 'zero variance'}, percent=True)
  add(
    'Reflections',
    'Per response, during training.',
    'rl-reflections',
    {'reflections': 'reflections'},
  )
  add(
    'Gradient',
    'Norm of the whole, and of what the entropy advantage ψ of silent groups adds (log scale).',
    'rl-gradient',
    {'grad_norm': 'whole', 'psi_grad_norm': 'ψ part'},
    colours=('base', 'da_grpo'),
    log=True,
  )
  add('KL to the SFT model', 'Nats per token.', 'rl-kl', {'kl': 'KL'})
  return charts


def _rl_rows_of_summary(summary: dict[str, Any]) -> list[dict[str, Any]]:
  """The three curves that a summary holds, as rows, for a run whose metrics file is gone."""
  curves = {
    name: values
    for name, values in (summary.get('rl') or {}).items()
    if isinstance(values, (list, tuple))
  }
  length = max(map(len, curves.values()), default=0)
  return [
    {'step': step} | {name: values[step] for name, values in curves.items() if step < len(values)}
    for step in range(length)
  ]


# ---- traces ----


def _trace(trace: dict[str, Any]) -> dict[str, Any]:
  query = str(trace.get('query', ''))
  columns = []
  for column in trace.get('columns') or []:
    # The query stands above all columns once; the instructions are the same in each and long.
    messages = [
      {'role': message['role'], 'segments': segments(str(message['content']))}
      for message in column.get('messages') or []
      if message['role'] != 'system' and str(message['content']).strip() != query.strip()
    ]
    columns.append(
      {
        'stage': column.get('stage', ''),
        'correct': column.get('correct'),
        'lazy': column.get('lazy'),
        'messages': messages,
      }
    )
  kind = trace.get('kind', '')
  return {'query': query, 'kind': KIND_LABELS.get(kind, kind), 'columns': columns}


def segments(text: str) -> list[tuple[str, str]]:
  """A message cut into ('think' | 'hesitation' | 'text', piece): reasoning, its marked words, and the rest.

  The tags themselves are dropped. Pieces are plain text; escaping is the template's work.
  """
  pieces, position = [], 0
  for think in _THINK.finditer(text):
    pieces.append(('text', text[position : think.start()]))
    parts = _HESITATION.split(think.group(1).strip('\n'))  # odd places hold the words themselves
    pieces += [('hesitation' if place % 2 else 'think', part) for place, part in enumerate(parts)]
    position = think.end()
  pieces.append(('text', text[position:].lstrip('\n') if position else text))
  return [(kind, piece) for kind, piece in pieces if piece.strip() or (kind == 'think' and piece)]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m dcore_jax.report.report', description='Render the report of a run again.'
  )
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--check', action='store_true', help='check summary.json and write nothing')
  arguments = parser.parse_args(argv)
  try:
    summary = read_json(arguments.workdir / 'summary.json')
    validate_summary(summary)
    if not arguments.check:
      traces = arguments.workdir / TRACES_FILE
      path = write_report(
        arguments.workdir,
        summary,
        read_metrics(arguments.workdir),
        read_json(traces) if traces.exists() else [],
      )
      print(path)
  except (OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
