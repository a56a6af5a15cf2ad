"""Writes a checkpoint as a Hugging Face directory.

    python -m experiments.export --checkpoint=RUN --out=DIR --dtype=float32

The checkpoint is a run (its last trained stage is taken), RUN/sft, RUN/checkpoints/da_grpo,
RUN/checkpoints/da_grpo/25, or any Hugging Face directory. Several hosts write a model that one
cannot hold: the same command on each, with --hosts.
"""

import pathlib
import sys

from absl import flags

from dcore_jax import distributed
from dcore_jax.run import program
from dcore_jax.run.export import export

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A run, a stage or checkpoint in it, or a Hugging Face directory.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'The directory to write.', required=True)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', ['bfloat16', 'float32'], 'Type of the tensors written.'
)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace --out where it is not empty.')
_HOSTS = flags.DEFINE_string(
  'hosts', '', "'auto', or ADDRESS:PORT,COUNT,INDEX: this process is one of several, a host each."
)


def main() -> None:
  """Writes the directory and says which stage and step are in it."""
  distributed.join(_HOSTS.value)
  try:
    found = export(
      pathlib.Path(_CHECKPOINT.value),
      pathlib.Path(_OUT.value),
      dtype=_DTYPE.value,
      overwrite=_OVERWRITE.value,
    )
  except FileExistsError as error:
    raise ValueError(str(error)) from error
  if distributed.writes():
    step = '' if found.step is None else f', step {found.step}'
    print(f'{_OUT.value}: {found.stage}{step}', file=sys.stderr)


if __name__ == '__main__':
  program.run(main)
