"""The engine's device programs: prompts into trunks, branches into trunks, and the decode loop.

A trunk is the key-value cache of a prompt, stored once for all rollouts of it; a branch is what one lane has sampled behind
its trunk. Every program is compiled for a few sizes (rows, spans of slots) and told the rest as numbers.
Letters as in models/config.py; here P trunks, A lanes, B lanes and R trunks of a decode tile, W places for lanes at a trunk,
N prompts of a prefill call, Q steps of a decode call, Z slots of a branch.
"""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dcore_jax.models import decoder
from dcore_jax.models.attention import Sharing
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import sampling
from dcore_jax.rollout.sampling import Mode, Rule

traces = (
  collections.Counter()
)  # a traced function's body runs once per compilation: that is where it is counted


class State(NamedTuple):
  """What stays on the device between calls; donated to each."""

  trunks: decoder.KVCache  # [L, P, K, S, H]
  trunk_hidden_PD: (
    jax.Array
  )  # after the last token of each trunk: any number of rollouts may start from it
  branches: decoder.KVCache  # [L, A, K, Z, H]
  hidden_AD: jax.Array  # after the last token of each branch


class LaneInputs(NamedTuple):
  """What the host tells a decode call of each lane."""

  key_B2: np.ndarray  # uint32
  drawn_B: np.ndarray  # int32, tokens sampled before this branch began
  slot_B: np.ndarray  # int32, slots of the branch in use
  limit_B: np.ndarray  # int32, slots to use at most
  live_B: np.ndarray  # bool
  rule: Rule


class Drawn(NamedTuple):
  """What a decode call drew. A lane's new tokens are the first of its column, as many as its slots have grown by."""

  tokens_QB: np.ndarray  # int32
  scores_3QB: (
    np.ndarray
  )  # float32: log-probability under the policy that drew and before truncation, and entropy there
  slot_B: np.ndarray  # int32
  live_B: np.ndarray  # bool
  steps: np.ndarray  # int32, steps taken
  top: sampling.Alternatives | None  # [Q, B, K], where a lane of the tile wants alternatives


def init_state(
  config: DecoderConfig,
  lanes: int,
  trunks: int,
  max_len: int,
  max_new: int,
  dtype: jnp.dtype,
  placement: NamedSharding | None,
) -> State:
  """Empty trunks of `max_len` slots and branches of `max_new`; `placement` splits their key heads over devices."""

  def make():
    hidden = lambda rows: jnp.zeros((rows, config.hidden_size), dtype)
    return State(
      decoder.init_cache(config, trunks, max_len, dtype),
      hidden(trunks),
      decoder.init_cache(config, lanes, max_new, dtype),
      hidden(lanes),
    )

  if placement is None:
    return make()
  whole = NamedSharding(placement.mesh, jax.P())
  cache = decoder.KVCache(placement, placement)
  return jax.jit(make, out_shardings=State(cache, whole, cache, whole))()


@functools.partial(
  jax.jit, static_argnames=('config', 'span', 'rows', 'placement'), donate_argnames='state'
)
def prefill(
  params: decoder.Params,
  state: State,
  tokens_NT: jax.Array,
  place_4N: jax.Array,
  count: jax.Array,
  *,
  config: DecoderConfig,
  span: int,
  rows: int,
  placement: NamedSharding | None,
) -> State:
  """Appends the first `count` rows of `tokens_NT` to trunks; a loop of that many turns, so that a call costs what it does.

  `place_4N` has for each row the trunk to read, the trunk to write (the same one, or another that becomes a longer copy), the
  slot of its first token and the number of its tokens. The first `span` slots are copied, which must hold the result.
  Rows go through the model `rows` at a time, the rest one by one.
  """
  traces['prefill'] += 1
  T = tokens_NT.shape[1]

  def fill(first, state, rows):
    source_R, target_R, start_R, length_R = jax.lax.dynamic_slice_in_dim(
      place_4N, first, rows, axis=1
    )
    parts = [_read(state.trunks, source_R[row], span) for row in range(rows)]
    part = jax.tree.map(lambda *stored: jnp.concatenate(stored, axis=1), *parts)
    tokens_RT = jax.lax.dynamic_slice_in_dim(tokens_NT, first, rows)
    hidden_RTD, part = decoder.extend(params, config, part, tokens_RT, start_R)
    trunks, hidden_PD = state.trunks, state.trunk_hidden_PD
    for row in range(rows):
      trunks = _write(
        trunks, jax.tree.map(lambda stored: stored[:, row : row + 1], part), target_R[row]
      )
    last_RD = jnp.take_along_axis(
      hidden_RTD, jnp.clip(length_R - 1, 0, T - 1)[:, None, None], axis=1
    )[:, 0]
    return state._replace(trunks=trunks, trunk_hidden_PD=hidden_PD.at[target_R].set(last_RD))

  batches = count // rows
  state = jax.lax.fori_loop(0, batches, lambda turn, state: fill(turn * rows, state, rows), state)
  if rows > 1:
    state = jax.lax.fori_loop(batches * rows, count, lambda row, state: fill(row, state, 1), state)
  return _placed(state, placement)


