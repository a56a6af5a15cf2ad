"""The paper's models by name: the fields of their public `config.json` that define the function.

A preset stands in for a checkpoint that is not there, for a plan or a random initialisation. A real
checkpoint is read from its own file, and `same_model` compares the two.
"""

import dataclasses
from typing import Any

from dcore_jax.models.config import DecoderConfig

# What all sizes of Qwen3 share. Its head size is a field of its own: at 0.6B, N * H is twice D.
_QWEN3 = {
  'model_type': 'qwen3',
  'vocab_size': 151936,
  'head_dim': 128,
  # Eight key heads at every size, so that a mesh splits them over at most eight devices.
  'num_key_value_heads': 8,
  'hidden_act': 'silu',
  'rope_theta': 1_000_000,
  'rms_norm_eps': 1e-6,
  'max_position_embeddings': 40960,
  'initializer_range': 0.02,
  'attention_bias': False,
  'tie_word_embeddings': False,
  'use_sliding_window': False,
  'bos_token_id': 151643,
  # `<|endoftext|>` begins a document, `<|im_end|>` ends a turn of chat.
  'eos_token_id': 151645,
}
# What Llama 3.1 8B and DeepSeek-Coder 6.7B share.
_LLAMA = {
  'model_type': 'llama',
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'hidden_size': 4096,
  'hidden_act': 'silu',
  'initializer_range': 0.02,
  'attention_bias': False,
  'tie_word_embeddings': False,
}


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> dict[str, Any]:
  return _QWEN3 | {
    'num_hidden_layers': layers,
    'hidden_size': hidden,
    'intermediate_size': ffn,
    'num_attention_heads': heads,
    'tie_word_embeddings': tied,
  }


# As Hugging Face writes them, so that a preset goes through the same checks as a file.
RECORDS: dict[str, dict[str, Any]] = {
  # Up to 4B the embedding is also the head.
  'qwen3_0_6b': _qwen3(28, 1024, 3072, 16, tied=True),
  'qwen3_1_7b': _qwen3(28, 2048, 6144, 16, tied=True),
  'qwen3_4b': _qwen3(36, 2560, 9728, 32, tied=True),
  'qwen3_8b': _qwen3(36, 4096, 12288, 32, tied=False),
  'qwen3_14b': _qwen3(40, 5120, 17408, 40, tied=False),
  'qwen3_32b': _qwen3(64, 5120, 25600, 64, tied=False),
  'qwen2_5_14b': {
    'model_type': 'qwen2',
    # Qwen2.5 has 128 rows more than Qwen3: both pad their vocabulary, to different sizes.
    'vocab_size': 152064,
    'hidden_size': 5120,
    'intermediate_size': 13824,
    'num_hidden_layers': 48,
    'num_attention_heads': 40,
    'num_key_value_heads': 8,
    'hidden_act': 'silu',
    'rope_theta': 1_000_000.0,
    'rms_norm_eps': 1e-6,
    'max_position_embeddings': 32768,
    'initializer_range': 0.02,
    'tie_word_embeddings': False,
    'use_sliding_window': False,
    'bos_token_id': 151643,
    'eos_token_id': 151645,
  },
  'llama3_1_8b': _LLAMA
  | {
    'vocab_size': 128256,
    'intermediate_size': 14336,
    'num_key_value_heads': 8,
    'rope_theta': 500_000.0,
    # Trained at 8,192 tokens and stretched to 131,072 by slowing the slow pairs down (rotary.py).
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    },
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 131072,
    'mlp_bias': False,
    'bos_token_id': 128000,
    # Three ids end a reply: end of text, end of a message that awaits a tool, end of a turn.
    'eos_token_id': [128001, 128008, 128009],
  },
  'deepseek_coder_6_7b': _LLAMA
  # An older record: full multi-head attention, and positions divided by 4 (rotary.py).
  | {
    'vocab_size': 32256,
    'intermediate_size': 11008,
    'num_key_value_heads': 32,
    'rope_theta': 100_000,
    'rope_scaling': {'type': 'linear', 'factor': 4.0},
    'rms_norm_eps': 1e-6,
    'max_position_embeddings': 16384,
    'bos_token_id': 32013,
    'eos_token_id': 32021,
  },
}


def record(name: str) -> dict[str, Any]:
  """Returns a copy of a preset's `config.json`; ValueError for an unknown name."""
  if name not in RECORDS:
    raise ValueError(f'unknown model preset {name!r}; known are {sorted(RECORDS)}')
  # A copy, so that a caller who changes a field does not change the preset.
  return dict(RECORDS[name])


def config(name: str) -> DecoderConfig:
  """Returns a preset's configuration; ValueError for an unknown name."""
  return DecoderConfig.from_hf(record(name))


def same_model(one: DecoderConfig, other: DecoderConfig) -> bool:
  """Whether both compute the same function of their parameters.

  Token ids and the standard deviation of the initial draw may differ.
  """
  # Neither enters the forward pass: fine-tuned models change their token ids and keep the function.
  apart = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')) | {
    'initializer_range': 0.02
  }
  return dataclasses.replace(one, **apart) == dataclasses.replace(other, **apart)
