"""Sweeps of settings: a table and a verdict on stderr, the content as JSON on stdout.

    python -m experiments.ablate --suite=alpha_delta --seeds=3 --sft_run=runs/nano

Suites:

    alpha_delta      DA-GRPO's alpha and delta (paper, Table 3)
    psi              psi as published and as released, its placebo, and what it could be instead
    psi_rivals       psi on words without a target, at a share of norms, and uniform KL terms
    decomposition    what the decomposer sees (paper, Table 6), with 95 % intervals over three
                     seeds; with --config=configs/nano.py:decomposition it takes four minutes a
                     setting and seed
    distill_size     how many rows, and GRPO without and with them (paper, Table 4)
    families         the organism's rows train a Llama- and a Qwen2.5-shaped model (Table 5)
    variance         the spread of rewards before and after (figures 5a, 12, 13), and the tokens of
                     highest and lowest entropy (14)
    composition      accuracy against the number of subtasks, and prompting to decompose (3c, 3d)
    behaviours       decomposition, reflection, verification, deduction a response (3a, 7a)
    self_distillation
                     the policy as its own teacher, and Algorithm 1 with SFT, at equal tokens

The work directory gets SUITE.json, .md, .csv and .png. Any config of `experiments.train` can be
swept, with overrides. configs/nano.py:tiny runs every line and measures nothing.
"""

import json
import pathlib
import sys

from absl import flags

from dcore_jax.claims import hold
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.run.ablation import CHECKPOINTS, SEEDS, SUITES, format_table, run_suite
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/nano.py')
_SUITE = flags.DEFINE_enum('suite', 'alpha_delta', SUITES, 'What is swept.')
_SEEDS = flags.DEFINE_integer('seeds', None, f'Repetitions of every setting; default: {SEEDS}.')
_CHECKPOINTS = flags.DEFINE_integer(
  'checkpoints', None, f'SFT checkpoints to start from, where 0 is none; default: {CHECKPOINTS}.'
)
_SETTINGS = flags.DEFINE_list(
  'settings',
  [],
  'Settings that are run and compared, by name, with commas between them; default: all.',
)
_JOBS = flags.DEFINE_integer('jobs', 1, 'Runs at a time, each in a process on a core of its own.')
_SFT_RUN = flags.DEFINE_string(
  'sft_run', '', 'Work directory whose SFT checkpoint is the only start; default: make them.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the results, in which finished settings are not run again; default: runs/ablation/ '
  'and the name of the suite.',
)

help_lib.group('what is swept', _SUITE, _SETTINGS, _SEEDS, _CHECKPOINTS, _SFT_RUN)
help_lib.group('how it runs', _WORKDIR, _JOBS)


def main() -> None:
  """Runs the settings that have no result yet and prints the table of all."""
  suite = _SUITE.value
  seeds = SEEDS[suite] if _SEEDS.value is None else _SEEDS.value
  workdir = pathlib.Path(_WORKDIR.value or f'runs/ablation/{suite}')
  checkpoints = _CHECKPOINTS.value
  if checkpoints is not None and not CHECKPOINTS[suite]:
    raise ValueError(f'the suite {suite} starts from no SFT checkpoint: leave --checkpoints out')
  if _SFT_RUN.value:
    if checkpoints not in (None, 1):
      raise ValueError(f'--sft_run is one checkpoint, and {checkpoints} are asked for')
    starts = pathlib.Path(_SFT_RUN.value)
  else:
    starts = max(1, CHECKPOINTS[suite]) if checkpoints is None else checkpoints
  config = read_config(_CONFIG.value)  # a wrong one leaves no folder behind
  where = f'{workdir}/{suite}.json, .md, .csv and .png, and a folder a run'
  print(f'sweeps {suite} with {seeds} seeds; results go to {where}', file=sys.stderr, flush=True)
  with hold(workdir):
    content = run_suite(
      suite,
      config,
      workdir,
      seeds=seeds,
      settings=_SETTINGS.value,
      starts=starts,
      processes=_JOBS.value,
    )
  print(format_table(content), file=sys.stderr)
  print(json.dumps(content))


if __name__ == '__main__':
  program.run(main)
