"""The decoder of Qwen3, Qwen2.5, Llama and DeepSeek-Coder: pure functions of a parameter tree.

RMSNorm before each block, grouped-query attention, rotary embedding in float32, SwiGLU. Qwen2.5
adds biases on queries, keys and values; Qwen3 adds RMSNorm on each head of queries and keys. The
layers are stacked along a leading axis and scanned, so that compile time does not grow with depth.
`abstract_params` is the one description of the parameters: initialisation, sharding, checkpoint
import and export all follow it. Shape letters: config.py.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcore_jax import sharding
from dcore_jax.models import rotary
from dcore_jax.models.attention import reference, tree_attention
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.projections import (
  INPUTS,
  Adapted,
  adapter_specs,
  project,
  project_all,
  turn_layer,
  turned_product,
)

Params = dict[str, Any]

# 'auto' follows the device, so that one config trains on an accelerator and is debugged on a CPU.
COMPUTE = ('auto', 'float32', 'bfloat16')
# What may wait in host memory: it is read once an update or once a pass, not in every layer.
OFFLOAD = ('optimizer', 'reference')
# What the backward pass keeps, in bytes per token and layer of Qwen3-8B in bfloat16: 'full' 8 KiB
# (the layer's input alone), 'attention' 16 KiB, 'dots' 84 KiB.
REMAT: dict[str, Callable[..., bool] | None] = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'attention': jax.checkpoint_policies.save_only_these_names(tree_attention.SAVED),
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Logical axes of [B, T, N, H] and [B, K, S, H] in the rollout engine. Lanes have an axis of their
# own, since no mesh splits them, while it does split the rows of a training batch.
_LANE_QUERIES = ('lanes', 'length', 'heads', 'head_dim')
_LANE_KEYS = ('lanes', 'kv_heads', 'length', 'head_dim')


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter before it exists.

  `axes` names each dimension for sharding (sharding.py); `init` is the standard deviation of a
  normal draw (0 gives zeros), or None for ones.
  """

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str, ...]
  init: float | None


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a training pass runs; rounding apart, no field changes what is computed.

  Attributes:
    attention: a name of `tree_attention`.
    compute: dtype of activations, to which a layer's parameters are cast when it runs: 'bfloat16',
      'float32', or 'auto', which is bfloat16 on accelerators and the parameters' own dtype on a
      CPU.
    remat: what the forward pass keeps for the backward pass, one of `REMAT`. Beside a layer's
      input, 'full' keeps nothing, 'attention' the outputs of attention, 'dots' the outputs of the
      projections; 'none' keeps all activations.
    unroll: whether the layers are compiled one by one instead of as one scanned body. On a CPU the
      unrolled step takes 0.6 of the time, but compiled code grows with depth. Rematerialised layers
      are scanned in any case.
    offload: 'optimizer' keeps the optimizer's moments in host memory between updates, 'reference'
      the reference policy between its passes, where the backend has such memory (learn.optimizer).
  """

  attention: str = 'auto'
  compute: str = 'auto'
  remat: str = 'none'
  unroll: bool = True
  offload: tuple[str, ...] = ()

  def __post_init__(self):
    # 'auto' is resolved later: resolving it asks jax for its devices, and a module that makes a
    # default `Execution` at import must not initialise the backend.
    if self.attention != 'auto':
      tree_attention.resolve(self.attention)
    for name, known in (('compute', COMPUTE), ('remat', tuple(REMAT))):
      if getattr(self, name) not in known:
        raise ValueError(f'execution.{name} = {getattr(self, name)!r} is not one of {known}')
    if set(self.offload) - set(OFFLOAD):
      raise ValueError(f'execution.offload = {self.offload!r} is not of {OFFLOAD}')

  def dtype(self, params: Params) -> jnp.dtype:
    """Returns the dtype in which a pass over `params` computes."""
    if self.compute == 'auto':
      # On a CPU nothing is rounded: the tests there compare with float32 references.
      return params['embed'].dtype if sharding.platform() == 'cpu' else jnp.dtype('bfloat16')
    return jnp.dtype(self.compute)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (already rotated) and values of B lanes, each [L, B, K, S, H].

  Slot s of a lane holds the token at position s. An unstacked cache is a tuple of L arrays [B, K,
  S, H] each: then no layer has to be cut out of the stack before it is read.
  """

  k: jax.Array | tuple[jax.Array, ...]
  v: jax.Array | tuple[jax.Array, ...]


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
  """Describes every array of the parameter tree by a ParamSpec.

  'head' is there only where the embedding is not tied.
  """
  D = config.hidden_size
  F = config.intermediate_size
  H = config.head_dim
  N = config.num_attention_heads
  K = config.num_key_value_heads
  L = config.num_hidden_layers
  std = config.initializer_range

  def matrix(shape, *axes):
    """A weight, drawn from a normal distribution."""
    return ParamSpec(shape=shape, dtype=jnp.dtype(dtype), axes=axes, init=std)

  def norm(shape, *axes):
    """The factors of an RMSNorm, which start at one."""
    return ParamSpec(shape=shape, dtype=jnp.dtype(dtype), axes=axes, init=None)

  # Heads are an axis of their own, not folded into D: a mesh splits whole heads, and no device
  # holds half of one.
  layers = {
    'attn_norm': norm((L, D), 'layers', 'norm'),
    'q': matrix((L, D, N, H), 'layers', 'embed', 'heads', 'head_dim'),
    'k': matrix((L, D, K, H), 'layers', 'embed', 'kv_heads', 'head_dim'),
    'v': matrix((L, D, K, H), 'layers', 'embed', 'kv_heads', 'head_dim'),
    'o': matrix((L, N, H, D), 'layers', 'heads', 'head_dim', 'embed'),
    'mlp_norm': norm((L, D), 'layers', 'norm'),
    'gate': matrix((L, D, F), 'layers', 'embed', 'mlp'),
    'up': matrix((L, D, F), 'layers', 'embed', 'mlp'),
    'down': matrix((L, F, D), 'layers', 'mlp', 'embed'),
  }
  # Qwen2.5: biases start at zero, as in Hugging Face's initialisation.
  if config.qkv_bias:

    def bias(heads, axis):
      """The bias of one projection, which starts at zero."""
      return ParamSpec(
        shape=(L, heads, H), dtype=jnp.dtype(dtype), axes=('layers', axis, 'head_dim'), init=0.0
      )

    layers |= {
      'q_bias': bias(N, 'heads'),
      'k_bias': bias(K, 'kv_heads'),
      'v_bias': bias(K, 'kv_heads'),
    }
  # Qwen3: one factor a component of a head, shared by all heads of a layer.
  if config.qk_norm:
    layers |= {'q_norm': norm((L, H), 'layers', 'norm'), 'k_norm': norm((L, H), 'layers', 'norm')}
  params = {
    'embed': matrix((config.vocab_size, D), 'vocab', 'embed'),
    'layers': layers,
    'final_norm': norm((D,), 'norm'),
  }
  # Absent, not aliased: an alias would be donated, sharded and counted twice.
  if not config.tie_word_embeddings:
    params['head'] = matrix((config.vocab_size, D), 'vocab', 'embed')
  return params


