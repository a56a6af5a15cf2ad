"""The engine's device programs: prompts into trunks, and the decode loop.

A trunk is the key-value cache of a prompt, stored once for all rollouts of it. A branch is the
cache of what one lane has sampled behind its trunk. Every program is compiled for a few sizes,
which are in its `shape`; all else that it depends on are arrays.

Letters of this room, beside those of models/config.py (D, H, K, L, T, V):

| letter | dimension |
|---|---|
| B | lanes: all of the engine (`State`, `LaneTable`), or those of one tile (`Tile`, `decode`) |
| U | trunks of the engine |
| S, Z | slots of a trunk, slots of a branch; a slot holds the keys and values of one token |
| R | rows of trunks in a tile (`Sharing`); rows that go through the model together in a prefill |
| W | places for lanes in a row of trunks (`Sharing`) |
| X | prompts of a prefill call |
| Q | steps of a decode call |
| J | alternatives of a token |
"""

import collections
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import sampling
from dcore_jax.rollout.sampling import Alternatives, Mode, Rule
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.rollout.tiles import Tile

# Compilations of each program. The body of a traced function runs once for each of them, which is
# where they are counted.
traces = collections.Counter()


class State(NamedTuple):
  """What stays on the device between calls; donated to each of them."""

  trunks: decoder.KVCache  # [L, U, K, S, H]
  trunk_hidden_UD: jax.Array  # after each trunk's last token: any number of rollouts start from it
  branches: decoder.KVCache  # [L, B, K, Z, H]
  hidden_BD: jax.Array  # after the last token of each branch


class LaneInputs(NamedTuple):
  """What the host knows of each lane and a decode call needs."""

  key_B2: np.ndarray  # uint32, random key
  slot_B: np.ndarray  # int32, slots of the branch in use
  limit_B: np.ndarray  # int32, slots to use at most
  live_B: np.ndarray  # bool, whether the lane runs a rollout
  rule: Rule


class Drawn(NamedTuple):
  """What a decode call drew.

  A lane's new tokens are the first of its column, as many as its slots have grown by.
  """

  tokens_QB: np.ndarray  # int32
  # float32: log-probability under the policy that drew, the same before truncation, entropy there.
  scores_3QB: np.ndarray
  slot_B: np.ndarray  # int32
  live_B: np.ndarray  # bool
  steps: np.ndarray  # int32, steps taken
  top: Alternatives | None  # [Q, B, J], where a lane of the tile wants alternatives


@dataclasses.dataclass(frozen=True)
class PrefillShape:
  """What a prefill program is compiled for.

  Attributes:
    config: the model's configuration.
    span: slots of a trunk that are copied, which must hold the result.
    rows: prompts that go through the model together.
    placement: how caches are split over a mesh (`cache_placement`).
  """

  config: DecoderConfig
  span: int
  rows: int
  placement: NamedSharding | None


@dataclasses.dataclass(frozen=True)
class DecodeShape:
  """What a decode program is compiled for.

  Attributes:
    config: the model's configuration.
    trunk_span: slots of each trunk that are read.
    span: slots of each branch that are read and written.
    mode: which of the sampling programs draws.
    top: alternatives to be given with each token; 0 for none.
    steps: tokens to be drawn for each lane at most.
    placement: how caches are split over a mesh (`cache_placement`).
  """

  config: DecoderConfig
  trunk_span: int
  span: int
  mode: Mode
  top: int
  steps: int
  placement: NamedSharding | None


def cache_placement(params: decoder.Params, config: DecoderConfig) -> NamedSharding | None:
  """Returns how caches [L, B, K, S, H] are split where the parameters are split over a mesh.

  None stands for one device.
  """
  held = getattr(params['embed'], 'sharding', None)  # numpy arrays have none
  if not isinstance(held, NamedSharding) or held.mesh.size == 1:
    return None
  # Rows and slots stay whole (they have the axis 'length'): any prompt goes to any trunk and any
  # rollout to any lane, so that a device that held only some of them would have to ask others.
  axes = ('layers', 'length', 'kv_heads', 'length', 'head_dim')
  # Only the size of an axis that is split matters: it must divide over the devices.
  shape = (1, 1, config.num_key_value_heads, 1, 1)
  return NamedSharding(held.mesh, sharding.partition_spec(axes, shape, held.mesh))


