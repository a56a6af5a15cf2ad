"""Turns a GGUF file, the format of llama.cpp, into a Hugging Face directory.

    import_gguf(pathlib.Path('model.gguf'), pathlib.Path('DIR'), dtype='float32')

A GGUF file holds a whole model: sizes, weights, which are mostly rounded to blocks of few bits, and
tokenizer. The directory holds the numbers that the blocks stand for, so that a model can be
trained. Letters: N heads, H the size of a head, D what a projection reads.
"""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from dcore_jax.files import write_json_atomic
from dcore_jax.models import rotary, tensor_files
from dcore_jax.models.config import DecoderConfig, RopeScaling
from dcore_jax.models.gguf_file import GgufFile
from dcore_jax.models.gguf_tokenizer import Tokenizer, read_tokenizer
from dcore_jax.models.hf_checkpoint import check_target, stored_tensors, swap_in
from dcore_jax.progress import SLOW, progress

DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
_ARCHITECTURES = ('llama', 'qwen2', 'qwen3')
_TOP_TENSORS = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
}
_LAYER_TENSORS = {
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
# What Llama 3.1's frequencies are divided by; a file has no field for how it was computed.
_ROPE_FACTORS = 'rope_freqs.weight'
# Fields, behind the architecture's name, that are read below.
_READ = frozenset(
  {
    'block_count',
    'context_length',
    'embedding_length',
    'feed_forward_length',
    'vocab_size',
    'attention.head_count',
    'attention.head_count_kv',
    'attention.key_length',
    'attention.value_length',
    'attention.layer_norm_rms_epsilon',
    'attention.causal',
    'rope.dimension_count',
    'rope.freq_base',
    'rope.scale_linear',
    'rope.scaling.type',
    'rope.scaling.factor',
  }
)
# Fields that compute nothing, or only with a scaling that is refused.
_PASSED = frozenset(
  {
    'rope.scaling.original_context_length',
    'rope.scaling.finetuned',
    'tensor_data_layout',
  }
)
# A field that says that there are no such layers is as good as none.
_ABSENT = (0, False, '')
_LISTED_PROBLEMS = 5


def import_gguf(
  source: pathlib.Path, out: pathlib.Path, *, dtype: str = 'float32', overwrite: bool = False
) -> DecoderConfig:
  """Writes the model of a GGUF file as a Hugging Face directory; returns its configuration.

  The directory is written beside its place and renamed when complete. One tensor at a time is held
  in float32.

  Args:
    source: the file.
    out: the directory to write; its parents are made.
    dtype: 'float32', 'bfloat16' or 'float16', of every tensor.
    overwrite: allows to replace a non-empty directory.

  Raises:
    ValueError: an architecture, tokenizer, field or tensor that this project does not read, a file
      that is damaged, or numbers that `dtype` cannot hold.
    FileExistsError: a non-empty target without `overwrite`, or a target that is no directory.
  """
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r} is not one of {list(DTYPES)}')
  target = pathlib.Path(out).absolute()
  check_target(target, overwrite)
  if target.resolve() in pathlib.Path(source).resolve().parents:
    raise ValueError(f'{source} lies in {out}, which would be replaced: name another directory')
  file = GgufFile(pathlib.Path(source))
  try:
    architecture = _architecture(file)
    tokenizer = read_tokenizer(file.fields)
    config = read_config(file, architecture, tokenizer)
    names = _names(file, config)
  except ValueError as error:
    raise ValueError(f'{source}: {error}') from error
  partial = target.parent / f'.{target.name}.partial'
  shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
  partial.mkdir(parents=True)
  try:
    tokenizer.save(partial, longest=config.max_position_embeddings)
    write_json_atomic(
      partial / 'config.json', config.to_hf() | {'dtype': dtype, 'torch_dtype': dtype}
    )
    write_json_atomic(partial / 'generation_config.json', tokenizer.generation_config())
    _write_tensors(partial / 'model.safetensors', file, config, names, dtype)
    swap_in(partial, target)
  finally:
    # There is none where all went well.
    shutil.rmtree(partial, ignore_errors=True)
  return config


