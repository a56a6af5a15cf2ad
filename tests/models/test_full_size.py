"""Slow: published widths and vocabularies against transformers, and the memory that a streaming
import takes.
"""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import PUBLISHED

from benchmarks import import_export
from dcore_jax.models import decoder, hf_checkpoint

torch = pytest.importorskip('torch', reason='torch is not installed: no reference to compare with')
pytestmark = pytest.mark.slow

WIDTHS = {'qwen3_0_6b': import_export.RECORD, 'qwen3_8b': PUBLISHED['qwen3']}


@pytest.mark.parametrize('name', WIDTHS)
def test_two_layers_at_full_width_equal_transformers(tmp_path, name):
  """Logits over the whole vocabulary in float32; 8B takes 7 GB, one of the two models at a time."""
  import transformers

  import_export.make_checkpoint(tmp_path / 'model', WIDTHS[name] | {'num_hidden_layers': 2})
  tokens = np.random.default_rng(1).integers(0, WIDTHS[name]['vocab_size'], (1, 24))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'model', dtype=torch.float32)
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  del model
  gc.collect()
  config, params = hf_checkpoint.load_params(tmp_path / 'model')
  position = jnp.arange(24)[None]
  end = jnp.full((1, 24), 24)
  run = jax.jit(
    functools.partial(decoder.hidden_states, execution=decoder.Execution(unroll=False)),
    static_argnums=1,
  )
  hidden = run(params, config, jnp.asarray(tokens), position, end)
  # Written so that the head, 2.5 GB, is not transposed.
  logits = jnp.einsum('td,vd->tv', hidden[0], decoder.head_matrix(params))
  np.testing.assert_allclose(logits, want[0], atol=1e-4)


def test_a_streaming_import_holds_no_more_than_the_largest_tensor(tmp_path):
  """Qwen3-0.6B's size on 8 devices: what is held beyond the parameters, mapped pages of the file
  apart and included.
  """
  import_export.make_checkpoint(tmp_path / 'model')
  largest = 4 * import_export.RECORD['vocab_size'] * import_export.RECORD['hidden_size']
  result = import_export.run_worker(
    'ours import', tmp_path / 'model', tmp_path / 'out', 'float32', devices=8
  )
  for kind in ('anonymous', 'resident'):
    beyond = result[kind] - result['parameters']
    assert beyond <= 1.3 * largest, f'{kind}: {beyond / 2**20:.0f} MiB'
