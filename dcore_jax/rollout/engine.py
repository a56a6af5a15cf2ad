"""Continuous batching: many rollouts on a fixed set of lanes, compiled once per shape bucket.

A lane is one row of the key-value cache. A prompt is prefilled into a lane once; further rollouts of the same prompt
copy it. Decoding runs `steps_per_call` steps on the device for a tile of lanes together, each step drawing a token from
the lane's last hidden state and extending the lane with it; then the host collects what was drawn, hands finished
rollouts out and fills the free lanes. Every rollout has a random key of its own, folded from (seed, key_id, token
index), so it does not matter which lane it runs in, nor beside which others.
Letters as in models/config.py; here B lanes (in `_decode` those of a tile), P prompts and C copies of a prefill call,
Q steps of a decode call, S slots of a lane.
"""
import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import sampling as sampling_lib
from dcore_jax.rollout.sampling import Mode, Rule, SamplingParams

Tag = Any
_CPU_TILE = 32  # lanes; larger tiles fall out of the caches, smaller ones starve the matrix products


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One rollout to be made. `key_id` names its random stream, e.g. (step, prompt, sample)."""
  prompt: np.ndarray  # int [n], n >= 1
  key_id: tuple[int, ...]
  max_tokens: int | None = None  # None: the sampling rule's; either is cut to what a lane has room for


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
  """What was sampled, token by token: what is trained on."""
  tokens: np.ndarray  # int32 [m], the stop token included
  logprobs: np.ndarray  # float32 [m], of the policy that sampled (after temperature and truncation)
  finished: bool  # the last token is a stop token; else the budget was used up
  prompt_len: int


Source = Callable[[int], Sequence[tuple[Tag, Request]]]


@dataclasses.dataclass
class EngineStats:
  """Counts since the engine was made."""
  prefill_tokens: int = 0  # prompt tokens that went through the model
  reused_tokens: int = 0  # prompt tokens whose keys and values were there from another rollout of the same prompt
  decoded_tokens: int = 0  # tokens handed out, which is also the number of lane-steps that did something
  lane_steps: int = 0  # decode steps times lanes
  prefill_calls: int = 0
  decode_calls: int = 0
  compilations: int = 0

  @property
  def occupancy(self) -> float:
    """Share of the lane-steps that drew a token of a rollout."""
    return self.decoded_tokens / max(self.lane_steps, 1)


class LaneInputs(NamedTuple):
  """What the host tells a decode call of each lane."""
  key_B2: np.ndarray  # uint32
  position_B: np.ndarray  # int32, the slot that the next token takes
  count_B: np.ndarray  # int32, tokens sampled so far
  limit_B: np.ndarray  # int32, tokens to sample at most
  live_B: np.ndarray  # bool


class DeviceState(NamedTuple):
  """What stays on the device between calls; donated to each."""
  cache: decoder.KVCache
  prompt_hidden_BD: jax.Array  # after the last prompt token: any number of rollouts may start from it
  hidden_BD: jax.Array  # after the last token


class Drawn(NamedTuple):
  """What a decode call drew. A lane's new tokens are the first of its column, as many as its count has grown by."""
  tokens_QB: np.ndarray  # int32
  logprobs_QB: np.ndarray  # float32
  count_B: np.ndarray  # int32
  live_B: np.ndarray  # bool
  steps: np.ndarray  # int32, steps taken


def bucket_ladder(max_len: int) -> tuple[int, ...]:
  """The lengths that programs are compiled for: 64, 128, 192, 256, 384, 512, 768, 1024, ... up to `max_len`."""
  steps = {64, 192} | {base << shift for base in (128, 192) for shift in range(32)}
  return (*sorted(step for step in steps if step < max_len), max_len)


def _bucket(ladder: Sequence[int], length: int) -> int:
  return ladder[int(np.searchsorted(ladder, length))]


_traces = collections.Counter()  # a traced function's body runs once per compilation: that is where it is counted


