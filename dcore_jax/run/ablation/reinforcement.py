"""Sweeps over reinforcement, from SFT checkpoints that all settings share.

alpha_delta         Table 3 and figure 6: DA-GRPO at four settings and plain GRPO
psi                 psi as published and as released, its placebo, and what it could be instead
psi_rivals          psi on words without a target, at a share of norms, and uniform KL terms
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcore_jax.evaluate.behaviour.lazy_reasoning import LOGGED_WORDS
from dcore_jax.files import read_json
from dcore_jax.learn.advantages import uses_entropy
from dcore_jax.overrides import overlay
from dcore_jax.run.ablation import runs, tables
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite
from dcore_jax.statistics import RUNS, format_estimate
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
  'alpha_measure': 'norm_share',
  'alpha_target': 0.3,
  'alpha_rate': 0.5,
  'alpha_high': 10.0,
}
# Twice what the organism reflects after SFT. Words without a target ran away to seven a response.
_HELD_WORDS = {
  'psi_words': LOGGED_WORDS,
  'alpha_measure': 'reflections',
  'alpha_target': 0.3,
  'alpha_rate': 0.5,
}
PLACEBO = 'psi_placebo'
# Psi as published, its placebo, what the paper leaves open about it, and its fair rival.
PSI = (
  Setting('grpo'),
  Setting('da_grpo'),
  Setting('da_grpo', note='released', changes={'psi_multiplier': 2.0, 'zero_test': 'token'}),
  Setting('da_grpo', note='ignore_wrong', changes={'psi_when_wrong': 'ignore'}),
  Setting('da_grpo', note='punish_wrong', changes={'psi_when_wrong': 'punish'}),
  Setting('da_grpo', note='held_words', changes=_HELD_WORDS),
  Setting('grpo', note='entropy_bonus_0.001', changes={'entropy_bonus': 0.001}),
  Setting(PLACEBO),
)
# Rivals that fared worse: nothing holds the words, and the uniform KL pushes mass to junk.
PSI_RIVALS = (
  Setting('grpo'),
  Setting('da_grpo', note='reflective', changes={'psi_words': LOGGED_WORDS}),
  Setting('da_grpo', note='adaptive', changes=_ADAPTIVE),
  Setting('grpo', note='uniform_kl_0.001', changes={'uniform_kl': 0.001}),
  Setting('grpo', note='uniform_kl_0.01', changes={'uniform_kl': 0.01}),
)
RL_SUITES = {'alpha_delta': ALPHA_DELTA, 'psi': PSI, 'psi_rivals': PSI_RIVALS}
_PUBLISHED = ('live', 'multi_turn', 'retail', 'airline')  # columns of Table 3 that are compared
# Compared as they are at the end of training: psi is about the second of them.
_COMPARED_ENDS = ('entropy', 'zero_variance_fraction', 'all_right_fraction', 'all_wrong_fraction')
_LAST = 0.25  # share of the steps whose mean stands for the end of a curve
_CURVES = (
  'reward',
  'reflections',
  'entropy',
  'alpha',
  'zero_variance_fraction',
  'all_right_fraction',
  'all_wrong_fraction',
  'grad_norm',
  'psi_grad_norm',
  'psi_grad_share',
  'psi_cosine',
  'response_tokens',
)


def run_setting(job: Job) -> list[dict[str, Any]]:
  """Reinforces at one setting; returns what the suite's file says of it."""
  setting = next(each for each in RL_SUITES[job.suite] if each.name == job.name)
  changes = {'estimator': setting.estimator, 'seed': job.seed}
  if setting.alpha is not None:
    changes |= {'alpha': setting.alpha, 'delta': setting.delta}
  has_psi = uses_entropy(setting.estimator)
  if not has_psi:
    # The config may say how psi acts, which is an error of an estimator without it.
    changes |= {'psi_words': (), 'alpha_measure': ''}
  # A setting's own fields come last, since they are what the suite varies.
  changes |= setting.changes
  config = runs.start_seed(job.config, job.checkpoint)
  mine = overlay(config, {'stages': ('rl', 'evaluate_rl'), 'rl': changes})
  runs.copy_model(job.start / 'sft', job.folder)
  summary = runs.run_stages(mine, job.folder)
  rows = read_metrics(job.folder, 'rl')
  # Every step logs the same figures, so that the first one tells which there are.
  curves = {}
  for name in _CURVES:
    if name in rows[0]:
      # The cosine is measured in some steps only.
      curves[name] = [row.get(name) for row in rows]
  # The summary names the trained model after its estimator.
  evaluated = summary['stages'][setting.estimator]
  run = {
    'setting': setting.name,
    'estimator': setting.estimator,
    # The config has both also where nothing reads them.
    'alpha': mine.rl.alpha if has_psi else None,
    'delta': mine.rl.delta if has_psi else None,
    **job.identity,
    'curves': curves,
    'end': {name: _end(values) for name, values in curves.items()},
    'accuracy': evaluated['accuracy'],
    'evaluated_reflections': evaluated['reflections_per_response'],
    'validation': summary['rl']['validation'],
  }
  return [run]


