"""Continuous batching: many rollouts, computed as few texts as they differ in.

Every rollout has a lane, which holds what it has drawn, and rides on a branch, which is a text and
the keys and values of it. Rollouts of one prompt begin on one branch. As long as they draw the same
tokens they stay on it: a text is computed once, however many rollouts agree on it, and each draws
from it by its own random numbers. Rollouts that draw other tokens go on in branches of their own,
which share all full pages of the cache with the one that they leave.

A step runs passes through the model. A pass holds the last token of each branch, tokens that are
guessed to come next (drafts.py), and pieces of prompts.

Every rollout has a random key of its own, folded from (seed, key_id, token index). Its random
numbers therefore do not depend on which lane it runs in, nor beside which others, nor on what was
guessed. Its log-probabilities do to their last bits (1e-5 in float32, 1e-2 in bfloat16), because
passes with other numbers of rows add up in another order.

Underneath are `submit`, `step` and `cancel`, for a server whose requests come and go; `generate`
and `stream` are loops over them. A conversation needs no bookkeeping: a prompt that begins as a
text that is kept (the last prompt, the answer as the template replays it) is computed from there.

No length, rule or number of rollouts is compiled in: an engine has the few programs of its
executor, which `prepare` compiles.

Letters as in passes.py.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dcore_jax import distributed
from dcore_jax.learn.lora import merge_stack
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.projections import is_adapted
from dcore_jax.rollout import programs
from dcore_jax.rollout import sampling as sampling_lib
from dcore_jax.rollout.executors import make_executor
from dcore_jax.rollout.lane_table import Decode, InFlight, LaneTable, empty_progress
from dcore_jax.rollout.live_branches import LiveBranches
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
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

_DEFAULT_SIZES = EngineSizes()


class Engine:
  """Rollouts of one model on a fixed number of lanes.

  Where the parameters are split over a mesh (`sharding.shardings`), the cache is split by key heads
  over its tensor axis; every device of the other axes holds all of it.

  Args:
    params: the parameter tree (`models.decoder`); its dtype is that of the computation and of the
      cache.
    config: the model's configuration.
    stop_ids: tokens that end a rollout; a rollout keeps the one that ended it.
    sizes: lanes, lengths and passes.
    decode: turns token ids into text; needed where rollouts have stop strings.

  Attributes:
    params: the parameters in use.
    sizes: the sizes, none of them 0 but `guesses`.
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
    self.config = config
    self.sizes = sizes.resolved(config)
    self.decode = decode
    self.stop_ids = np.array(sorted(set(stop_ids)), np.int32)
    self.stats = EngineStats()
    self.params = _committed(params)
    self._executor = make_executor(self.params, config, self.sizes, self.stop_ids)
    self._lanes = LaneTable(self.sizes, self.stop_ids, decode)
    self._live = LiveBranches(self.sizes, self._executor, self._lanes, self.stats)
    # Handles are never used again, so that a late `cancel` cannot end another rollout.
    self._handles = 0
    self._streaming = False
    self._is_prepared = False
    self._rollouts: dict[int, InFlight] = {}
    # First in, first out; a rollout that cannot have a branch yet keeps its place.
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
    return max(0, self.lanes - len(self._rollouts))

  @property
  def busy(self) -> bool:
    """Whether a step would do anything."""
    return bool(self._rollouts)

  def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
    """Compiles all programs that the engine will ever call, several at a time.

    An engine that was not prepared compiles each where it is first needed. A second call does
    nothing, also with other weights: programs are compiled for their shapes.

    Args:
      progress: is called with (programs that are ready, all programs).
    """
    if self._is_prepared:
      return
    before = programs.traces.total()
    self._executor.prepare(progress or (lambda ready, total: None))
    self._is_prepared = True
    self.stats.compilations += programs.traces.total() - before

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
    # One that waits has no branch to leave, but would be given one.
    if rollout in self._queue:
      self._queue.remove(rollout)
    else:
      self._live.leave(rollout)
    self._remove(rollout)

  def step(self) -> list[Progress]:
    """Gives waiting rollouts their lanes and runs passes, `steps_per_call` rounds at most.

    Returns:
      What was drawn for each rollout that runs, and the end of those that have ended.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    before = programs.traces.total()
    result = self._end_empty()
    ended: list[InFlight] = []
    for _ in range(max(1, self.sizes.steps_per_call // self._executor.steps)):
      self._admit()
      # Whoever asked for a rollout that has ended may have another one.
      if ended or not self._live:
        break
      ended = self._live.run()
    for rollout in ended:
      result.append(self._lanes.progress(rollout, ended=True))
      self._remove(rollout)
    for rollout in self._rollouts.values():
      if rollout.lane is not None and self._lanes.has_news(rollout):
        result.append(self._lanes.progress(rollout, ended=False))
    self.stats.compilations += programs.traces.total() - before
    return result

  # --- many --------------------------------------------------------------------------------------

  def update(self, params: decoder.Params) -> None:
    """Replaces the weights; nothing is compiled anew.

    They are cast to the engine's dtype and placed as the old ones are, without a copy where they
    already are so: a caller that donates its own parameters to a training step must update the
    engine before the next stream. The old ones are let go first, because there may be no room for
    both (Qwen3-14B: 30 GB in 2 bytes a parameter). Adapted matrices are merged, one after the
    other, unless the engine was made with such.

    Raises:
      ValueError: another tree or other shapes.
      RuntimeError: a stream is running or rollouts are in flight, which would mix two policies.
    """
    if self._rollouts or self._streaming:
      raise RuntimeError('update during a stream: its rollouts would mix two policies')
    self._replace(params)

  def exchange(self, params: decoder.Params) -> None:
    """Replaces the weights as `update` does, while rollouts are in flight, which go on.

    The keys and values of their texts are computed anew. What they draw from now on is what the new
    weights draw behind their texts, to the last log-probability; what they have drawn stays.

    Raises:
      ValueError: another tree or other shapes; the old weights stay.
      RuntimeError: a stream is running, whose consumer takes all of it for one policy's.
    """
    if self._streaming:
      raise RuntimeError('exchange during a stream: its rollouts would mix two policies')
    self._replace(params)

  def _replace(self, params: decoder.Params) -> None:
    # Other shapes would compile every program anew, in the middle of a training run.
    plain = not any(map(is_adapted, jax.tree.leaves(self.params, is_leaf=is_adapted)))
    whole = is_adapted if plain else None
    old = jax.tree.map(np.shape, self.params)
    new = jax.tree.map(lambda leaf: tuple(leaf.shape), params, is_leaf=whole)
    if old != new:
      raise ValueError(f'update: parameters of shapes {new} do not fit {old}')
    # In front of those that came later, and with the lanes that they have.
    self._queue.extendleft(reversed(self._live.suspend()))
    # Shapes and shardings stay; the arrays themselves are let go.
    places = jax.tree.map(_place_of, self.params)
    del self.params
    self._executor.unload()
    self.params = jax.tree.map(_put, params, places, is_leaf=whole)
    self._executor.load(self.params)
    # Keys and values of the old weights are of no use to the new ones.
    self._live.forget()

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
    self._live.forget()
    tags: dict[int, Tag] = {}
    self._streaming = True
    # Nobody looks at tokens one by one, so that only the number of passes counts.
    self._live.be_patient(True)
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
      self._live.be_patient(False)
      for handle in list(self._rollouts):
        self.cancel(handle)

  # --- what the host does ------------------------------------------------------------------------

  def _remove(self, rollout: InFlight) -> None:
    """Forgets a rollout that has ended."""
    del self._rollouts[rollout.handle]
    if rollout.lane is not None:
      self._lanes.vacate(rollout.lane)

  def _end_empty(self) -> list[Progress]:
    """Ends the rollouts that ask for nothing."""
    ended = []
    for rollout in list(self._queue):
      if not rollout.limit and rollout.prompt_top is None:
        self._queue.remove(rollout)
        self._remove(rollout)
        ended.append(empty_progress(rollout))
    return ended

  def _admit(self) -> None:
    """Gives waiting rollouts lanes and branches, in order."""
    if not self._queue or not self._may_run(self._queue[0]):
      return
    self._live.start_round()
    later = []
    while self._queue and self._may_run(self._queue[0]):
      rollout = self._queue.popleft()
      # A rollout that has to wait does not hold up those behind it: their prompts may be there.
      if not self._live.admit(rollout):
        later.append(rollout)
    # Those that wait keep their places before the ones that came after them.
    self._queue.extendleft(reversed(later))

  def _may_run(self, rollout: InFlight) -> bool:
    # Rollouts that were suspended have kept their lanes.
    return rollout.lane is not None or bool(self._lanes.free)


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
  # Waited for, so that no more than one matrix is there twice.
  if is_adapted(value):
    value = jax.block_until_ready(merge_stack(value, place.dtype))
  # Cast on the way, so that no second copy in the trainer's dtype stays on the device.
  return distributed.moved(jnp.asarray(value, place.dtype), place.sharding)
