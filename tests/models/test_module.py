"""The NNX decoder against the functions that it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.module import Decoder

CONFIG = DecoderConfig(
  vocab_size=61,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=10,
  rope_theta=1000.0,
  initializer_range=0.2,
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 7))


@pytest.fixture(scope='module')
def params():
  return decoder.init_params(CONFIG, jax.random.key(1))


@pytest.fixture(scope='module')
def logits(params):
  """What the functions give for TOKENS."""
  position = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
  end = jnp.full((2, 7), 7)
  hidden = decoder.hidden_states(params, CONFIG, jnp.asarray(TOKENS), position, end)
  return np.asarray(hidden) @ np.asarray(decoder.head_matrix(params)).T


def test_a_module_equals_the_functions(params, logits):
  module = Decoder(CONFIG, params=params)
  for held, given in zip(jax.tree.leaves(module.params()), jax.tree.leaves(params), strict=True):
    assert held is given
  np.testing.assert_allclose(module(TOKENS), logits, atol=1e-5)
  compiled = nnx.jit(lambda m, tokens: m(tokens))
  np.testing.assert_allclose(compiled(module, jnp.asarray(TOKENS)), logits, atol=1e-5)


def test_a_module_is_split_and_merged_at_a_jit_boundary(params, logits):
  graph, state = nnx.split(Decoder(CONFIG, params=params))
  np.testing.assert_allclose(nnx.merge(graph, state)(TOKENS), logits, atol=1e-5)
  compiled = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
  np.testing.assert_allclose(compiled(state, jnp.asarray(TOKENS)), logits, atol=1e-5)


def test_a_drawn_module_has_the_parameters_of_its_config(params):
  fresh = Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  assert jax.tree.structure(fresh.params()) == jax.tree.structure(params)
  leaves = jax.tree.leaves(nnx.state(fresh, nnx.Param))
  assert sum(leaf.size for leaf in leaves) == CONFIG.param_count
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('bfloat16')}


def test_a_module_is_trained_by_flax(params):
  """One step of an `nnx.Optimizer` lowers the loss."""
  module = Decoder(CONFIG, params=params)
  optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

  def loss(module):
    logp = jax.nn.log_softmax(module(TOKENS[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(logp, jnp.asarray(TOKENS[:, 1:, None]), axis=-1))

  before, gradient = nnx.value_and_grad(loss)(module)
  optimizer.update(module, gradient)
  assert loss(module) < before


def test_a_module_needs_one_source_of_parameters(params):
  with pytest.raises(ValueError, match='either its parameters or random numbers'):
    Decoder(CONFIG)
  with pytest.raises(ValueError, match='either its parameters or random numbers'):
    Decoder(CONFIG, params=params, rngs=nnx.Rngs(0))