def init_state(
  config: DecoderConfig, sizes: EngineSizes, dtype: jnp.dtype, placement: NamedSharding | None
) -> State:
  """Returns empty trunks of `max_len` slots and empty branches of `max_new`.

  Args:
    config: the model's configuration.
    sizes: resolved sizes.
    dtype: of the caches and the hidden states.
    placement: how caches are split over a mesh (`cache_placement`).
  """

  def make() -> State:
    """Empty caches and hidden states."""
    return State(
      trunks=decoder.init_cache(config, sizes.trunks, sizes.max_len, dtype),
      trunk_hidden_UD=jnp.zeros((sizes.trunks, config.hidden_size), dtype),
      branches=decoder.init_cache(config, sizes.lanes, sizes.max_new, dtype),
      hidden_BD=jnp.zeros((sizes.lanes, config.hidden_size), dtype),
    )

  if placement is None:
    return make()
  whole = NamedSharding(placement.mesh, jax.P())
  # Compiled, so that each device makes its own part; the whole may not fit on one of them.
  return jax.jit(make, out_shardings=state_placement(placement, whole))()


def state_placement(cache: NamedSharding, hidden: NamedSharding) -> State:
  """Returns where the arrays of a `State` lie, given it for caches and for hidden states."""
  split = decoder.KVCache(cache, cache)
  return State(trunks=split, trunk_hidden_UD=hidden, branches=split, hidden_BD=hidden)


@functools.partial(jax.jit, static_argnames='shape', donate_argnames='state')
def prefill(
  params: decoder.Params,
  state: State,
  tokens_XT: jax.Array,
  place_4X: jax.Array,
  count: jax.Array,
  *,
  shape: PrefillShape,
) -> State:
  """Appends the first `count` rows of `tokens_XT` to trunks.

  Rows go through the model `shape.rows` at a time, and the remaining ones singly. The loops run
  over the rows that are there, so that a call costs what its rows cost.

  Args:
    params: the model's parameters.
    state: trunks and branches; donated.
    tokens_XT: token ids, padded on the right.
    place_4X: for each row the trunk to read, the trunk to write (the same one, or another that
      becomes a longer copy), the slot of its first token and the number of its tokens.
    count: rows that hold something.
    shape: what is compiled in.
  """
  traces['prefill'] += 1
  T = tokens_XT.shape[1]

  def fill(first: jax.Array, state: State, rows: int) -> State:
    """Appends `rows` rows of tokens, from row `first` on."""
    place_4R = jax.lax.dynamic_slice_in_dim(place_4X, first, rows, axis=1)
    source_R, target_R, start_R, length_R = place_4R
    # Each row works on a copy of its source, and is written to its target when it is complete: the
    # source may be another trunk, which stays as it is.
    parts = [_read(state.trunks, source_R[row], shape.span) for row in range(rows)]
    part = jax.tree.map(lambda *stored: jnp.concatenate(stored, axis=1), *parts)
    tokens_RT = jax.lax.dynamic_slice_in_dim(tokens_XT, first, rows)
    hidden_RTD, part = decoder.extend(params, shape.config, part, tokens_RT, start_R)
    trunks = state.trunks
    for row in range(rows):
      one = jax.tree.map(lambda stored, row=row: stored[:, row : row + 1], part)
      trunks = _write(trunks, one, target_R[row])
    # Sampling starts from the hidden state of the last token; those of the padding behind it mean
    # nothing.
    last_R = jnp.clip(length_R - 1, 0, T - 1)
    last_RD = jnp.take_along_axis(hidden_RTD, last_R[:, None, None], axis=1)[:, 0]
    hidden_UD = state.trunk_hidden_UD.at[target_R].set(last_RD)
    return state._replace(trunks=trunks, trunk_hidden_UD=hidden_UD)

  def fill_batch(turn: jax.Array, state: State) -> State:
    """Appends one batch of rows."""
    return fill(turn * shape.rows, state, shape.rows)

  def fill_one(row: jax.Array, state: State) -> State:
    """Appends a single row."""
    return fill(row, state, 1)

  # The rows that are left go one by one. Filled up to a batch they would cost as much as a full
  # one, and a batch of just their number would be another program.
  batches = count // shape.rows
  state = jax.lax.fori_loop(0, batches, fill_batch, state)
  if shape.rows > 1:
    state = jax.lax.fori_loop(batches * shape.rows, count, fill_one, state)
  return _placed(state, shape.placement)


class _Decoding(NamedTuple):
  """What one step of the decode loop hands to the next."""

  steps: jax.Array  # int32, steps taken
  branches: decoder.KVCache  # [B, K, Z, H] for each layer
  hidden_BD: jax.Array
  slot_B: jax.Array
  live_B: jax.Array
  tokens_QB: jax.Array
  scores_3QB: jax.Array
  top: Alternatives | None


