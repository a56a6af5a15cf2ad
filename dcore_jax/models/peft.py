"""Adapters as a directory that `peft` loads: adapter_config.json and adapter_model.safetensors.

torch stores [out, in], and a tensor for each layer; adapters here have the layers stacked, input
axes first, and heads as axes of their own (`learn.lora`).
"""

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from dcore_jax.models import tensor_files
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import check_target, layer_tensor, swap_in


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
  """What a directory of adapters says beside their numbers.

  Attributes:
    alpha: products count alpha / rank times.
    base: the model that they stand beside, a directory.
    dtype: 'bfloat16' or 'float32', of every tensor.
  """

  alpha: float
  base: str
  dtype: str = 'float32'


def save_adapters(
  directory: str | pathlib.Path,
  config: DecoderConfig,
  adapters: dict[str, dict[str, Any]],
  files: AdapterFiles,
  *,
  overwrite: bool = False,
) -> None:
  """Writes the directory beside its place and renames it when it is complete.

  Args:
    directory: the target; its parents are made.
    config: of the base.
    adapters: of `learn.lora`, all of one rank.
    files: what else the directory says.
    overwrite: allows to replace a non-empty directory.

  Raises:
    FileExistsError: see `check_target`.
  """
  target = pathlib.Path(directory).absolute()
  check_target(target, overwrite)
  partial = target.parent / f'.{target.name}.partial'
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    record = _config_record(adapters, files)
    text = json.dumps(record, indent=2, sort_keys=True) + '\n'
    (partial / 'adapter_config.json').write_text(text, encoding='utf-8')
    tensors = _tensors(config, adapters)
    writer = tensor_files.FileWriter(
      partial / 'adapter_model.safetensors',
      {name: tensor.shape for name, tensor in tensors.items()},
      jnp.dtype(files.dtype),
    )
    for name in sorted(tensors):
      writer.write(name, tensors[name])
    writer.close()
    swap_in(partial, target)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _config_record(adapters: dict[str, dict[str, Any]], files: AdapterFiles) -> dict[str, Any]:
  """Returns the contents of adapter_config.json."""
  rank = next(iter(adapters.values()))['a'].shape[-1]
  modules = []
  for name in adapters:
    # q -> self_attn.q_proj.weight -> q_proj
    modules.append(layer_tensor(name).split('.')[-2])
  return {
    'base_model_name_or_path': files.base,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'lora_alpha': files.alpha,
    'lora_dropout': 0.0,
    'peft_type': 'LORA',
    'r': rank,
    'target_modules': sorted(modules),
    'task_type': 'CAUSAL_LM',
    'use_rslora': False,
  }


def _tensors(config: DecoderConfig, adapters: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
  """Returns every tensor of the file by its name."""
  tensors = {}
  for name, factors in adapters.items():
    a = np.asarray(factors['a'], np.float32)
    b = np.asarray(factors['b'], np.float32)
    rank = a.shape[-1]
    for layer in range(config.num_hidden_layers):
      module = f'base_model.model.model.layers.{layer}.{layer_tensor(name)}'
      module = module.removesuffix('.weight')
      # [*in, rank] -> [rank, in], and [rank, *out] -> [out, rank].
      tensors[f'{module}.lora_A.weight'] = a[layer].reshape(-1, rank).T
      out = math.prod(b.shape[2:])
      tensors[f'{module}.lora_B.weight'] = b[layer].reshape(rank, out).T
  return tensors
