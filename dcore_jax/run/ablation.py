"""Sweeps of the paper at the organism's scale, and of what it leaves open.

alpha_delta     Table 3 and figure 6: DA-GRPO at four settings and plain GRPO, from one SFT
                checkpoint
psi             should psi see the reward, act on reflective words alone, adapt its weight, or give
                way to a KL term
decomposition   Table 6: what the decomposer sees, from seeds to a fine-tuned model
"""

import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from dcore_jax.claims import claim
from dcore_jax.config import RunConfig
from dcore_jax.evaluate.lazy_reasoning import LOGGED_WORDS
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.learn.advantages import uses_entropy
from dcore_jax.learn.rewards import BOUNDS as REWARDS
from dcore_jax.overrides import overlay
from dcore_jax.progress import stage
from dcore_jax.run.config import read_config
from dcore_jax.run.pipeline import Pipeline
from dcore_jax.statistics import RUNS, estimate_mean, format_estimate, paired_difference
from dcore_jax.train.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Setting:
  """One point of a sweep over reinforcement.

  Attributes:
    estimator: the advantage estimator, `rl.estimator`.
    alpha: weight of psi; None: the config's, where the estimator has any.
    delta: bound of psi, nats; None: the config's.
    published: its row of the paper's Table 3, Qwen3-8B: live, multi-turn, retail, airline (%).
    note: sums up `changes` in the setting's name.
    changes: further fields of the config's section `rl`.
  """

  estimator: str
  alpha: float | None = None
  delta: float | None = None
  published: tuple[float, ...] = ()
  note: str = ''
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """What the setting's folder is called."""
    name = self.estimator
    if self.alpha is not None:
      name += f'_alpha{self.alpha:g}_delta{self.delta:g}'
    if self.note:
      name += f'_{self.note}'
    return name