@functools.partial(
  jax.jit, static_argnames=('span', 'branch_span', 'placement'), donate_argnames='state'
)
def commit(
  state: State,
  source: jax.Array,
  target: jax.Array,
  lane: jax.Array,
  length: jax.Array,
  count: jax.Array,
  *,
  span: int,
  branch_span: int,
  placement: NamedSharding | None,
) -> State:
  """Makes trunk `target` of the `length` tokens of trunk `source` and the first `count` of the lane's branch."""
  traces['commit'] += 1
  slot_Z = jnp.arange(branch_span)
  slot_Z = jnp.where(slot_Z < count, length + slot_Z, span)  # what lies beyond is dropped
  row, branch = _read(state.trunks, source, span), _read(state.branches, lane, branch_span)
  row = jax.tree.map(
    lambda stored, new: stored.at[:, :, :, slot_Z].set(new, mode='drop'), row, branch
  )
  return _placed(state._replace(trunks=_write(state.trunks, row, target)), placement)


@functools.partial(
  jax.jit,
  static_argnames=('config', 'trunk_span', 'span', 'mode', 'top', 'steps', 'placement'),
  donate_argnames='state',
)
def decode(
  params: decoder.Params,
  state: State,
  trunk_R: jax.Array,
  sharing: Sharing,
  lane_B: jax.Array,
  lanes: LaneInputs,
  stop_ids: jax.Array,
  *,
  config: DecoderConfig,
  trunk_span: int,
  span: int,
  mode: Mode,
  top: int,
  steps: int,
  placement: NamedSharding | None,
) -> tuple[State, Drawn]:
  """Up to `steps` tokens for every live lane of the tile `lane_B`, behind the trunks `trunk_R`; returns when none is left. Of
  each token `top` alternatives are given, too.

  The first slots of the tile's trunks and branches are copied together, decoded on, and what is new is copied back: for the
  price of a copy a call every step reads dense memory, and lanes of like lengths can be put together wherever they are.
  """
  traces['decode'] += 1
  trunks, branches = (
    _gather(state.trunks, trunk_R, trunk_span),
    _gather(state.branches, lane_B, span),
  )
  owner_B = trunk_R[sharing.place_B // sharing.lane_RW.shape[1]]
  hidden_BD = jnp.where(
    (lanes.slot_B == 0)[:, None], state.trunk_hidden_PD[owner_B], state.hidden_AD[lane_B]
  )

  def step(carry):
    turn, branches, hidden_BD, slot_B, live_B, tokens_QB, scores_3QB, tops = carry
    logits_BV = decoder.logits(params, hidden_BD)
    uniform_B2 = sampling.uniforms(sampling.token_keys(lanes.key_B2, lanes.drawn_B + slot_B))
    token_B, *scores, alternatives = sampling.draw(logits_BV, uniform_B2, lanes.rule, mode, top)
    tokens_QB, scores_3QB = (
      tokens_QB.at[turn].set(token_B),
      scores_3QB.at[:, turn].set(jnp.stack(scores)),
    )
    tops = jax.tree.map(
      lambda written_QBK, new_BK: written_QBK.at[turn].set(new_BK), tops, alternatives
    )
    # A lane without a rollout writes past the end, which is dropped: a branch that it still holds stays whole.
    hidden_BD, branches = decoder.extend_branches(
      params, config, trunks, branches, sharing, token_B, jnp.where(live_B, slot_B, span)
    )
    slot_B = slot_B + live_B
    live_B = (
      live_B & (slot_B < lanes.limit_B) & ~jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1)
    )
    return turn + 1, branches, hidden_BD, slot_B, live_B, tokens_QB, scores_3QB, tops

  B = len(lane_B)
  tops = (
    sampling.Alternatives(
      jnp.zeros((steps, B, top), jnp.int32), jnp.zeros((steps, B, top), jnp.float32)
    )
    if top
    else None
  )
  start = (
    jnp.int32(0),
    branches,
    hidden_BD,
    lanes.slot_B,
    lanes.live_B,
    jnp.zeros((steps, B), jnp.int32),
    jnp.zeros((3, steps, B), jnp.float32),
    tops,
  )
  turn, branches, hidden_BD, slot_B, live_B, tokens_QB, scores_3QB, tops = jax.lax.while_loop(
    lambda carry: (carry[0] < steps) & jnp.any(carry[4]), step, start
  )
  window = min(steps, span)

  def scatter(index, stored):
    first = jnp.minimum(lanes.slot_B[index], span - window)
    cut = lambda layer: jax.lax.dynamic_slice(
      layer, (index, 0, first, 0), (1, layer.shape[1], window, layer.shape[3])
    )
    part = decoder.KVCache(
      *(jnp.stack([cut(layer) for layer in side]) for side in (branches.k, branches.v))
    )
    return _write(stored, part, lane_B[index], first)

  stored = jax.lax.fori_loop(0, B, scatter, state.branches)
  state = state._replace(branches=stored, hidden_AD=state.hidden_AD.at[lane_B].set(hidden_BD))
  drawn = Drawn(tokens_QB, scores_3QB, slot_B, live_B, turn, tops)
  if placement is not None:  # every host reads all of it
    drawn = jax.lax.with_sharding_constraint(drawn, NamedSharding(placement.mesh, jax.P()))
  return _placed(state, placement), drawn