@functools.partial(jax.jit, static_argnames='config', donate_argnames='state')
def _prefill(params: decoder.Params, state: DeviceState, tokens_PT: jax.Array, row_2P: jax.Array, prompts: jax.Array,
             copy_2C: jax.Array, copies: jax.Array, *, config: DecoderConfig) -> DeviceState:
  """Puts the first `prompts` rows of `tokens_PT` into their lanes, then makes the first `copies` lane-to-lane copies.

  `row_2P` has the lane and the length of each prompt, `copy_2C` the lane to copy from and the lane to copy to. Both are
  loops of that many turns: a call costs what it does, not what it could hold.
  """
  _traces['prefill'] += 1
  T = tokens_PT.shape[1]

  def prefill_one(row, state):
    blank = decoder.init_cache(config, 1, T, state.cache.k.dtype)
    tokens_1T = jax.lax.dynamic_slice_in_dim(tokens_PT, row, 1)
    hidden_1TD, filled = decoder.extend(params, config, blank, tokens_1T, jnp.zeros(1, jnp.int32))
    lane, length = row_2P[:, row]
    hidden_BD = state.prompt_hidden_BD.at[lane].set(hidden_1TD[0, length - 1])
    return state._replace(cache=_write_lane(state.cache, filled, lane), prompt_hidden_BD=hidden_BD)

  def copy_one(index, state):
    source, target = copy_2C[:, index]
    hidden_BD = state.prompt_hidden_BD.at[target].set(state.prompt_hidden_BD[source])
    cache = _write_lane(state.cache, _read_lane(state.cache, source, T), target)
    return state._replace(cache=cache, prompt_hidden_BD=hidden_BD)

  return jax.lax.fori_loop(0, copies, copy_one, jax.lax.fori_loop(0, prompts, prefill_one, state))


def _read_lane(cache: decoder.KVCache, lane: jax.Array, span: int) -> decoder.KVCache:
  """The first `span` slots of one lane, as a cache of one lane."""
  def read(stored):
    L, _, K, _, H = stored.shape
    return jax.lax.dynamic_slice(stored, (0, lane, 0, 0, 0), (L, 1, K, span, H))
  return jax.tree.map(read, cache)


def _write_lane(cache: decoder.KVCache, part: decoder.KVCache, lane: jax.Array) -> decoder.KVCache:
  """`cache` with the slots of the one-lane cache `part` at the beginning of `lane`."""
  return jax.tree.map(lambda stored, new: jax.lax.dynamic_update_slice(stored, new, (0, lane, 0, 0, 0)), cache, part)