def specs_of(params: Params, config: DecoderConfig) -> Params:
  """Describes a tree of parameters, some of whose matrices may be `Adapted`, array by array."""

  def beside(spec, leaf):
    """The specs of a parameter: one, or three where it is adapted."""
    if not isinstance(leaf, Adapted):
      return spec
    a, b = adapter_specs(spec, inputs=leaf.a.ndim - 2, rank=leaf.a.shape[-1])
    return Adapted(spec, a, b, leaf.scale)

  return jax.tree.map(beside, abstract_params(config), params)


def init_params(config: DecoderConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
  """Draws every parameter by its spec."""
  return draw(abstract_params(config, dtype), key)


def draw(specs: Any, key: jax.Array) -> Any:
  """Draws a tree by its specs; each array has its own key, folded from its place in the tree."""
  specs, treedef = jax.tree.flatten(specs)

  def one(index, spec):
    """One array; its key depends on its place alone, so that shapes elsewhere do not change it."""
    if spec.init is None:
      return jnp.ones(spec.shape, spec.dtype)
    # Drawn in float32 and then rounded, so that every dtype starts from the same draw.
    return (spec.init * jax.random.normal(jax.random.fold_in(key, index), spec.shape)).astype(
      spec.dtype
    )

  return jax.tree.unflatten(treedef, [one(index, spec) for index, spec in enumerate(specs)])


def head_matrix(params: Params) -> jax.Array:
  """[V, D], where logits = hidden @ head.T; the embedding where the two are tied."""
  return params['head'] if 'head' in params else params['embed']


def hidden_states(
  params: Params,
  config: DecoderConfig,
  tokens_BT: jax.Array,
  position_BT: jax.Array,
  end_BT: jax.Array,
  execution: Execution = Execution(),
) -> jax.Array:
  """Final-normed hidden states [B, T, D] of packed rows.

  Query i sees key j iff j <= i < end[j]; plain causal rows have end = T. Under a mesh, rows are
  split over its batch axes, and heads, feed-forward layer and vocabulary over its tensor axis.

  Args:
    params: the parameter tree. The pass runs in `execution.compute`; norms, rotary angles, scores
      and softmax are float32.
    config: its configuration.
    tokens_BT: token ids.
    position_BT: rotary positions, the depth of each token below its own root.
    end_BT: row index one past the last descendant of each token.
    execution: which attention and dtype, what is recomputed, whether the layers are unrolled.
  """
  dtype = execution.dtype(params)
  # The constraint also holds for the gradients, its transpose: each device then keeps only its
  # shard of a gradient, as it does of the parameter.
  params = sharding.constrain_tree(params, specs_of(params, config))
  # The angles depend on positions alone, so that all layers share one table.
  cos, sin = rotary.rope_tables(
    position_BT, config.head_dim, config.rope_theta, config.rope_scaling
  )

  def layer_step(hidden_BTD, layer):
    """One step of the scan over layers."""

    def attend(q_BTNH, k_BTKH, v_BTKH):
      """Attention within packed rows, by the mask that `end_BT` describes."""
      return tree_attention.attend(q_BTNH, k_BTKH, v_BTKH, end_BT, execution.attention)

    # The cast stands inside the scan: a sharded layer is then gathered from the devices in 2 bytes
    # a parameter instead of 4, and there is never a whole copy of the model in `dtype`.
    hidden_BTD = _block(cast(layer, dtype), config, hidden_BTD, cos, sin, attend)
    # Without the constraint, the partitioner may choose another layout for the carry and exchange
    # it in every layer.
    return sharding.constrain(hidden_BTD, 'batch', 'length', 'hidden'), None

  if execution.remat != 'none':
    layer_step = jax.checkpoint(layer_step, policy=REMAT[execution.remat])
  # Rematerialised layers stay a loop: unrolled, XLA recomputes all of them before it needs the
  # first (8 layers, 16,384 tokens: 9.5 GiB of temporaries against 1.9).
  hidden_BTD, _ = jax.lax.scan(
    layer_step,
    _embedded(params['embed'], tokens_BT, dtype),
    params['layers'],
    unroll=execution.unroll and execution.remat == 'none',
  )
  return _rms_norm(hidden_BTD, params['final_norm'].astype(dtype), config.rms_norm_eps)


def cast(params: Params, dtype: Any) -> Params:
  """Casts every array of the tree; an array that has the dtype already is not copied."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def unstack(params: Params) -> Params:
  """Splits 'layers' into a tuple of trees, which copies each layer's arrays."""
  layers = []
  for index in range(len(params['layers']['attn_norm'])):
    layers.append(jax.tree.map(operator.itemgetter(index), params['layers']))
  return {**params, 'layers': tuple(layers)}


def turn(params: Params) -> Params:
  """Unstacks the layers and transposes their projections (`projections.turn_layer`).

  On a CPU, `extend_each` and `logits` read this form fastest. Adapted matrices are merged.
  """
  layers = params['layers']
  count = len(layers['attn_norm'])
  return {**params, 'layers': tuple(_turned_layer(layers, index) for index in range(count))}


# One small program that runs once a layer: for 30 layers together, XLA compiles for 10 s.
@jax.jit
def _turned_layer(layers: Params, index: jax.Array) -> Params:
  """Cuts a layer out of the stack and turns it."""
  return turn_layer(
    jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)
  )


