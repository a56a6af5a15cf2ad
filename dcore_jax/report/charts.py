"""Draws the charts of the report from a summary and the rows of metrics."""

from typing import Any

import markupsafe

from dcore_jax.report import plots
from dcore_jax.report.figures import Stages, entry, kind_label, kinds_of, number, stage_label


def _chart(title: str, note: str, svg: str) -> dict[str, Any]:
  # Our own drawing is the only markup that is not escaped.
  return {'title': title, 'note': note, 'svg': markupsafe.Markup(svg)}


def stage_charts(stages: Stages) -> list[dict[str, Any]]:
  """Draws charts of how the model reasons, stage by stage."""
  charts = []
  kinds = kinds_of(stages)
  labels = {name: stage_label(name) for name in stages}
  # Stages are compared on all kinds of any stage; a missing bar is a kind that was not measured.
  lazy = {}
  measured = False
  for name, stage in stages.items():
    lazy[name] = [entry(stage, 'lazy_ratio', kind) for kind in kinds]
    # A chart without a bar would say that nothing was lazy.
    measured = measured or any(value is not None for value in lazy[name])
  if measured:
    svg = plots.grouped_bars(
      'lazy', [kind_label(kind) for kind in kinds], lazy, labels, percent=True
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
  # The thoughts that any stage has, in the order of the first. Other programs may count others.
  seen: dict[str, None] = {}
  for counts in behaviours.values():
    seen.update(dict.fromkeys(counts))
  thoughts = list(seen)
  reflections = {name: [entry(stage, 'reflections_per_response')] for name, stage in stages.items()}
  # Thought types include reflections, which have a chart of their own only without them.
  if thoughts:
    series = {}
    for name, counts in behaviours.items():
      series[name] = [number(counts.get(thought)) for thought in thoughts]
    charts.append(
      _chart(
        'Thought types',
        "Times per response, counted by phrases (compare the paper's fig. 3).",
        plots.grouped_bars('behaviours', thoughts, series, labels, percent=False),
      )
    )
  elif any(values[0] is not None for values in reflections.values()):
    svg = plots.grouped_bars(
      'reflections', ['reflections per response'], reflections, labels, percent=False
    )
    charts.append(
      _chart('Reflections', 'How often a response turns back on its own reasoning.', svg)
    )
  return charts


def _points(rows: list[dict], field: str) -> list[tuple[float, float]]:
  return [
    # A step that was skipped has null in its row, and gives no point.
    (row['step'], row[field])
    for row in rows
    if number(row.get('step')) is not None and number(row.get(field)) is not None
  ]


def sft_charts(rows: list[dict]) -> list[dict[str, Any]]:
  """Draws charts over the steps of fine-tuning."""
  # A run that starts at the SFT model has no steps of fine-tuning.
  loss = _points(rows, 'loss')
  if not loss:
    return []
  svg = plots.curves('sft-loss', {'loss': loss}, colours=['sft'])
  return [_chart('Fine-tuning loss', 'Nats per trained token.', svg)]


def rl_charts(rows: list[dict]) -> list[dict[str, Any]]:
  """Draws charts over the steps of reinforcement learning."""
  charts = []

  def add(title: str, note: str, name: str, fields: dict[str, str], **options: Any) -> None:
    lines = {label: _points(rows, field) for field, label in fields.items()}
    # Which metrics a run logs depends on its estimator and its loss.
    lines = {label: points for label, points in lines.items() if points}
    if lines:
      charts.append(_chart(title, note, plots.curves(name, lines, **options)))

  add('Reward', 'Mean over the rollouts of a step.', 'rl-reward', {'reward': 'reward'})
  add('Entropy', 'Mean over generated tokens, in nats.', 'rl-entropy', {'entropy': 'entropy'})
  # The two kinds of silent groups mean opposite things: tasks too easy, and tasks too hard.
  right = _points(rows, 'all_right_fraction')
  wrong = _points(rows, 'all_wrong_fraction')
  title = 'Groups without variance'
  note = 'All rollouts of a group have one reward: GRPO learns nothing from them.'
  # Layers can be stacked only over the same steps. Otherwise their sum is drawn.
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
    # A logarithmic axis shows both norms, also if psi's part is small.
    log=True,
  )
  add(
    'Share of ψ',
    "Norm of ψ's part over that of the whole gradient. Most of it is noise: it does not say what ψ "
    'does.',
    'rl-share',
    {'psi_grad_share': 'share of norms'},
    percent=True,
  )
  add(
    'Direction of ψ',
    'Cosine between the gradient of ψ and that of GRPO, on one mini-batch of a measured step.',
    'rl-direction',
    {'psi_cosine': 'cosine'},
  )
  add('KL to the SFT model', 'Nats per token.', 'rl-kl', {'kl': 'KL'})
  return charts