def _read(cache: decoder.KVCache, row: jax.Array, span: int) -> decoder.KVCache:
  """The first `span` slots of one row, as a cache of one row."""

  def read(stored):
    L, _, K, _, H = stored.shape
    return jax.lax.dynamic_slice(stored, (0, row, 0, 0, 0), (L, 1, K, span, H))

  return jax.tree.map(read, cache)


def _write(
  cache: decoder.KVCache, part: decoder.KVCache, row: jax.Array, slot: jax.Array | int = 0
) -> decoder.KVCache:
  """`cache` with the one-row cache `part` in `row` from `slot` on."""
  return jax.tree.map(
    lambda stored, new: jax.lax.dynamic_update_slice(stored, new, (0, row, 0, slot, 0)), cache, part
  )


def _gather(cache: decoder.KVCache, row_M: jax.Array, span: int) -> decoder.KVCache:
  """The first `span` slots of some rows, unstacked: no layer has to be cut out of the stack before it is read."""

  def copy(index, tile):
    part = jax.tree.map(tuple, _read(cache, row_M[index], span))
    return jax.tree.map(
      lambda layer, new: jax.lax.dynamic_update_slice_in_dim(layer, new, index, 0), tile, part
    )

  L, _, K, _, H = cache.k.shape
  blank = tuple(jnp.zeros((len(row_M), K, span, H), cache.k.dtype) for _ in range(L))
  return jax.lax.fori_loop(0, len(row_M), copy, decoder.KVCache(blank, blank))


def _placed(state: State, placement: NamedSharding | None) -> State:
  """The caches stay where they are, so that a donated one is updated in place and the next call fits the same program."""
  if placement is None:
    return state
  whole, hold = NamedSharding(placement.mesh, jax.P()), jax.lax.with_sharding_constraint
  return State(
    hold(state.trunks, placement),
    hold(state.trunk_hidden_PD, whole),
    hold(state.branches, placement),
    hold(state.hidden_AD, whole),
  )
