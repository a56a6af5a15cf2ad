"""The numbers that define a decoder, under the field names of a Hugging Face `config.json`.

Letters used in shapes everywhere: V vocab_size, D hidden_size, F intermediate_size, L num_hidden_layers,
N num_attention_heads, K num_key_value_heads, H head_dim, G = N / K; B rows, T query tokens, S key positions.
"""
import dataclasses
from typing import Any

import jax.numpy as jnp

_MODEL_TYPE = 'qwen3'
# Statements about the file, not about the function the weights compute; reading past them changes nothing.
_DESCRIPTIVE = frozenset({
    'architectures', 'model_type', 'torch_dtype', 'dtype', 'transformers_version', 'use_cache', '_name_or_path',
    'max_window_layers', 'output_attentions', 'output_hidden_states', 'return_dict', 'id2label', 'label2id',
    'problem_type', 'chunk_size_feed_forward', '_attn_implementation_autoset',
})


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A Qwen3 decoder. Hashable, so that it can be a static argument of a jitted function."""
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

  def __post_init__(self):
    for name in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
                 'num_key_value_heads', 'head_dim', 'max_position_embeddings', 'rope_theta', 'rms_norm_eps'):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f'{name} must be a positive number, got {value!r}')
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(f'num_attention_heads={self.num_attention_heads} is not a multiple of '
                       f'num_key_value_heads={self.num_key_value_heads}')
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even: rotary embedding turns pairs')

  @classmethod
  def from_hf(cls, record: dict[str, Any]) -> 'DecoderConfig':
    """Reads the contents of a `config.json`; ValueError naming every field whose meaning would be ignored."""
    if record.get('model_type') != _MODEL_TYPE:
      raise ValueError(f'model_type {record.get("model_type")!r} is not supported, only {_MODEL_TYPE!r}')
    problems = _unsupported(record)
    fields = {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name in record}
    rope_theta = _rope_theta(record)
    if rope_theta is not None:
      fields['rope_theta'] = rope_theta
    # The defaults of transformers' Qwen3Config apply to what a file leaves out; those of this class are a user's.
    fields.setdefault('head_dim', 128)
    fields.setdefault('rope_theta', 10000.0)
    fields.setdefault('tie_word_embeddings', False)
    fields.setdefault('max_position_embeddings', 32768)
    if isinstance(fields.get('eos_token_id'), list):
      fields['eos_token_id'] = tuple(fields['eos_token_id'])
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    problems += [f'{name} is missing' for name in sorted(required - fields.keys())]
    if problems:
      raise ValueError('config.json: ' + '; '.join(problems))
    return cls(**fields)

  def to_hf(self) -> dict[str, Any]:
    """The contents of a `config.json` that `from_hf` and transformers (4.51 and later, 5 included) read back."""
    record = dataclasses.asdict(self)
    if isinstance(self.eos_token_id, tuple):
      record['eos_token_id'] = list(self.eos_token_id)
    return record | {
        'architectures': ['Qwen3ForCausalLM'], 'model_type': _MODEL_TYPE, 'hidden_act': 'silu', 'attention_bias': False,
        'attention_dropout': 0.0, 'use_cache': True, 'use_sliding_window': False, 'sliding_window': None,
        'rope_scaling': None,
    }

  @property
  def stop_token_ids(self) -> tuple[int, ...]:
    """eos_token_id as a tuple, empty where none is set."""
    if self.eos_token_id is None:
      return ()
    return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

  @property
  def param_count(self) -> int:
    """Stored parameters; a tied head is counted once."""
    norms = self.num_hidden_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
    embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
    return self._layer_matmul_params * self.num_hidden_layers + norms + embeddings

  def flops_per_token(self, seq_len: int) -> float:
    """Forward floating-point operations per token, averaged over a causal row of `seq_len` tokens, head included.

    Two per multiply-add: 2 per matrix parameter, and per layer 4 N H for each of the (seq_len + 1) / 2 keys a query
    sees on average. A training step without rematerialisation costs three times as much.
    """
    matmul = self._layer_matmul_params * self.num_hidden_layers + self.vocab_size * self.hidden_size
    attention = 4 * self.num_attention_heads * self.head_dim * (seq_len + 1) / 2
    return 2.0 * matmul + self.num_hidden_layers * attention

  def kv_bytes_per_token(self, dtype: Any) -> int:
    """Bytes of keys and values that one cached token holds in all layers."""
    return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * jnp.dtype(dtype).itemsize

  @property
  def _layer_matmul_params(self) -> int:
    attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
    return attention + 3 * self.hidden_size * self.intermediate_size


def _rope_theta(record: dict[str, Any]) -> float | None:
  """The base, from the top level (transformers 4) or from `rope_parameters` (transformers 5)."""
  nested = record.get('rope_parameters') or {}
  given = {float(theta) for theta in (record.get('rope_theta'), nested.get('rope_theta')) if theta is not None}
  if len(given) > 1:
    raise ValueError(f'config.json: rope_theta and rope_parameters disagree: {sorted(given)}')
  return given.pop() if given else None


def _unsupported(record: dict[str, Any]) -> list[str]:
  """One line per field of the file that asks for something this decoder does not do."""
  problems = []
  expected = {'hidden_act': ('silu',), 'attention_bias': (False, None), 'use_sliding_window': (False, None),
              'rope_scaling': (None,), 'attention_dropout': (0, None), 'mlp_bias': (False, None),
              'is_encoder_decoder': (False, None)}
  for name, allowed in expected.items():
    if name in record and record[name] not in allowed:
      problems.append(f'{name}={record[name]!r} is not supported')
  # Qwen's own files carry a width there and switch it off beside it: only the pair means a window.
  if record.get('sliding_window') is not None and record.get('use_sliding_window') is not False:
    problems.append(f'sliding_window={record["sliding_window"]!r} is not supported')
  rope = dict(record.get('rope_parameters') or {})
  rope.pop('rope_theta', None)
  if rope.pop('rope_type', 'default') != 'default' or rope:
    problems.append(f'rope_parameters={record["rope_parameters"]!r} is not supported, only the default rotation')
  other_layers = sorted(set(record.get('layer_types') or ()) - {'full_attention'})
  if other_layers:
    problems.append(f'layer_types {other_layers} are not supported')
  known = {f.name for f in dataclasses.fields(DecoderConfig)} | _DESCRIPTIVE | expected.keys()
  known |= {'sliding_window', 'rope_parameters', 'layer_types'}
  unknown = sorted(name for name, value in record.items() if name not in known and value is not None)
  if unknown:
    problems.append(f'unknown fields {unknown}')
  return problems
