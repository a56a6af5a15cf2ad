"""Hugging Face model directories, in and out: config.json, safetensors (one file or an indexed set), tokenizer files.

A torch `Linear` stores [out, in] and one tensor per layer; the parameter tree stores input axes first, heads as axes of
their own, and all layers stacked. Both directions are permutations of the numbers: importing and exporting in the
stored dtype gives back the same bits. Everything is checked before anything is built or written, and reported in one
error.
"""
from collections.abc import Iterator
import contextlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Params, abstract_params

# name in params['layers'] -> (name below model.layers.{i}, number of leading input axes; None: a vector, kept as it is)
_LAYER_TENSORS = {
    'attn_norm': ('input_layernorm', None),
    'q': ('self_attn.q_proj', 1),
    'k': ('self_attn.k_proj', 1),
    'v': ('self_attn.v_proj', 1),
    'o': ('self_attn.o_proj', 2),
    'q_norm': ('self_attn.q_norm', None),
    'k_norm': ('self_attn.k_norm', None),
    'mlp_norm': ('post_attention_layernorm', None),
    'gate': ('mlp.gate_proj', 1),
    'up': ('mlp.up_proj', 1),
    'down': ('mlp.down_proj', 1),
}
_TOP_TENSORS = {'embed': 'model.embed_tokens.weight', 'final_norm': 'model.norm.weight', 'head': 'lm_head.weight'}
_READABLE = ('F32', 'F16', 'BF16')
_WRITABLE = ('float32', 'bfloat16')
_TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
                    'vocab.json', 'merges.txt', 'tokenizer.model', 'chat_template.jinja', 'chat_template.json')


def load_config(directory: str | pathlib.Path) -> DecoderConfig:
  """The configuration in `directory`/config.json; ValueError for anything in it that would be ignored."""
  return DecoderConfig.from_hf(_read_json(pathlib.Path(directory) / 'config.json'))


def load_params(directory: str | pathlib.Path, dtype: Any = jnp.float32, *, shardings: Params | None = None
                ) -> tuple[DecoderConfig, Params]:
  """(config, parameters in `dtype`) of a checkpoint directory.

  `shardings`, a tree like the parameters, says where each one goes; without it all are on the default device. Host
  memory holds one stacked parameter at a time.

  Raises:
    ValueError: missing, extra, misshapen or unreadable tensors, all of them in one message; a file that is not there.
  """
  directory = pathlib.Path(directory)
  config = load_config(directory)
  specs = abstract_params(config, dtype)
  with contextlib.ExitStack() as stack:
    stored = _open_tensors(directory, stack)
    _check_stored(stored, config, directory)

    def build(path, spec, sharding=None):
      return jax.device_put(_stacked(stored, tuple(key.key for key in path), spec), sharding)

    trees = (specs,) if shardings is None else (specs, shardings)
    return config, jax.tree_util.tree_map_with_path(build, *trees)


def save_checkpoint(directory: str | pathlib.Path, config: DecoderConfig, params: Params, *,
                    tokenizer_dir: str | pathlib.Path | None = None, dtype: str = 'bfloat16', overwrite: bool = False,
                    generation_config: dict[str, Any] | None = None) -> None:
  """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` and the serving engines load.

  The directory is written beside its place and renamed when complete: a failure leaves what was there before.

  Args:
    directory: the target; its parents are made.
    config: the configuration that `params` belong to.
    params: the parameter tree, checked against `config`.
    tokenizer_dir: a directory whose tokenizer files are copied.
    dtype: 'bfloat16' or 'float32', of every tensor.
    overwrite: allows to replace a non-empty directory.
    generation_config: contents of generation_config.json; by default the token ids of `config`.

  Raises:
    ValueError: another dtype, a tree that does not fit the config (all differences listed), no tokenizer in
      tokenizer_dir.
    FileExistsError: a non-empty target without `overwrite`, or a target that is no directory.
  """
  if dtype not in _WRITABLE:
    raise ValueError(f'dtype={dtype!r} is not one of {_WRITABLE}')
  _check_tree(params, config)
  tokenizer_files = _tokenizer_files(tokenizer_dir)
  target = pathlib.Path(directory).absolute()
  if target.exists() and not target.is_dir():
    raise FileExistsError(f'{target} is not a directory')
  if target.is_dir() and any(target.iterdir()) and not overwrite:
    raise FileExistsError(f'{target} is not empty; pass overwrite=True to replace it')
  if generation_config is None:
    ids = {name: config.to_hf()[name] for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    generation_config = {name: value for name, value in ids.items() if value is not None}
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.parent / f'.{target.name}.partial'
  shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
  try:
    partial.mkdir()
    for source in tokenizer_files:
      shutil.copyfile(source, partial / source.name)
    # torch_dtype is what transformers 4 and the serving engines read, dtype what transformers 5 reads.
    _write_json(partial / 'config.json', config.to_hf() | {'dtype': dtype, 'torch_dtype': dtype})
    _write_json(partial / 'generation_config.json', generation_config)
    tensors = dict(_exported(params, jnp.dtype(dtype)))
    safetensors.numpy.save_file(tensors, partial / 'model.safetensors', metadata={'format': 'pt'})
    (partial / 'model.safetensors').chmod(0o644)  # safetensors 0.8 makes it readable for its owner only
    _swap_in(partial, target)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f'{path} is missing')
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(record, dict):
    raise ValueError(f'{path} does not hold a JSON object')
  return record


