"""The device programs of an engine on accelerators: a grid of rows through all layers, and draws.

The cache is one array for the keys of all layers and pages, and one for the values. It is donated
from call to call and stays in the carry of the loop over layers, so that it is never copied; the
parameters are used as they are, stacked, a layer at a time.

What bounds a call: a grid of one row a lane waits for memory, which is all weights once, and the
keys and values of its texts, those that several blocks read together once. A piece of a prompt is
bound by arithmetic, 2 operations a weight and row: from some 150 to 300 rows on, by the device,
that takes longer than to read the weights in 16 bits. Over a mesh each layer adds two exchanges of
rows * D numbers.

Letters as in passes.py and grids.py; G query heads of a key head, Q = M * G queries of a block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from dcore_jax import sharding
from dcore_jax.models import decoder, rotary
from dcore_jax.models.attention import pages
from dcore_jax.models.attention.page_reads import PageReads, Partial
from dcore_jax.models.attention.reference import MASKED_SCORE
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.grids import Grid, GridShape, Sharing, blank
from dcore_jax.rollout.programs import Drawn, draw_or_score, no_draws, traces

_CACHE = ('layers', 'length', 'kv_heads', 'length', 'head_dim')


class Cache(NamedTuple):
  """Keys (already rotated) and values of all layers and pages, [L, N, K, C, H].

  Where they are int8, each slot and key head has a float32 scale, [L, N, K, C]; else there is none.
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None
  v_scale: jax.Array | None


class State(NamedTuple):
  """What a call hands on to the next one.

  Attributes:
    cache: the pages.
    hidden_RD: final-normed hidden states of the pass, which draws read.
  """

  cache: Cache
  hidden_RD: jax.Array


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """What all programs of an engine are compiled for.

  Attributes:
    config: the model's configuration.
    placement: how keys and values are split over a mesh (`cache_placement`); None: one device.
    rows: rows of a pass, R.
  """

  config: DecoderConfig
  placement: NamedSharding | None
  rows: int


def cache_placement(params: decoder.Params, config: DecoderConfig) -> NamedSharding | None:
  """Returns how keys and values [L, N, K, C, H] are split where parameters are split over a mesh.

  None stands for one device.
  """
  held = getattr(params['embed'], 'sharding', None)  # numpy arrays have none
  if not isinstance(held, NamedSharding) or held.mesh.size == 1:
    return None
  # Pages and slots stay whole (they have the axis 'length'): any text goes to any page, so that a
  # device that held only some of them would have to ask others.
  # Only the size of an axis that is split matters: it must divide over the devices.
  shape = (1, 1, config.num_key_value_heads, 1, 1)
  return NamedSharding(held.mesh, sharding.partition_spec(_CACHE, shape, held.mesh))


def empty_state(shape: MeshShape, count: int, slots: int, dtype: Any, cache_dtype: Any) -> State:
  """Returns an empty cache and hidden states, zeros; to be traced.

  Args:
    shape: of the engine.
    count: N, pages.
    slots: C, of a page.
    dtype: of the hidden states.
    cache_dtype: of keys and values; int8 ones have scales.
  """
  config = shape.config
  L = config.num_hidden_layers
  size = (L, count, config.num_key_value_heads, slots, config.head_dim)

  def scale() -> jax.Array | None:
    return jnp.zeros(size[:4], jnp.float32) if jnp.dtype(cache_dtype) == jnp.int8 else None

  # Slots that nobody sees are multiplied by weights of 0, and have to be numbers.
  return State(
    cache=Cache(
      k=jnp.zeros(size, cache_dtype),
      v=jnp.zeros(size, cache_dtype),
      k_scale=scale(),
      v_scale=scale(),
    ),
    hidden_RD=jnp.zeros((shape.rows, config.hidden_size), dtype),
  )


def state_placement(state: State, cache: Sharding, hidden: Sharding) -> State:
  """Returns where the arrays of a state lie, given it for the cache and for hidden states."""
  return State(cache=jax.tree.map(lambda _: cache, state.cache), hidden_RD=hidden)


