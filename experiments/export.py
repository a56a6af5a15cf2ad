"""Writes a checkpoint as a Hugging Face directory.

    python -m experiments.export --checkpoint=RUN --out=DIR --dtype=float32
    python -m experiments.export --checkpoint=RUN --out=DIR --peft

With --peft the adapters of a LoRA run are written alone, as a directory that `peft` loads.
The checkpoint is a run (its last trained stage is taken), RUN/sft, RUN/checkpoints/da_grpo,
RUN/checkpoints/da_grpo/25, or any Hugging Face directory. Several hosts write a model that one
cannot hold: the same command on each, with --hosts.
"""

import pathlib
import sys

from absl import flags

from dcore_jax import distributed, host_watch
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.run.export import export, export_adapters

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'A run, a stage or checkpoint in it, or a Hugging Face directory.',
  required=True,
)
_OUT = flags.DEFINE_string('out', None, 'The directory to write.', required=True)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  ['bfloat16', 'float32'],
  'Type of the tensors written; default: bfloat16, float32 with --peft.',
)
_PEFT = flags.DEFINE_bool('peft', False, 'Write the adapters of a LoRA run alone.')
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace --out where it is not empty.')
_HOSTS = flags.DEFINE_string(
  'hosts', '', "'auto', or ADDRESS:PORT,COUNT,INDEX: this process is one of several, a host each."
)
_PATIENCE = flags.DEFINE_float(
  'patience', host_watch.PATIENCE, 'Seconds without a word from another host until this one ends.'
)

help_lib.group('what is written', _CHECKPOINT, _OUT, _DTYPE, _PEFT, _OVERWRITE)
help_lib.group('several hosts', _HOSTS, _PATIENCE)


def main() -> None:
  """Writes the directory and says which stage and step are in it."""
  distributed.join(_HOSTS.value, _PATIENCE.value)
  try:
    write = export_adapters if _PEFT.value else export
    found = write(
      pathlib.Path(_CHECKPOINT.value),
      pathlib.Path(_OUT.value),
      dtype=_DTYPE.value or ('float32' if _PEFT.value else 'bfloat16'),
      overwrite=_OVERWRITE.value,
    )
  except FileExistsError as error:
    raise ValueError(str(error)) from error
  if distributed.writes():
    step = '' if found.step is None else f', step {found.step}'
    print(f'{_OUT.value}: {found.stage}{step}', file=sys.stderr)


if __name__ == '__main__':
  program.run(main)
