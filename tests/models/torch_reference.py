"""Random tiny models of transformers to compare with, of each family."""

import pathlib

import pytest

# Slow enough a base that the three bands of llama3 (kept, mixed, divided) all have pairs among the
# five of a head of 10.
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
TINY = {
  'qwen3': {},
  'qwen3_tied': {'tie_word_embeddings': True},
  'qwen3_multi_query': {'num_attention_heads': 6, 'num_key_value_heads': 1, 'rope_theta': 500.0},
  'qwen3_no_groups': {
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'head_dim': 6,
    'rms_norm_eps': 1e-3,
  },
  'qwen2': {'model_type': 'qwen2', 'hidden_size': 40},
  'qwen2_tied': {'model_type': 'qwen2', 'hidden_size': 40, 'tie_word_embeddings': True},
  'llama3_1': {'model_type': 'llama', 'hidden_size': 40, 'rope_parameters': _LLAMA3},
  'llama3_1_tied': {
    'model_type': 'llama',
    'head_dim': 6,
    'rope_parameters': _LLAMA3,
    'tie_word_embeddings': True,
  },
  'deepseek_coder': {
    'model_type': 'llama',
    'hidden_size': 40,
    'num_key_value_heads': 4,
    'rope_parameters': {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 100000.0},
  },
}
FAMILIES = ['qwen3', 'qwen2', 'llama3_1', 'deepseek_coder']
TIED = ['qwen3_tied', 'qwen2_tied', 'llama3_1_tied']


def make_model(seed: int = 0, model_type: str = 'qwen3', **changes):
  """A float32 model with every weight perturbed (fresh norms are ones and biases zeros, and would
  hide one left out).
  """
  torch = pytest.importorskip(
    'torch', reason='torch is not installed: no reference to compare with'
  )
  transformers = pytest.importorskip('transformers')
  fields = {
    'vocab_size': 61,
    'hidden_size': 32,
    'intermediate_size': 40,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'tie_word_embeddings': False,
    'max_position_embeddings': 256,
    'initializer_range': 0.15,
  }
  fields |= {'head_dim': 10} if model_type == 'qwen3' else {}
  fields |= {} if 'rope_parameters' in changes else {'rope_theta': 12345.0}
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(model_type, **fields | changes)
  config._attn_implementation = 'eager'
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn(parameter.shape))
  return model


def save_model(folder: pathlib.Path, dtype: str = 'float32', **changes) -> pathlib.Path:
  """Writes such a model the way transformers does, in `dtype`."""
  import torch

  make_model(**changes).to(getattr(torch, dtype)).save_pretrained(folder)
  return folder
