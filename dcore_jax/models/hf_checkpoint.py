"""Hugging Face model directories, in and out: config.json, safetensors (one file or an indexed
set), tokenizer files.

A torch `Linear` stores [out, in] and one tensor per layer; the parameter tree stores input axes
first, heads as axes of their own, and all layers stacked. Both directions are permutations of the
numbers: importing and exporting in the stored dtype gives back the same bits. Everything is checked
before anything is built or written, and reported in one error. No process holds more of a model
than its own devices' part and one tensor.
"""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dcore_jax.files import read_json
from dcore_jax.models import tensor_files
from dcore_jax.models.checkpoint_checks import check_folder, check_tensors
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Params, abstract_params
from dcore_jax.models.projections import is_adapted, merged
from dcore_jax.progress import SLOW, progress

# Name in params['layers'] -> (name below model.layers.{i}, number of leading input axes). None
# stands for a vector, which has no input axes.
_LAYER_TENSORS = {
  'attn_norm': ('input_layernorm.weight', None),
  'q': ('self_attn.q_proj.weight', 1),
  'k': ('self_attn.k_proj.weight', 1),
  'v': ('self_attn.v_proj.weight', 1),
  'o': ('self_attn.o_proj.weight', 2),
  'q_bias': ('self_attn.q_proj.bias', None),
  'k_bias': ('self_attn.k_proj.bias', None),
  'v_bias': ('self_attn.v_proj.bias', None),
  'q_norm': ('self_attn.q_norm.weight', None),
  'k_norm': ('self_attn.k_norm.weight', None),
  'mlp_norm': ('post_attention_layernorm.weight', None),
  'gate': ('mlp.gate_proj.weight', 1),
  'up': ('mlp.up_proj.weight', 1),
  'down': ('mlp.down_proj.weight', 1),
}
_TOP_TENSORS = {
  'embed': 'model.embed_tokens.weight',
  'final_norm': 'model.norm.weight',
  'head': 'lm_head.weight',
}
_WRITABLE = ('float32', 'bfloat16')
_TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'tokenizer.model',
  'chat_template.jinja',
  'chat_template.json',
)


class Stored(NamedTuple):
  """Where a tensor of a checkpoint belongs in the parameter tree.

  Attributes:
    path: the keys that lead to the parameter, params[path[0]]...
    layer: the tensor's place in a stack of layers; None if the parameter is no stack.
    shape: the shape in the file.
    inputs: the number of leading axes of the parameter (of a layer) that the file has last. None:
      the file has the axes as they are (`embed`, `head`), or all in one (norms, biases).
  """

  path: tuple[str, ...]
  layer: int | None
  shape: tuple[int, ...]
  inputs: int | None