def logits(params: Params, hidden_MD: jax.Array) -> jax.Array:
  """Computes float32 logits [M, V] of a few final-normed hidden states.

  Where `turn` made the parameters, the product is a transposed one.
  """
  head_VD = head_matrix(params)
  # The head needs no `Turned`: [V, D] has its outputs first already.
  if isinstance(params['layers'], tuple):
    return turned_product(head_VD, hidden_MD)
  # Logits in bfloat16 would have 8 significant bits: of two tokens at 20.0 and 20.05, neither would
  # be the likelier.
  return jnp.einsum('md,vd->mv', hidden_MD, head_VD, preferred_element_type=jnp.float32)


def init_cache(config: DecoderConfig, B: int, S: int, dtype: Any = jnp.float32) -> KVCache:
  """Makes a cache of B lanes with S slots each; a slot is always written before it is read."""
  L = config.num_hidden_layers
  shape = (L, B, config.num_key_value_heads, S, config.head_dim)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def extend(
  params: Params,
  config: DecoderConfig,
  cache: KVCache,
  tokens_BT: jax.Array,
  start_B: jax.Array,
  *,
  span: int | None = None,
) -> tuple[jax.Array, KVCache]:
  """Appends T tokens to every lane: (final-normed hidden [B, T, D], cache).

  Lane b's tokens take the slots and rotary positions start_b .. start_b + T - 1; the query at
  position p sees slots 0..p of its lane. One function serves prefill (start 0), continuation and
  decoding (T = 1). Padding stands on the right, where no query sees it, and later tokens overwrite
  it. Writes at slots >= S are dropped. Donate the cache: it is updated in place.

  Args:
    params: the parameter tree.
    config: its configuration.
    cache: lanes as `init_cache` or an earlier call left them, stacked.
    tokens_BT: token ids.
    start_B: the slot of each lane's first token, >= 0.
    span: static; only the first `span` slots are read. Lanes whose result is used must keep start +
      T <= span.

  Raises:
    ValueError: `span` outside 1..S.
  """
  S = cache.k.shape[-2]
  span = S if span is None else span
  if not 1 <= span <= S:
    raise ValueError(f'span={span} is outside 1..{S}, the slots of the cache')
  position_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])[None, :]
  mask_BTS = reference.cache_mask(position_BT, span)
  cos, sin = rotary.rope_tables(
    position_BT, config.head_dim, config.rope_theta, config.rope_scaling
  )
  # Shape [B, 1] broadcasts against the slots [B, T], so that one scatter writes all lanes.
  lane_B1 = jnp.arange(tokens_BT.shape[0])[:, None]

  def layer_step(carry, layer_and_index):
    """One step of the scan over layers, with the cache in its carry."""
    hidden_BTD, keys, values = carry
    layer, index = layer_and_index
    # `attend` is called inside `_block`, which returns the hidden states alone.
    written = []

    def attend(q_BTNH, k_BTKH, v_BTKH):
      """Writes the new keys and values, then attends over the first `span` slots."""
      slots = (index, lane_B1, slice(None), position_BT)
      # A lane that is full writes outside the cache: such writes are lost, and no other slot
      # changes.
      new_k = keys.at[slots].set(k_BTKH.astype(keys.dtype), mode='drop')
      new_v = values.at[slots].set(v_BTKH.astype(values.dtype), mode='drop')
      written.extend([new_k, new_v])
      # Reading fewer slots than S saves memory traffic, which bounds decoding.
      seen = (index, slice(None), slice(None), slice(span))
      return sharding.on_shards(
        reference.attend,
        (q_BTNH, new_k[seen].astype(q_BTNH.dtype), new_v[seen].astype(q_BTNH.dtype), mask_BTS),
        (_LANE_QUERIES, _LANE_KEYS, _LANE_KEYS),
      )

    hidden_BTD = _block(layer, config, hidden_BTD, cos, sin, attend, rows='lanes')
    return (hidden_BTD, *written), None

  # The cache travels in the carry: as a scan output it would be copied whole at every step.
  (hidden_BTD, keys, values), _ = jax.lax.scan(
    layer_step,
    (params['embed'][tokens_BT], cache.k, cache.v),
    (params['layers'], jnp.arange(config.num_hidden_layers)),
  )
  return _rms_norm(hidden_BTD, params['final_norm'], config.rms_norm_eps), KVCache(keys, values)


