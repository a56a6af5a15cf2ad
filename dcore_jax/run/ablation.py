"""Sweeps of the paper at the organism's scale, and of what it leaves open.

alpha_delta     Table 3 and figure 6: DA-GRPO at four settings and plain GRPO, from one SFT checkpoint
psi             should psi see the reward, act on reflective words alone, adapt its weight, or give way to a KL term
decomposition   Table 6: what the decomposer sees, from seeds to a fine-tuned model
"""

import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import scipy.stats

from dcore_jax.evaluate.lazy_reasoning import LOGGED_WORDS
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.learn.advantages import uses_entropy
from dcore_jax.progress import stage
from dcore_jax.run.pipeline import Pipeline
from dcore_jax.statistics import format_difference, paired_difference, standard_error
from dcore_jax.train.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Setting:
  """One point of the sweep. `alpha` and `delta` None: those of the config, where the estimator has any. `published` is its row of
  the paper's Table 3, Qwen3-8B: live, multi-turn, retail, airline (%). `changes` are further fields of the config's section `rl`,
  summed up in the `note`."""

  estimator: str
  alpha: float | None
  delta: float | None
  published: tuple[float, ...] = ()
  note: str = ''
  changes: tuple[tuple[str, Any], ...] = ()

  @property
  def name(self) -> str:
    point = (
      self.estimator
      if self.alpha is None
      else f'{self.estimator}_alpha{self.alpha:g}_delta{self.delta:g}'
    )
    return f'{point}_{self.note}' if self.note else point


ALPHA_DELTA = (
  Setting('grpo', None, None, (75.6, 67.4, 49.2, 41.2)),
  Setting('da_grpo', 0.01, 0.5, (77.0, 67.9, 52.5, 38.8)),
  Setting('da_grpo', 0.1, 0.5, (82.3, 63.8, 50.7, 44.4)),
  Setting('da_grpo', 0.4, 0.5, (78.8, 59.9, 54.6, 36.8)),
  Setting('da_grpo', 1.0, 1.0, (76.4, 62.1, 47.9, 39.6)),
)
PSI = (
  Setting('grpo', None, None),
  Setting('da_grpo', None, None),
  Setting('da_grpo', None, None, note='ignore_wrong', changes=(('psi_when_wrong', 'ignore'),)),
  Setting('da_grpo', None, None, note='punish_wrong', changes=(('psi_when_wrong', 'punish'),)),
  Setting('da_grpo', None, None, note='reflective', changes=(('psi_words', LOGGED_WORDS),)),
  # At the default rate alpha would at most double in the eight steps of a run, and at alpha = 1 psi has a fifth of the
  # organism's gradient.
  Setting(
    'da_grpo',
    None,
    None,
    note='adaptive',
    changes=(
      ('alpha_measure', 'psi_share'),
      ('alpha_target', 0.3),
      ('alpha_rate', 0.5),
      ('alpha_high', 10.0),
    ),
  ),
  *(
    Setting('grpo', None, None, note=f'uniform_kl_{c:g}', changes=(('uniform_kl', c),))
    for c in (0.001, 0.01)
  ),
)
RL_SUITES = {'alpha_delta': ALPHA_DELTA, 'psi': PSI}


@dataclasses.dataclass(frozen=True)
class Decomposer:
  """One row of Table 6. `published` is the paper's: decomposition success and tau-bench overall of Qwen3-8B (%)."""

  name: str
  reference: str
  examples: int
  published: tuple[float, float]


DECOMPOSITION = (
  Decomposer('no_reference', 'hidden', 0, (73.8, 20.3)),
  Decomposer('reference', 'shown', 0, (89.1, 33.8)),
  Decomposer('reference_examples', 'shown', 2, (93.2, 37.1)),
  Decomposer('pseudo_labels', 'pseudo', 2, (92.8, 29.6)),
)
SUITES = (*RL_SUITES, 'decomposition')
SEEDS = {
  'alpha_delta': 1,
  'psi': 1,
  'decomposition': 3,
}  # repetitions: Table 6 is nothing without intervals
_LAST = 0.25  # share of the steps whose mean is "at the end"
_CURVES = (
  'reward',
  'reflections',
  'entropy',
  'alpha',
  'zero_variance_fraction',
  'grad_norm',
  'psi_grad_norm',
  'psi_grad_share',
  'response_tokens',
)


