"""The numbers that define a decoder, under the field names of a Hugging Face `config.json`.

Letters used in shapes everywhere: V vocab_size, D hidden_size, F intermediate_size,
L num_hidden_layers, N num_attention_heads, K num_key_value_heads, H head_dim, G = N / K; B rows,
T query tokens, S key positions.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp


class _Family(NamedTuple):
  """What a `model_type` says about a file and about the layers.

  Attributes:
    architecture: the class that transformers loads.
    qkv_bias: whether queries, keys and values have biases.
    qk_norm: whether queries and keys are normalised head by head.
    defaults: the defaults of its config class in transformers. None follows from other fields:
      head_dim is hidden_size / num_attention_heads, and there are as many key heads as query heads.
    required: the values that a field may have if a file has it, since no other is implemented.
    written: fields with their values that go into the files that we write.
  """

  architecture: str
  qkv_bias: bool
  qk_norm: bool
  defaults: Mapping[str, Any]
  required: Mapping[str, tuple[Any, ...]]
  written: Mapping[str, Any]


# transformers leaves a field out of a file if it has the class's default, so that these numbers are
# a part of the format.
_DEFAULTS = {
  'rope_theta': 10000.0,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'initializer_range': 0.02,
  'head_dim': None,
}
_QWEN_DEFAULTS = _DEFAULTS | {'num_key_value_heads': 32, 'max_position_embeddings': 32768}
_NO_BIAS = {'attention_bias': (False, None), 'mlp_bias': (False, None)}
_NO_WINDOW = {'use_sliding_window': False, 'sliding_window': None}
# DeepSeek-Coder, Llama and what descends from them are all 'llama'; Qwen2.5 is 'qwen2'.
_FAMILIES = {
  'qwen3': _Family(
    'Qwen3ForCausalLM',
    qkv_bias=False,
    qk_norm=True,
    defaults=_QWEN_DEFAULTS | {'head_dim': 128},
    required=_NO_BIAS,
    written={'attention_bias': False, **_NO_WINDOW},
  ),
  # Its query, key and value projections have biases whatever a file says. The base models of
  # Qwen2.5, and what was distilled into them, say that their positions have one axis.
  'qwen2': _Family(
    'Qwen2ForCausalLM',
    qkv_bias=True,
    qk_norm=False,
    defaults=_QWEN_DEFAULTS,
    required={
      'attention_bias': (True, None),
      'mlp_bias': (False, None),
      'use_mrope': (False, None),
    },
    written=_NO_WINDOW,
  ),
  'llama': _Family(
    'LlamaForCausalLM',
    qkv_bias=False,
    qk_norm=False,
    defaults=_DEFAULTS
    | {
      'num_key_value_heads': None,
      'max_position_embeddings': 2048,
      'bos_token_id': 1,
      'eos_token_id': 2,
    },
    # Above 1 the projections are summed in slices, in another order than one product sums them.
    required=_NO_BIAS | {'pretraining_tp': (1, None)},
    written={'attention_bias': False, 'mlp_bias': False},
  ),
}
_REQUIRED = {
  'hidden_act': ('silu', 'swish'),
  'attention_dropout': (0, None),
  'is_encoder_decoder': (False, None),
  'partial_rotary_factor': (1, None),
  'rope_interleaved': (False, None),
  # What only models of other kinds have, and older versions of transformers wrote into every file.
  'add_cross_attention': (False, None),
  'cross_attention_hidden_size': (None,),
  'pruned_heads': ({}, None),
  'tie_encoder_decoder': (False, None),
}
# Statements about the file, not about the function the weights compute; reading past them changes
# nothing. To them come what transformers itself declares (`_declared`), and names that begin with
# one of `_DESCRIPTIVE_PREFIXES`.
_DESCRIPTIVE = frozenset(
  {
    'model_type',
    'torch_dtype',
    'max_window_layers',
    # How transformers 4 runs a model, and what the model was trained for.
    'attn_implementation',
    'finetuning_task',
    'is_decoder',
    'output_attentions',
    'prefix',
    'task_specific_params',
    'tf_legacy_loss',
    'torchscript',
    'use_bfloat16',
    'use_cache',
    # Which tokenizer and which tokens its texts are read and written with.
    'cls_token_id',
    'mask_token_id',
    'processor_class',
    'sep_token_id',
    'tokenizer_class',
    'unk_token_id',
    # What the model was made from, for how long a text, and where.
    'base_model',
    'is_llama_config',
    'license',
    'max_sequence_length',
    'model_max_length',
    'model_name',
    'model_name_or_path',
    'name_or_path',
    'transformers.js_config',
    'trl_version',
  }
)
# Where the programs that round weights to few bits say how they did it.
_QUANTISED = ('quantization_config', 'quantization', 'compression_config')
# transformers keeps fields with an underscore for itself; in our families none of them computes
# anything. Unsloth marks the files that it wrote.
_DESCRIPTIVE_PREFIXES = ('_', 'unsloth_')
_SIZES = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'num_key_value_heads',
  'head_dim',
  'max_position_embeddings',
)
_ROPE_FIELDS = {
  'linear': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are slowed down for contexts longer than those of pretraining.

  rotary.py has the formulas.

  'linear' divides all by `factor` (DeepSeek-Coder), 'llama3' the slow ones (Llama-3.1); the other
  fields are its.
  """

  rope_type: str
  factor: float
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  original_max_position_embeddings: int | None = None

  def __post_init__(self):
    if not isinstance(self.rope_type, str) or self.rope_type not in _ROPE_FIELDS:
      raise ValueError(
        f'rope_type {self.rope_type!r} is not supported, only {sorted(_ROPE_FIELDS)}'
      )
    # A field that this kind of scaling would ignore is an error too: its file means something else.
    for field in dataclasses.fields(self)[1:]:
      value = getattr(self, field.name)
      if field.name not in _ROPE_FIELDS[self.rope_type]:
        if value is not None:
          raise ValueError(f'{self.rope_type} rope scaling does not read {field.name}={value!r}')
      # True is an int in Python, and would count as the factor 1.
      elif not _is_number(value) or value <= 0:
        raise ValueError(
          f'{field.name} of {self.rope_type} rope scaling must be a positive number, got {value!r}'
        )
    # The formula divides by the difference of the two.
    if self.rope_type == 'llama3' and not self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        f'low_freq_factor={self.low_freq_factor} is not below '
        f'high_freq_factor={self.high_freq_factor}'
      )

  @classmethod
  def from_hf(cls, record: Mapping[str, Any]) -> 'RopeScaling':
    """Reads the fields of a scaling.

    Raises:
      ValueError: a field is missing, or one is there that would be ignored.
    """
    unknown = sorted(record.keys() - {field.name for field in dataclasses.fields(cls)})
    if unknown:
      raise ValueError(f'unknown fields {unknown} of a rope scaling')
    # Without a factor the check of its value says that it is missing.
    return cls(**{'factor': None, **record})

  def to_hf(self) -> dict[str, Any]:
    """Returns the fields that are set, by the names that a config.json has."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder of the Qwen3, Qwen2 or Llama family.

  Hashable, so that it can be a static argument of a jitted function.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = True
  max_position_embeddings: int = 40960
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None
  model_type: str = 'qwen3'
  rope_scaling: RopeScaling | None = None

  def __post_init__(self):
    if self.model_type not in _FAMILIES:
      raise ValueError(f'model_type {self.model_type!r} is not supported, only {sorted(_FAMILIES)}')
    # Configs come from files that people edit, so that each number is checked here once.
    for name in (*_SIZES, 'rope_theta', 'rms_norm_eps'):
      value = getattr(self, name)
      whole = name in _SIZES
      if not (_is_integer(value) if whole else _is_number(value)) or value <= 0:
        raise ValueError(
          f'{name} must be a positive {"integer" if whole else "number"}, got {value!r}'
        )
    if not _is_number(self.initializer_range) or self.initializer_range < 0:
      raise ValueError(
        f'initializer_range must be a number of at least 0, got {self.initializer_range!r}'
      )
    self._check_token_ids()
    # The text 'false' would count as true.
    if not isinstance(self.tie_word_embeddings, bool):
      raise ValueError(
        f'tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}'
      )
    # Grouped-query attention gives each key head the same number of query heads, G.
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f'num_attention_heads={self.num_attention_heads} is not a multiple of '
        f'num_key_value_heads={self.num_key_value_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even: rotary embedding turns pairs')

  def _check_token_ids(self) -> None:
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
      value = getattr(self, name)
      several = value if name == 'eos_token_id' and isinstance(value, tuple) else (value,)
      # -1 is how early Llama conversions write that there is no such token.
      if not all(one is None or (_is_integer(one) and one >= -1) for one in several):
        raise ValueError(f'{name} must be a token id, got {value!r}')

  @classmethod
  def from_hf(cls, record: dict[str, Any]) -> 'DecoderConfig':
    """Reads the contents of a `config.json`.

    The defaults of the family's config class in transformers apply to what a file leaves out (those
    of this class are a user's), except for the sizes, which must be there.

    Raises:
      ValueError: names every field whose meaning would be ignored, and those that are missing.
    """
    if not isinstance(record, Mapping):
      raise ValueError(f'config.json holds {type(record).__name__}, expected a JSON object')
    kind = record.get('model_type')
    if not isinstance(kind, str) or kind not in _FAMILIES:
      raise ValueError(f'model_type {kind!r} is not supported, only {sorted(_FAMILIES)}')
    family = _FAMILIES[kind]
    rope, problems = _rope(record)
    problems = _unsupported(record, family) + problems
    fields = (
      # Later entries win: the file over the defaults, and the rotary fields, read from three
      # places, last.
      family.defaults
      | {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name in record}
      | rope
    )
    if isinstance(fields.get('eos_token_id'), list):
      # A list would make the config unhashable.
      fields['eos_token_id'] = tuple(fields['eos_token_id'])
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    problems += [f'{name} is missing' for name in sorted(required - fields.keys())]
    # All problems in one error, so that a person need not find them one by one.
    if problems:
      raise ValueError('config.json: ' + '; '.join(problems))
    if fields['num_key_value_heads'] is None:
      fields['num_key_value_heads'] = fields['num_attention_heads']
    if fields['head_dim'] is None:
      fields['head_dim'] = _divided(fields['hidden_size'], fields['num_attention_heads'])
    return cls(**fields)

  def to_hf(self) -> dict[str, Any]:
    """Returns the contents of a `config.json`.

    `from_hf` and transformers (4.51 and later, 5 included) read them back.
    """
    family = _FAMILIES[self.model_type]
    record = dataclasses.asdict(self)
    if isinstance(self.eos_token_id, tuple):
      record['eos_token_id'] = list(self.eos_token_id)
    return (
      record
      | family.written
      | {
        'architectures': [family.architecture],
        'hidden_act': 'silu',
        'attention_dropout': 0.0,
        'use_cache': True,
        'rope_scaling': self.rope_scaling and self.rope_scaling.to_hf(),
      }
    )

  @property
  def qkv_bias(self) -> bool:
    """Whether queries, keys and values have biases."""
    return _FAMILIES[self.model_type].qkv_bias

  @property
  def qk_norm(self) -> bool:
    """Whether queries and keys are normalised head by head."""
    return _FAMILIES[self.model_type].qk_norm

  @property
  def stop_token_ids(self) -> tuple[int, ...]:
    """eos_token_id as a tuple, empty where none is set."""
    ids = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
    return tuple(one for one in ids if one is not None and one >= 0)

  @property
  def param_count(self) -> int:
    """The number of stored parameters; a tied head is counted once."""
    # Two norms of a layer, and its norms of queries and keys, which all heads share.
    vectors = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
    if self.qkv_bias:
      vectors += (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
    return (
      (self._layer_matmul_params + vectors) * self.num_hidden_layers + self.hidden_size + embeddings
    )

  def flops_per_token(self, seq_len: int) -> float:
    """Returns the forward floating-point operations per token, head included.

    They are averaged over a causal row of `seq_len` tokens. A training step without
    rematerialisation costs three times as much.
    """
    # A multiply-add is two operations: 2 per matrix parameter, and per layer 4 N H for each key
    # that a query sees. That is (seq_len + 1) / 2 keys on average.
    matmul = self._layer_matmul_params * self.num_hidden_layers + self.vocab_size * self.hidden_size
    attention = 4 * self.num_attention_heads * self.head_dim * (seq_len + 1) / 2
    return 2.0 * matmul + self.num_hidden_layers * attention

  def kv_bytes_per_token(self, dtype: Any) -> int:
    """Returns the bytes of keys and values that one cached token holds in all layers."""
    return (
      2
      * self.num_hidden_layers
      * self.num_key_value_heads
      * self.head_dim
      * jnp.dtype(dtype).itemsize
    )

  @property
  def _layer_matmul_params(self) -> int:
    attention = (
      2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
    )
    return attention + 3 * self.hidden_size * self.intermediate_size


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _divided(hidden_size: Any, heads: Any) -> int:
  """Returns the head_dim of a file that has none."""
  if (
    not isinstance(hidden_size, int)
    or not isinstance(heads, int)
    or heads < 1
    or hidden_size % heads
  ):
    raise ValueError(
      f'config.json: head_dim is missing, and hidden_size={hidden_size!r} is not a multiple of '
      f'num_attention_heads={heads!r}'
    )
  return hidden_size // heads


def _rope(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Returns (rope_scaling, and rope_theta if it is given, as fields; problems).

  transformers 4 writes `rope_theta` and `rope_scaling` side by side, transformers 5 both into
  `rope_parameters`.
  """
  # The same value in two places is no contradiction, and two different ones are.
  thetas = [record.get('rope_theta')]
  scaling = set()
  problems = []
  for place in ('rope_scaling', 'rope_parameters'):
    if not record.get(place):
      continue
    try:
      theta, found = _rope_fields(record[place])
    except ValueError as error:
      problems.append(f'{place}={record[place]!r}: {error}')
      continue
    thetas.append(theta)
    scaling.add(found)
  thetas = [theta for theta in thetas if theta is not None]
  wrong = [theta for theta in thetas if not _is_number(theta)]
  if wrong:
    problems.append(f'rope_theta must be a positive number, got {wrong[0]!r}')
  elif len(set(thetas)) > 1 or len(scaling) > 1:
    problems.append(
      'rope_theta, rope_scaling and rope_parameters disagree: '
      f'{[record.get(name) for name in ("rope_theta", "rope_scaling", "rope_parameters")]}'
    )
  known = {} if wrong or not thetas else {'rope_theta': float(thetas[0])}
  return {**known, 'rope_scaling': next(iter(scaling), None)}, problems


