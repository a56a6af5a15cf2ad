"""Continuous batching: many rollouts on a fixed set of lanes, compiled once per shape bucket.

A prompt is prefilled once into a trunk, which all rollouts of it read; what a rollout samples goes into the branch of its
lane. Decoding runs `steps_per_call` steps on the device for a tile of lanes together, each step drawing a token from the
lane's last hidden state and extending its branch with it; then the host collects what was drawn, hands finished rollouts out
and fills the free lanes. Every rollout has a random key of its own, folded from (seed, key_id, token index), so that its random
numbers do not depend on which lane it runs in, nor beside which others; its log-probabilities do to their last bits (1e-6 in
float32, 1e-2 in bfloat16), as tiles of other shapes add up in another order.

Underneath is `submit`, `step`, `extend` and `cancel`, for a server whose requests come and go; `generate` and `stream` are
loops over them. A conversation needs no bookkeeping: a prompt that continues what a trunk holds (the last prompt, the answer
as the template replays it, a tool's output) is prefilled from there on.

Compiled are at most: a prefill for each length and span of `bucket_ladder(max_len)`, the length not above the span; a commit
for each such span and span of branches; a decode for each span of trunks, span of branches and shape of a tile (its lanes, and
the rows of its trunks: one a lane, or an eighth or a quarter of that), in each mode of sampling, with and without alternatives.
Nothing else of a request is compiled in.
Letters as in device.py.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device
from dcore_jax.rollout import sampling as sampling_lib
from dcore_jax.rollout.device import LaneInputs
from dcore_jax.rollout.lanes import (
  Fill,
  Tile,
  TrunkTable,
  bucket,
  bucket_ladder,
  plan_tiles,
  span_ladder,
)
from dcore_jax.rollout.sampling import TOP, Alternatives, Rule, SamplingParams

Tag = Any
_CPU_TILE = (
  32  # lanes; larger tiles fall out of the caches, smaller ones starve the matrix products
)
# Parts of a tile that serve the last rollouts of a batch; on a CPU an eighth and single lanes too: a step of 8 layers of width
# 512 (100 MB of weights) takes 6 ms for 1 lane, 8 for 4, 12 for 8, 17 for 16 and 30 for 32.
_PARTS, _CPU_PARTS = (4, 2, 1), (8, 4, 2, 1)
PIECE = 1024  # tokens; longer prompts are prefilled in pieces, so that attention scores stay below 1024 x max_len a head
BATCH = 256  # tokens; shorter prompts are prefilled together up to this many


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One rollout to be made. `key_id` names its random stream, e.g. (step, prompt, sample)."""

  prompt: np.ndarray  # int [n], n >= 1
  key_id: tuple[int, ...]
  max_tokens: int | None = (
    None  # None: the sampling rule's; either is cut to what there is room for
  )
  top: int = 0  # alternatives of each token to be reported, at most sampling.TOP


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
  """What was sampled, token by token: what is trained on."""

  tokens: np.ndarray  # int32 [m], the stop token included
  logprobs: np.ndarray  # float32 [m], of the policy that sampled (after temperature and truncation)
  full_logprobs: (
    np.ndarray
  )  # float32 [m], before truncation: what a trainer computes at the same temperature
  entropies: np.ndarray  # float32 [m], nats, of the distributions before truncation
  finished: (
    bool  # the last token is a stop token; else the budget was used up, or a stop string completed
  )
  stop: str | None  # the stop string that the last token completed
  prompt_len: int  # tokens before these, given or sampled


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
  """What a step drew for one rollout; `completion` is all of it where it has ended, but for the alternatives: the engine does
  not keep them."""

  handle: int
  tokens: np.ndarray  # int32 [k]
  logprobs: np.ndarray  # float32 [k]
  full_logprobs: np.ndarray  # float32 [k]
  completion: Completion | None
  top: Alternatives | None = None  # [k, request's `top`]; None where the request asks for none


Source = Callable[[int], Sequence[tuple[Tag, Request]]]


