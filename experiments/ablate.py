"""Sweeps: python -m experiments.ablate --suite=alpha_delta [--seeds=3] [--quick] [--sft_run=runs/nano] [--workdir=runs/ablation]

    --suite=alpha_delta      DA-GRPO's alpha and delta (paper, Table 3)
    --suite=psi              what the paper leaves open about psi
    --suite=decomposition    what the decomposer sees (paper, Table 6), with 95 % intervals over three seeds; four minutes a
                             setting and seed
"""
import json
import pathlib
import sys

from absl import app, flags, logging

from configs import nano
from dcore_jax.run.ablation import SEEDS, SUITES, format_table, run_suite

_SUITE = flags.DEFINE_enum('suite', 'alpha_delta', SUITES, 'What is swept.')
_SEEDS = flags.DEFINE_integer('seeds', None, f'Repetitions of every setting; default: {SEEDS}.')
_QUICK = flags.DEFINE_bool('quick', False, 'A few steps and tasks: shows the program working, measures nothing.')
_SFT_RUN = flags.DEFINE_string('sft_run', '', 'Work directory whose SFT checkpoint is the start; default: make one.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/ablation', 'Where results are and go; finished settings are not run again.')


def decomposition_config():
  """A quarter of nano's seeds, and twice its epochs: at two of them, 68 steps, the loss of the rows with the reference in view is
  still 0.4, and the model gets no task of several subtasks right."""
  c = nano.get_config()
  c.distill.tasks.update(dict(single=40, sequential=80, parallel=80, irrelevant=12, multi_turn=24))
  c.sft.epochs = 6
  c.evaluate.tasks = 48
  return c


def quick_config():
  """The smallest sweep that goes through every line."""
  c = nano.get_config('quick')
  c.evaluate.tasks = 4
  c.distill.tasks.update(dict(single=10, sequential=16, parallel=16, irrelevant=8, multi_turn=4))
  c.rl.update(dict(steps=1, prompts=4, group=4, updates=1, validation=2))
  return c


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  full = decomposition_config if _SUITE.value == 'decomposition' else nano.get_config
  config = quick_config() if _QUICK.value else full()
  try:
    seeds = SEEDS[_SUITE.value] if _SEEDS.value is None else _SEEDS.value
    content = run_suite(_SUITE.value, config, pathlib.Path(_WORKDIR.value), seeds=seeds,
                        sft_run=pathlib.Path(_SFT_RUN.value) if _SFT_RUN.value else None)
  except ValueError as error:
    sys.exit(f'error: {error}')
  print(format_table(content), file=sys.stderr)
  print(json.dumps(content))


if __name__ == '__main__':
  app.run(main)