ALPHA_DELTA = (
  Setting('grpo', published=(75.6, 67.4, 49.2, 41.2)),
  Setting('da_grpo', alpha=0.01, delta=0.5, published=(77.0, 67.9, 52.5, 38.8)),
  Setting('da_grpo', alpha=0.1, delta=0.5, published=(82.3, 63.8, 50.7, 44.4)),
  Setting('da_grpo', alpha=0.4, delta=0.5, published=(78.8, 59.9, 54.6, 36.8)),
  Setting('da_grpo', alpha=1.0, delta=1.0, published=(76.4, 62.1, 47.9, 39.6)),
)
# The default alpha_rate would at most double alpha in the eight steps of a run, and even at
# alpha = 1 psi makes up only a fifth of the organism's gradient: hence a faster rate, and a higher
# bound.
_ADAPTIVE = {
  'alpha_measure': 'psi_share',
  'alpha_target': 0.3,
  'alpha_rate': 0.5,
  'alpha_high': 10.0,
}
# What the paper leaves open about psi: what it sees (the reward, reflective words alone), its
# weight, and whether a KL term would keep as much diversity.
PSI = (
  Setting('grpo'),
  Setting('da_grpo'),
  Setting('da_grpo', note='ignore_wrong', changes={'psi_when_wrong': 'ignore'}),
  Setting('da_grpo', note='punish_wrong', changes={'psi_when_wrong': 'punish'}),
  Setting('da_grpo', note='reflective', changes={'psi_words': LOGGED_WORDS}),
  Setting('da_grpo', note='adaptive', changes=_ADAPTIVE),
  Setting('grpo', note='uniform_kl_0.001', changes={'uniform_kl': 0.001}),
  Setting('grpo', note='uniform_kl_0.01', changes={'uniform_kl': 0.01}),
)
RL_SUITES = {'alpha_delta': ALPHA_DELTA, 'psi': PSI}


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
SUITES = (*RL_SUITES, 'decomposition')
# Repetitions of every setting. The rows of Table 6 differ by less than two seeds of the organism
# do, so that they say nothing without intervals.
SEEDS = {'alpha_delta': 1, 'psi': 1, 'decomposition': 3}
_PUBLISHED = ('live', 'multi_turn', 'retail', 'airline')  # columns of Table 3 that are compared
_LAST = 0.25  # share of the steps whose mean stands for the end of a curve
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
  config: ml_collections.ConfigDict | RunConfig,
  workdir: pathlib.Path,
  *,
  seeds: int,
  sft_run: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Runs what is not there yet, writes `workdir`/<suite>.json and returns its content.

  Args:
    suite: one of SUITES.
    config: pipeline config. At every setting and seed its stages `rl` and `evaluate_rl` are run,
      or `distill` to `evaluate_sft` for the suite decomposition.
    workdir: results, one folder a setting and seed; a second call resumes.
    seeds: repetitions of each setting, with other prompt orders and samples, or with other seeds
      of everything.
    sft_run: of an RL suite: work directory of a finished run to start from; without it the stages
      up to SFT are run in `workdir`/start.

  Raises:
    ValueError: an unknown suite, no seeds, no steps or nothing set aside to compare settings on,
      a start without an SFT checkpoint, or with another one than `workdir` began with.
  """
  # Checked as a config file is, before any setting is run.
  config = read_config(config)
  if suite not in SUITES:
    raise ValueError(f'unknown suite {suite!r}; expected one of {SUITES}')
  if seeds < 1:
    raise ValueError(f'seeds = {seeds}: at least one is needed')
  if suite == 'decomposition':
    # This suite compares ways of distilling, so a finished SFT checkpoint cannot be its start.
    if sft_run:
      raise ValueError('the suite decomposition starts from the base model, not from --sft_run')
    return _run_decomposition(config, workdir, seeds)
  # Without steps, or without prompts set aside, the table of the sweep would have empty columns.
  for field, value in (('steps', config.rl.steps), ('validation', config.rl.validation)):
    if value < 1:
      raise ValueError(
        f'rl.{field} = {value}: settings are compared by what their steps do to prompts set aside'
      )
  # One start for all settings: differences then come from reinforcement alone.
  start = _start(config, workdir, sft_run)
  settings = RL_SUITES[suite]
  runs = []
  # All settings at one seed before the next seed: a sweep that is stopped early can be compared.
  for seed in range(seeds):
    for setting in settings:
      with stage(f'{setting.name}, seed {seed}'):
        runs.append(_run_one(setting, seed, config, workdir / setting.name / f'seed{seed}', start))
      # Written after every run: a notebook can look while the sweep goes on.
      content = {
        'suite': suite,
        'sft': _sft_point(start),
        'runs': runs,
        'table': compare_settings(settings, runs),
      }
      write_json_atomic(workdir / f'{suite}.json', content)
  return content


# --- reinforcement ---


def _start(config: RunConfig, workdir: pathlib.Path, sft_run: pathlib.Path | None) -> pathlib.Path:
  """The work directory whose SFT checkpoint all settings start from, made where none is given."""
  start = sft_run or workdir / 'start'
  if sft_run is None:
    # The SFT model is measured once here, for the point from which all settings start.
    Pipeline(overlay(config, {'stages': ('distill', 'sft', 'evaluate_sft')}), start).run()
  model = start / 'sft'
  if not (model / 'config.json').exists():
    raise ValueError(f'{str(start)!r} holds no SFT checkpoint')
  # The weights and not the path: a start that was trained anew in its place is another one.
  digest = hashlib.sha256()
  # Checkpoints of more than 5 GB lie in several files.
  for part in sorted(model.glob('model*.safetensors')):
    with part.open('rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  complaint = f'holds runs that started from other weights than {str(model)!r}, by their'
  claim(workdir / 'start.json', {'sha256': digest.hexdigest()}, complaint)
  return start


def _run_one(
  setting: Setting,
  seed: int,
  config: RunConfig,
  folder: pathlib.Path,
  start: pathlib.Path,
) -> dict[str, Any]:
  """Reinforces at one setting and seed in `folder`; returns what the suite's file says of it."""
  changes = {'estimator': setting.estimator, 'seed': seed}
  if setting.alpha is not None:
    changes |= {'alpha': setting.alpha, 'delta': setting.delta}
  has_psi = uses_entropy(setting.estimator)
  if not has_psi:
    # The config may say how psi acts, which is an error of an estimator without it.
    changes |= {'psi_words': (), 'alpha_measure': ''}
  # A setting's own fields come last, since they are what the suite varies.
  changes |= setting.changes
  mine = overlay(config, {'stages': ('rl', 'evaluate_rl'), 'rl': changes})
  if not (folder / 'sft').exists():
    # Copied beside its place and renamed: a half copied checkpoint must not look like a whole one.
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(start / 'sft', folder / 'sft.tmp', dirs_exist_ok=True)
    (folder / 'sft.tmp').rename(folder / 'sft')
  summary = Pipeline(mine, folder).run()
  rows = read_metrics(folder, 'rl')
  # Every step logs the same figures, so that the first one tells which there are.
  curves = {}
  for name in _CURVES:
    if name in rows[0]:
      curves[name] = [row[name] for row in rows]
  # The summary names the trained model after its estimator.
  evaluated = summary['stages'][setting.estimator]
  return {
    'setting': setting.name,
    'estimator': setting.estimator,
    # The config has both also where nothing reads them.
    'alpha': mine.rl.alpha if has_psi else None,
    'delta': mine.rl.delta if has_psi else None,
    'seed': seed,
    'curves': curves,
    'end': {name: _end(values) for name, values in curves.items()},
    'accuracy': evaluated['accuracy'],
    'evaluated_reflections': evaluated['reflections_per_response'],
    'validation': summary['rl']['validation'],
  }


