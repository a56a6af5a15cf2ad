"""Figures 3a, 3c, 3d and 7a: how models think, and how they do as subtasks add up.

behaviours    decomposition, reflection, verification and deduction a response, by the markers of
              `evaluate.behaviours`, before and after training
composition   accuracy against the number of composed subtasks: the base model by itself, the base
              model prompted to decompose first, and the self-distilled model
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.distill.stage import run_distillation
from dcore_jax.evaluate.behaviour.labels import BEHAVIOURS, behaviour_counts
from dcore_jax.evaluate.held_out import held_out_tasks
from dcore_jax.files import read_json_lines
from dcore_jax.overrides import overlay
from dcore_jax.run.ablation import runs, tables
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite

_MODELS = ('base', 'sft', 'rl')


# --- behaviours ---


def run_behaviours(job: Job) -> list[dict[str, Any]]:
  """Trains from the base to RL, and counts behaviours in what each model said when measured."""
  config = runs.reseeded(job.config, job.seed)
  stages = ('evaluate_base', 'distill', 'sft', 'evaluate_sft', 'rl', 'evaluate_rl')
  runs.run_stages(config, job.folder, stages=stages)
  found = []
  for setting, model in zip(_MODELS, ('base', 'sft', config.rl.estimator), strict=True):
    records = read_json_lines(job.folder / f'evaluate_{model}' / 'trajectories.jsonl')
    figures = behaviour_figures(records)
    found.append({'setting': setting, **job.identity, 'figures': figures})
  return found


def behaviour_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Computes how often a response announces each behaviour, over all responses of the tasks."""
  texts = []
  for record in records:
    texts += [m['content'] for m in record['messages'] if m['role'] == 'assistant']
  counts = behaviour_counts(texts)
  return {name: float(counts[name].mean()) if texts else 0.0 for name in BEHAVIOURS}


def behaviour_table(records: Sequence[dict[str, Any]]) -> list[tables.Row]:
  """A row a model."""
  return tables.make_table(_MODELS, records, against={'sft': 'base', 'rl': 'sft'}, published={})


def behaviour_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether self-distillation makes a model decompose more and reflect less (3a, 7a)."""
  claims = [
    tables.Claimed(
      'decompositions a response, after less before',
      tables.difference_of(table, 'sft', 'decomposition'),
      1,
    ),
    tables.Claimed('reflections a response', tables.difference_of(table, 'sft', 'reflection'), -1),
  ]
  return tables.verdict('self-distillation puts decomposition in the place of reflection', claims)


BEHAVIOURS_SUITE = Suite(
  jobs=('models',),
  run=run_behaviours,
  table=behaviour_table,
  verdict=behaviour_verdict,
  panels=BEHAVIOURS,
)


# --- composition ---

_COMPOSED = ('single', 'sequential', 'parallel')  # kinds of one request with so many calls
_WAYS = ('direct', 'prompted', 'sft')


def run_composition(job: Job) -> list[dict[str, Any]]:
  """Measures the base, the prompted base and the self-distilled model by number of subtasks.

  Prompting is Algorithm 1 without the reference: the base model splits each held-out request,
  solves one subtask after the other, and the calls must be the reference's. The other two act the
  task out and are judged by the state that they leave, which is milder.
  """
  config = runs.reseeded(job.config, job.seed)
  stages = ('evaluate_base', 'distill', 'sft', 'evaluate_sft')
  pipeline = runs.Pipeline(overlay(config, {'stages': stages}), job.folder)
  pipeline.run()
  tasks = held_out_tasks(pipeline.config, pipeline.world)
  verdicts = {
    'direct': _acted(job.folder / 'evaluate_base', tasks),
    'prompted': _prompted(pipeline, tasks, job.folder / 'prompted'),
    'sft': _acted(job.folder / 'evaluate_sft', tasks),
  }
  found = []
  for setting in _WAYS:
    figures = composition_figures(verdicts[setting])
    found.append({'setting': setting, **job.identity, 'figures': figures})
  return found


def _acted(folder: pathlib.Path, tasks: Mapping[str, Sequence[Any]]) -> list[tuple[int, bool]]:
  """(number of reference calls, whether it was right) of each task that was acted out."""
  steps = {task.id: task.steps for kind in _COMPOSED for task in tasks.get(kind, ())}
  verdicts = []
  for record in read_json_lines(folder / 'trajectories.jsonl'):
    if record['id'] in steps:
      verdicts.append((steps[record['id']], bool(record['correct'])))
  return verdicts


def _prompted(
  pipeline: runs.Pipeline, tasks: Mapping[str, Sequence[Any]], folder: pathlib.Path
) -> list[tuple[int, bool]]:
  """The same of the base model that decomposes first, and does not see the reference."""
  seeds = []
  for kind in _COMPOSED:
    for task in tasks.get(kind, ()):
      seeds += task_seeds(pipeline.world, task)
  blind = overlay(pipeline.config, {'distill': {'reference': 'hidden', 'examples': 0}})
  run_distillation(blind, folder, seeds, pipeline.models.backend)
  steps = {seed.id: len(seed.calls) for seed in seeds}
  verdicts = []
  for path in sorted(folder.glob('outcomes-*.jsonl')):
    for record in read_json_lines(path):
      verdicts.append((steps[record['seed']], not record['reason']))
  return verdicts


def composition_figures(verdicts: Sequence[tuple[int, bool]]) -> dict[str, float]:
  """Computes accuracy by number of subtasks, of all with several, and its slope a subtask."""
  by_steps = collections.defaultdict(list)
  for steps, right in verdicts:
    by_steps[steps].append(right)
  figures = {f'accuracy_{steps}': float(np.mean(by_steps[steps])) for steps in sorted(by_steps)}
  several = [right for steps, right in verdicts if steps > 1]
  if several:
    figures['accuracy_several'] = float(np.mean(several))
  if len(by_steps) > 1:
    # Tasks and not numbers of subtasks are fitted, so that rare numbers weigh little.
    slope, _ = np.polyfit(*np.array(verdicts, float).T, 1)
    figures['slope'] = float(slope)
  return figures


def composition_table(records: Sequence[dict[str, Any]]) -> list[tables.Row]:
  """A row a way of answering."""
  against = {'prompted': 'direct', 'sft': 'direct'}
  return tables.make_table(_WAYS, records, against=against, published={})


def composition_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether composing hurts, and prompting to decompose helps without training (3c, 3d)."""
  direct = tables.row_of(table, 'direct')
  claims = [
    tables.Claimed(
      'points of accuracy a subtask', direct and direct['figures'].get('slope'), -1, 100
    ),
    tables.Claimed(
      'prompted less direct, several subtasks, points',
      tables.difference_of(table, 'prompted', 'accuracy_several'),
      1,
      100,
    ),
  ]
  return tables.verdict('accuracy falls as subtasks add up, and prompting mends it', claims)


COMPOSITION_SUITE = Suite(
  jobs=('models',),
  run=run_composition,
  table=composition_table,
  verdict=composition_verdict,
  panels=('accuracy_1', 'accuracy_2', 'accuracy_3', 'accuracy_4', 'accuracy_several', 'slope'),
)
