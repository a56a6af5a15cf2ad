"""The decoder as a Flax NNX module: the form of a model that a person holds.

The training loops and the rollout engine work on the bare parameter tree (decoder.py), which they
donate, shard and cast. The module holds the same arrays as `nnx.Param`s, so that Flax's own tools
(`nnx.split`, `nnx.Optimizer`, `nnx.grad`, filters over the state) apply to them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import (
  Params,
  abstract_params,
  head_matrix,
  hidden_states,
  init_params,
)


class Decoder(nnx.Module):
  """A decoder with its parameters.

  Args:
    config: the architecture.
    params: the arrays to hold, a tree as `decoder.abstract_params` describes it; nothing is copied.
    rngs: draws the parameters instead.
    dtype: dtype of drawn parameters.

  Raises:
    ValueError: both `params` and `rngs` are given, or neither is.
  """

  def __init__(
    self,
    config: DecoderConfig,
    *,
    params: Params | None = None,
    rngs: nnx.Rngs | None = None,
    dtype: Any = jnp.float32,
  ):
    # Both would leave open which of them counts.
    if (params is None) == (rngs is None):
      raise ValueError('a decoder needs either its parameters or random numbers to draw them from')
    if params is None:
      params = init_params(config, rngs.params(), dtype)
    self.config = config
    # Names and nesting of the tree stay, so that a filter over the state finds parameters by the
    # names that decoder.py uses. The stacked layers are one array each, not a module a layer: they
    # are scanned.
    for name, value in params.items():
      if isinstance(value, dict):
        setattr(self, name, nnx.Dict(jax.tree.map(nnx.Param, value)))
      else:
        setattr(self, name, nnx.Param(value))

  def params(self) -> Params:
    """Returns the parameter tree that the functions of decoder.py take; nothing is copied."""
    # Walked by the specs: a module may hold more, such as what a subclass adds.
    tree = {}
    for name, spec in abstract_params(self.config).items():
      held = getattr(self, name)
      # The stacked layers are a dictionary of arrays; what stands beside them is one array each.
      if isinstance(spec, dict):
        tree[name] = {inner: held[inner][...] for inner in spec}
      else:
        tree[name] = held[...]
    return tree

  def __call__(
    self,
    tokens_BT: jax.Array,
    position_BT: jax.Array | None = None,
    end_BT: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the logits [B, T, V] of token rows.

    Args:
      tokens_BT: token ids.
      position_BT: rotary positions; by default 0 to T - 1.
      end_BT: row index one past the last descendant of each token, see `hidden_states`; by default
        T, which makes the rows plain causal sequences.
    """
    # Lists and numpy arrays are taken as well: a notebook passes what its tokenizer returned.
    tokens_BT = jnp.asarray(tokens_BT)
    B, T = tokens_BT.shape
    if position_BT is None:
      position_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    if end_BT is None:
      # Every query then sees all keys before it.
      end_BT = jnp.full((B, T), T)
    return _logits(self.params(), self.config, tokens_BT, position_BT, end_BT)


# Compiled here as well as by a caller's own jit: an eager call would trace and compile the scanned
# layers anew each time.
@functools.partial(jax.jit, static_argnames='config')
def _logits(
  params: Params,
  config: DecoderConfig,
  tokens_BT: jax.Array,
  position_BT: jax.Array,
  end_BT: jax.Array,
) -> jax.Array:
  hidden_BTD = hidden_states(params, config, tokens_BT, position_BT, end_BT)
  return jnp.einsum('btd,vd->btv', hidden_BTD, head_matrix(params))