def _end(values: Sequence[float | None]) -> float | None:
  """The mean of the last steps that have a value; steps that were skipped have none."""
  # One step is noisy: the end of a curve is the mean of its last quarter.
  last = values[-max(1, round(len(values) * _LAST)) :]
  return _mean([value for value in last if value is not None])


def _mean(values: Sequence[float]) -> float | None:
  return float(np.mean(values)) if values else None


def sft_point(start: pathlib.Path) -> dict[str, Any] | None:
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
  # The first setting is the suite's baseline, plain GRPO.
  first = [run for run in runs if run['setting'] == settings[0].name]
  placebo = [run for run in runs if run['setting'] == PLACEBO]
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
      'against': None if setting is settings[0] else settings[0].name,
      'against_first': {} if setting is settings[0] else _contrast(first, mine),
      # Not every setting has a row in the paper.
      'published': dict(zip(_PUBLISHED, setting.published, strict=False)),
    }
    # What differs from the placebo as well is psi's doing; what does not is noise, or Adam's.
    if placebo and setting.estimator != PLACEBO and uses_entropy(setting.estimator):
      row['against_placebo'] = _contrast(placebo, mine)
    table.append(row)
  for field in ('against_first', 'against_placebo'):
    tables.add_holm(table, field)
  return table


def _figures(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Estimates over the runs of one setting, by name."""
  # Runs of one setting have the same figures: names are read off the first.
  values = {}
  for name in runs[0]['end']:
    values[name] = [run['end'].get(name) for run in runs]
  for kind in runs[0]['accuracy']:
    values[f'accuracy_{kind}'] = [run['accuracy'][kind] for run in runs]
  for name in ('reward', 'reflections'):
    values[f'validation_{name}'] = [run['validation']['after'][name] for run in runs]
  values['evaluated_reflections'] = [run['evaluated_reflections'] for run in runs]
  # A run all of whose last steps were skipped has no value at its end.
  return tables.estimates(
    [{name: found[place] for name, found in values.items()} for place in range(len(runs))]
  )


def _contrast(
  first: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
  """How the policies of two settings differ, by figure: on the prompts set aside, and as trained.

  Runs of one seed answer the same prompts from the same random streams, so that they are compared
  seed by seed. The interval is over these pairs of runs. One pair has none: over its prompts the
  difference of two policies could be told, and not that of two settings.
  """
  before = {tables.run_key(run): _compared(run) for run in first}
  after = {tables.run_key(run): _compared(run) for run in mine}
  contrast = {}
  for name in _compared(mine[0]):
    found = tables.paired(
      name,
      {key: figures.get(name) for key, figures in before.items()},
      {key: figures.get(name) for key, figures in after.items()},
    )
    # While a sweep runs, the first setting is one seed ahead.
    if found:
      contrast[name] = found
  return contrast


def _compared(run: dict[str, Any]) -> dict[str, float | None]:
  """The figures of a run by which settings are compared."""
  figures = {name: _prompt_mean(run, name) for name in run['validation']['by_prompt']['after']}
  for name in _COMPARED_ENDS:
    if name in run['end']:
      figures[name] = run['end'][name]
  return figures


def _prompt_mean(run: dict[str, Any], name: str) -> float:
  """The mean over the prompts set aside, after training."""
  # One value for each prompt, so that all prompts count the same.
  return float(np.mean(run['validation']['by_prompt']['after'][name]))


# --- for a terminal ---


def format_reinforcement(content: dict[str, Any]) -> str:
  """Returns the table of such a suite as lines of text."""
  columns = (
    'validation_reward',
    'validation_reflections',
    'entropy',
    'all_right_fraction',
    'all_wrong_fraction',
    'psi_grad_norm',
    'grad_norm',
    'psi_cosine',
    'accuracy_sequential',
    'accuracy_parallel',
    'accuracy_single',
  )
  contrasts = ('reward', 'right_fraction', 'reflections', 'zero_variance_fraction')
  names = [name.removeprefix('accuracy_').removeprefix('validation_') for name in columns]
  names += [f'{name}, change' for name in contrasts]
  lines = [_line('setting', names)]
  for row in content['table']:
    cells = [cell(row, row['figures'].get(name), 3) for name in columns]
    cells += [cell(row, row['against_first'].get(name), 3) for name in contrasts]
    lines.append(_line(row['setting'], cells))
  lines.append(
    f'change: against {content["table"][0]["setting"]} of the same seed, on the prompts set aside; '
    'in brackets: 95 % intervals over runs'
  )
  return '\n'.join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
  return name.ljust(40) + ''.join(text.rjust(40) for text in cells)


def cell(
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


# --- verdicts ---


def alpha_delta_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether the published alpha earns more reward than GRPO (Table 3, figure 6)."""
  chosen = tables.difference_of(table, ALPHA_DELTA[2].name, 'reward')
  claims = [tables.Claimed('reward, alpha 0.1 against GRPO', chosen, 1)]
  return tables.verdict('DA-GRPO at alpha 0.1 earns more than GRPO', claims)


def psi_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether psi as published differs from its placebo, by Holm over the three figures."""
  row = tables.row_of(table, PSI[1].name)
  found = row.get('against_placebo', {}) if row else {}
  names = ('reward', 'reflections', 'zero_variance_fraction')
  words = []
  known = {}
  for name in names:
    if name in found:
      words.append(f'{name} {format_estimate({"unit": RUNS} | found[name], 3)}')
      if 'p' in found[name]:
        known[name] = found[name]['p']
  adjusted = dict(zip(known, tables.holm(list(known.values())), strict=True))
  differs = [name for name, probability in adjusted.items() if probability < tables.REJECTED]
  if not adjusted:
    answer = 'is not known to differ from its placebo: that takes two runs of each'
  elif differs:
    answer = f'differs from its placebo in {", ".join(differs)}'
  else:
    answer = 'does not differ from its placebo here'
  detail = '; '.join(words)
  return f'psi as published {answer}' + (f' ({detail})' if detail else '')


def rivals_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether any of the other ways earns more than GRPO."""
  better = []
  for row in table:
    change = row['against_first'].get('reward', {})
    if change.get('p_holm', 1.0) < tables.REJECTED and change['difference'] > 0:
      better.append(row['setting'])
  return f'rivals of psi that earn more than GRPO: {", ".join(better) or "none is shown to"}'


_PANELS = ('validation_reward', 'validation_reflections', 'zero_variance_fraction', 'entropy')


def _suite(name: str, verdict: Any, seeds: int, checkpoints: int) -> Suite:
  settings = RL_SUITES[name]
  names = tuple(setting.name for setting in settings)
  return Suite(
    jobs=names,
    run=run_setting,
    table=functools.partial(compare_settings, settings),
    verdict=verdict,
    text=format_reinforcement,
    panels=_PANELS,
    seeds=seeds,
    checkpoints=checkpoints,
  )


REINFORCEMENT = {
  'alpha_delta': _suite('alpha_delta', alpha_delta_verdict, 1, 1),
  # Eight runs a setting: prompts of one run are no repetitions.
  'psi': _suite('psi', psi_verdict, 4, 2),
  'psi_rivals': _suite('psi_rivals', rivals_verdict, 4, 2),
}
