"""Sweeps: python -m experiments.ablate --suite=alpha_delta [--seeds=3] [--config=configs/nano.py] [--sft_run=runs/nano]

    --suite=alpha_delta      DA-GRPO's alpha and delta (paper, Table 3)
    --suite=psi              what the paper leaves open about psi, at the config's alpha and delta
    --suite=decomposition    what the decomposer sees (paper, Table 6), with 95 % intervals over three seeds: of the organism with
                             --config=configs/nano.py:decomposition, four minutes a setting and seed

Any config of `experiments.train` can be swept, with overrides. configs/nano.py:tiny goes through every line and measures nothing.
"""

import json
import pathlib
import sys

from absl import app, flags, logging

from dcore_jax.run.ablation import SEEDS, SUITES, format_table, run_suite
from dcore_jax.run.config import define_config

_CONFIG = define_config('configs/nano.py')
_SUITE = flags.DEFINE_enum('suite', 'alpha_delta', SUITES, 'What is swept.')
_SEEDS = flags.DEFINE_integer('seeds', None, f'Repetitions of every setting; default: {SEEDS}.')
_SFT_RUN = flags.DEFINE_string(
  'sft_run', '', 'Work directory whose SFT checkpoint is the start; default: make one.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where results are and go; finished settings are not run again. Default: '
  'runs/ablation/ and the name of the suite.',
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  try:
    seeds = SEEDS[_SUITE.value] if _SEEDS.value is None else _SEEDS.value
    workdir = pathlib.Path(_WORKDIR.value or f'runs/ablation/{_SUITE.value}')
    content = run_suite(
      _SUITE.value,
      _CONFIG.value,
      workdir,
      seeds=seeds,
      sft_run=pathlib.Path(_SFT_RUN.value) if _SFT_RUN.value else None,
    )
  except (ValueError, ConnectionError) as error:
    sys.exit(f'error: {error}')
  print(format_table(content), file=sys.stderr)
  print(json.dumps(content))


if __name__ == '__main__':
  app.run(main)
