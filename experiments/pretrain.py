"""Builds the model organism.

python -m experiments.pretrain --config=configs/nano_base.py [--workdir=DIR] [--out=DIR]
"""

import pathlib
import sys

from absl import app, flags, logging

from dcore_jax.claims import hold
from dcore_jax.organism.pretrain import pretrain
from dcore_jax.run.config import define_config

_CONFIG = define_config('configs/nano_base.py')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/pretrain', 'Checkpoints and metrics; a second run resumes from here.'
)
_OUT = flags.DEFINE_string('out', 'runs/pretrain/organism', 'Hugging Face directory to write.')


def main(argv: list[str]) -> None:
  """Pretrains the organism and writes it."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # orbax logs dozens of lines a checkpoint
  workdir = pathlib.Path(_WORKDIR.value)
  try:
    with hold(workdir):
      pretrain(_CONFIG.value, workdir, pathlib.Path(_OUT.value))
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main)
