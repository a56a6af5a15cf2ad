"""Continuous batching: many rollouts on a fixed set of lanes, compiled once for each shape bucket.

A prompt is prefilled once into a trunk, which all rollouts of it read; what a rollout samples goes
into the branch of its lane. A decode call runs up to `steps_per_call` steps on the device for a
tile of lanes. Each step draws a token from the lane's last hidden state and extends its branch with
it. Then the host collects what was drawn, hands out the rollouts that have ended and fills the free
lanes.

Every rollout has a random key of its own, folded from (seed, key_id, token index). Its random
numbers therefore do not depend on which lane it runs in, nor beside which others. Its
log-probabilities do to their last bits (1e-6 in float32, 1e-2 in bfloat16), because tiles of other
shapes add up in another order.

Underneath are `submit`, `step` and `cancel`, for a server whose requests come and go; `generate`
and `stream` are loops over them. A conversation needs no bookkeeping: a prompt that continues what
a trunk holds (the last prompt, the answer as the template replays it, a tool's output) is prefilled
from there.

The programs that can be compiled are:
- a prefill for each length and span of `bucket_ladder(max_len)` with the length not above the span;
- a decode for each span of trunks, span of branches and shape of a tile (its lanes, and the rows of
  its trunks: as many as lanes, or an eighth or a quarter of that), in each mode of sampling, with
  and without alternatives;
- a scoring of prompts for each length of the ladder, with and without alternatives.
Nothing else of a request is compiled in.

Letters as in device.py.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device
from dcore_jax.rollout import sampling as sampling_lib
from dcore_jax.rollout.device import DecodeShape, LaneInputs, PrefillShape
from dcore_jax.rollout.lane_table import Decode, InFlight, LaneTable, empty_progress
from dcore_jax.rollout.prefill import PrefillCall, prefill_calls, prefill_rows
from dcore_jax.rollout.requests import (
  Completion,
  EngineStats,
  Progress,
  Request,
  RequestSource,
  Tag,
  checked_limit,
  checked_prompt,
)
from dcore_jax.rollout.sampling import TOP, SamplingParams
from dcore_jax.rollout.scoring import Scoring
from dcore_jax.rollout.sizes import EngineSizes, bucket, span_ladder
from dcore_jax.rollout.tiles import Tile
from dcore_jax.rollout.trunk_table import TrunkTable

_DEFAULT_SIZES = EngineSizes()


class Engine:
  """Rollouts of one model on a fixed number of lanes.

  Where the parameters are split over a mesh (`sharding.shardings`), trunks and branches are split
  by key heads over its tensor axis; every device of the other axes holds all of them.

  Args:
    params: the parameter tree (`models.decoder`); its dtype is that of the computation and of the
      caches.
    config: the model's configuration.
    stop_ids: tokens that end a rollout; a rollout keeps the one that ended it.
    sizes: lanes, lengths and steps.
    decode: turns token ids into text; needed where rollouts have stop strings.

  Attributes:
    params: the parameters in use.
    sizes: the sizes, none of them 0.
    stop_ids: int32, ascending.
    stats: counts since the engine was made.

  Raises:
    ValueError: a size that cannot be (`EngineSizes.resolved`), or a stop id outside the vocabulary.
  """

  def __init__(
    self,
    params: decoder.Params,
    config: DecoderConfig,
    *,
    stop_ids: Sequence[int],
    sizes: EngineSizes = _DEFAULT_SIZES,
    decode: Decode | None = None,
  ):
    # Out of range, a stop id would never be drawn, and rollouts would run to their limits.
    if any(not 0 <= stop < config.vocab_size for stop in stop_ids):
      raise ValueError(
        f'stop_ids {list(stop_ids)} are not all in the vocabulary of {config.vocab_size}'
      )
    self._placement = device.cache_placement(params, config)
    # Without a mesh the one device of the process holds everything.
    self._mesh = self._placement.mesh if self._placement else None
    self._platform = sharding.platform(self._mesh)
    self.config = config
    self.sizes = sizes.resolved(config, self._platform)
    self.decode = decode
    # Sorted and without repetition: the array is an argument of a compiled program, and its length
    # decides which.
    self.stop_ids = np.array(sorted(set(stop_ids)), np.int32)
    self.stats = EngineStats()
    self._set_weights(_committed(params))
    # The caches have the parameters' dtype, so that a step casts neither.
    dtype = params['embed'].dtype
    self._state = _committed(device.init_state(config, self.sizes, dtype, self._placement))
    self._trunks = TrunkTable(self.sizes.trunks, self.sizes.max_len)
    self._lanes = LaneTable(
      self.sizes,
      tile_sizes=self.sizes.tiles(self._platform),
      stop_ids=self.stop_ids,
      decode=decode,
    )
    # Handles are never used again, so that a late `cancel` cannot end another rollout.
    self._handles = 0
    self._streaming = False
    self._rollouts: dict[int, InFlight] = {}
    # First in, first out; a rollout that cannot have a trunk yet keeps its place.
    self._queue: collections.deque[InFlight] = collections.deque()

  @property
  def lanes(self) -> int:
    """Rollouts in flight at once."""
    return self.sizes.lanes

  @property
  def max_len(self) -> int:
    """Tokens of a prompt and its completion together."""
    return self.sizes.max_len

  @property
  def max_new(self) -> int:
    """Tokens of a completion."""
    return self.sizes.max_new

  # --- one rollout at a time ---------------------------------------------------------------------

  @property
  def free(self) -> int:
    """Lanes that neither run a rollout nor are promised to one that waits."""
    # Waiting rollouts take lanes at the next step, so that theirs count as taken.
    return max(0, self._lanes.free - len(self._queue))

  @property
  def busy(self) -> bool:
    """Whether a step would do anything."""
    return bool(self._rollouts)

  def submit(self, request: Request, sampling: SamplingParams) -> int:
    """Queues a rollout and returns its handle, which is valid until the rollout ends.

    Raises:
      ValueError: an empty prompt, one that leaves no room, tokens outside the vocabulary, too many
        alternatives, or stop strings where the engine has no `decode`.
    """
    # Whatever can be wrong with a request is found here, before it takes a lane.
    prompt = checked_prompt(request, self.max_len, self.config.vocab_size)
    if sampling.stop and self.decode is None:
      raise ValueError(f'request {request.key_id}: stop strings need an engine with `decode`')
    rollout = InFlight(
      handle=self._handles,
      prompt=prompt,
      # Where the room is short the completion is cut, as it is at any other limit.
      limit=min(checked_limit(request, sampling), self.max_len - len(prompt), self.max_new),
      key=sampling_lib.request_key(sampling.seed, request.key_id),
      sampling=sampling,
      top=request.top,
      prompt_top=request.prompt_top,
    )
    self._handles += 1
    self._rollouts[rollout.handle] = rollout
    self._queue.append(rollout)
    return rollout.handle

  def cancel(self, handle: int) -> None:
    """Ends a rollout, whether it waits or runs, and frees its lane.

    Raises:
      ValueError: there is no such rollout.
    """
    rollout = self._rollouts.get(handle)
    if rollout is None:
      raise ValueError(f'cancel: there is no rollout {handle}')
    # One that waits has no lane to free, but would be given one.
    if rollout in self._queue:
      self._queue.remove(rollout)
    self._remove(rollout)

  def step(self) -> list[Progress]:
    """Gives waiting rollouts their lanes and decodes once, `steps_per_call` tokens at most.

    A prompt that is to be scored is scored before its rollout gets a lane, one a step: who decodes
    waits for no more than that.

    Returns:
      What was drawn for each rollout that runs, and the end of those that sample nothing.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    scoring = Scoring(self._counted, self.params, self.config, self.max_len, self._placement)
    self.stats.scored_tokens += scoring.score_first(self._queue)
    ended = self._end_empty()
    # Several rounds: prompts that share a prefix with one of a round are copied in the next.
    # Each round that admits a rollout shortens the queue, so that the loop ends.
    while self._queue and self._admit_round():
      pass
    return ended + self._advance()

  # --- many --------------------------------------------------------------------------------------

  def update(self, params: decoder.Params) -> None:
    """Replaces the weights; nothing is compiled anew.

    They are cast to the engine's dtype and placed as the old ones are, without a copy where they
    already are so: a caller that donates its own parameters to a training step must update the
    engine before the next stream. The old ones are let go first, because there may be no room for
    both (Qwen3-14B: 30 GB in 2 bytes a parameter).

    Raises:
      ValueError: another tree or other shapes.
      RuntimeError: a stream is running or rollouts are in flight, which would mix two policies.
    """
    if self._rollouts or self._streaming:
      raise RuntimeError('update during a stream: its rollouts would mix two policies')
    # Other shapes would compile every program anew, in the middle of a training run.
    old = jax.tree.map(jnp.shape, self.params)
    new = jax.tree.map(jnp.shape, params)
    if old != new:
      raise ValueError(f'update: parameters of shapes {new} do not fit {old}')
    # Shapes and shardings stay; the arrays themselves are let go.
    places = jax.tree.map(_place_of, self.params)
    del self.params
    del self._decode_params
    self._set_weights(jax.tree.map(_put, params, places))
    # Keys and values of the old weights are of no use to the new ones.
    self._trunks.forget()

  def generate(
    self,
    requests: Sequence[Request],
    sampling: SamplingParams,
    progress: Callable[[int], None] | None = None,
  ) -> list[Completion]:
    """Returns all completions, in the order of the requests.

    `progress` is called with the number of tokens of each completion as it ends.
    """
    waiting = collections.deque(enumerate(requests))
    # Rollouts end in any order, and each is put where its request stood.
    done: list[Completion | None] = [None] * len(waiting)

    def source(free: int) -> list[tuple[int, Request]]:
      # No more than there are lanes for; the rest stay in the caller's list.
      return [waiting.popleft() for _ in range(min(free, len(waiting)))]

    for index, completion in self.stream(source, sampling):
      done[index] = completion
      if progress:
        progress(len(completion.tokens))
    return done

  def stream(
    self, source: RequestSource, sampling: SamplingParams
  ) -> Iterator[tuple[Tag, Completion]]:
    """Yields (tag, completion) as rollouts end.

    Args:
      source: is asked with the number of free lanes whenever there are any, and returns up to that
        many (tag, request) pairs. What the consumer does between two yields (a step of an
        environment) may give it more to return. The stream ends when nothing is in flight and the
        source returns nothing.
      sampling: the rule for all of them.

    Raises:
      ValueError: what `submit` refuses, or more requests than free lanes.
      RuntimeError: another stream is running, or rollouts are in flight.
      FloatingPointError: a log-probability is not a number.
    """
    if self._rollouts or self._streaming:
      raise RuntimeError('an engine runs one stream at a time')
    # What a stream gives must not depend on what ran before it, to the last bit.
    self._trunks.forget()
    tags: dict[int, Tag] = {}
    self._streaming = True
    try:
      while True:
        # A source that was asked for more than the free lanes would have to choose before it knows
        # what ends next.
        free = self.free
        arrivals = source(free) if free else ()
        if len(arrivals) > free:
          raise ValueError(f'the source returned {len(arrivals)} requests for {free} free lanes')
        for tag, request in arrivals:
          tags[self.submit(request, sampling)] = tag
        # The source had nothing, and nothing is in flight.
        if not tags:
          return
        for part in self.step():
          if part.completion is not None:
            yield tags.pop(part.handle), part.completion
    finally:
      # A consumer may leave the loop early; then the lanes have to be free for the next stream.
      self._streaming = False
      for handle in list(self._rollouts):
        self.cancel(handle)

  # --- what the host does ------------------------------------------------------------------------

  def _set_weights(self, params: decoder.Params) -> None:
    self.params = params
    # On an accelerator both names hold the same arrays.
    self._decode_params = params
    if self._platform == 'cpu':
      # A second copy for decoding, layer by layer and transposed. Cut out of their stacks in every
      # step, the 100 MB of a model with 8 layers of width 512 made a step of 8 lanes take 17 ms,
      # where 12 are enough.
      self._decode_params = _turn(params)

  def _remove(self, rollout: InFlight) -> None:
    """Forgets a rollout that has ended."""
    del self._rollouts[rollout.handle]
    if rollout.lane is not None:
      self._trunks.release(rollout.trunk)
      self._lanes.vacate(rollout.lane)

  def _end_empty(self) -> list[Progress]:
    """Ends the rollouts that sample nothing, once their prompts are scored."""
    ended = []
    for rollout in list(self._queue):
      if not rollout.limit and not rollout.unscored:
        self._queue.remove(rollout)
        self._remove(rollout)
        ended.append(empty_progress(rollout))
    return ended

  def _admit_round(self) -> bool:
    """Gives waiting rollouts lanes and trunks, in order, and prefills what the trunks lack.

    A rollout whose prompt shares a long prefix with one of this round waits for the next round,
    which copies it. Returns whether any rollout was admitted.
    """
    self._trunks.start_round()
    fills = []
    later = []
    admitted = False
    while self._queue and self._lanes.free:
      rollout = self._queue.popleft()
      # A rollout that has to wait does not hold up those behind it: their prompts may be there.
      found = None if rollout.unscored else self._trunks.acquire(rollout.prompt)
      if found is None:
        later.append(rollout)
        continue
      admitted = True
      rollout.trunk, fill = found
      self._lanes.start(rollout)
      if fill:
        fills.append(fill)
      # Prompt tokens that were not computed, because another rollout or turn had left them.
      self.stats.reused_tokens += fill.start if fill else len(rollout.prompt)
    # Those that wait keep their places before the ones that came after them.
    self._queue.extendleft(reversed(later))
    self.stats.prefill_tokens += sum(len(fill.tokens) for fill in fills)
    for call in prefill_calls(fills, self.sizes):
      self._prefill(call)
    return admitted

  def _prefill(self, call: PrefillCall) -> None:
    # Shapes depend on the ladder alone, so that few programs serve all prompts.
    tokens_XT, place_4X = call.arrays(self.lanes)
    shape = PrefillShape(
      config=self.config,
      span=call.span,
      rows=prefill_rows(call.length, self.lanes),
      placement=self._placement,
    )
    self._state = self._counted(
      device.prefill,
      self.params,
      self._state,
      tokens_XT,
      place_4X,
      # An array, not a Python int: another count must not compile another program.
      np.int32(len(call.pieces)),
      shape=shape,
    )
    self.stats.prefill_calls += 1

  def _advance(self) -> list[Progress]:
    """Makes one decode call for each tile with live lanes and returns what they drew."""
    # All calls are dispatched before the first result is waited for, so that the device never
    # idles.
    calls = [(tile, *self._decode(tile)) for tile in self._lanes.tiles(self._trunks.length_U)]
    result = []
    # Calls end in the order in which they were made.
    for tile, slots, drawn in calls:
      # Here the host waits for the device.
      drawn = jax.device_get(drawn)
      steps = int(drawn.steps)
      self.stats.decode_calls += 1
      self.stats.decode_steps += steps
      self.stats.lane_steps += steps * len(tile.lane_B)
      self.stats.slots_read += steps * slots
      # Lanes that only fill the tile up have nothing to collect.
      for column in np.flatnonzero(self._lanes.inputs.live_B[tile.lane_B]).tolist():
        lane = int(tile.lane_B[column])
        rollout = self._lanes.rollouts[lane]
        part = self._lanes.collect(lane, column, drawn)
        self.stats.decoded_tokens += len(part.tokens)
        if part.completion is not None:
          self._remove(rollout)
        result.append(part)
    return result

  def _decode(self, tile: Tile) -> tuple[int, device.Drawn]:
    """Returns (slots that a step reads, what the call will have drawn)."""
    rollouts = self._lanes.tile_rollouts(tile)
    inputs = self._lanes.tile_inputs(tile)
    # All alternatives that there may be, however many are wanted: each number would be a program.
    top = min(TOP, self.config.vocab_size) if any(rollout.top for rollout in rollouts) else 0
    shape = DecodeShape(
      config=self.config,
      # The smallest compiled spans that hold this tile; a step reads no slots beyond them.
      trunk_span=bucket(span_ladder(self.max_len), int(tile.sharing.length_R.max())),
      span=bucket(span_ladder(self.max_new), _reach(inputs, self.sizes.steps_per_call)),
      # One program draws for all lanes of the tile, each by a rule of its own.
      mode=sampling_lib.widest(rollout.sampling.mode for rollout in rollouts),
      top=top,
      steps=self.sizes.steps_per_call,
      placement=self._placement,
    )
    self._state, drawn = self._counted(
      device.decode,
      self._decode_params,
      self._state,
      tile,
      inputs,
      self.stop_ids,
      shape=shape,
    )
    # Every row and branch is read as far as the longest one.
    slots = len(tile.trunk_R) * shape.trunk_span + len(tile.lane_B) * shape.span
    return slots, drawn

  def _counted(self, function: Callable[..., Any], *args, **kwargs) -> Any:
    """Calls a device program and counts how many programs that compiled.

    The mesh in context is that of the weights, whatever the trainer's is.
    """
    # Tracing happens once for each compilation, also where the persistent cache has the program.
    before = device.traces.total()
    with jax.set_mesh(self._mesh):
      result = function(*args, **kwargs)
    self.stats.compilations += device.traces.total() - before
    return result


# One compiled program: layer by layer, each copy would be dispatched on its own.
_turn = jax.jit(decoder.turn)


def _committed(tree: Any) -> Any:
  """Returns the same arrays, tied to the devices they are on.

  The arrays of `update` and of every later call are tied, too. For arrays that are not, jax
  compiles a program of its own, which would be all of them twice.
  """
  return jax.tree.map(lambda leaf: jax.device_put(leaf, jnp.asarray(leaf).sharding), tree)


def _place_of(held: jax.Array) -> jax.ShapeDtypeStruct:
  """Returns shape, dtype and sharding of an array, which the array itself can then leave."""
  return jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=held.sharding)


def _put(value: Any, place: jax.ShapeDtypeStruct) -> jax.Array:
  # Cast on the way, so that no second copy in the trainer's dtype stays on the device.
  return jax.device_put(jnp.asarray(value, place.dtype), place.sharding)


def _reach(inputs: LaneInputs, steps: int) -> int:
  """Returns the slots that the longest of the live branches can have in use `steps` steps later."""
  # A lane near its limit uses fewer slots than the call has steps.
  new_B = np.minimum(steps, inputs.limit_B - inputs.slot_B)
  return int((inputs.slot_B + new_B)[inputs.live_B].max())