def extend_each(
  params: Params,
  config: DecoderConfig,
  cache: KVCache,
  token_B: jax.Array,
  position_B: jax.Array,
) -> tuple[jax.Array, KVCache]:
  """Appends one token to every lane: (final-normed hidden [B, D], cache).

  This is the step of a decode loop. Writes at positions beyond a lane are dropped.

  Args:
    params: the parameter tree. On a CPU, `turn`'s tree is better: there, cutting a layer out of its
      stack is a copy.
    config: its configuration.
    cache: unstacked. Unstacked caches unroll the layers: on a CPU decoding takes some 30 % less
      time, and compile time grows with depth.
    token_B: token ids.
    position_B: where they go, >= 0.
  """
  position_B1 = position_B[:, None]
  # Without the barrier, XLA's CPU compiler computes cosines and sines anew in every layer.
  tables = jax.lax.optimization_barrier(
    rotary.rope_tables(position_B1, config.head_dim, config.rope_theta, config.rope_scaling)
  )
  hidden_B1D = params['embed'][token_B][:, None]
  # Lists, since each layer replaces its own array.
  keys = list(cache.k)
  values = list(cache.v)

  for index, layer in enumerate(
    params['layers'] if isinstance(params['layers'], tuple) else unstack(params)['layers']
  ):
    hidden_B1D, keys[index], values[index] = _extend_layer(
      layer, config, hidden_B1D, (keys[index], values[index]), position_B1, tables
    )
  hidden_B1D = _rms_norm(hidden_B1D, params['final_norm'], config.rms_norm_eps)
  return hidden_B1D[:, 0], KVCache(tuple(keys), tuple(values))