# --- arguments ------------------------------------------------------------------------------------


def pack(tree: Any) -> np.ndarray:
  """Returns a tree of small arrays as one int32 array, bit by bit.

  Each argument of a program is sent to each device, which takes longer than its bytes do.
  """
  parts = []
  for leaf in jax.tree.leaves(tree):
    leaf = np.asarray(leaf)
    wide = leaf.astype(np.int32) if leaf.dtype == bool else np.ascontiguousarray(leaf)
    parts.append(wide.reshape(-1).view(np.int32))
  return np.concatenate(parts)


def _unpack(packed: jax.Array, like: Any) -> Any:
  """Undoes `pack`, given a tree of arrays of the same shapes."""
  leaves, treedef = jax.tree.flatten(like)
  found = []
  start = 0
  for leaf in leaves:
    count = math.prod(np.shape(leaf))
    part = packed[start : start + count].reshape(np.shape(leaf))
    start += count
    found.append(
      part != 0 if leaf.dtype == bool else jax.lax.bitcast_convert_type(part, leaf.dtype)
    )
  return jax.tree.unflatten(treedef, found)


# --- programs -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('shape', 'grid_shape'), donate_argnames='state')
def forward(
  params: decoder.Params,
  state: State,
  packed: jax.Array,
  *,
  shape: MeshShape,
  grid_shape: GridShape,
) -> State:
  """Runs the tokens of a grid through the model: writes their keys and values, and hidden states.

  Args:
    params: the parameters, stacked.
    state: donated.
    packed: the grid (`pack`).
    shape: of the engine.
    grid_shape: of the grid.
  """
  traces['forward'] += 1
  config = shape.config
  grid = _unpack(packed, blank(grid_shape, shape.rows))
  position_BM = grid.position_BM
  slots = state.cache.k.shape[3]
  cos, sin = rotary.rope_tables(
    position_BM, config.head_dim, config.rope_theta, config.rope_scaling
  )
  # Where there is no token the page is none, and nothing is written.
  page_BM = jnp.take_along_axis(grid.pages_BP, jnp.maximum(position_BM, 0) // slots, axis=1)
  page_BM = jnp.where(position_BM >= 0, page_BM, state.cache.k.shape[1])
  own, together = (
    pages.prepare(reads, state.cache.k) if reads else None
    for reads in _reads(grid, slots, config.num_attention_heads // config.num_key_value_heads)
  )
  visit = Visit(
    own=own,
    together=together,
    sharing=grid.sharing,
    page_BM=page_BM,
    slot_BM=jnp.maximum(position_BM, 0) % slots,
  )
  attend = _on_shards(shape.placement)

  def layer_step(carry: tuple[jax.Array, Cache], inputs: tuple[decoder.Params, jax.Array]):
    """One layer; the cache is in the carry: as an output of the loop it would be copied."""
    hidden_BMD, cache = carry
    layer, number = inputs
    q, k, v = decoder.queries_keys_values(layer, config, hidden_BMD, cos, sin, rows='lanes')
    cache, out_BMNH = attend(cache, q, k, v, number, visit)
    hidden_BMD = decoder.after_attention(layer, config, hidden_BMD, out_BMNH, rows='lanes')
    # Without the constraint the partitioner may choose another layout for the carry, and exchange
    # it in every layer.
    return (sharding.constrain(hidden_BMD, 'lanes', 'length', 'hidden'), cache), None

  hidden_BMD = params['embed'][grid.token_BM]
  hidden_BMD = sharding.constrain(hidden_BMD, 'lanes', 'length', 'hidden')
  (hidden_BMD, cache), _ = jax.lax.scan(
    layer_step,
    (hidden_BMD, state.cache),
    (params['layers'], jnp.arange(config.num_hidden_layers, dtype=jnp.int32)),
  )
  hidden_BMD = decoder.final_norm(params, config, hidden_BMD)
  hidden_RD = state.hidden_RD.at[grid.row_BM].set(hidden_BMD, mode='drop')
  return _placed(State(cache=cache, hidden_RD=hidden_RD), shape.placement)


@functools.partial(jax.jit, static_argnames=('count', 'shape'))
def draw(
  params: decoder.Params,
  hidden_RD: jax.Array,
  packed: jax.Array,
  *,
  count: int,
  shape: MeshShape,
) -> Drawn:
  """Draws from rows of a pass, or scores tokens behind them.

  Args:
    params: embedding or head; 'layers' may be empty.
    hidden_RD: final-normed hidden states of the pass.
    packed: inputs of the draws (`pack`).
    count: A, draws of a call.
    shape: of the engine.

  Returns:
    What was drawn, whole on every device.
  """
  traces['draw'] += 1
  inputs = _unpack(packed, no_draws(count))
  drawn = draw_or_score(decoder.logits(params, hidden_RD[inputs.row_A]), inputs)
  if shape.placement is None:
    return drawn
  # Every host reads all of it.
  return jax.lax.with_sharding_constraint(drawn, NamedSharding(shape.placement.mesh, jax.P()))


@functools.partial(jax.jit, static_argnames='shape', donate_argnames='state')
def copy_page(state: State, pages_2: jax.Array, *, shape: MeshShape) -> State:
  """Copies a page, of all layers, into another: `pages_2` are source and target."""
  traces['copy_page'] += 1

  def copy(stored: jax.Array) -> jax.Array:
    page = jax.lax.dynamic_slice_in_dim(stored, pages_2[0], 1, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(stored, page, pages_2[1], axis=1)

  state = state._replace(cache=jax.tree.map(copy, state.cache))
  return _placed(state, shape.placement)


def _placed(state: State, placement: NamedSharding | None) -> State:
  """Keeps the arrays where they are.

  A donated cache is then updated in place, and the next call fits the same program.
  """
  if placement is None:
    return state
  whole = NamedSharding(placement.mesh, jax.P())
  return jax.tree.map(
    jax.lax.with_sharding_constraint, state, state_placement(state, placement, whole)
  )


# --- attention ------------------------------------------------------------------------------------


def _reads(grid: Grid, slots: int, group: int) -> tuple[PageReads, PageReads | None]:
  """Returns what each block reads alone, and what the rows of blocks read together.

  Args:
    grid: the grid.
    slots: C, of a page.
    group: G.
  """
  position_BM, pages_BP = grid.position_BM, grid.pages_BP
  B, P = pages_BP.shape
  read_B = jnp.max(position_BM, axis=1) // slots + 1
  if not len(grid.sharing.count_S):
    own = PageReads(
      pages_RP=pages_BP,
      start_R=jnp.zeros(B, jnp.int32),
      count_R=read_B,
      position_RT=jnp.repeat(position_BM, group, axis=1),
    )
    return own, None
  block_SW, count_S, place_B = grid.sharing
  S, W = block_SW.shape
  shared_B = jnp.where(place_B >= 0, count_S[jnp.maximum(place_B, 0) // W], 0)
  # Behind the last page any id will do.
  behind_BP = jnp.minimum(shared_B[:, None] + jnp.arange(P)[None, :], P - 1)
  own = PageReads(
    pages_RP=jnp.take_along_axis(pages_BP, behind_BP, axis=1),
    start_R=shared_B * slots,
    count_R=read_B - shared_B,
    position_RT=jnp.repeat(position_BM, group, axis=1),
  )
  first_S = jnp.maximum(block_SW[:, 0], 0)
  position_SWM = jnp.where(block_SW[:, :, None] >= 0, position_BM[jnp.maximum(block_SW, 0)], -1)
  together = PageReads(
    pages_RP=pages_BP[first_S],
    start_R=jnp.zeros(S, jnp.int32),
    count_R=count_S,
    position_RT=jnp.repeat(position_SWM, group, axis=2).reshape(S, -1),
  )
  return own, together


class Visit(NamedTuple):
  """What a grid reads and writes in every layer.

  Attributes:
    own: what each block reads alone.
    together: what the rows of blocks read; None where the grid has no such rows.
    sharing: which blocks these are.
    page_BM: page of each token; page N: it is not written.
    slot_BM: its slot there.
  """

  own: PageReads
  together: PageReads | None
  sharing: Sharing
  page_BM: jax.Array
  slot_BM: jax.Array


def _on_shards(placement: NamedSharding | None) -> Callable[..., tuple[Cache, jax.Array]]:
  """Returns `_write_and_attend`, each device on its key heads, as kernels and writes need it."""
  if placement is None:
    return _write_and_attend
  # Heads are the third axis of rows [B, M, K, H] as of the cache [L, N, K, C, H].
  heads = jax.P(*placement.spec[:3])
  return jax.shard_map(
    _write_and_attend,
    in_specs=(*[heads] * 4, jax.P(), jax.P()),
    out_specs=(heads, heads),
    # Unchecked: jax cannot follow a kernel, whose result varies by device as its inputs do.
    check_vma=False,
  )


def _write_and_attend(
  cache: Cache,
  q_BMNH: jax.Array,
  k_BMKH: jax.Array,
  v_BMKH: jax.Array,
  number: jax.Array,
  visit: Visit,
) -> tuple[Cache, jax.Array]:
  """Writes the keys and values of a grid into a layer's pages, and attends over these.

  Args:
    cache: the pages.
    q_BMNH, k_BMKH, v_BMKH: of the grid.
    number: of the layer.
    visit: what is read and written.
  """
  B, M, N, H = q_BMNH.shape
  K = k_BMKH.shape[2]
  page_b = visit.page_BM.reshape(-1)
  slot_b = visit.slot_BM.reshape(-1)
  new = [x.reshape(B * M, K, H) for x in (k_BMKH, v_BMKH)]
  if cache.k_scale is not None:
    (k, k_scale), (v, v_scale) = (pages.quantize(x) for x in new)
    new = [k, v, k_scale, v_scale]
  written = [
    pages.write(held, x, number, page_b, slot_b) for held, x in zip(cache, new, strict=False)
  ]
  cache = Cache(*written, *[None] * (len(cache) - len(written)))

  def attend(q_RKTH: jax.Array, what: PageReads) -> Partial:
    return pages.partial_pages(q_RKTH, cache.k, cache.v, number, what, cache.k_scale, cache.v_scale)

  q_BKQH = q_BMNH.reshape(B, M, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
  part = attend(q_BKQH, visit.own)
  if visit.together:
    q_SWKQH = q_BKQH[jnp.maximum(visit.sharing.block_SW, 0)]
    S, W, _, Q, _ = q_SWKQH.shape
    q_SKTH = q_SWKQH.transpose(0, 2, 1, 3, 4).reshape(S, K, W * Q, H)
    part = pages.merge_partials(
      part, _of_blocks(attend(q_SKTH, visit.together), visit.sharing.place_B, W)
    )
  out_BKQH = pages.finish(part).astype(q_BMNH.dtype)
  out_BMNH = out_BKQH.reshape(B, K, M, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, M, N, H)
  return cache, out_BMNH


def _of_blocks(part: Partial, place_B: jax.Array, width: int) -> Partial:
  """Returns for each block what its row of `width` blocks has read; nothing where it has no row."""

  def take(x_SKT: jax.Array, nothing: float) -> jax.Array:
    """[S, K, W * Q, ...] -> [B, K, Q, ...]."""
    S, K, T = x_SKT.shape[:3]
    by_place = jnp.moveaxis(x_SKT.reshape(S, K, width, T // width, *x_SKT.shape[3:]), 2, 1)
    by_block = by_place.reshape(S * width, *by_place.shape[2:])[jnp.maximum(place_B, 0)]
    there_B = (place_B >= 0).reshape(-1, *[1] * (by_block.ndim - 1))
    return jnp.where(there_B, by_block, nothing)

  return Partial(
    top_RKT=take(part.top_RKT, MASKED_SCORE),
    total_RKT=take(part.total_RKT, 0.0),
    out_RKTH=take(part.out_RKTH, 0.0),
  )