def _rope_fields(given: Any) -> tuple[Any, RopeScaling | None]:
  """Reads one place that a file has for rotary fields -> (rope_theta or None, the scaling).

  Raises:
    ValueError: it cannot be read, or asks for what is not supported.
  """
  if not isinstance(given, Mapping):
    raise ValueError('expected a JSON object')
  fields = dict(given)
  theta = fields.pop('rope_theta', None)
  # Renamed in transformers 4.43; a file may have both.
  kinds = [fields.pop(name, None) for name in ('rope_type', 'type')]
  kinds = [kind for kind in kinds if kind is not None]
  factor = fields.pop('partial_rotary_factor', 1)
  if factor != 1:
    raise ValueError(f'partial_rotary_factor={factor!r} is not supported')
  if any(kind != kinds[0] for kind in kinds):
    raise ValueError(f'rope_type and type disagree: {kinds}')
  if kinds[:1] == ['default'] and fields.get('factor') in (None, 1):
    # No frequency is changed, whatever context they were made for.
    fields.pop('factor', None)
    fields.pop('original_max_position_embeddings', None)
  if not fields and kinds in ([], ['default'], ['default', 'default']):
    return theta, None
  if not kinds:
    raise ValueError('rope_type is missing')
  return theta, RopeScaling.from_hf({**fields, 'rope_type': kinds[0]})