def _write_json(path: pathlib.Path, record: dict[str, Any]) -> None:
  path.write_text(json.dumps(record, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _open_tensors(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
  """name -> the open safetensors file that holds it, of model.safetensors or of the files its index lists."""
  files = ['model.safetensors']
  index = directory / 'model.safetensors.index.json'
  if not (directory / files[0]).is_file() and index.is_file():
    files = sorted(set(_read_json(index).get('weight_map', {}).values()))
  absent = [name for name in files if pathlib.PurePath(name).name != name or not (directory / name).is_file()]
  if absent or not files:
    raise ValueError(f'{directory}: no weights, missing files {absent}')
  stored = {}
  for name in files:
    try:
      handle = stack.enter_context(safetensors.safe_open(directory / name, framework='np'))
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f'{directory / name} cannot be read: {error}') from error
    twice = sorted(set(handle.keys()) & stored.keys())
    if twice:
      raise ValueError(f'{directory}: stored in more than one file: {twice}')
    stored.update(dict.fromkeys(handle.keys(), handle))
  return stored


def _hf_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Every tensor of the checkpoint with its shape as stored."""
  specs = abstract_params(config)
  shapes = {_TOP_TENSORS[name]: spec.shape for name, spec in specs.items() if name != 'layers'}
  for name, spec in specs['layers'].items():
    suffix, inputs = _LAYER_TENSORS[name]
    shape = spec.shape[1:]
    if inputs is not None:
      shape = (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
    for index in range(config.num_hidden_layers):
      shapes[f'model.layers.{index}.{suffix}.weight'] = shape
  return shapes


def _check_stored(stored: dict[str, Any], config: DecoderConfig, directory: pathlib.Path) -> None:
  """Raises one ValueError that lists every difference between the files and the configuration."""
  expected = _hf_shapes(config)
  embed, head = _TOP_TENSORS['embed'], _TOP_TENSORS['head']
  problems = [f'missing {name} {list(expected[name])}' for name in expected if name not in stored]
  for name, handle in stored.items():
    tensor = handle.get_slice(name)
    shape = tuple(tensor.get_shape())
    if tensor.get_dtype() not in _READABLE:
      problems.append(f'{name} has dtype {tensor.get_dtype()}, readable are {list(_READABLE)}')
    elif name == head and name not in expected:
      # Some published tied checkpoints (Qwen3-0.6B) store the head all the same; a copy is fine, anything else is not.
      if embed in stored and not np.array_equal(handle.get_tensor(name), stored[embed].get_tensor(embed)):
        problems.append(f'{head} differs from {embed} although tie_word_embeddings is true')
    elif name not in expected:
      problems.append(f'extra {name} {list(shape)}')
    elif shape != expected[name]:
      problems.append(f'{name} has shape {list(shape)}, expected {list(expected[name])}')
  if problems:
    raise ValueError(f'{directory} does not fit its config.json:\n  ' + '\n  '.join(problems))


def _stacked(stored: dict[str, Any], path: tuple[str, ...], spec: Any) -> np.ndarray:
  """One parameter of the tree, read from its file or from its L tensors, in the dtype of `spec`."""
  if len(path) == 1:
    name = _TOP_TENSORS[path[0]]
    return stored[name].get_tensor(name).astype(spec.dtype)
  suffix, inputs = _LAYER_TENSORS[path[1]]
  stacked = np.empty(spec.shape, spec.dtype)
  for index in range(spec.shape[0]):
    name = f'model.layers.{index}.{suffix}.weight'
    tensor = stored[name].get_tensor(name)
    stacked[index] = (tensor if inputs is None else tensor.T).reshape(spec.shape[1:]).astype(spec.dtype)
  return stacked


def _exported(params: Params, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor) for every tensor of the file, contiguous as safetensors needs them."""
  for name, value in params.items():
    if name != 'layers':
      yield _TOP_TENSORS[name], np.ascontiguousarray(np.asarray(value).astype(dtype))
  for name, value in params['layers'].items():
    suffix, inputs = _LAYER_TENSORS[name]
    for index, tensor in enumerate(np.asarray(value).astype(dtype)):
      if inputs is not None:
        tensor = tensor.reshape(int(np.prod(tensor.shape[:inputs])), -1).T
      yield f'model.layers.{index}.{suffix}.weight', np.ascontiguousarray(tensor)


def _check_tree(params: Params, config: DecoderConfig) -> None:
  """Raises one ValueError that lists every difference between a parameter tree and the configuration."""
  def flat(tree):
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

  expected, given = flat(abstract_params(config)), flat(params)
  problems = [f'missing {name}' for name in expected if name not in given]
  problems += [f'extra {name}' for name in given if name not in expected]
  problems += [f'{name} has shape {given[name]}, expected {shape}' for name, shape in expected.items()
               if name in given and given[name] != shape]
  if problems:
    raise ValueError('the parameters do not fit the config: ' + '; '.join(problems))


def _tokenizer_files(tokenizer_dir: str | pathlib.Path | None) -> list[pathlib.Path]:
  if tokenizer_dir is None:
    return []
  folder = pathlib.Path(tokenizer_dir)
  files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
  if not {'tokenizer.json', 'vocab.json', 'tokenizer.model'} & {file.name for file in files}:
    raise ValueError(f'{folder} holds no tokenizer')
  return files


def _swap_in(partial: pathlib.Path, target: pathlib.Path) -> None:
  """Puts the complete directory in its place; what was there is removed last."""
  replaced = target.parent / f'.{target.name}.replaced'
  shutil.rmtree(replaced, ignore_errors=True)
  if target.exists():
    target.rename(replaced)
  try:
    partial.rename(target)
  except OSError:
    if replaced.exists():
      replaced.rename(target)
    raise
  shutil.rmtree(replaced, ignore_errors=True)
