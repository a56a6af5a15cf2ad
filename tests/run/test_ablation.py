"""Sweeps: settings that the stages take, and what is made of their results.

An invented pipeline shows which configs are run, and gives figures to put beside the paper's.
"""

import json
import pathlib
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import nano
from dcore_jax.learn import advantages
from dcore_jax.run import ablation
from dcore_jax.run.ablation import reinforcement, runs
from dcore_jax.run.config import default_config, read_config
from dcore_jax.train.metrics import Metrics
from experiments import ablate


class InventedPipeline:
  """Success and accuracy that depend on what the decomposer sees and, a little, on the seed."""

  configs = []

  def __init__(self, config, workdir):
    self.config = config
    self.workdir = workdir

  def run(self):
    InventedPipeline.configs.append((self.config, self.workdir))
    d = self.config.distill
    rate = (
      {'hidden': 0.7, 'shown': 0.9, 'pseudo': 0.8}[d.reference]
      + 0.01 * d.examples
      + 0.02 * self.config.seed
    )
    made = {
      'success_rate': rate,
      'success_rate_all': rate / 2,
      'decomposition_rate': 1.0,
      'rows': 10,
      'dropped': {},
    }
    if d.reference == 'pseudo':
      made['labels'] = {'seeds': 8, 'agree': 6}
    return {
      'distill': made,
      'stages': {'sft': {'accuracy': {k: rate for k in ('sequential', 'parallel', 'multi_turn')}}},
    }


@pytest.fixture(autouse=True)
def pipeline(monkeypatch):
  InventedPipeline.configs = []
  monkeypatch.setattr(runs, 'Pipeline', InventedPipeline)


def test_table_6(tmp_path):
  content = ablation.run_suite('decomposition', nano.get_config('decomposition'), tmp_path, seeds=3)
  assert json.loads((tmp_path / 'decomposition.json').read_text()) == content
  asked = [(c.distill.reference, c.distill.examples, c.seed) for c, _ in InventedPipeline.configs]
  assert len(set(asked)) == 12 and len({folder for _, folder in InventedPipeline.configs}) == 12
  assert {(reference, examples) for reference, examples, _ in asked} == {
    ('hidden', 0),
    ('shown', 0),
    ('shown', 2),
    ('pseudo', 2),
  }
  assert all(
    tuple(c.stages) == ('distill', 'sft', 'evaluate_sft') for c, _ in InventedPipeline.configs
  )
  rows = {row['setting']: row for row in content['table']}
  values = [0.7, 0.72, 0.74]
  figure = rows['no_reference']['figures']['success_rate']
  assert figure['mean'] == pytest.approx(0.72)
  # Student's t with 2 degrees of freedom: 4.3027.
  half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
  assert figure['interval'] == pytest.approx([0.72 - half, 0.72 + half], rel=1e-5)
  assert (figure['n'], figure['unit']) == (3, 'runs')
  assert rows['pseudo_labels']['figures']['label_agreement']['mean'] == 0.75
  assert 'label_agreement' not in rows['reference']['figures']
  published = [row['published']['success_percent'] for row in content['table']]
  assert published == [73.8, 89.1, 93.2, 92.8]
  table = ablation.format_table(content)
  assert '72.0 [67.0, 77.0] (3 runs)' in table and '93.2, 37.1' in table
  assert len(table.splitlines()) == 7
  # The invented gains are alike in all runs, so that only the rule of three bounds them.
  assert 'the reference in view helps: is not decided here' in table


def test_the_program_repeats_what_needs_intervals(tmp_path, monkeypatch, capsys):
  asked = {}
  monkeypatch.setattr(
    ablate,
    'run_suite',
    lambda suite, config, workdir, seeds, settings, starts, processes: (
      asked.update({suite: (seeds, starts, config.name, config.rl.alpha, settings)})
      or {'suite': suite, 'table': []}
    ),
  )
  monkeypatch.setattr(ablate, 'format_table', lambda content: '')
  for suite, *more in (
    ('decomposition', '--config=configs/nano.py:decomposition'),
    ('alpha_delta',),
    (
      'psi',
      '--seeds=2',
      '--settings=grpo,psi_placebo',
      '--config=configs/nano.py:tiny',
      '--config.rl.alpha=0.4',
    ),
    ('psi_rivals', f'--sft_run={tmp_path}'),
  ):
    with flagsaver.flagsaver():
      monkeypatch.setattr(
        sys, 'argv', ['ablate', f'--suite={suite}', f'--workdir={tmp_path}', *more]
      )  # read for overrides
      flags.FLAGS(sys.argv)
      ablate.main()
  assert asked == {
    'decomposition': (3, 1, 'configs/nano.py:decomposition', 0.1, []),
    'alpha_delta': (1, 1, 'configs/nano.py', 0.1, []),
    'psi': (2, 2, 'configs/nano.py:tiny', 0.4, ['grpo', 'psi_placebo']),
    'psi_rivals': (4, tmp_path, 'configs/nano.py', 0.1, []),
  }
  assert set(ablation.SEEDS) == set(ablation.SUITES)
  capsys.readouterr()


