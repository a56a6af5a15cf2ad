"""Writes the model of a GGUF file as a Hugging Face directory.

    python -m experiments.import_model --gguf=FILE --out=DIR --dtype=bfloat16

Architectures llama, qwen2 and qwen3, in every type of rounded numbers that the gguf package reads.
The directory holds the numbers that these stand for, and the tokenizer with its chat template, so
that it can be trained, served and given to other programs.
"""

import pathlib
import sys

from absl import flags

from dcore_jax.models.gguf import DTYPES, import_gguf
from dcore_jax.run import program

_GGUF = flags.DEFINE_string('gguf', None, 'The GGUF file.', required=True)
_OUT = flags.DEFINE_string('out', None, 'The directory to write.', required=True)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', list(DTYPES), 'Type of the tensors written; float32 loses nothing.'
)
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Replace --out where it is not empty.')


def main() -> None:
  """Writes the directory and says what is in it."""
  try:
    config = import_gguf(
      pathlib.Path(_GGUF.value),
      pathlib.Path(_OUT.value),
      dtype=_DTYPE.value,
      overwrite=_OVERWRITE.value,
    )
  except FileExistsError as error:
    raise ValueError(str(error)) from error
  millions = config.param_count / 1e6
  print(f'{_OUT.value}: {config.model_type}, {millions:.1f} million parameters', file=sys.stderr)


if __name__ == '__main__':
  program.run(main)