@functools.partial(jax.jit, static_argnames='shape', donate_argnames='state')
def decode(
  params: decoder.Params,
  state: State,
  tile: Tile,
  inputs: LaneInputs,
  stop_ids: jax.Array,
  *,
  shape: DecodeShape,
) -> tuple[State, Drawn]:
  """Draws up to `shape.steps` tokens for every live lane of a tile; ends early where none is left.

  The first slots of the tile's trunks and branches are copied together, decoded on, and what is new
  is copied back. For the price of one copy a call every step reads dense memory, and lanes of like
  lengths can be put together wherever they are.

  Args:
    params: the model's parameters.
    state: trunks and branches; donated.
    tile: the lanes and their trunks.
    inputs: of the tile's lanes.
    stop_ids: tokens that end a rollout.
    shape: what is compiled in.

  Returns:
    (the state with what was drawn appended, what was drawn).
  """
  traces['decode'] += 1
  # Trunks are only read in the loop, and therefore are no part of what its steps hand on.
  trunks = _gather(state.trunks, tile.trunk_R, shape.trunk_span)

  def unfinished(now: _Decoding) -> jax.Array:
    """Whether a live lane has steps left."""
    return (now.steps < shape.steps) & jnp.any(now.live_B)

  def step(now: _Decoding) -> _Decoding:
    """Draws one token a lane and extends the branches by it."""
    logits_BV = decoder.logits(params, now.hidden_BD)
    # The number of a token in its completion chooses its random numbers, and not the step of this
    # call: a rollout that waited or changed its neighbours draws the same.
    keys_B = sampling.token_keys(inputs.key_B2, now.slot_B)
    drawn = sampling.draw(logits_BV, sampling.uniforms(keys_B), inputs.rule, shape.mode, shape.top)
    scores_3B = jnp.stack([drawn.logprob_B, drawn.full_logprob_B, drawn.entropy_B])
    top = jax.tree.map(
      lambda written_QBJ, new_BJ: written_QBJ.at[now.steps].set(new_BJ), now.top, drawn.top
    )
    # A lane that is not live writes past the end, where what is written is dropped: it may have
    # used up its slots, and there is nothing to append.
    write_B = jnp.where(now.live_B, now.slot_B, shape.span)
    hidden_BD, branches = decoder.extend_branches(
      params, shape.config, trunks, now.branches, tile.sharing, drawn.token_B, write_B
    )
    slot_B = now.slot_B + now.live_B
    # Stop ids are an argument and not compiled in: engines that differ in them share programs.
    stopped_B = jnp.any(drawn.token_B[:, None] == stop_ids[None, :], axis=-1)
    return _Decoding(
      steps=now.steps + 1,
      branches=branches,
      hidden_BD=hidden_BD,
      slot_B=slot_B,
      # The stop token itself is kept: a trainer has to learn when to stop.
      live_B=now.live_B & (slot_B < inputs.limit_B) & ~stopped_B,
      tokens_QB=now.tokens_QB.at[now.steps].set(drawn.token_B),
      scores_3QB=now.scores_3QB.at[:, now.steps].set(scores_3B),
      top=top,
    )

  end = jax.lax.while_loop(unfinished, step, _start(state, tile, inputs, shape))
  # Trunks have not changed, so that only the branches are written back.
  branches = _append(state.branches, end.branches, tile.lane_B, inputs.slot_B, shape)
  state = state._replace(
    branches=branches, hidden_BD=state.hidden_BD.at[tile.lane_B].set(end.hidden_BD)
  )
  return _placed(state, shape.placement), _drawn(end, shape.placement)