def _architecture(file: GgufFile) -> str:
  """The file's architecture; ValueError where it is no model that can be read here."""
  kind = file.fields.get('general.type', 'model')
  if not isinstance(kind, str) or kind != 'model':
    raise ValueError(f'its general.type is {kind!r}, expected a model')
  architecture = file.fields.get('general.architecture')
  if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
    raise ValueError(f'its architecture is {architecture!r}; readable are {list(_ARCHITECTURES)}')
  parts = file.fields.get('split.count', 0)
  if not isinstance(parts, int) or parts not in (0, 1):
    raise ValueError(
      f'it is one of {parts} parts of a model: join them first (llama-gguf-split --merge)'
    )
  return architecture


def read_config(file: GgufFile, architecture: str, tokenizer: Tokenizer) -> DecoderConfig:
  """Returns the configuration that a file's fields and tensors say.

  Raises:
    ValueError: a field that is missing, of the wrong type, or would be ignored although it changes
      what the weights compute.
  """
  fields = _Fields(file.fields, architecture)
  fields.check_unknown()
  if fields.value('attention.causal', True) is not True:
    raise ValueError(f'{architecture}.attention.causal is not true: tokens would see later ones')
  hidden = fields.integer('embedding_length')
  heads = fields.integer('attention.head_count')
  if not heads or hidden % heads and 'attention.key_length' not in fields:
    raise ValueError(f'{hidden} numbers cannot be split into {heads} heads')
  head_dim = fields.integer('attention.key_length', hidden // heads)
  for name in ('attention.value_length', 'rope.dimension_count'):
    if fields.integer(name, head_dim) != head_dim:
      raise ValueError(
        f'{architecture}.{name} is {fields.integer(name)}, and a head has {head_dim} numbers: '
        'other sizes for values or rotation are not supported'
      )
  embedding = file.tensors.get('token_embd.weight')
  if embedding is None:
    raise ValueError('it holds no token_embd.weight, so that it is no whole model')
  rows = embedding.shape[0]
  if not tokenizer.size <= rows:
    raise ValueError(f'the tokenizer has {tokenizer.size} tokens, token_embd.weight {rows} rows')
  layers = fields.integer('block_count')
  # A damaged number would otherwise be a list of billions of missing tensors.
  if layers > len(file.tensors):
    raise ValueError(
      f'{architecture}.block_count is {layers}, and there are {len(file.tensors)} tensors'
    )
  record = {
    'model_type': architecture,
    'vocab_size': rows,
    'hidden_size': hidden,
    'intermediate_size': fields.integer('feed_forward_length'),
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': fields.integer('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'rms_norm_eps': fields.number('attention.layer_norm_rms_epsilon'),
    'max_position_embeddings': fields.integer('context_length'),
    # llama.cpp computes with the embedding where there is no matrix for the output.
    'tie_word_embeddings': 'output.weight' not in file.tensors,
    'rope_theta': fields.number('rope.freq_base', 10000.0),
    'bos_token_id': tokenizer.ids.get('bos'),
    'eos_token_id': tokenizer.ids.get('eos'),
    'pad_token_id': tokenizer.ids.get('pad'),
  }
  scaling = _rope_scaling(file, fields, head_dim, record['rope_theta'])
  return DecoderConfig.from_hf(record | {'rope_scaling': scaling and scaling.to_hf()})


class _Fields:
  """The fields of an architecture, by their names behind its own."""

  def __init__(self, fields: dict[str, Any], architecture: str):
    self._all = fields
    self._prefix = f'{architecture}.'

  def __contains__(self, name: str) -> bool:
    return self._prefix + name in self._all

  def integer(self, name: str, default: int | None = None) -> int:
    """Returns a positive integer; where a file has one for each layer, these must be equal."""
    value = self.value(name, default)
    if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:
      value = value[0].item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      shown = 'one for each layer' if isinstance(value, np.ndarray) else repr(value)
      raise ValueError(f'{self._prefix}{name} is {shown}, expected a positive integer')
    return value

  def number(self, name: str, default: float | None = None) -> float:
    """Returns a positive number."""
    value = self.value(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
      raise ValueError(f'{self._prefix}{name} is {value!r}, expected a positive number')
    # Stored as float32, where 1e-5 is 9.9999997e-06: the shortest number that means the same.
    return float(str(np.float32(value)))

  def value(self, name: str, default: Any = None) -> Any:
    """Returns a field of any type; ValueError where it is missing and there is no default."""
    value = self._all.get(self._prefix + name, default)
    if value is None:
      raise ValueError(f'field {self._prefix}{name} is missing')
    return value

  def check_unknown(self) -> None:
    """ValueError for fields that nobody here reads and that say more than that there is none."""
    known = {self._prefix + name for name in _READ | _PASSED}
    unknown = []
    for name, value in self._all.items():
      if name not in known and name.startswith(self._prefix):
        # Of a list, no truth can be asked.
        if isinstance(value, (np.ndarray, list)) or value not in _ABSENT:
          unknown.append(name)
    if unknown:
      raise ValueError(f'its fields {sorted(unknown)} are not supported')


def _rope_scaling(
  file: GgufFile, fields: _Fields, head_dim: int, theta: float
) -> RopeScaling | None:
  """How frequencies are slowed: as the fields say (linear) or as the factors do (llama3)."""
  # A factor whose kind no field names is that of a linear scaling, for llama.cpp too.
  kind = fields.value('rope.scaling.type', 'linear')
  if not isinstance(kind, str) or kind not in ('none', 'linear'):
    raise ValueError(f'rope scaling {kind!r} is not supported, only linear and that of Llama 3.1')
  factor = 1.0
  if kind == 'linear':
    # The older name of the field.
    older = fields.number('rope.scale_linear', 1.0)
    factor = fields.number('rope.scaling.factor', older)
  linear = None if factor == 1.0 else RopeScaling('linear', factor)
  if _ROPE_FACTORS not in file.tensors:
    return linear
  factors = file.dequantized(_ROPE_FACTORS)
  if factors.shape != (head_dim // 2,) or not np.all((factors > 0) & (factors < np.inf)):
    raise ValueError(
      f'{_ROPE_FACTORS} has shape {list(factors.shape)}, expected {head_dim // 2} positive numbers'
    )
  if np.all(factors == 1):
    return linear
  if linear:
    raise ValueError(f'{_ROPE_FACTORS} and linear rope scaling together are not supported')
  return llama3_scaling(factors, head_dim, theta)


def llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling:
  """Returns the scaling of Llama 3.1 that divides the frequencies by `factors`.

  Args:
    factors: float32 [H/2], what the frequency of each pair is divided by.
    head_dim: H.
    theta: the base of the frequencies.

  Raises:
    ValueError: there is none.
  """
  plain = rotary.frequencies(head_dim, theta).astype(np.float64)
  slowest = float(str(factors.max()))
  # 1 / factor = kept + (1 - kept) / slowest, where kept is linear in the pair's turns a token:
  # (context * turns - low) / (high - low). Only ratios count, so that low is 1.
  with np.errstate(all='ignore'):  # where nothing is divided by more than 1, none is kept
    kept = (1 / factors.astype(np.float64) - 1 / slowest) / (1 - 1 / slowest)
  turns = plain / (2 * np.pi)
  for high, context in _llama3_candidates(turns, kept):
    # A fit is as exact as float32 is; what was meant is a round number.
    for digits in (0, 2, 6):
      fields = (round(float(high), digits), round(float(context)))
      if fields[0] <= 1 or fields[1] < 1:
        continue
      scaling = RopeScaling(
        rope_type='llama3',
        factor=slowest,
        low_freq_factor=1.0,
        high_freq_factor=fields[0],
        original_max_position_embeddings=fields[1],
      )
      # float32 has 24 bits, and the factors went through two roundings.
      if np.allclose(
        rotary.frequencies(head_dim, theta, scaling), plain / factors, rtol=1e-5, atol=0
      ):
        return scaling
  raise ValueError(f"{_ROPE_FACTORS} holds factors that are not those of Llama 3.1's rope scaling")


def _llama3_candidates(turns: np.ndarray, kept: np.ndarray) -> Iterator[tuple[float, float]]:
  """(high, context) by which the pairs with these turns a token may be kept as they are."""
  mixed = (kept > 1e-4) & (kept < 1 - 1e-4)  # the others are cut off at 0 and 1
  if mixed.sum() > 1:
    slope, offset = np.polyfit(turns[mixed], kept[mixed], 1)
    if offset < 0:
      yield 1 - 1 / offset, -slope / offset
  for high in (4.0, 2.0, 8.0, 16.0, 1.5):
    # Llama 3.1's own comes first. A single pair, or none, does not tell one from the other.
    context = ((high - 1) * kept[mixed][0] + 1) / turns[mixed][0] if mixed.any() else 8192.0
    yield high, context
  whole, divided = turns[kept >= 0.5], turns[kept < 0.5]
  if not mixed.any() and whole.size and divided.size:
    # The band lies between two pairs: it begins just above the faster one that is divided.
    context = int(1 / divided.max())
    yield min(4.0, int(100 * whole.min() * context) / 100), context


def _names(file: GgufFile, config: DecoderConfig) -> dict[str, str]:
  """Hugging Face's name -> the file's, of every tensor; one ValueError for all that do not fit."""
  expected = stored_tensors(config)
  names = {name: _file_name(name) for name in expected}
  problems = []
  for name, stored in expected.items():
    tensor = file.tensors.get(names[name])
    if tensor is None:
      problems.append(f'{names[name]} is missing')
    elif tensor.shape != stored.shape:
      problems.append(
        f'{names[name]} has shape {list(tensor.shape)}, expected {list(stored.shape)}'
      )
  extra = file.tensors.keys() - set(names.values()) - {_ROPE_FACTORS}
  problems += [f'{name} is not a tensor of {config.model_type}' for name in sorted(extra)]
  if problems:
    shown = problems[:_LISTED_PROBLEMS]
    more = len(problems) - len(shown)
    raise ValueError('; '.join(shown) + (f'; and {more} more' if more else ''))
  return names


def _file_name(name: str) -> str:
  """llama.cpp's name of a tensor."""
  stem, _, kind = name.rpartition('.')
  if stem in _TOP_TENSORS:
    return f'{_TOP_TENSORS[stem]}.{kind}'
  _, _, layer, part = stem.split('.', 3)
  return f'blk.{layer}.{_LAYER_TENSORS[part]}.{kind}'


def _write_tensors(
  path: pathlib.Path, file: GgufFile, config: DecoderConfig, names: dict[str, str], dtype: str
) -> None:
  expected = stored_tensors(config)
  stored_dtype = tensor_files.DTYPES[DTYPES[dtype]]
  shapes = {name: stored.shape for name, stored in expected.items()}
  writer = tensor_files.FileWriter(path, shapes, stored_dtype)
  try:
    for name in progress(writer.names, description='import', unit='tensor', delay=SLOW):
      tensor = file.dequantized(names[name])
      # Of 16-bit floats those of float16 end at 65,504.
      most = 65504 if dtype == 'float16' else np.finfo(np.float32).max
      if not np.abs(tensor).max() <= most:  # also where it is NaN
        raise ValueError(
          f'{file.path}: tensor {names[name]} holds numbers that {dtype} cannot hold: '
          'the file is damaged, or --dtype=bfloat16 is wanted'
        )
      writer.write(name, _heads_in_halves(name, tensor, config))
  finally:
    writer.close()


def _heads_in_halves(name: str, tensor: np.ndarray, config: DecoderConfig) -> np.ndarray:
  """A projection whose heads have first and second components of the rotated pairs in two halves.

  For models of type llama, and for these alone, a file has the two of a pair side by side.
  """
  if config.model_type != 'llama' or not name.endswith(('q_proj.weight', 'k_proj.weight')):
    return tensor
  pairs_NH2D = tensor.reshape(-1, config.head_dim // 2, 2, tensor.shape[-1])
  return pairs_NH2D.swapaxes(1, 2).reshape(tensor.shape)