# Traced once for all layers, and for all programs of the same shapes.
@functools.partial(jax.jit, static_argnames='config')
def _extend_layer(
  layer: Params,
  config: DecoderConfig,
  hidden_B1D: jax.Array,
  cache: tuple[jax.Array, jax.Array],
  position_B1: jax.Array,
  tables: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Runs a layer of `extend_each`: (hidden states, keys, values); `tables` are of the rotary."""
  position_B = position_B1[:, 0]
  lane_B = jnp.arange(len(position_B))
  written = []

  def attend(q_B1NH, k_B1KH, v_B1KH):
    """Writes one key and value a lane, then attends over the lane."""
    for held, new_B1KH in zip(cache, (k_B1KH, v_B1KH), strict=True):
      # A slice stands between the two index arrays: numpy's rule then puts their axis first, so
      # that the update is [B, K, H].
      new_BKH = new_B1KH[:, 0].astype(held.dtype)
      written.append(held.at[lane_B, :, position_B].set(new_BKH, mode='drop'))
    mask_B1S = reference.cache_mask(position_B1, cache[0].shape[2])
    return reference.attend(q_B1NH, *written, mask_B1S)

  hidden_B1D = _block(layer, config, hidden_B1D, *tables, attend, rows='lanes')
  return hidden_B1D, *written


def _embedded(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
  """Looks token ids up: [B, T, D] in `dtype`."""
  # Under a mesh each device looks up its columns of all rows; then rows are exchanged for columns.
  # So the table is not gathered (Qwen3-8B: 1.2 GB), and neither is its gradient.
  hidden_BTD = sharding.constrain(
    embed_VD[tokens_BT].astype(dtype), 'shared_batch', 'length', 'embed'
  )
  return sharding.constrain(hidden_BTD, 'batch', 'length', 'hidden')


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  """Root-mean-square normalisation of the last axis in float32 (Zhang and Sennrich 2019)."""
  # A bfloat16 sum of equal terms stops growing at 256 of them, and D is 1,024 and more.
  wide = x.astype(jnp.float32)
  normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
  # Rounded before the weight is applied, which is the order of Hugging Face's code.
  return normed.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def queries_keys_values(
  layer: Params,
  config: DecoderConfig,
  hidden_BTD: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  rows: str = 'batch',
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (queries [B, T, N, H], keys [B, T, K, H], values) of one layer, the first two rotated.

  It is the half of a layer before attention; `after_attention` is the other. `rows` is the logical
  axis of B.
  """

  def spread(x, heads):
    """Splits the heads of an array over the tensor axis."""
    return sharding.constrain(x, rows, 'length', heads, 'head_dim')

  normed = _rms_norm(hidden_BTD, layer['attn_norm'], config.rms_norm_eps)
  q_BTNH, k_BTKH, v_BTKH = project_all(normed, layer, ('q', 'k', 'v'))
  if config.qkv_bias:
    q_BTNH, k_BTKH, v_BTKH = (
      x + layer[name][None, None]
      for x, name in ((q_BTNH, 'q_bias'), (k_BTKH, 'k_bias'), (v_BTKH, 'v_bias'))
    )
  # Constrained here, each device computes whole heads, and attention exchanges nothing.
  q_BTNH = spread(q_BTNH, 'heads')
  k_BTKH = spread(k_BTKH, 'kv_heads')
  v_BTKH = spread(v_BTKH, 'kv_heads')
  # Qwen3 normalises before it rotates. A rotation keeps the norm, but the weights of q_norm differ
  # by component, so that the order matters.
  if config.qk_norm:
    q_BTNH = _rms_norm(q_BTNH, layer['q_norm'], config.rms_norm_eps)
    k_BTKH = _rms_norm(k_BTKH, layer['k_norm'], config.rms_norm_eps)
  # Values are not rotated: positions enter through the scores alone.
  return rotary.rotate(q_BTNH, cos, sin), rotary.rotate(k_BTKH, cos, sin), v_BTKH


def after_attention(
  layer: Params,
  config: DecoderConfig,
  hidden_BTD: jax.Array,
  out_BTNH: jax.Array,
  rows: str = 'batch',
) -> jax.Array:
  """Returns the hidden states [B, T, D] behind a layer, given those before it and its attention."""
  out_BTNH = sharding.constrain(out_BTNH, rows, 'length', 'heads', 'head_dim')
  # `o` sums over heads, which is the one exchange of attention under tensor parallelism.
  hidden_BTD = hidden_BTD + project(out_BTNH, layer['o'], inputs=INPUTS['o'])
  normed = _rms_norm(hidden_BTD, layer['mlp_norm'], config.rms_norm_eps)
  # SwiGLU (Shazeer 2020, arXiv:2002.05202): the gate alone passes through SiLU.
  gate_BTF, up_BTF = project_all(normed, layer, ('gate', 'up'))
  gated_BTF = sharding.constrain(jax.nn.silu(gate_BTF) * up_BTF, rows, 'length', 'mlp')
  return hidden_BTD + project(gated_BTF, layer['down'])


def final_norm(params: Params, config: DecoderConfig, hidden_BTD: jax.Array) -> jax.Array:
  """Returns the final-normed hidden states, which `logits` reads."""
  return _rms_norm(hidden_BTD, params['final_norm'], config.rms_norm_eps)


def _block(
  layer: Params,
  config: DecoderConfig,
  hidden_BTD: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  rows: str = 'batch',
) -> jax.Array:
  """Runs one layer.

  `attend(q_BTNH, k_BTKH, v_BTKH)` decides where keys and values live, so that training and decoding
  share this function. `rows` is the logical axis of B.
  """
  out_BTNH = attend(*queries_keys_values(layer, config, hidden_BTD, cos, sin, rows))
  return after_attention(layer, config, hidden_BTD, out_BTNH, rows)
