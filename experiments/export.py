"""Writes a Hugging Face directory: python -m experiments.export --checkpoint=RUN --out=DIR [--dtype=float32] [--overwrite]

The checkpoint is a run (its last trained stage), RUN/sft, RUN/checkpoints/da_grpo, RUN/checkpoints/da_grpo/25, or any Hugging
Face directory. A model that one host cannot hold is written by several: the same command on each, with --hosts.
"""

import pathlib
import sys

from absl import app, flags, logging

from dcore_jax import distributed
from dcore_jax.run.export import export

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A run, a stage or checkpoint in it, or a Hugging Face directory.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'The directory to write.', required=True)
_DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the tensors written.')
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace --out where it is not empty.')
_HOSTS = flags.DEFINE_string(
  'hosts', '', "'auto', or ADDRESS:PORT,COUNT,INDEX: this process is one of several, a host each."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # orbax logs dozens of lines a checkpoint
  try:
    distributed.join(_HOSTS.value)
    found = export(
      pathlib.Path(_CHECKPOINT.value),
      pathlib.Path(_OUT.value),
      dtype=_DTYPE.value,
      overwrite=_OVERWRITE.value,
    )
  except (ValueError, FileExistsError) as error:
    sys.exit(f'error: {error}')
  if distributed.writes():
    print(
      f'{_OUT.value}: {found.stage}' + (f', step {found.step}' if found.step is not None else ''),
      file=sys.stderr,
    )


if __name__ == '__main__':
  app.run(main)
