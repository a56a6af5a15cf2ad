"""GGUF files as llama.cpp's converter writes them, from models and tokenizers of Hugging Face."""

import json
import pathlib
import re
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf.quants import quantize

_NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'self_attn.o_proj': 'attn_output',
}


def file_name(name: str) -> str:
  """llama.cpp's name of a tensor of a Hugging Face model."""
  stem, kind = name.rsplit('.', 1)
  layer = re.fullmatch(r'model\.layers\.(\d+)\.(.*)', stem)
  part = layer[2] if layer else stem
  part = _NAMES.get(part) or re.sub(
    r'mlp\.(\w+)_proj', r'ffn_\1', re.sub(r'self_attn\.(\w+?)(_proj)?$', r'attn_\1', part)
  )
  return f'blk.{layer[1]}.{part}.{kind}' if layer else f'{part}.{kind}'


def quantised(tensor: np.ndarray, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
  """(bytes, type); vectors stay in float32, as converters keep them."""
  chosen = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else 'F32']
  return quantize(np.ascontiguousarray(tensor, np.float32), chosen), chosen


def model_fields(config: Any) -> dict[str, Any]:
  """The fields that say what a transformers configuration says."""
  kind = config.model_type
  rope = config.rope_parameters
  fields = {
    f'{kind}.block_count': config.num_hidden_layers,
    f'{kind}.context_length': config.max_position_embeddings,
    f'{kind}.embedding_length': config.hidden_size,
    f'{kind}.feed_forward_length': config.intermediate_size,
    f'{kind}.attention.head_count': config.num_attention_heads,
    f'{kind}.attention.head_count_kv': config.num_key_value_heads,
    f'{kind}.attention.layer_norm_rms_epsilon': float(config.rms_norm_eps),
    f'{kind}.rope.freq_base': float(rope['rope_theta']),
  }
  if getattr(config, 'head_dim', None):
    fields |= {
      f'{kind}.attention.key_length': config.head_dim,
      f'{kind}.attention.value_length': config.head_dim,
    }
  if rope['rope_type'] == 'linear':
    fields |= {
      f'{kind}.rope.scaling.type': 'linear',
      f'{kind}.rope.scaling.factor': float(rope['factor']),
    }
  return fields


def rope_factors(config: Any) -> np.ndarray:
  """What Llama 3.1 divides frequencies by, pair by pair, as the converter computes it."""
  rope = config.rope_parameters
  head_dim = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
  low = rope['original_max_position_embeddings'] / rope['low_freq_factor']
  high = rope['original_max_position_embeddings'] / rope['high_freq_factor']
  factors = []
  for pair in range(head_dim // 2):
    wavelength = 2 * np.pi * rope['rope_theta'] ** (2 * pair / head_dim)
    smooth = (rope['original_max_position_embeddings'] / wavelength - rope['low_freq_factor']) / (
      rope['high_freq_factor'] - rope['low_freq_factor']
    )
    between = 1 / ((1 - smooth) / rope['factor'] + smooth)
    factors.append(1 if wavelength < high else rope['factor'] if wavelength > low else between)
  return np.array(factors, np.float32)


def tokenizer_fields(tokenizer: tokenizers.Tokenizer, pre: str, rows: int) -> dict[str, Any]:
  """The fields of a byte-level BPE tokenizer, filled up to the rows of an embedding."""
  record = json.loads(tokenizer.to_str())
  vocabulary = tokenizer.get_vocab()
  tokens = [f'[PAD{number}]' for number in range(rows)]
  kinds = [5] * rows
  for token, number in vocabulary.items():
    tokens[number], kinds[number] = token, 1
  for added in record['added_tokens']:
    kinds[added['id']] = 3 if added['special'] else 4
  merges = [m if isinstance(m, str) else ' '.join(m) for m in record['model']['merges']]
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': kinds,
    'tokenizer.ggml.merges': merges,
  }


def write(path: pathlib.Path, fields: dict[str, Any], tensors: dict[str, Any]) -> pathlib.Path:
  """Writes a file; a tensor is float32, or (bytes, type). A field that is None is left out."""
  fields = dict(fields)
  writer = gguf.GGUFWriter(path, fields.pop('general.architecture'))
  for name, value in fields.items():
    if isinstance(value, bool):
      writer.add_bool(name, value)
    elif isinstance(value, int):
      writer.add_uint32(name, value)
    elif isinstance(value, float):
      writer.add_float32(name, value)
    elif isinstance(value, str):
      writer.add_string(name, value)
    elif value is not None:
      writer.add_array(name, value)
  for name, tensor in tensors.items():
    if isinstance(tensor, tuple):
      writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
    else:
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def model_tensors(model: Any, kind: str = 'F32') -> dict[str, Any]:
  """The tensors of a transformers model, each of the type `kind`, by llama.cpp's names."""
  config = model.config
  tensors = {}
  for name, value in model.state_dict().items():
    if name == 'lm_head.weight' and config.tie_word_embeddings:
      continue
    array = value.float().numpy()
    heads = {'q_proj': config.num_attention_heads, 'k_proj': config.num_key_value_heads}
    which = name.split('.')[-2]
    if config.model_type == 'llama' and which in heads:
      # llama.cpp turns neighbours where Hugging Face turns the halves of a head.
      halves = array.reshape(heads[which], 2, -1, array.shape[-1])
      array = halves.swapaxes(1, 2).reshape(array.shape)
    tensors[file_name(name)] = quantised(array, kind)
  if config.rope_parameters['rope_type'] == 'llama3':
    tensors['rope_freqs.weight'] = rope_factors(config)
  return tensors