@functools.partial(jax.jit, static_argnames=('config', 'span', 'mode', 'steps'), donate_argnames='state')
def _decode(params: decoder.Params, state: DeviceState, index_B: jax.Array, lanes: LaneInputs, stop_ids: jax.Array,
            rule: Rule, *, config: DecoderConfig, span: int, mode: Mode, steps: int) -> tuple[DeviceState, Drawn]:
  """Up to `steps` tokens for every live lane of the tile `index_B`; returns early when none is left.

  The first `span` slots of the tile's lanes are copied together, decoded on, and copied back: for the price of two
  copies a call every step reads dense memory, and lanes of like lengths can be put together whatever their places.
  """
  _traces['decode'] += 1
  B = index_B.shape[0]
  head_VD = decoder.head_matrix(params)

  def gather(lane, tile):
    part = jax.tree.map(tuple, _read_lane(state.cache, index_B[lane], span))
    return jax.tree.map(lambda layer, new: jax.lax.dynamic_update_slice_in_dim(layer, new, lane, 0), tile, part)

  def scatter(lane, cache):
    part = jax.tree.map(lambda layer: jax.lax.dynamic_slice_in_dim(layer, lane, 1), tile)
    return _write_lane(cache, decoder.KVCache(jnp.stack(part.k), jnp.stack(part.v)), index_B[lane])


  def step(carry):
    turn, tile, hidden_BD, position_B, count_B, live_B, tokens_QB, logprobs_QB = carry
    logits_BV = jnp.einsum('bd,vd->bv', hidden_BD, head_VD, preferred_element_type=jnp.float32)
    uniform_B2 = sampling_lib.uniforms(sampling_lib.token_keys(lanes.key_B2, count_B))
    token_B, logprob_B = sampling_lib.draw(logits_BV, uniform_B2, rule, mode)
    tokens_QB, logprobs_QB = tokens_QB.at[turn].set(token_B), logprobs_QB.at[turn].set(logprob_B)
    # A lane without a rollout writes past the end, which is dropped: the prompt that it still holds stays whole.
    start_B = jnp.where(live_B, position_B, span)
    hidden_B1D, tile = decoder.extend(params, config, tile, token_B[:, None], start_B)
    count_B, position_B = count_B + live_B, position_B + live_B
    live_B = live_B & (count_B < lanes.limit_B) & ~jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1)
    return turn + 1, tile, hidden_B1D[:, 0], position_B, count_B, live_B, tokens_QB, logprobs_QB

  tile = jax.lax.fori_loop(0, B, gather, decoder.init_cache(config, B, span, state.cache.k.dtype, stacked=False))
  hidden_BD = jnp.where((lanes.count_B == 0)[:, None], state.prompt_hidden_BD[index_B], state.hidden_BD[index_B])
  start = (jnp.int32(0), tile, hidden_BD, lanes.position_B, lanes.count_B, lanes.live_B,
           jnp.zeros((steps, B), jnp.int32), jnp.zeros((steps, B), jnp.float32))
  turn, tile, hidden_BD, _, count_B, live_B, tokens_QB, logprobs_QB = jax.lax.while_loop(
      lambda carry: (carry[0] < steps) & jnp.any(carry[5]), step, start)
  cache = jax.lax.fori_loop(0, B, scatter, state.cache)
  state = DeviceState(cache, state.prompt_hidden_BD, state.hidden_BD.at[index_B].set(hidden_BD))
  return state, Drawn(tokens_QB, logprobs_QB, count_B, live_B, turn)