@dataclasses.dataclass
class EngineStats:
  """Counts since the engine was made."""

  prefill_tokens: int = 0  # given tokens that went through the model
  reused_tokens: int = (
    0  # given tokens whose keys and values were there from another rollout or an earlier turn
  )
  decoded_tokens: int = (
    0  # tokens handed out, which is also the number of lane-steps that did something
  )
  lane_steps: int = 0  # decode steps times lanes of their tiles
  decode_steps: int = 0  # each reads the weights once
  slots_read: int = 0  # keys and values of one token, read by a decode step
  prefill_calls: int = 0
  decode_calls: int = 0
  compilations: int = 0

  @property
  def occupancy(self) -> float:
    """Share of the lane-steps that drew a token of a rollout."""
    return self.decoded_tokens / max(self.lane_steps, 1)


@dataclasses.dataclass(eq=False)
class _Rollout:
  """The host's account of one rollout, from `submit` until its lane is free again."""

  handle: int
  context: (
    np.ndarray
  )  # int32 [n], what stands before the next token to be sampled, without the branch
  limit: int  # tokens to sample behind it
  key: np.ndarray  # uint32 [2]
  sampling: SamplingParams
  hold: bool
  top: int
  given: np.ndarray | None = None  # tokens of `extend` that wait for their turn
  lane: int | None = None
  trunk: int = -1
  drawn: int = 0  # tokens sampled before the present branch