def run_suite(
  suite: str,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  seeds: int,
  sft_run: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Runs what is not there yet and writes `workdir`/<suite>.json -> its content.

  Args:
    suite: one of SUITES.
    config: pipeline config; at every setting and seed its stages `rl` and `evaluate_rl` are run, or `distill` to
      `evaluate_sft`.
    workdir: results, one folder a setting and seed; a second call resumes.
    seeds: repetitions of each setting, with other prompt orders and samples, or with other seeds of everything.
    sft_run: of an RL suite: work directory of a finished run to start from; without it the stages up to SFT are run in
      `workdir`/start.

  Raises:
    ValueError: an unknown suite, no seeds, no steps or nothing set aside to compare settings on, a start without an SFT
      checkpoint, or with another one than `workdir` began with.
  """
  if suite not in SUITES:
    raise ValueError(f'unknown suite {suite!r}; expected one of {SUITES}')
  if seeds < 1:
    raise ValueError(f'seeds = {seeds}: at least one is needed')
  if suite == 'decomposition':
    if sft_run:
      raise ValueError('the suite decomposition starts from the base model, not from --sft_run')
    return _run_decomposition(config, workdir, seeds)
  for field in ('steps', 'validation'):
    if config.rl[field] < 1:
      raise ValueError(
        f'rl.{field} = {config.rl[field]}: settings are compared by what their steps do to prompts set aside'
      )
  start = sft_run or workdir / 'start'
  if sft_run is None:
    first = config.copy_and_resolve_references()
    first.stages = ('distill', 'sft', 'evaluate_sft')
    Pipeline(first, start).run()
  if not (start / 'sft' / 'config.json').exists():
    raise ValueError(f'{str(start)!r} holds no SFT checkpoint')
  _claim(workdir, start / 'sft')
  runs = []
  for seed in range(seeds):
    for setting in RL_SUITES[suite]:
      with stage(f'{setting.name}, seed {seed}'):
        runs.append(_run_one(setting, seed, config, workdir / setting.name / f'seed{seed}', start))
      # Written after every run: a notebook can look while the sweep goes on.
      content = {
        'suite': suite,
        'sft': _sft_point(start),
        'runs': runs,
        'table': _table(RL_SUITES[suite], runs),
      }
      write_json_atomic(workdir / f'{suite}.json', content)
  return content


def _claim(workdir: pathlib.Path, model: pathlib.Path) -> None:
  """Notes which weights a sweep starts from, or checks that they are the ones it began with."""
  digest = hashlib.sha256()
  for part in sorted(model.glob('model*.safetensors')):  # more than one from 5 GB on
    with part.open('rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  mine, path = digest.hexdigest(), workdir / 'start.json'
  if path.exists() and read_json(path)['sha256'] != mine:
    raise ValueError(
      f'{str(workdir)!r} holds runs that started from other weights than {str(model)!r}; name another --workdir'
    )
  write_json_atomic(path, {'sha256': mine})


def _run_one(
  setting: Setting,
  seed: int,
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  start: pathlib.Path,
) -> dict[str, Any]:
  mine = config.copy_and_resolve_references()
  mine.stages = ('rl', 'evaluate_rl')
  mine.rl.estimator, mine.rl.seed = setting.estimator, seed
  if setting.alpha is not None:
    mine.rl.alpha, mine.rl.delta = setting.alpha, setting.delta
  if not uses_entropy(
    setting.estimator
  ):  # a config may say how psi acts, which is an error of an estimator without it
    mine.rl.update(dict(psi_words=(), alpha_measure=''))
  mine.rl.update(dict(setting.changes))
  if not (folder / 'sft').exists():
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(start / 'sft', folder / 'sft.tmp', dirs_exist_ok=True)
    (folder / 'sft.tmp').rename(folder / 'sft')
  summary = Pipeline(mine, folder).run()
  rows = read_metrics(folder, 'rl')
  curves = {name: [row[name] for row in rows] for name in _CURVES if name in rows[0]}
  evaluated = summary['stages'][setting.estimator]
  alpha, delta = (mine.rl.alpha, mine.rl.delta) if uses_entropy(setting.estimator) else (None, None)
  return {
    'setting': setting.name,
    'estimator': setting.estimator,
    'alpha': alpha,
    'delta': delta,
    'seed': seed,
    'curves': curves,
    'end': {name: _end(values) for name, values in curves.items()},
    'accuracy': evaluated['accuracy'],
    'evaluated_reflections': evaluated['reflections_per_response'],
    'validation': summary['rl']['validation'],
  }


def _end(values: Sequence[float | None]) -> float | None:
  """Mean of the last steps; those that were skipped have no numbers."""
  known = [value for value in values[-max(1, round(len(values) * _LAST)) :] if value is not None]
  return float(np.mean(known)) if known else None


def _sft_point(start: pathlib.Path) -> dict[str, Any] | None:
  path = start / 'evaluate_sft' / 'result.json'
  if not path.exists():
    return None
  result = read_json(path)
  return {
    'accuracy': result['accuracy'],
    'evaluated_reflections': result['reflections_per_response'],
  }


def _table(settings: Sequence[Setting], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Mean and standard error over the seeds of each setting, `against_first` setting of the suite, beside the paper's row."""
  table = []
  first = [run for run in runs if run['setting'] == settings[0].name]
  for setting in settings:
    mine = [run for run in runs if run['setting'] == setting.name]
    if not mine:
      continue
    figures = {name: [run['end'][name] for run in mine] for name in mine[0]['end']}
    figures |= {
      f'accuracy_{kind}': [run['accuracy'][kind] for run in mine] for kind in mine[0]['accuracy']
    }
    for name in ('reward', 'reflections'):
      figures[f'validation_{name}'] = [run['validation']['after'][name] for run in mine]
    figures['evaluated_reflections'] = [run['evaluated_reflections'] for run in mine]
    described = {
      name: {'mean': float(np.mean(known)), 'standard_error': standard_error(known)}
      for name, values in figures.items()
      if (known := [value for value in values if value is not None])
    }
    table.append(
      {
        'setting': setting.name,
        'estimator': setting.estimator,
        'alpha': mine[0]['alpha'],
        'delta': mine[0]['delta'],
        'seeds': len(mine),
        'figures': described,
        'against_first': _contrast(first, mine),
        'published': dict(zip(('live', 'multi_turn', 'retail', 'airline'), setting.published)),
      }
    )
  return table


def _contrast(
  first: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
  """How the policies of two settings differ on the prompts set aside, seed by seed: with one seed both answer the same prompts,
  drawn from the same random streams. The standard error is over the seeds; of one seed, which says nothing of others, over its
  prompts."""
  result = {}
  for name in mine[0]['validation']['by_prompt']['after']:
    after = lambda run, name=name: run['validation']['by_prompt']['after'][name]
    by_seed = [paired_difference(after(a), after(b)) for a, b in zip(first, mine)]
    differences = [pair['difference'] for pair in by_seed]
    result[name] = (
      by_seed[0] if len(by_seed) == 1 else paired_difference([0.0] * len(differences), differences)
    )
  return result


def _run_decomposition(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, seeds: int
) -> dict[str, Any]:
  runs = []
  for seed in range(seeds):
    for setting in DECOMPOSITION:
      mine = config.copy_and_resolve_references()
      mine.stages, mine.seed = ('distill', 'sft', 'evaluate_sft'), seed
      mine.distill.reference, mine.distill.examples = setting.reference, setting.examples
      with stage(f'{setting.name}, seed {seed}'):
        summary = Pipeline(mine, workdir / setting.name / f'seed{seed}').run()
      made = summary['distill']
      figures = {
        name: made[name]
        for name in ('success_rate', 'success_rate_all', 'decomposition_rate', 'rows')
      }
      if 'labels' in made:
        figures['label_agreement'] = made['labels']['agree'] / made['labels']['seeds']
      accuracy = summary['stages']['sft']['accuracy']
      figures |= {f'accuracy_{kind}': value for kind, value in accuracy.items()}
      figures['accuracy'] = float(np.mean(list(accuracy.values())))
      runs.append(
        {'setting': setting.name, 'seed': seed, 'figures': figures, 'dropped': made['dropped']}
      )
      content = {'suite': 'decomposition', 'runs': runs, 'table': _decomposition_table(runs)}
      write_json_atomic(workdir / 'decomposition.json', content)
  return content


def _decomposition_table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Mean and half the width of its 95 % interval over the seeds of each setting, beside the paper's row."""
  table = []
  for setting in DECOMPOSITION:
    mine = [run['figures'] for run in runs if run['setting'] == setting.name]
    if mine:
      columns = {name: [figures[name] for figures in mine] for name in mine[0]}
      table.append(
        {
          'setting': setting.name,
          'reference': setting.reference,
          'examples': setting.examples,
          'seeds': len(mine),
          'figures': {
            name: {'mean': float(np.mean(v)), 'half_width': _half_width(v)}
            for name, v in columns.items()
          },
          'published': dict(zip(('success_percent', 'tau_percent'), setting.published)),
        }
      )
  return table


def _half_width(values: Sequence[float]) -> float | None:
  """Of the 95 % interval of a mean, by Student's t; None for a single value."""
  error = standard_error(values)
  return None if error is None else float(scipy.stats.t.ppf(0.975, len(values) - 1) * error)


def format_table(content: dict[str, Any]) -> str:
  """The table for a terminal."""
  if content['suite'] == 'decomposition':
    return _format_decomposition(content['table'])
  columns = (
    'validation_reward',
    'validation_reflections',
    'entropy',
    'psi_grad_norm',
    'grad_norm',
    'accuracy_sequential',
    'accuracy_parallel',
    'accuracy_single',
  )
  contrasts = ('reward', 'right_fraction', 'reflections')
  names = [c.removeprefix('accuracy_').removeprefix('validation_') for c in columns] + [
    f'{c}, change' for c in contrasts
  ]
  lines = ['setting'.ljust(40) + ''.join(name.rjust(24) for name in names)]
  for row in content['table']:
    cells = [row['figures'].get(c) for c in columns]
    shown = [
      '-'
      if c is None
      else f'{c["mean"]:.3g}' + (f' ± {c["standard_error"]:.2g}' if c['standard_error'] else '')
      for c in cells
    ]
    shown += [format_difference(row['against_first'][c]) for c in contrasts]
    lines.append(row['setting'].ljust(40) + ''.join(text.rjust(24) for text in shown))
  lines.append(
    f'change: against {content["table"][0]["setting"]}, on the prompts set aside; ±: one standard error, over seeds '
    'or, of one seed, over prompts'
  )
  return '\n'.join(lines)


def _format_decomposition(table: list[dict[str, Any]]) -> str:
  columns = (
    'success_rate',
    'success_rate_all',
    'accuracy',
    'accuracy_sequential',
    'accuracy_parallel',
    'accuracy_multi_turn',
  )
  names = [column.removeprefix('accuracy_').rjust(18) for column in columns]
  lines = ['setting'.ljust(20) + ''.join(names) + 'paper: success, tau'.rjust(24)]
  for row in table:
    cells = [row['figures'][c] for c in columns]
    shown = [
      f'{100 * c["mean"]:.1f}'
      + ('' if c['half_width'] is None else f' +- {100 * c["half_width"]:.1f}')
      for c in cells
    ]
    published = row['published']
    lines.append(
      row['setting'].ljust(20)
      + ''.join(text.rjust(18) for text in shown)
      + f'{published["success_percent"]}, {published["tau_percent"]}'.rjust(24)
    )
  return '\n'.join(lines)
