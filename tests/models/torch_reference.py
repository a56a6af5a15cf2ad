"""Random Qwen3 models of transformers to compare with."""
import pathlib

import pytest

TINY = {
    'plain': {},
    'tied': {'tie_word_embeddings': True},
    'multi_query': {'num_attention_heads': 6, 'num_key_value_heads': 1, 'rope_theta': 500.0},
    'no_groups': {'num_attention_heads': 2, 'num_key_value_heads': 2, 'head_dim': 6, 'rms_norm_eps': 1e-3},
}


def make_model(seed: int = 0, **changes):
  """A float32 Qwen3ForCausalLM with every weight perturbed (fresh norms are ones, and would hide a norm left out)."""
  torch = pytest.importorskip('torch', reason='torch is not installed: no reference to compare with')
  transformers = pytest.importorskip('transformers')
  fields = {'vocab_size': 61, 'hidden_size': 32, 'intermediate_size': 40, 'num_hidden_layers': 3,
            'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 10, 'rope_theta': 12345.0,
            'tie_word_embeddings': False, 'max_position_embeddings': 256, 'initializer_range': 0.15}
  torch.manual_seed(seed)
  config = transformers.Qwen3Config(**fields | changes)
  config._attn_implementation = 'eager'
  model = transformers.Qwen3ForCausalLM(config).float().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn(parameter.shape))
  return model


def save_model(folder: pathlib.Path, dtype: str = 'float32', **changes) -> pathlib.Path:
  """Writes such a model the way transformers does, in `dtype`."""
  import torch
  make_model(**changes).to(getattr(torch, dtype)).save_pretrained(folder)
  return folder
