"""What a model directory must be before anything of it is loaded, and what its tensors must be.

A person gives what he has: weights for another program, an adapter without its model. Each such
thing is refused by a sentence that says what to do with it.
"""

import pathlib
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dcore_jax.models import rotary, tensor_files
from dcore_jax.models.config import DecoderConfig

_EMBED = 'model.embed_tokens.weight'
_HEAD = 'lm_head.weight'
_ADAPTER_FILES = ('adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin')
_LFS_POINTER = b'version https://git-lfs'
# Buffers that older versions of transformers stored, once a layer or once for all of them. The
# tables of cosines and sines follow from the frequencies and the positions.
_ROTARY_BUFFER = re.compile(
  r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.'
  r'(?P<what>inv_freq|original_inv_freq|cos_cached|sin_cached)'
)


def check_folder(path: pathlib.Path) -> None:
  """Checks that a path may be a Hugging Face model directory with weights that can be read here.

  A directory that lacks its config.json, or that is not there, is left to whoever reads it.

  Raises:
    ValueError: a file, GGUF weights alone, a LoRA adapter, weights that are a pickle, or files that
      Git LFS has not fetched.
  """
  if path.is_file():
    if path.suffix == '.gguf' or _begins_with(path, b'GGUF'):
      raise ValueError(_gguf(path))
    raise ValueError(
      f'{path} is a file; a model is the Hugging Face directory that holds its config.json and '
      'model.safetensors'
    )
  # An adapter beside whole weights would be added to them by other programs, so that the weights
  # alone are not the model that is meant.
  adapter = [name for name in _ADAPTER_FILES if (path / name).is_file()]
  if adapter:
    raise ValueError(
      f'{path} holds a LoRA adapter ({adapter[0]}), which is no model by itself: merge it into its '
      'base model first (peft: `model.merge_and_unload().save_pretrained(DIR)`) and give that '
      'directory'
    )
  for file in [*sorted(path.glob('*.safetensors')), path / 'tokenizer.json']:
    if file.is_file() and _begins_with(file, _LFS_POINTER):
      raise ValueError(
        f'{file} is a pointer of Git LFS, and not the file itself: run `git lfs pull` in {path}'
      )
  if any(path.glob('*.safetensors')) or not path.is_dir():
    return
  found = sorted(path.glob('*.gguf'))
  if found:
    raise ValueError(_gguf(found[0]))
  pickles = sorted([*path.glob('pytorch_model*.bin'), *path.glob('*.pth'), *path.glob('*.pt')])
  if pickles:
    raise ValueError(
      f'{pickles[0]} is a pickle, which is never read here: convert it first (transformers: '
      '`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)` writes safetensors)'
    )


def _begins_with(path: pathlib.Path, mark: bytes) -> bool:
  with path.open('rb') as file:
    return file.read(len(mark)) == mark


def _gguf(path: pathlib.Path) -> str:
  return (
    f'{path} is a GGUF file, whose weights are rounded for llama.cpp: convert it to a Hugging Face '
    f'directory first (`python -m experiments.import_model --gguf={path} --out=DIR`), or give the '
    'directory that it was made from'
  )


def check_tensors(
  files: Mapping[str, tensor_files.MappedFile],
  expected: Mapping[str, tuple[int, ...]],
  directory: pathlib.Path,
  config: DecoderConfig,
) -> None:
  """Checks the tensors of a directory against the configuration.

  Args:
    files: name -> the file that holds the tensor.
    expected: name -> shape of every tensor that the model has.
    directory: named in the error.
    config: of the model.

  Raises:
    ValueError: lists every difference.
  """
  problems = []
  for name, shape in expected.items():
    if name not in files:
      problems.append(f'missing {name} {list(shape)}')
  for name, file in files.items():
    problem = _tensor_problem(name, file, files, expected, config)
    if problem:
      problems.append(problem)
  if problems:
    raise ValueError(f'{directory} does not fit its config.json:\n  ' + '\n  '.join(problems))


def _tensor_problem(
  name: str,
  file: tensor_files.MappedFile,
  files: Mapping[str, tensor_files.MappedFile],
  expected: Mapping[str, tuple[int, ...]],
  config: DecoderConfig,
) -> str:
  """What is wrong with a stored tensor, or ''."""
  entry = file.entries[name]
  buffer = _ROTARY_BUFFER.fullmatch(name)
  if entry.dtype not in tensor_files.DTYPES:
    return f'{name} has dtype {entry.dtype}, readable are {list(tensor_files.DTYPES)}'
  if name == _HEAD and name not in expected:
    # Some published tied checkpoints (Qwen3-0.6B) store the head all the same; a copy is fine,
    # anything else is not.
    if _EMBED in files and not _same(file, _HEAD, files[_EMBED], _EMBED):
      return f'{_HEAD} differs from {_EMBED} although tie_word_embeddings is true'
    return ''
  if buffer:
    frequencies = buffer['what'].endswith('inv_freq')
    return _frequency_problem(name, file, config) if frequencies else ''
  if name not in expected:
    return f'extra {name} {list(entry.shape)}'
  if entry.shape != expected[name]:
    return f'{name} has shape {list(entry.shape)}, expected {list(expected[name])}'
  return ''


def _frequency_problem(name: str, file: tensor_files.MappedFile, config: DecoderConfig) -> str:
  """Why stored rotary frequencies are not those that config.json says, or ''."""
  stored = file.view(name)
  scaling = config.rope_scaling
  accepted = [rotary.frequencies(config.head_dim, config.rope_theta, scaling)]
  # A linear scaling once divided the positions, and kept the frequencies as they were.
  if name.endswith('original_inv_freq') or scaling and scaling.rope_type == 'linear':
    accepted.append(rotary.frequencies(config.head_dim, config.rope_theta))
  # Two roundings of the file's dtype: 2^-7 of bfloat16. Powers in float32 differ by 1e-6.
  rounding = ml_dtypes.finfo(stored.dtype)
  relative = max(2 * float(rounding.eps), 1e-5)
  for wanted in accepted:
    if stored.shape == wanted.shape and np.allclose(
      np.float32(stored), wanted, rtol=relative, atol=2 * float(rounding.smallest_subnormal)
    ):
      return ''
  return (
    f'{name} holds other frequencies than rope_theta={config.rope_theta} and '
    f'rope_scaling={scaling and scaling.to_hf()} of config.json give'
  )


def _same(
  file: tensor_files.MappedFile, name: str, other: tensor_files.MappedFile, other_name: str
) -> bool:
  """Whether two tensors are equal to the bit."""
  if file.entries[name][:2] != other.entries[other_name][:2]:
    return False
  ours = file.view(name).reshape(-1).view(np.uint8)
  theirs = other.view(other_name).reshape(-1).view(np.uint8)
  # 16 MiB at a time: comparing a whole vocabulary would need as much memory again.
  step = 16 << 20
  same = all(
    np.array_equal(ours[at : at + step], theirs[at : at + step]) for at in range(0, len(ours), step)
  )
  file.release(name)
  other.release(other_name)
  return same
