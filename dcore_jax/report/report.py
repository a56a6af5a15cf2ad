"""Writes `report.html`, one page that a person reads after a run. The page fetches nothing.

`python -m experiments.report --workdir=W` renders it again from the files of a run. If a part is
missing, as after a skipped stage, its section holds a note. Text that a model wrote is escaped by
Jinja; only our own charts are passed as markup.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.evaluate.trajectories import TRAJECTORIES_FILE, find_trajectories, read_trajectories
from dcore_jax.files import write_json_atomic
from dcore_jax.pages import render_page
from dcore_jax.report import charts, tables
from dcore_jax.report import traces as traces_lib
from dcore_jax.report.figures import stage_label
from dcore_jax.report.trace_page import PAGE_FILE, write_trace_page

TRACES_FILE = 'traces.json'
# Table 3 of the paper: Qwen3-8B on BFCL v3 (live to multi-turn) and tau-bench (retail, airline), in
# per cent.
PUBLISHED_COLUMNS = ('Live', 'Non-live', 'Relev.', 'Irrelev.', 'Multi-turn', 'Retail', 'Airline')
PUBLISHED_ROWS = (
  ('base', (78.5, 88.8, 77.8, 79.1, 33.0, 34.7, 23.2)),
  ('+ self-distillation', (82.5, 86.5, 66.7, 89.7, 57.5, 42.0, 31.2)),
  ('+ GRPO', (75.6, 85.4, 72.2, 84.5, 67.4, 49.2, 41.2)),
  ('+ DA-GRPO, α = 0.1', (82.3, 86.4, 77.8, 89.4, 63.8, 50.7, 44.4)),
)


def write_report(
  workdir: str | os.PathLike,
  summary: dict[str, Any],
  metrics: list[dict[str, Any]],
  traces: list[dict[str, Any]],
) -> pathlib.Path:
  """Writes `workdir/report.html` and, for rendering it again, the traces as `workdir/traces.json`.

  Where models were evaluated, `workdir/traces.html` holds all of their tasks.

  Args:
    summary: as `validate_summary` describes; two further fields are shown where present: `run`, a
      flat dict of what was run (config, model, device, ...), and per stage `behaviours`, {thought
      type: times per response} (fig. 3a).
    metrics: rows of stage 'sft' (loss) and 'rl' (reward, entropy, zero_variance_fraction,
      all_right_fraction, all_wrong_fraction, reflections, grad_norm, psi_grad_norm, psi_cosine,
      kl); those at hand are drawn.
    traces: {'query', 'kind', 'columns': [{'stage', 'id', 'messages': [{'role', 'content'}],
      'correct', 'lazy'}]}.

  Returns:
    the path of the page.
  """
  workdir = pathlib.Path(workdir)
  acted = {}
  if any(workdir.glob(f'evaluate_*/{TRAJECTORIES_FILE}')):
    for name, path in find_trajectories(workdir).items():
      acted[name] = read_trajectories(path)
  # Rendered first: a summary that cannot be shown must not leave new traces beside an old page.
  page = render_report(summary, metrics, traces, _places(acted))
  if any(acted.values()):
    write_trace_page(workdir / PAGE_FILE, acted, workdir.name)
  workdir.mkdir(parents=True, exist_ok=True)
  write_json_atomic(workdir / TRACES_FILE, traces)
  path = workdir / 'report.html'
  # Renamed into place, so that a browser never reloads half a page.
  beside = path.with_suffix('.partial')
  beside.write_text(page, encoding='utf-8')
  beside.replace(path)
  return path


def render_report(
  summary: dict[str, Any],
  metrics: list[dict[str, Any]],
  traces: list[dict[str, Any]],
  places: Mapping[tuple[str, Any], int] | None = None,
) -> str:
  """Returns the page as text.

  Args:
    summary, metrics, traces: see `write_report`.
    places: number of each trace on the page of all traces, by stage and id; this page links there.
  """
  places = places or {}
  # A file of another program may hold null for a stage.
  stages = {name: stage or {} for name, stage in (summary.get('stages') or {}).items()}
  # A summary keeps fewer curves than the metrics file, so it is the second choice.
  rl_rows = [row for row in metrics if row.get('stage') == 'rl'] or _rl_rows_of_summary(summary)
  return render_page(
    pathlib.Path(__file__).with_name('report.html.jinja'),
    headline=tables.headline(stages),
    lede=tables.lede(summary),
    run=summary.get('run') or {},
    export=summary.get('export'),
    stages=list(stages),
    stage_labels={name: stage_label(name) for name in stages},
    cards=tables.cards(summary, stages, rl_rows),
    accuracy=tables.accuracy_table(stages),
    changes=tables.changes(summary.get('changes')),
    habits=tables.habit_table(stages),
    suites=tables.suite_table(stages),
    stage_charts=charts.stage_charts(stages),
    funnel=tables.funnel(summary.get('distill')),
    sft_charts=charts.sft_charts([row for row in metrics if row.get('stage') == 'sft']),
    rl_charts=charts.rl_charts(rl_rows),
    held_out=tables.held_out((summary.get('rl') or {}).get('validation')),
    published_columns=PUBLISHED_COLUMNS,
    published_rows=PUBLISHED_ROWS,
    # Cut into segments here, so that the template only has to escape and colour them.
    traces=[traces_lib.trace(trace, places) for trace in traces],
    all_traces=PAGE_FILE,
    acted=len(places),
    seconds=tables.seconds(summary.get('seconds'), summary.get('compile_seconds')),
    phases=tables.phases(rl_rows),
  )


def _places(acted: Mapping[str, Sequence[dict[str, Any]]]) -> dict[tuple[str, Any], int]:
  """Numbers the traces as their page does: one source after the other."""
  keys = [(name, record['id']) for name, records in acted.items() for record in records]
  return {key: place for place, key in enumerate(keys)}


def _rl_rows_of_summary(summary: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the curves of a summary as rows, for a run whose metrics file is gone."""
  # `rl` also holds figures that are no curves, such as those of the prompts set aside.
  curves = {
    name: values
    for name, values in (summary.get('rl') or {}).items()
    if isinstance(values, (list, tuple))
  }
  # Curves of different lengths are drawn as far as each one goes.
  length = max(map(len, curves.values()), default=0)
  rows = []
  for step in range(length):
    row = {'step': step}
    for name, values in curves.items():
      if step < len(values):
        row[name] = values[step]
    rows.append(row)
  return rows
