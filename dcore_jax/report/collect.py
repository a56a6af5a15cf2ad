"""Collects what the stages of a run left in its work directory, for the summary and the report.

W/<folder>/result.json                the figures of a stage, see `stage_folders`
W/evaluate_<model>/trajectories.jsonl  every held-out task as it went
W/metrics.jsonl                       rows of the training steps
"""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dcore_jax.config import RunConfig
from dcore_jax.files import read_json
from dcore_jax.models.config import DecoderConfig
from dcore_jax.statistics import paired_difference
from dcore_jax.train.metrics import read_metrics

# Metrics of the RL steps whose curves the report draws.
_CURVES = (
  'zero_variance_fraction',
  'all_right_fraction',
  'all_wrong_fraction',
  'reward',
  'entropy',
  'reflections',
  'grad_norm',
  'psi_grad_norm',
  'psi_grad_share',
  'psi_cosine',
  'kl',
  'response_tokens',
  'logp_gap_mean',
)
# Kinds of tasks whose trajectories are worth reading: the model must plan, or must decline.
_TRACED_KINDS = ('sequential', 'parallel', 'irrelevant')
# Next to a task gained (1) or lost (-1) between the first and the last model: where the first one
# was lazy, a reader sees what the method is about.
_LAZY_WORTH = 0.5


def stage_folders(estimator: str) -> dict[str, str]:
  """Returns the folder of each stage's result.json, in the order in which stages are run.

  Args:
    estimator: names the trained model of the RL stage, `rl.estimator` of the config.
  """
  return {
    'evaluate_base': 'evaluate_base',
    'distill': 'distill',
    'sft': 'sft',
    'evaluate_sft': 'evaluate_sft',
    'rl': estimator,
    'evaluate_rl': f'evaluate_{estimator}',
    'export': 'export_result',
  }


def collect_summary(
  workdir: pathlib.Path, config: RunConfig, model: DecoderConfig
) -> dict[str, Any]:
  """Collects everything that the stages of a run have left, in the shape of `report.summary`.

  Args:
    workdir: the run's work directory.
    config: the run's config; its `name`, `seed` and `rl.estimator` are read.
    model: the architecture that was trained.
  """
  results = {}
  for stage, folder in stage_folders(config.rl.estimator).items():
    # A stage writes its result last, so that a file means a stage that has ended.
    path = workdir / folder / 'result.json'
    if path.exists():
      results[stage] = read_json(path)
  # A model is named after the stage that trained it, which is what a reader compares.
  models = {'base': 'evaluate_base', 'sft': 'evaluate_sft', config.rl.estimator: 'evaluate_rl'}
  measured = {name: results[stage] for name, stage in models.items() if stage in results}
  # A run without an export stage has trained, and has no directory to show.
  export = results.get('export')
  collected: dict[str, Any] = {
    'run': {
      'config': config.name,
      'seed': config.seed,
      'model': f'{model.to_hf()["model_type"]}, {model.param_count / 1e6:.2f} M parameters',
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'jax': jax.__version__,
    },
    'stages': measured,
    # Differences come with intervals, so that a reader sees which of them are chance.
    'changes': _changes(workdir, list(measured)),
    'seconds': {stage: result['seconds'] for stage, result in results.items()},
    # Results of earlier versions have none.
    'compile_seconds': {
      stage: result['compile_seconds']
      for stage, result in results.items()
      if 'compile_seconds' in result
    },
  }
  gathered = workdir / 'recipe' / 'result.json'
  if gathered.exists():
    collected['recipe'] = read_json(gathered)
  # A stage that has not been run is left out; times stand together under `seconds`.
  for stage in ('distill', 'sft'):
    if stage in results:
      collected[stage] = _without_seconds(results[stage])
  if 'rl' in results:
    collected['rl'] = _curves(workdir) | _without_seconds(results['rl'])
  collected['export'] = export['path'] if export else None
  return collected


def collect_traces(workdir: pathlib.Path, estimator: str, count: int) -> list[dict[str, Any]]:
  """Returns up to `count` held-out tasks, each with what every measured model made of it.

  Tasks that the first model got lazily wrong and the last one got right come first, one of each
  kind before a second one.
  """
  # A run may start from a model that was never measured: columns are what is there.
  acted = {}
  for name in ('base', 'sft', estimator):
    records = _trajectories(workdir, name)
    if records:
      acted[name] = records
  if not acted:
    return []
  # All models acted out the same tasks in the same order, so that lines belong together.
  tasks = [task for task in zip(*acted.values(), strict=True) if task[0]['kind'] in _TRACED_KINDS]
  # The sort is stable: equal tasks keep the order of the file, and pages do not change.
  tasks.sort(key=_worth_reading, reverse=True)
  firsts: list[Sequence[dict[str, Any]]] = []
  others: list[Sequence[dict[str, Any]]] = []
  seen = set()
  for task in tasks:
    kind = task[0]['kind']
    (others if kind in seen else firsts).append(task)
    seen.add(kind)
  return [_trace(list(acted), task) for task in (firsts + others)[:count]]


def _worth_reading(task: Sequence[dict[str, Any]]) -> float:
  first = task[0]
  return (task[-1]['correct'] - first['correct']) + _LAZY_WORTH * first['lazy']


def _trace(names: Sequence[str], task: Sequence[dict[str, Any]]) -> dict[str, Any]:
  columns = []
  for name, record in zip(names, task, strict=True):
    shown = {field: record[field] for field in ('messages', 'correct', 'lazy')}
    # By its id the page of all traces is linked to.
    columns.append({'stage': name, 'id': record.get('id')} | shown)
  return {'query': task[0]['query'], 'kind': task[0]['kind'], 'columns': columns}


def _changes(workdir: pathlib.Path, names: Sequence[str]) -> list[dict[str, Any]]:
  """Compares the accuracy of each measured model with the one before it, by kind of task.

  Every model is measured on the same tasks with the same random streams, which is what makes the
  differences paired.
  """
  acted = []
  for name in names:
    records = _trajectories(workdir, name)
    if records:
      acted.append((name, records))
  changes = []
  # With the stage between them missing, base and the estimator's model are neighbours.
  for (before, first), (after, second) in itertools.pairwise(acted):
    right: dict[str, list[tuple[bool, bool]]] = {}
    for one, other in zip(first, second, strict=True):
      # Lines of both files are of the same task, because tasks depend on the seed alone.
      right.setdefault(one['kind'], []).append((one['correct'], other['correct']))
    accuracy = {}
    for kind, pairs in right.items():
      accuracy[kind] = paired_difference(*zip(*pairs, strict=True), bounds=(0.0, 1.0))
    changes.append({'from': before, 'to': after, 'accuracy': accuracy})
  return changes


def _curves(workdir: pathlib.Path) -> dict[str, list[float | None]]:
  """Returns the metrics that any RL step has logged, one value a step."""
  rows = read_metrics(workdir, 'rl')
  curves = {}
  # Which figures a step logs depends on the estimator and on the objective.
  for name in _CURVES:
    if any(name in row for row in rows):
      curves[name] = [row.get(name) for row in rows]
  return curves


def _without_seconds(result: dict[str, Any]) -> dict[str, Any]:
  times = ('seconds', 'compile_seconds')
  return {name: value for name, value in result.items() if name not in times}


def _trajectories(workdir: pathlib.Path, name: str) -> list[dict[str, Any]]:
  """Reads the records of the evaluation of a model; [] without an evaluation."""
  path = workdir / f'evaluate_{name}' / 'trajectories.jsonl'
  # A model that was not evaluated has no trajectories.
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