def stored_tensors(config: DecoderConfig) -> dict[str, Stored]:
  """Returns every tensor of a checkpoint by its name, in the order of the model."""
  specs = abstract_params(config)
  top = {
    _TOP_TENSORS[name]: Stored((name,), None, spec.shape, None)
    for name, spec in specs.items()
    if name != 'layers'
  }
  layers = {}
  for index in range(config.num_hidden_layers):
    for name, (suffix, inputs) in _LAYER_TENSORS.items():
      if name in specs['layers']:
        # The first axis of a stack is the layer, and the file has a tensor for each.
        shape = specs['layers'][name].shape[1:]
        stored = (
          (math.prod(shape),)
          if inputs is None
          else (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        )
        layers[f'model.layers.{index}.{suffix}'] = Stored(('layers', name), index, stored, inputs)
  embed = _TOP_TENSORS['embed']
  # Embedding, layers, final norm, head: the order in which files of several parts are filled.
  return {embed: top.pop(embed), **layers, **top}


def layer_tensor(name: str) -> str:
  """Returns the name of a layer's parameter below model.layers.{i}."""
  return _LAYER_TENSORS[name][0]


def load_config(directory: str | pathlib.Path) -> DecoderConfig:
  """Reads the configuration in `directory`/config.json.

  Raises:
    ValueError: something in it would be ignored, or there is no such directory.
  """
  check_folder(pathlib.Path(directory))
  return DecoderConfig.from_hf(_read_json(pathlib.Path(directory) / 'config.json'))


def load_params(
  directory: str | pathlib.Path, dtype: Any = jnp.float32, *, shardings: Params | None = None
) -> tuple[DecoderConfig, Params]:
  """Loads (config, parameters in `dtype`) of a checkpoint directory.

  The files are memory-mapped, and each device is given its slices of them, layer by layer,
  converted on the way.

  Args:
    directory: with config.json and model.safetensors or an index and its files.
    dtype: of all parameters.
    shardings: a tree like the parameters: where each one goes. Without it all are on the default
      device.

  Raises:
    ValueError: missing, extra, misshapen or unreadable tensors, all of them in one message; a file
      that is not there.
  """
  directory = pathlib.Path(directory)
  config = load_config(directory)
  specs = abstract_params(config, dtype)
  files = _open_tensors(directory)
  tensors = stored_tensors(config)
  # All tensors are checked by the headers of their files before any number is read.
  check_tensors(files, {name: stored.shape for name, stored in tensors.items()}, directory, config)
  # The tensors of each parameter, in the order of the layers.
  names: dict[tuple[str, ...], list[str]] = {}
  for name, stored in tensors.items():
    names.setdefault(stored.path, []).append(name)

  bar = progress(total=len(tensors), description='read weights', unit='tensor', delay=SLOW)

  def build(path, spec, sharding=None):
    own = names[tuple(key.key for key in path)]
    bar.update(len(own))
    if tensors[own[0]].layer is None:
      return _placed(files[own[0]], own[0], None, spec.shape, spec.dtype, sharding)
    # The stack is made on the devices and filled in place: the host holds one layer at a time.
    stack = jax.jit(functools.partial(jnp.zeros, spec.shape, spec.dtype), out_shardings=sharding)()
    for index, name in enumerate(own):
      layer = _placed(
        files[name], name, tensors[name].inputs, spec.shape[1:], spec.dtype, _of_layer(sharding)
      )
      # Waited for: what is dispatched and not yet done holds its layer.
      stack = jax.block_until_ready(_layer_setter(sharding)(stack, layer, index))
    return stack

  trees = (specs,) if shardings is None else (specs, shardings)
  with bar:
    return config, jax.tree_util.tree_map_with_path(build, *trees)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
  """What a model directory holds beside the config and the tensors.

  Attributes:
    tokenizer_dir: a directory whose tokenizer files are copied.
    generation_config: contents of generation_config.json; by default the token ids of the config.
    card: the text of README.md; without it none is written.
  """

  tokenizer_dir: str | pathlib.Path | None = None
  generation_config: dict[str, Any] | None = None
  card: str | None = None


_NO_FILES = ModelFiles()


def save_checkpoint(
  directory: str | pathlib.Path,
  config: DecoderConfig,
  params: Params,
  beside: ModelFiles = _NO_FILES,
  *,
  dtype: str = 'bfloat16',
  overwrite: bool = False,
  shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a directory that transformers and the serving engines load.

  The directory is written beside its place and renamed when complete: a failure leaves what was
  there before. Where there are several processes all of them call this, on one file system; each
  writes some of the files, and one tensor at a time is gathered from the devices.

  Args:
    directory: the target; its parents are made.
    config: the configuration that `params` belong to.
    params: the parameter tree, checked against `config`; sharded in any way. Adapted matrices are
      merged in float32, one at a time.
    beside: the other files of the directory.
    dtype: 'bfloat16' or 'float32', of every tensor.
    overwrite: allows to replace a non-empty directory.
    shard_bytes: the most that a file holds, except for one tensor that is larger.

  Raises:
    ValueError: another dtype, a tree that does not fit the config (all differences listed), no
      tokenizer in `beside.tokenizer_dir`.
    FileExistsError: a non-empty target without `overwrite`, or a target that is no directory.
    RuntimeError: another process could not write its part.
  """
  if dtype not in _WRITABLE:
    raise ValueError(f'dtype={dtype!r} is not one of {_WRITABLE}')
  _check_tree(params, config)
  # Numpy arrays become jax arrays, so that all have shards to be gathered from.
  params = jax.tree.map(jnp.asarray, params)
  tokenizer_files = _tokenizer_files(beside.tokenizer_dir)
  target = pathlib.Path(directory).absolute()
  check_target(target, overwrite)
  generation_config = beside.generation_config
  if generation_config is None:
    ids = {name: config.to_hf()[name] for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    generation_config = {name: value for name, value in ids.items() if value is not None}
  # On the same file system as the target, so that renaming is one step.
  partial = target.parent / f'.{target.name}.partial'
  tensors = stored_tensors(config)
  shapes = {name: stored.shape for name, stored in tensors.items()}
  files = tensor_files.split(shapes, jnp.dtype(dtype).itemsize, shard_bytes)

  def start():
    # A run that was killed may have left a part of its directory.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for source in tokenizer_files:
      copied = partial / source.relative_to(beside.tokenizer_dir)
      copied.parent.mkdir(exist_ok=True)
      shutil.copyfile(source, copied)
    # torch_dtype is what transformers 4 and the serving engines read, dtype what transformers 5
    # reads.
    _write_json(partial / 'config.json', config.to_hf() | {'dtype': dtype, 'torch_dtype': dtype})
    _write_json(partial / 'generation_config.json', generation_config)
    if beside.card is not None:
      (partial / 'README.md').write_text(beside.card, encoding='utf-8')
    if len(files) > 1:
      _write_json(
        partial / 'model.safetensors.index.json',
        tensor_files.index(files, shapes, jnp.dtype(dtype).itemsize),
      )

  # One process makes the directory and puts it in place; all write their files into it.
  leader = jax.process_index() == 0

  def nothing():
    return None

  try:
    # Each step waits for all processes: the directory has to be there before anybody writes into
    # it, and must be complete before it is put in place.
    _together(start if leader else nothing)
    _together(lambda: _write_files(partial, files, tensors, params, jnp.dtype(dtype)))
    _together((lambda: swap_in(partial, target)) if leader else nothing)
  except BaseException:
    if leader:
      shutil.rmtree(partial, ignore_errors=True)
    raise


def check_target(directory: pathlib.Path, overwrite: bool) -> None:
  """Raises FileExistsError unless a directory may be written here."""
  if directory.exists() and not directory.is_dir():
    raise FileExistsError(f'{directory} is not a directory')
  if directory.is_dir() and any(directory.iterdir()) and not overwrite:
    raise FileExistsError(f'{directory} is not empty; pass overwrite to replace it')


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f'{path} is missing')
  record = read_json(path)
  if not isinstance(record, dict):
    raise ValueError(f'{path} does not hold a JSON object')
  return record


def _write_json(path: pathlib.Path, record: dict[str, Any]) -> None:
  path.write_text(json.dumps(record, indent=2, sort_keys=True) + '\n', encoding='utf-8')


# --- import ---


def _open_tensors(directory: pathlib.Path) -> dict[str, tensor_files.MappedFile]:
  """Returns the mapped file of each tensor: model.safetensors, or one that its index lists."""
  names = ['model.safetensors']
  index = directory / 'model.safetensors.index.json'
  if not (directory / names[0]).is_file() and index.is_file():
    listed = _read_json(index).get('weight_map')
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
  # An index is somebody else's text: a name with a path in it would lead out of the directory.
  absent = [
    name
    for name in names
    if pathlib.PurePath(name).name != name or not (directory / name).is_file()
  ]
  if absent or not names:
    raise ValueError(f'{directory}: no weights, missing files {absent}')
  found: dict[str, tensor_files.MappedFile] = {}
  for name in names:
    file = tensor_files.MappedFile(directory / name)
    # Of two tensors of one name it cannot be known which one is meant.
    twice = sorted(file.entries.keys() & found.keys())
    if twice:
      raise ValueError(f'{directory}: stored in more than one file: {twice}')
    found.update(dict.fromkeys(file.entries, file))
  return found


def _placed(
  file: tensor_files.MappedFile,
  name: str,
  inputs: int | None,
  shape: tuple[int, ...],
  dtype: Any,
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """Returns a tensor of a file on the devices of `sharding`.

  It has the layout and dtype of its parameter, or of one layer of a stack.
  """
  view = file.view(name)

  # Copied in any case: a parameter that is a view of our buffer could not be donated.
  def put(block, device):
    return jax.device_put(block, device, may_alias=False)

  if sharding is None:
    array = put(_block(view, inputs, shape, (slice(None),) * len(shape), dtype), None)
  else:
    holders: dict[tuple, tuple[tuple[slice, ...], list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
      holders.setdefault(tuple((axis.start, axis.stop) for axis in index), (index, []))[1].append(
        device
      )
    parts = []
    # Replicas get the same block, which is converted once.
    for index, devices in holders.values():
      block = _block(view, inputs, shape, index, dtype)
      parts += jax.block_until_ready([put(block, device) for device in devices])
    array = jax.make_array_from_single_device_arrays(shape, sharding, parts)
  array = jax.block_until_ready(array)
  # The pages that were read would otherwise add up to the whole file.
  file.release(name)
  return array


def _block(
  view: np.ndarray, inputs: int | None, shape: tuple[int, ...], index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
  """Returns parameter[index]; `view` has the file's layout, `shape` is that of the parameter."""
  if inputs is None:
    return tensor_files.contiguous(view.reshape(shape)[index], dtype)
  # Heads are axes of their own in the parameter, and a part of one axis in the file.
  part = view.reshape(shape[inputs:] + shape[:inputs])[index[inputs:] + index[:inputs]]
  # The file has output axes first and the parameter input axes first: one transposition of a
  # matrix.
  outs = part.ndim - inputs
  block = np.empty(part.shape[outs:] + part.shape[:outs], dtype)
  rows = math.prod(part.shape[outs:])
  tensor_files.copy_transposed(part.reshape(-1, rows), block.reshape(rows, -1))
  return block


def _of_layer(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
  """Returns the sharding of one layer of a stack that has `sharding`."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
  return sharding


@functools.lru_cache(maxsize=64)
def _layer_setter(
  sharding: jax.sharding.Sharding | None,
) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
  """Returns a function (stack, layer, index) -> the stack with that layer, in the same memory."""

  def put(stack, layer, index):
    # As integers: XLA's CPU compiler updates a stack of bfloat16 by way of a copy in float32 of all
    # of it.
    def bits(x):
      return jax.lax.bitcast_convert_type(x, f'uint{8 * stack.dtype.itemsize}')

    updated = jax.lax.dynamic_update_index_in_dim(bits(stack), bits(layer), index, 0)
    return jax.lax.bitcast_convert_type(updated, stack.dtype)

  return jax.jit(put, donate_argnums=0, out_shardings=sharding)


# --- export ---


def _write_files(
  folder: pathlib.Path,
  files: dict[str, list[str]],
  tensors: dict[str, Stored],
  params: Params,
  dtype: np.dtype,
) -> None:
  """Writes this process's share of the files.

  Gathering is collective: it goes on where writing has failed.
  """
  error = None
  bar = progress(total=len(tensors), description='write weights', unit='tensor', delay=SLOW)
  for number, (file, names) in enumerate(files.items()):
    writer = None
    for name in sorted(names):
      bar.update(1)
      # Files go round the processes, so that all of them write at once.
      mine = number % jax.process_count() == jax.process_index() and error is None
      tensor = _gathered(params, tensors[name], mine)
      if not mine:
        continue
      try:
        writer = writer or tensor_files.FileWriter(
          folder / file, {key: tensors[key].shape for key in names}, dtype
        )
        writer.write(name, tensor)
      except OSError as caught:
        error = caught
    if writer:
      writer.close()
  bar.close()
  if error:
    raise error


def _gathered(params: Params, stored: Stored, mine: bool) -> np.ndarray | None:
  """Returns the tensor on the host as its file has it, in the parameter's dtype; merged, float32.

  A process that does not write it gets None.
  """
  leaf = functools.reduce(lambda tree, key: tree[key], stored.path, params)
  stacked = stored.layer is not None
  whole = None
  held = jax.tree.leaves(leaf)[0]
  if not held.is_fully_addressable:
    whole = jax.sharding.NamedSharding(held.sharding.mesh, jax.sharding.PartitionSpec())
  if stacked or whole:
    # Waited for by all: a process that ran ahead would hold further tensors, and collectives could
    # meet in another order.
    leaf = jax.block_until_ready(_taker(whole)(leaf, stored.layer or 0, stacked))
  if not mine:
    return None
  tensor = _on_host(leaf)
  return (
    tensor.reshape(stored.shape) if stored.inputs is None else tensor.reshape(stored.shape[::-1]).T
  )


@functools.lru_cache(maxsize=64)
def _taker(sharding: jax.sharding.Sharding | None) -> Callable[[jax.Array, int, bool], jax.Array]:
  """Returns a function (parameter, layer, stacked) -> the layer of a stack, placed by `sharding`.

  A parameter that is no stack is returned whole. A layer of an adapted one is merged.
  """

  def take(leaf, layer, stacked):
    if not stacked:
      return leaf
    found = jax.tree.map(
      lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False), leaf
    )
    return merged(found, jnp.float32)

  return jax.jit(take, static_argnums=2, out_shardings=sharding)


def _on_host(array: jax.Array) -> np.ndarray:
  """Returns an array of which this process has every part as a numpy array."""
  # jax keeps the host's copy of an array that it was asked for. Copies of the parts are freed.
  parts = list({str(shard.index): shard for shard in array.addressable_shards}.values())
  if len(parts) == 1:
    return np.asarray(parts[0].data.copy())
  whole = np.empty(array.shape, array.dtype)
  for part in parts:
    whole[part.index] = np.asarray(part.data.copy())
  return whole


def _together(step: Callable[[], None]) -> None:
  """Runs this process's part of a step and waits for the others.

  Where one process has failed, all raise: none may go on with a directory that is incomplete.
  """
  if jax.process_count() == 1:
    return step()
  error = None
  try:
    step()
  except Exception as caught:
    error = caught
  # Also a process that has failed takes part, or the others would wait for it for ever.
  failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
  if error is not None:
    raise error
  if failed.size:
    raise RuntimeError(f'the export failed on processes {failed.tolist()}')


def _check_tree(params: Params, config: DecoderConfig) -> None:
  """Raises one ValueError that lists every difference between a parameter tree and the
  configuration.
  """

  def flat(tree):
    return {
      jax.tree_util.keystr(path): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_adapted)
    }

  expected = flat(abstract_params(config))
  given = flat(params)
  problems = [f'missing {name}' for name in expected if name not in given]
  problems += [f'extra {name}' for name in given if name not in expected]
  problems += [
    f'{name} has shape {given[name]}, expected {shape}'
    for name, shape in expected.items()
    if name in given and given[name] != shape
  ]
  if problems:
    raise ValueError('the parameters do not fit the config: ' + '; '.join(problems))


def _tokenizer_files(tokenizer_dir: str | pathlib.Path | None) -> list[pathlib.Path]:
  if tokenizer_dir is None:
    return []
  folder = pathlib.Path(tokenizer_dir)
  files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
  # Where a tokenizer has several templates, transformers keeps all but the default one here.
  files += sorted(folder.glob('additional_chat_templates/*.jinja'))
  if not {'tokenizer.json', 'vocab.json', 'tokenizer.model'} & {file.name for file in files}:
    raise ValueError(f'{folder} holds no tokenizer')
  return files


def swap_in(partial: pathlib.Path, target: pathlib.Path) -> None:
  """Puts the complete directory in its place; what was there is removed last."""
  # A directory cannot be replaced in one step: the old one steps aside and comes back if renaming
  # fails.
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
