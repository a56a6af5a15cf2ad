"""Sweeps of settings, with a table on stderr and its content as JSON on stdout.

    python -m experiments.ablate --suite=alpha_delta --seeds=3 --sft_run=runs/nano

Suites:

    alpha_delta      DA-GRPO's alpha and delta (paper, Table 3)
    psi              what the paper leaves open about psi, at the alpha and delta of the config
    decomposition    what the decomposer sees (paper, Table 6), with 95 % intervals over three
                     seeds; with --config=configs/nano.py:decomposition it takes four minutes a
                     setting and seed

Any config of `experiments.train` can be swept, with overrides. configs/nano.py:tiny runs every line
and measures nothing.
"""

import json
import pathlib
import sys

from absl import flags

from dcore_jax.claims import hold
from dcore_jax.run import program
from dcore_jax.run.ablation import SEEDS, SUITES, format_table, run_suite
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/nano.py')
_SUITE = flags.DEFINE_enum('suite', 'alpha_delta', SUITES, 'What is swept.')
_SEEDS = flags.DEFINE_integer('seeds', None, f'Repetitions of every setting; default: {SEEDS}.')
_SFT_RUN = flags.DEFINE_string(
  'sft_run', '', 'Work directory whose SFT checkpoint is the start; default: make one.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the results, in which finished settings are not run again; default: runs/ablation/ '
  'and the name of the suite.',
)


def main() -> None:
  """Runs the settings that have no result yet and prints the table of all."""
  suite = _SUITE.value
  seeds = SEEDS[suite] if _SEEDS.value is None else _SEEDS.value
  workdir = pathlib.Path(_WORKDIR.value or f'runs/ablation/{suite}')
  sft_run = pathlib.Path(_SFT_RUN.value) if _SFT_RUN.value else None
  config = read_config(_CONFIG.value)  # a wrong one leaves no folder behind
  with hold(workdir):
    content = run_suite(suite, config, workdir, seeds=seeds, sft_run=sft_run)
  print(format_table(content), file=sys.stderr)
  print(json.dumps(content))


if __name__ == '__main__':
  program.run(main)