@pytest.mark.parametrize(
  ('arguments', 'named'),
  [
    (('--suite=psi', '--sft_run=w', '--checkpoints=2'), 'one checkpoint, and 2 are asked for'),
    (('--suite=decomposition', '--checkpoints=2'), 'starts from no SFT checkpoint'),
  ],
)
def test_a_start_that_does_not_fit_is_named(tmp_path, monkeypatch, arguments, named):
  with flagsaver.flagsaver():
    monkeypatch.setattr(sys, 'argv', ['ablate', f'--workdir={tmp_path}', *arguments])
    flags.FLAGS(sys.argv)
    with pytest.raises(ValueError, match=named):
      ablate.main()


def test_one_seed_has_no_interval(tmp_path):
  content = ablation.run_suite('decomposition', nano.get_config('quick'), tmp_path, seeds=1)
  assert all(row['figures']['accuracy']['interval'] is None for row in content['table'])
  table = ablation.format_table(content)
  assert '(1 run: no interval)' in table and '[' not in table


@pytest.mark.parametrize(
  ('arguments', 'named'),
  [
    (dict(suite='x', seeds=1), 'unknown suite'),
    (dict(suite='decomposition', seeds=0), 'seeds = 0'),
    (dict(suite='decomposition', seeds=1, starts=pathlib.Path('w')), 'base model'),
    (dict(suite='psi', seeds=1, settings=['grpo', 'placebo']), "no setting 'placebo'"),
    (dict(suite='psi', seeds=1, starts=0), 'checkpoints = 0'),
    (dict(suite='psi', seeds=1, steps=0), 'rl.steps = 0'),
    (dict(suite='psi', seeds=1, validation=0), 'rl.validation = 0'),
  ],
)
def test_what_cannot_be_swept(tmp_path, arguments, named):
  config = nano.get_config()
  config.rl.update(
    {name: arguments.pop(name) for name in ('steps', 'validation') if name in arguments}
  )
  with pytest.raises(ValueError, match=named):
    ablation.run_suite(config=config, workdir=tmp_path, **arguments)
  assert not InventedPipeline.configs


class InventedReinforcement(InventedPipeline):
  """Leaves one step's metrics, and a reward that is alpha."""

  def run(self):
    InventedPipeline.configs.append((self.config, self.workdir))
    assert (self.workdir / 'sft' / 'config.json').exists()
    with Metrics(self.workdir) as metrics:
      metrics.write('rl', 0, reward=self.config.rl.alpha, entropy=0.3)
    values = {'reward': self.config.rl.alpha, 'reflections': 0.1}
    by_prompt = {name: [value] * 2 for name, value in values.items()}
    evaluated = {'accuracy': {'single': 0.9}, 'reflections_per_response': 0.2}
    return {
      'stages': {self.config.rl.estimator: evaluated},
      'rl': {'validation': {'after': values, 'by_prompt': {'after': by_prompt}}},
    }


@pytest.mark.parametrize(
  ('suite', 'alphas'), [('psi', {0.4}), ('alpha_delta', {0.01, 0.1, 0.4, 1.0})]
)
def test_alpha_is_the_settings_or_else_the_configs(tmp_path, monkeypatch, suite, alphas):
  monkeypatch.setattr(runs, 'Pipeline', InventedReinforcement)
  start = tmp_path / 'start'
  (start / 'sft').mkdir(parents=True)
  for name in ('config.json', 'model.safetensors'):
    (start / 'sft' / name).write_text('{}')
  config = nano.get_config('tiny')
  config.rl.alpha = 0.4
  config.rl.psi_words = ('wait',)
  content = ablation.run_suite(suite, config, tmp_path / 'sweep', seeds=1, starts=start)
  assert {row['alpha'] for row in content['table'] if row['estimator'] == 'da_grpo'} == alphas
  assert {row['alpha'] for row in content['table'] if row['estimator'] == 'grpo'} == {None}
  assert all(
    row['figures']['reward']['mean'] == row['alpha'] for row in content['table'] if row['alpha']
  )
  assert len({folder for _, folder in InventedPipeline.configs}) == len(
    reinforcement.RL_SUITES[suite]
  )
  assert all(c.rl.psi_words == () for c, _ in InventedPipeline.configs if c.rl.estimator == 'grpo')
  if suite == 'psi':
    different = {
      (
        c.rl.estimator,
        c.rl.psi_when_wrong,
        c.rl.psi_multiplier,
        tuple(c.rl.psi_words),
        c.rl.entropy_bonus,
      )
      for c, _ in InventedPipeline.configs
    }
    assert len(different) == len(content['table'])


def test_only_the_settings_that_are_named_are_run(tmp_path, monkeypatch):
  monkeypatch.setattr(runs, 'Pipeline', InventedReinforcement)
  start = tmp_path / 'start' / 'sft'
  start.mkdir(parents=True)
  (start / 'config.json').write_text('{}')
  content = ablation.run_suite(
    'psi',
    nano.get_config('tiny'),
    tmp_path / 'sweep',
    seeds=2,
    settings=['psi_placebo', 'da_grpo'],
    starts=start.parent,
  )
  ran = [(run['setting'], run['seed']) for run in content['runs']]
  assert ran == [('da_grpo', 0), ('psi_placebo', 0), ('da_grpo', 1), ('psi_placebo', 1)]
  first, second = content['table']
  # Without the suite's first setting there is nothing to be different from, but the placebo.
  assert first['against_first'] == second['against_first'] == {}
  assert first['against_placebo']['reward']['n'] == 2


