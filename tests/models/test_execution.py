"""What a training pass keeps for its backward pass, and in which dtype it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.learn import optimizer
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig

CONFIG = DecoderConfig(
  vocab_size=32,
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=6,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  initializer_range=0.2,
)
T = 128
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, T)))


@pytest.fixture(scope='module')
def params():
  return jax.jit(decoder.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def compiled(params, execution):
  """The compiled gradient of a sum over hidden states."""
  position = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
  end = jnp.full((2, T), T)

  def loss(params):
    hidden_BTD = decoder.hidden_states(params, CONFIG, TOKENS, position, end, execution)
    return jnp.sum(jnp.sin(hidden_BTD.astype(jnp.float32)))

  return jax.jit(jax.grad(loss)).lower(params).compile()


def test_policies_keep_what_they_say_and_change_no_gradient(params):
  plain = decoder.Execution(unroll=False)
  steps = {
    remat: compiled(params, dataclasses.replace(plain, remat=remat)) for remat in decoder.REMAT
  }
  want = steps['none'](params)
  for remat, step in steps.items():
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, err_msg=remat)
    jax.tree.map(close, step(params), want)
  kept = {remat: step.memory_analysis().temp_size_in_bytes for remat, step in steps.items()}
  assert kept['full'] < kept['attention'] < kept['dots'] < kept['none'], kept
  # Of a token and layer: the output of attention (32 floats) and a number for each of 4 heads.
  assert kept['attention'] - kept['full'] >= 6 * 2 * T * (32 + 4) * 4 * 0.8


def test_bfloat16_computes_from_float32_masters(params):
  """Gradients are float32, and as near as 8 bits allow; what the layers work on is bfloat16."""
  exact = compiled(params, decoder.Execution(remat='full'))(params)
  rough = compiled(params, decoder.Execution(remat='full', compute='bfloat16'))(params)
  for one, other in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
    assert one.dtype == jnp.float32
    assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other)
  ones = jnp.ones((1, 4), jnp.int32)
  rough = decoder.Execution(compute='bfloat16')
  hidden = jax.eval_shape(
    lambda params: decoder.hidden_states(params, CONFIG, ones, ones, ones * 4, rough), params
  )
  assert hidden.dtype == jnp.bfloat16
  assert decoder.Execution().dtype(params) == jnp.float32  # on a CPU the parameters' own


def test_offloading_is_refused_where_there_is_no_such_memory(params):
  tx = optimizer.make_optimizer('adamw', 1e-3)
  with pytest.raises(ValueError, match='execution.offload: .* needs a mesh of accelerators'):
    optimizer.init_state(params, tx, offload=True)
  mesh = jax.make_mesh(
    (1, 1, 1),
    ('data', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:1],
  )
  with (
    jax.set_mesh(mesh),
    pytest.raises(ValueError, match='cpu devices have no pinned_host memory apart from their own'),
  ):
    optimizer.init_state(params, tx, offload=True)
  with pytest.raises(ValueError, match='execution.offload = .*weights'):
    decoder.Execution(offload=('weights',))
