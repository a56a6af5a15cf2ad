"""Table 6: what the decomposer sees, from seeds to a fine-tuned model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dcore_jax.run.ablation import runs, tables
from dcore_jax.run.ablation.reinforcement import cell
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite


@dataclasses.dataclass(frozen=True)
class Decomposer:
  """One row of Table 6.

  Attributes:
    name: what the setting's folder is called.
    reference: the calls that the decomposer sees, `distill.reference`.
    examples: worked decompositions in its prompt.
    published: the paper's row: decomposition success and tau-bench overall of Qwen3-8B (%).
  """

  name: str
  reference: str
  examples: int
  published: tuple[float, float]


DECOMPOSITION = (
  Decomposer('no_reference', reference='hidden', examples=0, published=(73.8, 20.3)),
  Decomposer('reference', reference='shown', examples=0, published=(89.1, 33.8)),
  Decomposer('reference_examples', reference='shown', examples=2, published=(93.2, 37.1)),
  Decomposer('pseudo_labels', reference='pseudo', examples=2, published=(92.8, 29.6)),
)


def run_decomposer(job: Job) -> list[dict[str, Any]]:
  """Distils, fine-tunes and measures at one setting and seed."""
  setting = next(each for each in DECOMPOSITION if each.name == job.name)
  summary = runs.run_stages(
    job.config,
    # A folder for each setting and seed, so that a finished run is not repeated.
    job.folder,
    seed=job.seed,
    stages=('distill', 'sft', 'evaluate_sft'),
    distill={'reference': setting.reference, 'examples': setting.examples},
  )
  figures = _figures(summary)
  return [
    {
      'setting': setting.name,
      **job.identity,
      'figures': figures,
      'dropped': summary['distill']['dropped'],
    }
  ]


def _figures(summary: dict[str, Any]) -> dict[str, float]:
  """What a run's rows are like, and how well the model does that was trained on them."""
  made = summary['distill']
  names = ('success_rate', 'success_rate_all', 'decomposition_rate', 'rows')
  figures = {name: made[name] for name in names}
  # Only pseudo-labels can differ from the reference calls.
  if 'labels' in made:
    figures['label_agreement'] = made['labels']['agree'] / made['labels']['seeds']
  # What counts in the end is the model that the rows made, and not the rows.
  return figures | runs.model_figures(summary['stages']['sft'])


def decomposition_table(records: Sequence[dict[str, Any]]) -> list[tables.Row]:
  """A row a setting: means with intervals over runs, beside the paper's."""
  published = {}
  for setting in DECOMPOSITION:
    success, tau = setting.published
    published[setting.name] = {'success_percent': success, 'tau_percent': tau}
  names = [setting.name for setting in DECOMPOSITION]
  table = tables.make_table(
    names, records, against=dict.fromkeys(names[1:], names[0]), published=published
  )
  by_name = {setting.name: setting for setting in DECOMPOSITION}
  for row in table:
    setting = by_name[row['setting']]
    row |= {'reference': setting.reference, 'examples': setting.examples}
  return table


def decomposition_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether seeing the reference makes more decompositions succeed, and a better model."""
  claims = []
  for name in ('success_rate', 'accuracy'):
    found = tables.difference_of(table, 'reference_examples', name)
    claims.append(tables.Claimed(f'{name}, per cent', found, 1, 100))
  return tables.verdict('the reference in view helps', claims)


def format_decomposition(content: dict[str, Any]) -> str:
  """Returns the suite's table as lines of text."""
  columns = (
    'success_rate',
    'success_rate_all',
    'accuracy',
    'accuracy_sequential',
    'accuracy_parallel',
    'accuracy_multi_turn',
  )
  names = [column.removeprefix('accuracy_').rjust(30) for column in columns]
  lines = ['setting'.ljust(20) + ''.join(names) + 'paper: success, tau'.rjust(24)]
  for row in content['table']:
    line = row['setting'].ljust(20)
    for column in columns:
      line += cell(row, row['figures'][column], 1, 100).rjust(30)
    published = row['published']
    paper = f'{published["success_percent"]}, {published["tau_percent"]}'
    lines.append(line + paper.rjust(24))
  lines.append("in brackets: 95 % intervals over runs; all figures but the paper's in per cent")
  return '\n'.join(lines)


SUITE = Suite(
  jobs=tuple(setting.name for setting in DECOMPOSITION),
  run=run_decomposer,
  table=decomposition_table,
  verdict=decomposition_verdict,
  text=format_decomposition,
  panels=('success_rate', 'accuracy', 'accuracy_sequential', 'accuracy_parallel'),
  # The rows of Table 6 differ by less than two seeds of the organism do.
  seeds=3,
)
