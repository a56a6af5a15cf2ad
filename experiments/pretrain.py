"""Builds the model organism.

    python -m experiments.pretrain --config=configs/nano_base.py --out=DIR

The same command goes on where an earlier one was interrupted.
"""

import pathlib

from absl import flags

from dcore_jax.claims import hold
from dcore_jax.organism.pretrain import pretrain
from dcore_jax.run import program
from dcore_jax.run.config import define_config

_CONFIG = define_config('configs/nano_base.py')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/pretrain', 'Checkpoints and metrics; a second run resumes from here.'
)
_OUT = flags.DEFINE_string('out', 'runs/pretrain/organism', 'Hugging Face directory to write.')


def main() -> None:
  """Pretrains the organism and writes it."""
  workdir = pathlib.Path(_WORKDIR.value)
  with hold(workdir):
    pretrain(_CONFIG.value, workdir, pathlib.Path(_OUT.value))


if __name__ == '__main__':
  program.run(main)