def _end(values: Sequence[float | None]) -> float | None:
  """The mean of the last steps that have a value; steps that were skipped have none."""
  # One step is noisy: the end of a curve is the mean of its last quarter.
  last = values[-max(1, round(len(values) * _LAST)) :]
  return _mean([value for value in last if value is not None])


def _mean(values: Sequence[float]) -> float | None:
  return float(np.mean(values)) if values else None


def _sft_point(start: pathlib.Path) -> dict[str, Any] | None:
  """The figures of the model that all settings start from, where it was measured."""
  # A run given by --sft_run need not have measured its model.
  path = start / 'evaluate_sft' / 'result.json'
  if not path.exists():
    return None
  result = read_json(path)
  return {
    'accuracy': result['accuracy'],
    'evaluated_reflections': result['reflections_per_response'],
  }


def compare_settings(
  settings: Sequence[Setting], runs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """Returns a row for each setting that has been run: its figures beside the paper's.

  `figures` are means over the runs, and `against_first` is the difference from the suite's first
  setting, both with intervals over runs (`statistics`). The first setting has no such difference.

  Args:
    settings: of the suite.
    runs: what is known of each run, `runs` of the suite's file.
  """
  # The first setting is the suite's baseline, plain GRPO in both suites.
  first = [run for run in runs if run['setting'] == settings[0].name]
  table = []
  for setting in settings:
    mine = [run for run in runs if run['setting'] == setting.name]
    if not mine:
      continue
    row = {
      'setting': setting.name,
      'estimator': setting.estimator,
      'alpha': mine[0]['alpha'],
      'delta': mine[0]['delta'],
      'seeds': len(mine),
      'figures': _figures(mine),
      'against_first': {} if setting is settings[0] else _contrast(first, mine),
      # Not every setting has a row in the paper.
      'published': dict(zip(_PUBLISHED, setting.published, strict=False)),
    }
    table.append(row)
  return table


def _figures(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Estimates over the runs of one setting, by name."""
  # Runs of one setting have the same figures: names are read off the first.
  values = {}
  for name in runs[0]['end']:
    values[name] = [run['end'][name] for run in runs]
  for kind in runs[0]['accuracy']:
    values[f'accuracy_{kind}'] = [run['accuracy'][kind] for run in runs]
  for name in ('reward', 'reflections'):
    values[f'validation_{name}'] = [run['validation']['after'][name] for run in runs]
  values['evaluated_reflections'] = [run['evaluated_reflections'] for run in runs]
  figures = {}
  for name, found in values.items():
    # A run all of whose last steps were skipped has no value at its end.
    known = [value for value in found if value is not None]
    if known:
      figures[name] = estimate_mean(known, unit=RUNS, bounds=_bounds(name))
  return figures


def _bounds(name: str) -> tuple[float, float] | None:
  """The least and the largest value of a figure, where there are any."""
  # Bounds keep intervals of few runs inside what a figure can be.
  share = name.startswith('accuracy') or name.endswith(('_fraction', '_rate', '_rate_all'))
  if share or name == 'label_agreement':
    return 0.0, 1.0
  return REWARDS if name in ('reward', 'validation_reward') else None


def _contrast(
  first: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
  """How the policies of two settings differ on the prompts set aside, by figure.

  Runs of one seed answer the same prompts from the same random streams, so that they are compared
  seed by seed. The interval is over these pairs of runs. One pair has none: over its prompts the
  difference of two policies could be told, and not that of two settings.
  """
  others = {run['seed']: run for run in mine}
  contrast = {}
  for name in mine[0]['validation']['by_prompt']['after']:
    before = []
    after = []
    for run in first:
      # While a sweep runs, the first setting is one seed ahead.
      if run['seed'] in others:
        other = others[run['seed']]
        before.append(_prompt_mean(run, name))
        after.append(_prompt_mean(other, name))
    if before:
      contrast[name] = paired_difference(before, after, unit=RUNS, bounds=_bounds(name))
  return contrast


def _prompt_mean(run: dict[str, Any], name: str) -> float:
  """The mean over the prompts set aside, after training."""
  # One value for each prompt, so that all prompts count the same.
  return float(np.mean(run['validation']['by_prompt']['after'][name]))


# --- decomposition ---


def _run_decomposition(config: RunConfig, workdir: pathlib.Path, seeds: int) -> dict[str, Any]:
  """Distils, fine-tunes and measures at every setting and seed."""
  runs = []
  for seed in range(seeds):
    for setting in DECOMPOSITION:
      changes = {
        'seed': seed,
        'stages': ('distill', 'sft', 'evaluate_sft'),
        'distill': {'reference': setting.reference, 'examples': setting.examples},
      }
      with stage(f'{setting.name}, seed {seed}'):
        # A folder for each setting and seed, so that a finished run is not repeated.
        folder = workdir / setting.name / f'seed{seed}'
        summary = Pipeline(overlay(config, changes), folder).run()
      run = {
        'setting': setting.name,
        'seed': seed,
        'figures': _decomposition_figures(summary),
        'dropped': summary['distill']['dropped'],
      }
      runs.append(run)
      # After every run, as for reinforcement.
      content = {'suite': 'decomposition', 'runs': runs, 'table': _decomposition_table(runs)}
      write_json_atomic(workdir / 'decomposition.json', content)
  return content


def _decomposition_figures(summary: dict[str, Any]) -> dict[str, float]:
  """What a run's rows are like, and how well the model does that was trained on them."""
  made = summary['distill']
  names = ('success_rate', 'success_rate_all', 'decomposition_rate', 'rows')
  figures = {name: made[name] for name in names}
  # Only pseudo-labels can differ from the reference calls.
  if 'labels' in made:
    figures['label_agreement'] = made['labels']['agree'] / made['labels']['seeds']
  # What counts in the end is the model that the rows made, and not the rows.
  accuracy = summary['stages']['sft']['accuracy']
  for kind, value in accuracy.items():
    figures[f'accuracy_{kind}'] = value
  # The mean over kinds: a row of one number to put beside the paper's tau-bench overall.
  figures['accuracy'] = float(np.mean(list(accuracy.values())))
  return figures


def _decomposition_table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """A row a setting: means with intervals over runs, beside the paper's."""
  table = []
  for setting in DECOMPOSITION:
    # While the sweep runs, later settings have no row yet.
    mine = [run['figures'] for run in runs if run['setting'] == setting.name]
    if not mine:
      continue
    figures = {}
    for name in mine[0]:
      values = [run[name] for run in mine]
      figures[name] = estimate_mean(values, unit=RUNS, bounds=_bounds(name))
    success, tau = setting.published
    row = {
      'setting': setting.name,
      'reference': setting.reference,
      'examples': setting.examples,
      'seeds': len(mine),
      'figures': figures,
      'published': {'success_percent': success, 'tau_percent': tau},
    }
    table.append(row)
  return table


# --- for a terminal ---


def format_table(content: dict[str, Any]) -> str:
  """Returns a suite's table as lines of text."""
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
  names = [name.removeprefix('accuracy_').removeprefix('validation_') for name in columns]
  names += [f'{name}, change' for name in contrasts]
  lines = [_line('setting', names)]
  for row in content['table']:
    cells = [_cell(row, row['figures'].get(name), 3) for name in columns]
    cells += [_cell(row, row['against_first'].get(name), 3) for name in contrasts]
    lines.append(_line(row['setting'], cells))
  lines.append(
    f'change: against {content["table"][0]["setting"]} of the same seed, on the prompts set aside; '
    'in brackets: 95 % intervals over runs'
  )
  return '\n'.join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
  return name.ljust(40) + ''.join(cell.rjust(40) for cell in cells)


def _cell(
  row: Mapping[str, Any], figure: Mapping[str, Any] | None, digits: int, scale: float = 1.0
) -> str:
  """A figure with its interval; not every estimator has every figure."""
  if figure is None:
    return '-'
  # Tables of earlier programs do not say at each figure over how many runs it is, and with one run
  # they compared prompts.
  runs = row['seeds']
  unit = RUNS if figure.get('n', runs) == runs else 'prompts'
  return format_estimate({'n': runs, 'unit': unit} | figure, digits, scale)


def _format_decomposition(table: Sequence[dict[str, Any]]) -> str:
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
  for row in table:
    line = row['setting'].ljust(20)
    for column in columns:
      line += _cell(row, row['figures'][column], 1, 100).rjust(30)
    published = row['published']
    paper = f'{published["success_percent"]}, {published["tau_percent"]}'
    lines.append(line + paper.rjust(24))
  lines.append("in brackets: 95 % intervals over runs; all figures but the paper's in per cent")
  return '\n'.join(lines)