class Engine:
  """Rollouts of one model on `lanes` lanes of `max_len` slots (prompt and completion together).

  Args:
    params: the parameter tree (`models.decoder`); its dtype is that of the computation and of the cache.
    config: its configuration.
    stop_ids: tokens that end a rollout; a rollout keeps the one that ended it.
    lanes: rollouts in flight at once.
    max_len: tokens of prompt and completion that a lane can hold.
    steps_per_call: decode steps between two looks of the host. A lane that finishes idles for the rest of them.
    tile: lanes that are decoded together; must divide `lanes`. Small tiles waste less when lengths differ or few lanes
      are live, large ones use the hardware better. By default the largest divisor up to 32 on a CPU, all lanes on an
      accelerator.

  Raises:
    ValueError: a size below 1, `max_len` below 2 or beyond the model's positions, a stop id outside the vocabulary, or
      a tile that does not divide the lanes.
  """

  def __init__(self, params: decoder.Params, config: DecoderConfig, *, stop_ids: Sequence[int], lanes: int = 64,
               max_len: int = 1024, steps_per_call: int = 16, tile: int | None = None):
    if tile is None:
      most = min(lanes, _CPU_TILE) if jax.default_backend() == 'cpu' else lanes
      tile = max((size for size in range(1, most + 1) if lanes % size == 0), default=1)
    if tile < 1 or lanes % tile:
      raise ValueError(f'tile={tile} does not divide lanes={lanes}')
    if lanes < 1 or steps_per_call < 1 or not 2 <= max_len <= config.max_position_embeddings:
      raise ValueError(f'lanes={lanes}, steps_per_call={steps_per_call} must be at least 1 and max_len={max_len} in '
                       f'2..{config.max_position_embeddings}, the positions of the model')
    if any(not 0 <= stop < config.vocab_size for stop in stop_ids):
      raise ValueError(f'stop_ids {list(stop_ids)} are not all in the vocabulary of {config.vocab_size}')
    self.params, self.config, self.max_len = params, config, max_len
    self.lanes, self.steps_per_call, self.tile = lanes, steps_per_call, tile
    self.stats = EngineStats()
    self._ladder = bucket_ladder(max_len)
    self._stop_ids = np.array(sorted(set(stop_ids)), np.int32)
    dtype, hidden = params['embed'].dtype, (lanes, config.hidden_size)
    self._state = DeviceState(decoder.init_cache(config, lanes, max_len, dtype), jnp.zeros(hidden, dtype),
                              jnp.zeros(hidden, dtype))
    self._table: _LaneTable | None = None  # there while a stream runs

  def update(self, params: decoder.Params) -> None:
    """Replaces the weights; nothing is compiled anew.

    They are cast to the engine's dtype and placed as the old ones are, without a copy where they already are so: a
    caller that donates its own parameters to a training step must update the engine before the next stream.

    Raises:
      ValueError: another tree or other shapes.
      RuntimeError: a stream is running, whose rollouts would mix two policies.
    """
    if self._table is not None:
      raise RuntimeError('update during a stream: its rollouts would mix two policies')
    old, new = jax.tree.map(jnp.shape, self.params), jax.tree.map(jnp.shape, params)
    if old != new:
      raise ValueError(f'update: parameters of shapes {new} do not fit {old}')

    def replace(value, held):
      return jax.device_put(jnp.asarray(value, held.dtype), held.sharding)

    self.params = jax.tree.map(replace, params, self.params)

  def generate(self, requests: Sequence[Request], sampling: SamplingParams,
               progress: Callable[[int], None] | None = None) -> list[Completion]:
    """All completions, in the order of the requests. `progress` is told the tokens of each one as it ends."""
    waiting = collections.deque(enumerate(requests))
    done: list[Completion | None] = [None] * len(waiting)

    def source(free):
      return [waiting.popleft() for _ in range(min(free, len(waiting)))]

    for index, completion in self.stream(source, sampling):
      done[index] = completion
      if progress:
        progress(len(completion.tokens))
    return done

  def stream(self, source: Source, sampling: SamplingParams) -> Iterator[tuple[Tag, Completion]]:
    """Yields (tag, completion) as rollouts finish.

    Args:
      source: asked with the number of free lanes whenever there are any; returns up to that many (tag, request) pairs.
        What the consumer does between two yields (a step of an environment) may give it more to return. The stream ends
        when nothing is in flight and it returns nothing.
      sampling: the rule for all of them.

    Raises:
      ValueError: an empty prompt, one that leaves no room, tokens outside the vocabulary, or more requests than free
        lanes.
      RuntimeError: another stream is running.
      FloatingPointError: a log-probability is not a number.
    """
    if self._table is not None:
      raise RuntimeError('an engine runs one stream at a time')
    # Prompts held from an earlier stream may come from other weights: a new table knows of none.
    table = self._table = _LaneTable(self.lanes, self.max_len)
    try:
      while True:
        arrivals = source(table.free) if table.free else ()
        if len(arrivals) > table.free:
          raise ValueError(f'the source returned {len(arrivals)} requests for {table.free} free lanes')
        self._admit(table, arrivals, sampling)
        if not table.inputs.live_B.any():
          return
        yield from self._advance(table, sampling)
    finally:
      self._table = None

  def _admit(self, table: '_LaneTable', arrivals: Sequence[tuple[Tag, Request]], sampling: SamplingParams) -> None:
    """Gives every request a lane that holds its prompt: one that already does, or one to copy to, or one to prefill."""
    rollouts = [self._checked(tag, request, sampling) for tag, request in arrivals]
    # Free lanes that still hold a wanted prompt go first, before another request is given them.
    others = [rollout for rollout in rollouts if not table.resume(rollout)]
    plans = collections.defaultdict(lambda: ([], []))
    for rollout in others:
      lane, holder = table.start(rollout)
      prefills, copies = plans[_bucket(self._ladder, len(rollout.prompt))]
      if holder is None:
        prefills.append((lane, rollout.prompt))
      else:
        copies.append((holder, lane))
    for length, (prefills, copies) in plans.items():
      self._fill(length, prefills, copies)
    prefilled = sum(len(prompt) for prefills, _ in plans.values() for _, prompt in prefills)
    self.stats.prefill_tokens += prefilled
    self.stats.reused_tokens += sum(len(rollout.prompt) for rollout in rollouts) - prefilled

  def _checked(self, tag: Tag, request: Request, sampling: SamplingParams) -> '_Rollout':
    prompt, vocab = np.asarray(request.prompt), self.config.vocab_size
    limit = sampling.max_tokens if request.max_tokens is None else request.max_tokens
    if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in 'iu':
      raise ValueError(f'request {tag}: a prompt is a row of at least one token id, got {prompt.dtype} {prompt.shape}')
    if len(prompt) >= self.max_len:
      raise ValueError(f'request {tag}: a prompt of {len(prompt)} tokens leaves no room in max_len={self.max_len}')
    if prompt.min() < 0 or prompt.max() >= vocab:
      raise ValueError(f'request {tag}: token ids {prompt.min()}..{prompt.max()} exceed the vocabulary of {vocab}')
    if limit < 1:
      raise ValueError(f'request {tag}: max_tokens={limit} must be at least 1')
    key = sampling_lib.request_key(sampling.seed, request.key_id)
    return _Rollout(tag, prompt.astype(np.int32), min(limit, self.max_len - len(prompt)), key)

  def _fill(self, length: int, prefills: Sequence[tuple[int, np.ndarray]], copies: Sequence[tuple[int, int]]) -> None:
    """One prefill call of the bucket `length`: prompts into lanes, then lanes into lanes."""
    tokens_PT, row_2P = np.zeros((self.lanes, length), np.int32), np.zeros((2, self.lanes), np.int32)
    for row, (lane, prompt) in enumerate(prefills):
      tokens_PT[row, :len(prompt)] = prompt
      row_2P[:, row] = lane, len(prompt)
    copy_2B = np.zeros((2, self.lanes), np.int32)
    copy_2B[:, :len(copies)] = np.array(copies, np.int32).reshape(-1, 2).T
    self._state = self._counted(_prefill, self.params, self._state, tokens_PT, row_2P, np.int32(len(prefills)), copy_2B,
                                np.int32(len(copies)), config=self.config)
    self.stats.prefill_calls += 1

  def _advance(self, table: '_LaneTable', sampling: SamplingParams) -> list[tuple[Tag, Completion]]:
    """One decode call for each tile with live lanes; the rollouts that ended in them."""
    calls = []
    for index_B in table.tiles(self.tile):
      inputs = LaneInputs(*(column[index_B] for column in table.inputs))
      span = _bucket(self._ladder, _reach(inputs, self.steps_per_call))
      self._state, drawn = self._counted(
          _decode, self.params, self._state, index_B, inputs, self._stop_ids, sampling.rule(), config=self.config,
          span=span, mode=sampling.mode, steps=self.steps_per_call)
      calls.append((index_B, drawn))
    ended = []
    for index_B, drawn in calls:
      drawn = jax.device_get(drawn)
      self.stats.decode_calls += 1
      self.stats.lane_steps += int(drawn.steps) * len(index_B)
      self.stats.decoded_tokens += table.collect(index_B, drawn)
      ended += table.finish(index_B[table.inputs.live_B[index_B] & ~drawn.live_B], self._stop_ids)
    return ended

  def _counted(self, function: Callable[..., Any], *args, **kwargs) -> Any:
    """The call, and how many programs it compiled."""
    before = _traces.total()
    result = function(*args, **kwargs)
    self.stats.compilations += _traces.total() - before
    return result