class Engine:
  """Rollouts of one model on `lanes` lanes.

  Where the parameters are split over a mesh (`sharding.shardings`), trunks and branches are split by key heads over its
  tensor axis; every device of the other axes holds all of them.

  Args:
    params: the parameter tree (`models.decoder`); its dtype is that of the computation and of the cache.
    config: its configuration.
    stop_ids: tokens that end a rollout; a rollout keeps the one that ended it.
    lanes: rollouts in flight at once.
    max_len: tokens of prompt and completion together.
    max_new: tokens that a lane can sample behind its trunk; by default as many as `max_len` has room for.
    trunks: prompts held at once; by default one for each lane. Fewer save memory where rollouts come in groups.
    steps_per_call: decode steps between two looks of the host. A lane that finishes idles for the rest of them.
    tile: lanes that are decoded together; must divide `lanes`. Small tiles waste less when lengths differ or few lanes
      are live, large ones use the hardware better. By default the largest divisor up to 32 on a CPU, all lanes on an
      accelerator.
    decode: token ids to text; needed where rollouts have stop strings.

  Raises:
    ValueError: a size below 1, `max_len` below 2 or beyond the model's positions, a stop id outside the vocabulary, or
      a tile that does not divide the lanes.
  """

  def __init__(
    self,
    params: decoder.Params,
    config: DecoderConfig,
    *,
    stop_ids: Sequence[int],
    lanes: int = 64,
    max_len: int = 1024,
    max_new: int | None = None,
    trunks: int | None = None,
    steps_per_call: int = 16,
    tile: int | None = None,
    decode: Callable[[list[int]], str] | None = None,
  ):
    if tile is None:
      most = min(lanes, _CPU_TILE) if jax.default_backend() == 'cpu' else lanes
      tile = max((size for size in range(1, most + 1) if lanes % size == 0), default=1)
    max_new, trunks = max_len if max_new is None else max_new, lanes if trunks is None else trunks
    if tile < 1 or lanes % tile:
      raise ValueError(f'tile={tile} does not divide lanes={lanes}')
    if (
      min(lanes, steps_per_call, max_new, trunks) < 1
      or not 2 <= max_len <= config.max_position_embeddings
    ):
      raise ValueError(
        f'lanes={lanes}, steps_per_call={steps_per_call}, max_new={max_new}, trunks={trunks} must be at least 1 '
        f'and max_len={max_len} in 2..{config.max_position_embeddings}, the positions of the model'
      )
    if any(not 0 <= stop < config.vocab_size for stop in stop_ids):
      raise ValueError(
        f'stop_ids {list(stop_ids)} are not all in the vocabulary of {config.vocab_size}'
      )
    self.config, self.max_len, self.max_new = config, max_len, min(max_new, max_len)
    self._hold(_committed(params))
    self.lanes, self.steps_per_call, self.tile, self.decode = lanes, steps_per_call, tile, decode
    self.stats = EngineStats()
    self._ladder, self._spans, self._branch_spans = (
      bucket_ladder(max_len),
      span_ladder(max_len),
      span_ladder(self.max_new),
    )
    parts = (tile, *_CPU_PARTS) if jax.default_backend() == 'cpu' else _PARTS
    self._tiles = sorted({tile // part for part in parts if tile >= part})
    self._stop_ids = np.array(sorted(set(stop_ids)), np.int32)
    self._placement = cache_placement(params, config)
    self._state = _committed(
      device.init_state(
        config, lanes, trunks, max_len, self.max_new, params['embed'].dtype, self._placement
      )
    )
    self._trunks = TrunkTable(trunks, max_len)
    self._handles = 0
    self._streaming = False
    self._rollouts: dict[int, _Rollout] = {}
    self._queue: collections.deque[_Rollout] = collections.deque()
    self._free = dict.fromkeys(range(lanes))  # in the order of release
    slot_A, drawn_A, limit_A = np.zeros((3, lanes), np.int32)
    rule = Rule(*(np.zeros(lanes, number.dtype) for number in SamplingParams().rule()))
    self._inputs = LaneInputs(
      np.zeros((lanes, 2), np.uint32), drawn_A, slot_A, limit_A, np.zeros(lanes, bool), rule
    )
    self._in_lane: list[_Rollout | None] = [None] * lanes
    self._tokens_AZ = np.zeros((lanes, self.max_new), np.int32)
    self._scores_3AZ = np.zeros((3, lanes, self.max_new), np.float32)

  # --- one rollout at a time ------------------------------------------------------------------------------------------------

  @property
  def free(self) -> int:
    """Lanes that neither hold a rollout nor are promised to one that waits."""
    return max(0, len(self._free) - sum(rollout.lane is None for rollout in self._queue))

  @property
  def busy(self) -> bool:
    """Whether a step would do anything, or could once held lanes are given up."""
    return bool(self._queue) or bool(self._inputs.live_B.any())

  def submit(self, request: Request, sampling: SamplingParams, *, hold: bool = False) -> int:
    """Queues a rollout -> its handle.

    With `hold` it keeps its lane when it ends, for `extend`, until it is cancelled; else its handle ends with it.

    Raises:
      ValueError: an empty prompt, one that leaves no room, tokens outside the vocabulary, too many alternatives, or stop
        strings where the engine has no `decode`.
    """
    name = f'request {request.key_id}'
    prompt = self._checked(name, request.prompt)
    if sampling.stop and self.decode is None:
      raise ValueError(f'{name}: stop strings need an engine with `decode`')
    if not 0 <= request.top <= TOP:
      raise ValueError(f'{name}: top={request.top} alternatives; there may be {TOP}')
    limit = self._limit(
      name, len(prompt), sampling.max_tokens if request.max_tokens is None else request.max_tokens
    )
    key = sampling_lib.request_key(sampling.seed, request.key_id)
    rollout = _Rollout(self._handles, prompt, limit, key, sampling, hold, request.top)
    self._handles += 1
    self._rollouts[rollout.handle] = rollout
    self._queue.append(rollout)
    return rollout.handle

  def extend(self, handle: int, tokens: np.ndarray, max_tokens: int | None = None) -> None:
    """Appends given tokens, a tool's output say, behind what the rollout has sampled; it samples on in the next step.

    Nothing of its past is computed again. What it samples then counts and completes by itself, from the same random stream.

    Args:
      handle: of a rollout that has a lane: one submitted with `hold`, or one that still runs.
      tokens: int [n], n >= 1.
      max_tokens: to sample behind them; None: the sampling rule's.

    Raises:
      ValueError: a handle without a lane, or tokens as `submit` refuses them.
    """
    rollout = self._rollouts.get(handle)
    if rollout is None or rollout.lane is None or rollout.given is not None:
      raise ValueError(f'extend: rollout {handle} has no lane, or waits for an earlier extension')
    name, slots = f'extension of rollout {handle}', int(self._inputs.slot_B[rollout.lane])
    rollout.given = self._checked(name, tokens, len(rollout.context) + slots)
    rollout.limit = self._limit(
      name,
      len(rollout.context) + slots + len(rollout.given),
      rollout.sampling.max_tokens if max_tokens is None else max_tokens,
    )
    self._inputs.live_B[rollout.lane] = False
    self._queue.appendleft(rollout)

  def cancel(self, handle: int) -> None:
    """Ends a rollout, whatever it is doing, and frees its lane; ValueError for one that is not there."""
    rollout = self._rollouts.pop(handle, None)
    if rollout is None:
      raise ValueError(f'cancel: there is no rollout {handle}')
    if rollout in self._queue:
      self._queue.remove(rollout)
    if rollout.lane is not None:
      self._vacate(rollout)

  def step(self) -> list[Progress]:
    """Gives waiting rollouts their lanes and decodes once, `steps_per_call` tokens at most -> what was drawn for each.

    Raises:
      FloatingPointError: a log-probability is not a number.
      RuntimeError: rollouts to be extended wait for trunks, all of which they hold themselves.
    """
    while self._queue and self._admit_round():
      pass
    if (
      self._queue
      and not self._inputs.live_B.any()
      and all(r.given is not None for r in self._in_lane if r)
    ):
      raise RuntimeError(
        f'{len(self._queue)} rollouts wait for one of {len(self._trunks.length_P)} trunks and nothing runs that '
        'would give one up: the engine needs more trunks'
      )
    return self._advance()

  # --- many -----------------------------------------------------------------------------------------------------------------

  def update(self, params: decoder.Params) -> None:
    """Replaces the weights; nothing is compiled anew.

    They are cast to the engine's dtype and placed as the old ones are, without a copy where they already are so: a
    caller that donates its own parameters to a training step must update the engine before the next stream. The old ones are
    let go first: there is never room for both (Qwen3-14B: 30 GB in 2 bytes a parameter).

    Raises:
      ValueError: another tree or other shapes.
      RuntimeError: a stream is running or rollouts are in flight, which would mix two policies.
    """
    if self._rollouts or self._streaming:
      raise RuntimeError('update during a stream: its rollouts would mix two policies')
    old, new = jax.tree.map(jnp.shape, self.params), jax.tree.map(jnp.shape, params)
    if old != new:
      raise ValueError(f'update: parameters of shapes {new} do not fit {old}')

    places = jax.tree.map(
      lambda held: jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=held.sharding), self.params
    )
    del self.params, self._decode_params
    self._hold(
      jax.tree.map(
        lambda value, place: jax.device_put(jnp.asarray(value, place.dtype), place.sharding),
        params,
        places,
      )
    )
    self._trunks.forget()

  def generate(
    self,
    requests: Sequence[Request],
    sampling: SamplingParams,
    progress: Callable[[int], None] | None = None,
  ) -> list[Completion]:
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
      ValueError: what `submit` refuses, or more requests than free lanes.
      RuntimeError: another stream is running, or rollouts are in flight.
      FloatingPointError: a log-probability is not a number.
    """
    if self._rollouts or self._streaming:
      raise RuntimeError('an engine runs one stream at a time')
    self._trunks.forget()  # what a stream gives does not depend on what ran before it, to the last bit
    tags: dict[int, Tag] = {}
    self._streaming = True
    try:
      while True:
        free = self.free
        arrivals = source(free) if free else ()
        if len(arrivals) > free:
          raise ValueError(f'the source returned {len(arrivals)} requests for {free} free lanes')
        for tag, request in arrivals:
          tags[self.submit(request, sampling)] = tag
        if not tags:
          return
        for part in self.step():
          if part.completion is not None:
            yield tags.pop(part.handle), part.completion
    finally:
      self._streaming = False
      for handle in list(self._rollouts):
        self.cancel(handle)

  # --- what the host does ---------------------------------------------------------------------------------------------------

  def _hold(self, params: decoder.Params) -> None:
    """On a CPU with a second copy for decoding, layer by layer and turned: cut out of their stacks in every step, the 100 MB of a
    model with 8 layers of width 512 made a step of 8 lanes take 17 ms."""
    self.params = params
    self._decode_params = _turn(params) if jax.default_backend() == 'cpu' else params

  def _checked(self, name: str, tokens: np.ndarray, before: int = 0) -> np.ndarray:
    tokens, vocab = np.asarray(tokens), self.config.vocab_size
    if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in 'iu':
      raise ValueError(
        f'{name}: a prompt is a row of at least one token id, got {tokens.dtype} {tokens.shape}'
      )
    if before + len(tokens) >= self.max_len:
      raise ValueError(
        f'{name}: a prompt of {before + len(tokens)} tokens leaves no room in max_len={self.max_len}'
      )
    if tokens.min() < 0 or tokens.max() >= vocab:
      raise ValueError(
        f'{name}: token ids {tokens.min()}..{tokens.max()} exceed the vocabulary of {vocab}'
      )
    return tokens.astype(np.int32)

  def _limit(self, name: str, before: int, limit: int) -> int:
    if limit < 1:
      raise ValueError(f'{name}: max_tokens={limit} must be at least 1')
    return min(limit, self.max_len - before, self.max_new)

  def _admit_round(self) -> bool:
    """Gives waiting rollouts lanes and trunks, in order, and computes what the trunks lack; whether it did anything.

    A rollout whose prompt shares a long prefix with one of this round waits for the next, which copies it.
    """
    self._trunks.start_round()
    fills, later, starting = [], [], []
    while self._queue:
      rollout = self._queue.popleft()
      if rollout.given is not None:
        if (
          fill := self._grown(rollout)
        ) is None:  # waits for a trunk: another reads its own, or this round copies it
          later.append(rollout)
          continue
      elif self._free and (found := self._trunks.acquire(rollout.context)):
        rollout.trunk, fill = found
        rollout.lane = next(iter(self._free))
        del self._free[rollout.lane]
        self.stats.reused_tokens += fill.start if fill else len(rollout.context)
      else:
        later.append(rollout)
        if not self._free and not any(other.given is not None for other in self._queue):
          break
        continue
      if fill:
        fills.append(fill)
      starting.append(rollout)
    self._queue.extendleft(reversed(later))
    self._fill(fills)
    for rollout in starting:
      self._start(rollout)
    return bool(starting)

  def _grown(self, rollout: _Rollout) -> Fill | None:
    """Moves the branch of a rollout that is extended into a trunk -> what is to be appended, None where no trunk is free."""
    lane, length = rollout.lane, len(rollout.context)
    count = int(self._inputs.slot_B[lane])
    context = np.concatenate([rollout.context, self._tokens_AZ[lane, :count], rollout.given])
    trunk = self._trunks.grow(rollout.trunk, context)
    if trunk is None:
      return None
    self._state = self._counted(
      device.commit,
      self._state,
      np.int32(rollout.trunk),
      np.int32(trunk),
      np.int32(lane),
      np.int32(length),
      np.int32(count),
      span=bucket(self._ladder, length + count),
      branch_span=bucket(self._branch_spans, max(count, 1)),
      placement=self._placement,
    )
    given, rollout.given = rollout.given, None
    rollout.trunk, rollout.context, rollout.drawn = trunk, context, rollout.drawn + count
    self.stats.reused_tokens += length
    return Fill(trunk, trunk, length + count, given)

  def _start(self, rollout: _Rollout) -> None:
    """Sets the lane of a rollout whose trunk is there to an empty branch."""
    inputs, lane = self._inputs, rollout.lane
    self._in_lane[lane] = rollout
    for column, value in zip(
      inputs[:5], (rollout.key, rollout.drawn, 0, rollout.limit, True), strict=True
    ):
      column[lane] = value
    for column, value in zip(inputs.rule, rollout.sampling.rule(), strict=True):
      column[lane] = value

  def _vacate(self, rollout: _Rollout) -> None:
    self._trunks.release(rollout.trunk)
    self._inputs.live_B[rollout.lane] = False
    self._in_lane[rollout.lane] = None
    self._free[rollout.lane] = None

  def _fill(self, fills: Sequence[Fill]) -> None:
    """Prefills, those of like lengths in one call; long ones in pieces, each of which continues the one before."""
    self.stats.prefill_tokens += sum(len(fill.tokens) for fill in fills)
    while fills:
      calls, rest = collections.defaultdict(list), []
      for fill in fills:
        piece = Fill(fill.source, fill.target, fill.start, fill.tokens[:PIECE])
        end = fill.start + len(piece.tokens)
        calls[bucket(self._ladder, len(piece.tokens)), bucket(self._ladder, end)].append(piece)
        if len(fill.tokens) > PIECE:
          rest.append(Fill(fill.target, fill.target, end, fill.tokens[PIECE:]))
      for (length, span), pieces in calls.items():
        for first in range(0, len(pieces), self.lanes):
          self._prefill(length, span, pieces[first : first + self.lanes])
      fills = rest

  def _prefill(self, length: int, span: int, pieces: Sequence[Fill]) -> None:
    tokens_NT, place_4N = (
      np.zeros((self.lanes, length), np.int32),
      np.zeros((4, self.lanes), np.int32),
    )
    for row, piece in enumerate(pieces):
      tokens_NT[row, : len(piece.tokens)] = piece.tokens
      place_4N[:, row] = piece.source, piece.target, piece.start, len(piece.tokens)
    rows = max(1, min(BATCH // length, self.lanes))
    self._state = self._counted(
      device.prefill,
      self.params,
      self._state,
      tokens_NT,
      place_4N,
      np.int32(len(pieces)),
      config=self.config,
      span=span,
      rows=rows,
      placement=self._placement,
    )
    self.stats.prefill_calls += 1

  def _advance(self) -> list[Progress]:
    """One decode call for each tile with live lanes, and what they drew."""
    live_A = self._inputs.live_B
    trunk_A = np.array([rollout.trunk if rollout else 0 for rollout in self._in_lane], np.int32)
    tiles = plan_tiles(
      np.flatnonzero(live_A),
      np.flatnonzero(~live_A),
      trunk_A,
      self._trunks.length_P[trunk_A],
      self._inputs.slot_B,
      self._tiles,
    )
    calls = [(tile, *self._decode(tile)) for tile in tiles]
    result = []
    for tile, slots, drawn in calls:
      drawn = jax.device_get(drawn)
      self.stats.decode_calls += 1
      self.stats.decode_steps += int(drawn.steps)
      self.stats.lane_steps += int(drawn.steps) * len(tile.lane_B)
      self.stats.slots_read += int(drawn.steps) * slots
      result += self._collect(tile.lane_B, drawn)
    return result

  def _decode(self, tile: Tile) -> tuple[int, device.Drawn]:
    """(slots that a step reads, what the call will have drawn)."""
    lane_B = tile.lane_B
    inputs = jax.tree.map(lambda column: column[lane_B], self._inputs)
    reach_B = inputs.slot_B + np.minimum(self.steps_per_call, inputs.limit_B - inputs.slot_B)
    trunk_span = bucket(self._spans, int(tile.sharing.length_R.max()))
    span = bucket(self._branch_spans, int(reach_B[inputs.live_B].max()))
    rollouts = [self._in_lane[lane] for lane in lane_B[inputs.live_B]]
    # All that there may be, however many are wanted: other numbers would be other programs.
    top = min(TOP, self.config.vocab_size) if any(rollout.top for rollout in rollouts) else 0
    self._state, drawn = self._counted(
      device.decode,
      self._decode_params,
      self._state,
      tile.trunk_R,
      tile.sharing,
      lane_B,
      inputs,
      self._stop_ids,
      config=self.config,
      trunk_span=trunk_span,
      span=span,
      top=top,
      steps=self.steps_per_call,
      placement=self._placement,
      mode=sampling_lib.widest(rollout.sampling.mode for rollout in rollouts),
    )
    return len(tile.trunk_R) * trunk_span + len(lane_B) * span, drawn

  def _collect(self, lane_B: np.ndarray, drawn: device.Drawn) -> list[Progress]:
    """Files what a decode call drew for the lanes `lane_B`."""
    result = []
    for column in np.flatnonzero(self._inputs.live_B[lane_B]).tolist():
      lane = int(lane_B[column])
      before, after = int(self._inputs.slot_B[lane]), int(drawn.slot_B[column])
      scores_3Q = drawn.scores_3QB[:, : after - before, column]
      if np.isnan(scores_3Q).any():
        raise FloatingPointError('the model gives log-probabilities that are not a number')
      self._tokens_AZ[lane, before:after] = drawn.tokens_QB[: after - before, column]
      self._scores_3AZ[:, lane, before:after] = scores_3Q
      rollout = self._in_lane[lane]
      after, stop = (
        self._stopped(rollout, before, after) if rollout.sampling.stop else (after, None)
      )
      self._inputs.slot_B[lane] = after
      self.stats.decoded_tokens += after - before
      completion = None
      if stop is not None or not drawn.live_B[column]:
        completion = self._end(rollout, after, stop)
      top = (
        Alternatives(*(all_QBK[: after - before, column, : rollout.top] for all_QBK in drawn.top))
        if rollout.top
        else None
      )
      result.append(
        Progress(
          rollout.handle,
          self._tokens_AZ[lane, before:after].copy(),
          *self._scores_3AZ[:2, lane, before:after].copy(),
          completion,
          top,
        )
      )
    return result

  def _stopped(self, rollout: _Rollout, before: int, after: int) -> tuple[int, str | None]:
    """(tokens up to the first one that completes a stop string, that string), or (`after`, None).

    A string of n bytes lies in the last n tokens where it lies in any, as each holds at least a byte.
    """
    tokens = self._tokens_AZ[rollout.lane, :after].tolist()
    reach = max(len(text.encode()) for text in rollout.sampling.stop)
    chunk = self.decode(tokens[max(0, before + 1 - reach) :])
    if any(text in chunk for text in rollout.sampling.stop):
      for end in range(before + 1, after + 1):
        tail = self.decode(tokens[max(0, end - reach) : end])
        if found := [text for text in rollout.sampling.stop if text in tail]:
          return end, found[0]
    return after, None

  def _end(self, rollout: _Rollout, count: int, stop: str | None) -> Completion:
    """The completion of a rollout that has ended; its lane is free, or held."""
    lane = rollout.lane
    tokens = self._tokens_AZ[lane, :count].copy()
    completion = Completion(
      tokens,
      *self._scores_3AZ[:, lane, :count].copy(),
      bool(tokens[-1] in self._stop_ids),
      stop,
      len(rollout.context),
    )
    self._inputs.live_B[lane] = False
    if not rollout.hold:
      del self._rollouts[rollout.handle]
      self._vacate(rollout)
    return completion

  def _counted(self, function: Callable[..., Any], *args, **kwargs) -> Any:
    """The call, and how many programs it compiled. Its mesh is that of the weights, whatever the trainer's in context is."""
    before = device.traces.total()
    with jax.set_mesh(self._placement.mesh if self._placement else None):
      result = function(*args, **kwargs)
    self.stats.compilations += device.traces.total() - before
    return result


_turn = jax.jit(decoder.turn)


def _committed(tree: Any) -> Any:
  """The same arrays, tied to the devices they are on, as those of `update` and of every later call are: jax compiles a program
  apart for arrays that are not, which would be all of them twice."""
  return jax.tree.map(lambda leaf: jax.device_put(leaf, jnp.asarray(leaf).sharding), tree)


def cache_placement(params: decoder.Params, config: DecoderConfig) -> NamedSharding | None:
  """How caches [L, B, K, S, H] are split where the parameters are split over a mesh; None on one device."""
  held = getattr(params['embed'], 'sharding', None)  # numpy arrays have none
  if not isinstance(held, NamedSharding) or held.mesh.size == 1:
    return None
  axes, shape = (
    ('layers', 'length', 'kv_heads', 'length', 'head_dim'),
    (1, 1, config.num_key_value_heads, 1, 1),
  )
  return NamedSharding(held.mesh, sharding.partition_spec(axes, shape, held.mesh))