def test_a_sweep_goes_on_from_the_same_weights_alone(tmp_path, monkeypatch):
  """In as many files as they have."""
  monkeypatch.setattr(runs, 'Pipeline', InventedReinforcement)
  model = tmp_path / 'start' / 'sft'
  model.mkdir(parents=True)
  (model / 'config.json').write_text('{}')
  for part in (1, 2):
    (model / f'model-0000{part}-of-00002.safetensors').write_bytes(bytes([part]))

  def sweep():
    config = nano.get_config('tiny')
    workdir = tmp_path / 'sweep'
    ablation.run_suite('psi', config, workdir, seeds=1, starts=tmp_path / 'start')

  sweep()
  sweep()
  (model / 'model-00002-of-00002.safetensors').write_bytes(b'3')
  with pytest.raises(ValueError, match='other weights'):
    sweep()


def a_run(setting, seed, after):
  """A run of a suite, with the rewards of three prompts set aside."""
  figures = {'reward': np.mean(after), 'reflections': 0.1}
  by_prompt = {'reward': after, 'right_fraction': [0.5] * 3, 'reflections': [0.1] * 3}
  return {
    'setting': setting.name,
    'alpha': setting.alpha,
    'delta': setting.delta,
    'seed': seed,
    'accuracy': {'single': 0.9},
    'end': {'entropy': 0.03, 'grad_norm': None},
    'evaluated_reflections': 0.2,
    'validation': {'before': figures, 'after': figures, 'by_prompt': {'after': by_prompt}},
  }


def test_settings_are_compared_run_by_run():
  """One run of each has no interval; two have Student's, whatever their prompts show."""
  grpo, da_grpo = reinforcement.PSI[:2]
  runs = [a_run(grpo, 0, [1.0, 2, 3]), a_run(da_grpo, 0, [1.5, 2, 4])]
  first, second = reinforcement.compare_settings(reinforcement.PSI, runs)
  assert first['against_first'] == {}
  assert second['against_first']['reward'] == {
    'difference': 0.5,
    'standard_error': None,
    'interval': None,
    'n': 1,
    'unit': 'runs',
  }
  runs += [a_run(grpo, 1, [1.0, 1, 1]), a_run(da_grpo, 1, [1.0, 1, 1.3])]
  table = reinforcement.compare_settings(reinforcement.PSI, runs)
  change = table[1]['against_first']['reward']
  half = 12.7062 * 0.2  # Student's t of one degree of freedom
  assert change['difference'] == pytest.approx(0.3)
  assert change['interval'] == pytest.approx([0.3 - half, 0.3 + half], rel=1e-5)
  shown = ablation.format_table({'suite': 'psi', 'table': table}).splitlines()
  assert '+0.300 [-2.241, +2.841] (2 runs)' in shown[2] and 'against grpo' in shown[3]


def test_runs_are_paired_by_their_seed():
  """Also where a sweep was stopped between two settings, or its runs come in another order."""
  grpo, da_grpo = reinforcement.PSI[:2]
  runs = [a_run(grpo, seed, [seed, seed]) for seed in range(3)]
  runs += [a_run(da_grpo, seed, [seed + 0.5, seed + 0.7]) for seed in (2, 0)]
  change = reinforcement.compare_settings(reinforcement.PSI, runs)[1]['against_first']['reward']
  assert change['difference'] == pytest.approx(0.6) and change['n'] == 2


def test_a_table_of_an_earlier_program_is_shown():
  old = {'setting': 'grpo', 'seeds': 3, 'against_first': {}, 'figures': {}}
  old['figures']['entropy'] = {'mean': 0.5, 'standard_error': 0.1}
  old['against_first']['reward'] = {'difference': 0.0, 'standard_error': 0.0, 'n': 3}
  shown = ablation.format_table({'suite': 'psi', 'table': [old]})
  assert '0.500 [0.070, 0.930] (3 runs)' in shown and '(3 runs, all alike: no interval)' in shown
  cell = {'mean': 0.5, 'half_width': 0.1}
  assert reinforcement.cell(old, cell, 1, 100) == '50.0 [40.0, 60.0] (3 runs)'


@pytest.mark.parametrize('suite', sorted(reinforcement.RL_SUITES))
def test_settings_differ_and_are_known_to_the_config(suite):
  settings = reinforcement.RL_SUITES[suite]
  assert len({setting.name for setting in settings}) == len(settings)
  for setting in settings:
    config = default_config()
    config.rl.estimator = setting.estimator
    config.rl.update(setting.changes)
    assert read_config(config).rl.estimator in advantages.ADVANTAGES
    assert bool(setting.changes) == bool(setting.note)