class _Rollout(NamedTuple):
  tag: Tag
  prompt: np.ndarray  # int32 [n]
  limit: int  # tokens to sample at most
  key: np.ndarray  # uint32 [2]


class _LaneTable:
  """The host's account of the lanes: what runs in each, what it drew, and which prompt each one holds (a lane holds its
  prompt until it is given another, also after its rollout has ended)."""

  def __init__(self, lanes: int, max_len: int):
    position_B, count_B, limit_B = np.zeros((3, lanes), np.int32)
    self.inputs = LaneInputs(np.zeros((lanes, 2), np.uint32), position_B, count_B, limit_B, np.zeros(lanes, bool))
    self._rollout: list[_Rollout | None] = [None] * lanes
    self._held: list[bytes | None] = [None] * lanes
    self._holders: dict[bytes, set[int]] = collections.defaultdict(set)
    self._free = dict.fromkeys(range(lanes))  # in the order of release
    self._tokens_BS = np.zeros((lanes, max_len), np.int32)
    self._logprobs_BS = np.zeros((lanes, max_len), np.float32)

  @property
  def free(self) -> int:
    """Lanes without a rollout."""
    return len(self._free)

  def resume(self, rollout: _Rollout) -> bool:
    """Starts the rollout in a free lane that holds its prompt, if there is one."""
    lane = min((lane for lane in self._holders.get(rollout.prompt.tobytes(), ()) if lane in self._free), default=None)
    if lane is None:
      return False
    self._occupy(lane, rollout)
    return True

  def start(self, rollout: _Rollout) -> tuple[int, int | None]:
    """Starts the rollout in the lane that has been free for longest: (lane, another lane with its prompt or None).

    The other lane is running (`resume` has taken those that are free), so nothing overwrites it before it is copied.
    """
    prompt = rollout.prompt.tobytes()
    lane = next(iter(self._free))
    holder = min(self._holders.get(prompt, ()), default=None)
    if (before := self._held[lane]) is not None:
      self._holders[before].discard(lane)
      if not self._holders[before]:
        del self._holders[before]
    self._held[lane] = prompt
    self._holders[prompt].add(lane)
    self._occupy(lane, rollout)
    return lane, holder

  def _occupy(self, lane: int, rollout: _Rollout) -> None:
    del self._free[lane]
    self._rollout[lane] = rollout
    for column, value in zip(self.inputs, (rollout.key, len(rollout.prompt), 0, rollout.limit, True), strict=True):
      column[lane] = value

  def tiles(self, size: int) -> list[np.ndarray]:
    """The live lanes in tiles of `size`, shortest first, so that a tile reads little more than its lanes hold; free
    lanes fill the last one up."""
    live = np.flatnonzero(self.inputs.live_B)
    live = live[np.argsort(self.inputs.position_B[live], kind='stable')]
    index = np.concatenate([live, np.flatnonzero(~self.inputs.live_B)[:-len(live) % size]])
    return list(index.astype(np.int32).reshape(-1, size))

  def collect(self, index_B: np.ndarray, drawn: Drawn) -> int:
    """Files what a decode call drew for the lanes `index_B`; the number of new tokens.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    before_B = self.inputs.count_B[index_B]
    new_B = drawn.count_B - before_B
    column, turn = np.nonzero(np.arange(len(drawn.tokens_QB))[None, :] < new_B[:, None])
    logprobs = drawn.logprobs_QB[turn, column]
    if np.isnan(logprobs).any():
      raise FloatingPointError('the model gives log-probabilities that are not a number')
    place = index_B[column], before_B[column] + turn
    self._tokens_BS[place], self._logprobs_BS[place] = drawn.tokens_QB[turn, column], logprobs
    self.inputs.position_B[index_B] += new_B
    self.inputs.count_B[index_B] = drawn.count_B
    return int(new_B.sum())

  def finish(self, ended: np.ndarray, stop_ids: np.ndarray) -> list[tuple[Tag, Completion]]:
    """Frees the lanes `ended`: their completions."""
    completions = []
    for lane in ended.tolist():
      rollout, count = self._rollout[lane], self.inputs.count_B[lane]
      tokens = self._tokens_BS[lane, :count].copy()
      logprobs, finished = self._logprobs_BS[lane, :count].copy(), bool(tokens[-1] in stop_ids)
      completions.append((rollout.tag, Completion(tokens, logprobs, finished, len(rollout.prompt))))
      self._rollout[lane] = None
      self._free[lane] = None
    self.inputs.live_B[ended] = False
    return completions


def _reach(inputs: LaneInputs, steps: int) -> int:
  """Slots that the next `steps` steps of these lanes read at most."""
  reach_B = inputs.position_B + np.minimum(steps, inputs.limit_B - inputs.count_B)
  return int(reach_B[inputs.live_B].max())