def _unsupported(record: dict[str, Any], family: _Family) -> list[str]:
  """Returns a line for each field of the file that asks for what this decoder does not do.

  Rotary fields are left to `_rope`.
  """
  expected = _REQUIRED | family.required
  problems = [
    f'{name}={record[name]!r} is not supported'
    for name, allowed in expected.items()
    if name in record and record[name] not in allowed
  ]
  # Qwen's own files carry a width there and switch it off beside it: only the pair means a window.
  window = record.get('sliding_window')
  used = record.get('use_sliding_window')
  if used or window is not None and used is not False:
    problems.append(
      f'sliding_window={window!r} with use_sliding_window={used!r} and '
      f'max_window_layers={record.get("max_window_layers")!r} is not supported: '
      'no layer may have a window'
    )
  # Newer files list the kind of each layer; only full attention is implemented.
  layers = record.get('layer_types') or ()
  if not isinstance(layers, (list, tuple)):
    problems.append(f'layer_types={layers!r} is not a list')
  elif any(kind != 'full_attention' for kind in layers):
    others = sorted({str(kind) for kind in layers} - {'full_attention'})
    problems.append(f'layer_types {others} are not supported')
  for name in _QUANTISED:
    if record.get(name):
      problems.append(_quantised(name, record[name]))
  known = {f.name for f in dataclasses.fields(DecoderConfig)} | _DESCRIPTIVE | expected.keys()
  known |= {'sliding_window', 'use_sliding_window', 'rope_parameters', 'layer_types', *_QUANTISED}
  unknown = []
  for name, value in record.items():
    # A field without a value asks for nothing.
    if name in known or value is None or name.startswith(_DESCRIPTIVE_PREFIXES):
      continue
    if name not in _declared():
      unknown.append(name)
  if unknown:
    problems.append(f'unknown fields {sorted(unknown)}')
  return problems


def _quantised(name: str, given: Any) -> str:
  method = given.get('quant_method') if isinstance(given, Mapping) else None
  return (
    f'{name} says that the weights are rounded to few bits'
    f'{f" ({method})" if method else ""}: give the directory that they were made from, or convert '
    'them first (transformers: `AutoModelForCausalLM.from_pretrained(DIR)`, `.dequantize()`, then '
    '`save_pretrained`)'
  )


@functools.cache
def _declared() -> frozenset[str]:
  """Fields that transformers has for models of every kind, and those of how texts are sampled.

  Version 4 wrote the latter into config.json. None of them is about the weights but for those of
  `_REQUIRED`, whose values are checked.
  """
  # Only a file with a field that is not known by name needs this, and the import takes seconds.
  import transformers

  declared = transformers.PretrainedConfig().to_dict() | transformers.GenerationConfig().to_dict()
  return frozenset(declared) - {'tie_word_embeddings', 'quantization_config'}