def _start(state: State, tile: Tile, inputs: LaneInputs, shape: DecodeShape) -> _Decoding:
  """Returns what the first step begins with; an empty branch begins at its trunk's end."""
  B = len(tile.lane_B)
  Q = shape.steps
  width = tile.sharing.lane_RW.shape[1]
  trunk_B = tile.trunk_R[tile.sharing.place_B // width]
  # The lane's own hidden state is that of the rollout it ran before.
  empty_B = inputs.slot_B == 0
  hidden_BD = jnp.where(
    empty_B[:, None], state.trunk_hidden_UD[trunk_B], state.hidden_BD[tile.lane_B]
  )
  top = None
  if shape.top:
    top = Alternatives(
      token_BJ=jnp.zeros((Q, B, shape.top), jnp.int32),
      logprob_BJ=jnp.zeros((Q, B, shape.top), jnp.float32),
    )
  return _Decoding(
    steps=jnp.int32(0),
    branches=_gather(state.branches, tile.lane_B, shape.span),
    hidden_BD=hidden_BD,
    slot_B=inputs.slot_B,
    live_B=inputs.live_B,
    tokens_QB=jnp.zeros((Q, B), jnp.int32),
    scores_3QB=jnp.zeros((3, Q, B), jnp.float32),
    top=top,
  )


def _drawn(end: _Decoding, placement: NamedSharding | None) -> Drawn:
  drawn = Drawn(
    tokens_QB=end.tokens_QB,
    scores_3QB=end.scores_3QB,
    slot_B=end.slot_B,
    live_B=end.live_B,
    steps=end.steps,
    top=end.top,
  )
  if placement is None:
    return drawn
  # Every host reads all of it.
  return jax.lax.with_sharding_constraint(drawn, NamedSharding(placement.mesh, jax.P()))


def _append(
  stored: decoder.KVCache,
  tile_branches: decoder.KVCache,
  lane_B: jax.Array,
  slot_B: jax.Array,
  shape: DecodeShape,
) -> decoder.KVCache:
  """Returns the branches with the slots of a tile written back that a call can have filled.

  They are a window of `shape.steps` slots from `slot_B` on. Where the span ends before the window,
  the window begins earlier, and what lies before `slot_B` is written again as it was.
  """
  window = min(shape.steps, shape.span)

  def copy(index: jax.Array, stored: decoder.KVCache) -> decoder.KVCache:
    """Writes one branch of the tile back into the stored branches."""
    first = jnp.minimum(slot_B[index], shape.span - window)

    def cut(layer: jax.Array) -> jax.Array:
      """The window of one layer."""
      size = (1, layer.shape[1], window, layer.shape[3])
      return jax.lax.dynamic_slice(layer, (index, 0, first, 0), size)

    part = decoder.KVCache(
      jnp.stack([cut(layer) for layer in tile_branches.k]),
      jnp.stack([cut(layer) for layer in tile_branches.v]),
    )
    return _write(stored, part, lane_B[index], first)

  return jax.lax.fori_loop(0, len(lane_B), copy, stored)


def _read(cache: decoder.KVCache, row: jax.Array, span: int) -> decoder.KVCache:
  """Returns the first `span` slots of one row, as a cache of one row."""

  def read(stored: jax.Array) -> jax.Array:
    """The slots of one array, keys or values."""
    L, _, K, _, H = stored.shape
    return jax.lax.dynamic_slice(stored, (0, row, 0, 0, 0), (L, 1, K, span, H))

  return jax.tree.map(read, cache)


def _write(
  cache: decoder.KVCache, part: decoder.KVCache, row: jax.Array, slot: jax.Array | int = 0
) -> decoder.KVCache:
  """Returns `cache` with the one-row cache `part` in `row` from `slot` on."""

  def write(stored: jax.Array, new: jax.Array) -> jax.Array:
    """Writes into one array, keys or values."""
    return jax.lax.dynamic_update_slice(stored, new, (0, row, 0, slot, 0))

  return jax.tree.map(write, cache, part)


def _gather(cache: decoder.KVCache, row_R: jax.Array, span: int) -> decoder.KVCache:
  """Returns the first `span` slots of some rows, with an array for each layer.

  A step then reads each layer where it lies; out of a stack it would have to be cut first.
  """

  def copy(index: jax.Array, gathered: decoder.KVCache) -> decoder.KVCache:
    """Copies one row of the stack into the arrays of the layers."""
    part = jax.tree.map(tuple, _read(cache, row_R[index], span))
    return jax.tree.map(
      lambda layer, new: jax.lax.dynamic_update_slice_in_dim(layer, new, index, 0), gathered, part
    )

  L, _, K, _, H = cache.k.shape
  blank = tuple(jnp.zeros((len(row_R), K, span, H), cache.k.dtype) for _ in range(L))
  return jax.lax.fori_loop(0, len(row_R), copy, decoder.KVCache(blank, blank))


def _placed(state: State, placement: NamedSharding | None) -> State:
  """Keeps the arrays where they are.

  A donated cache is then updated in place, and the next call fits the same program.
  """
  if placement is None:
    return state
  whole = NamedSharding(placement.mesh, jax.P())
  return jax.tree.map(jax.lax.with_sharding_constraint, state, state_placement(placement, whole))
