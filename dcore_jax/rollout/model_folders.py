"""The directory of a model by whatever name it is asked for: here, packaged, or on the hub."""

import hashlib
import pathlib

from dcore_jax import hub
from dcore_jax.rollout.policy import ORGANISM

_NAMED_FILES = ('*.safetensors', '*.json', '*.jinja', 'tokenizer.model')
_NAMED_BYTES = 1 << 20  # of each file, at its beginning and at its end


def find_model_folder(name: str) -> pathlib.Path:
  """Finds the directory of a model, and downloads it if only the hub has it.

  Raises:
    ValueError: it is nowhere, see `hub.find`.
  """
  # The empty name is the default of config fields, which means the packaged model.
  if name in ('', 'organism'):
    return ORGANISM
  return hub.find(name, 'model')


def folder_name(folder: pathlib.Path) -> str:
  """Returns the name of a model's directory, and a fingerprint of what is in it.

  Other than `Policy.name` it needs no weights in memory, and does not depend on their dtype there.
  """
  # Parts are enough: training changes every tensor, and reading 30 GB takes minutes.
  digest = hashlib.sha256()
  for path in sorted({path for pattern in _NAMED_FILES for path in folder.glob(pattern)}):
    size = path.stat().st_size
    digest.update(f'{path.name} {size}\n'.encode())
    with path.open('rb') as file:
      digest.update(file.read(_NAMED_BYTES))
      file.seek(max(0, size - _NAMED_BYTES))
      digest.update(file.read(_NAMED_BYTES))
  return f'{folder.resolve().name}-{digest.hexdigest()[:8]}'
