"""What each lane of an engine runs, and what it has drawn.

Letters as in device.py.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from dcore_jax.rollout.device import Drawn, LaneInputs
from dcore_jax.rollout.requests import Completion, Progress, PromptScores
from dcore_jax.rollout.sampling import Alternatives, SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.rollout.tiles import Tile, plan_tiles

Decode = Callable[[list[int]], str]  # token ids to text


@dataclasses.dataclass(eq=False)
class InFlight:
  """The host's account of one rollout, from `Engine.submit` until its lane is free again.

  Attributes:
    handle: what the caller knows it by.
    prompt: int32 [n].
    limit: tokens to sample at most.
    key: uint32 [2], of its random stream.
    sampling: its rule.
    top: alternatives to be reported with each token.
    prompt_top: the same for the tokens of the prompt; None: they are not scored.
    prompt_scores: those that the next progress reports.
    trunk: which holds the prompt; meaningless without a lane.
    lane: None while it waits.
  """

  handle: int
  prompt: np.ndarray
  limit: int
  # The random key is that of the request, whichever lane runs it.
  key: np.ndarray
  sampling: SamplingParams
  top: int
  prompt_top: int | None
  prompt_scores: PromptScores | None = None
  trunk: int = -1
  lane: int | None = None

  @property
  def unscored(self) -> bool:
    """Whether its prompt is still to be scored, before it gets a lane."""
    return self.prompt_top is not None and self.prompt_scores is None and self.lane is None

  def take_scores(self) -> PromptScores | None:
    """Returns the scores of the prompt, once."""
    scores = self.prompt_scores
    self.prompt_scores = None
    return scores


class LaneTable:
  """What each lane runs, and what it has drawn.

  Args:
    sizes: resolved sizes.
    tile_sizes: numbers of lanes that are decoded together, ascending.
    stop_ids: tokens that end a rollout.
    decode: turns token ids into text; needed where rollouts have stop strings.

  Attributes:
    inputs: of all lanes, for decode calls. `inputs.live_B` says which lanes run a rollout.
    rollouts: the rollout of each lane, if any.
  """

  def __init__(
    self,
    sizes: EngineSizes,
    tile_sizes: Sequence[int],
    stop_ids: np.ndarray,
    decode: Decode | None,
  ):
    lanes = sizes.lanes
    # Any valid rule: the numbers of an idle lane are never used.
    rule = SamplingParams().rule()
    self.inputs = LaneInputs(
      key_B2=np.zeros((lanes, 2), np.uint32),
      slot_B=np.zeros(lanes, np.int32),
      limit_B=np.zeros(lanes, np.int32),
      live_B=np.zeros(lanes, bool),
      rule=jax.tree.map(lambda number: np.zeros(lanes, number.dtype), rule),
    )
    self.rollouts: list[InFlight | None] = [None] * lanes
    self._tile_sizes = tile_sizes
    self._stop_ids = stop_ids
    self._decode = decode
    # A dict as an ordered set: taking the lane that is free for longest is quick, and which lane a
    # rollout gets depends on nothing but the order of events.
    self._free = dict.fromkeys(range(lanes))  # in the order of release
    # What a lane has drawn stays on the host as well: the completion is then there when the rollout
    # ends, without another copy from the device.
    self._tokens_BZ = np.zeros((lanes, sizes.max_new), np.int32)
    self._scores_3BZ = np.zeros((3, lanes, sizes.max_new), np.float32)

  @property
  def free(self) -> int:
    """The number of lanes without a rollout."""
    return len(self._free)

  def start(self, rollout: InFlight) -> None:
    """Gives a rollout the lane that has been free for longest, with an empty branch."""
    lane = next(iter(self._free))
    del self._free[lane]
    rollout.lane = lane
    self.rollouts[lane] = rollout
    inputs = self.inputs
    inputs.key_B2[lane] = rollout.key
    # What the branch holds of the last rollout is never read: slots are written before they count.
    inputs.slot_B[lane] = 0
    inputs.limit_B[lane] = rollout.limit
    inputs.live_B[lane] = True
    # In the order of `Rule`'s fields, which both sides share.
    for number_B, number in zip(inputs.rule, rollout.sampling.rule(), strict=True):
      number_B[lane] = number

  def vacate(self, lane: int) -> None:
    """Frees a lane."""
    self.inputs.live_B[lane] = False
    self.rollouts[lane] = None
    self._free[lane] = None

  def tiles(self, length_U: np.ndarray) -> list[Tile]:
    """Returns the tiles of a step, given the tokens that each trunk holds."""
    # Lanes without a rollout name trunk 0, of which nothing is read for them.
    trunk_B = np.array([rollout.trunk if rollout else 0 for rollout in self.rollouts], np.int32)
    return plan_tiles(
      np.flatnonzero(self.inputs.live_B),
      np.flatnonzero(~self.inputs.live_B),
      trunk_B,
      length_U[trunk_B],
      self.inputs.slot_B,
      self._tile_sizes,
    )

  def tile_inputs(self, tile: Tile) -> LaneInputs:
    """Returns the inputs of a tile's lanes."""
    return jax.tree.map(lambda number_B: number_B[tile.lane_B], self.inputs)

  def tile_rollouts(self, tile: Tile) -> list[InFlight]:
    """Returns the rollouts that a tile's live lanes run."""
    live_B = self.inputs.live_B[tile.lane_B]
    return [self.rollouts[lane] for lane in tile.lane_B[live_B]]

  def collect(self, lane: int, column: int, drawn: Drawn) -> Progress:
    """Takes what a decode call drew for a lane; its rollout has ended where there is a completion.

    Args:
      lane: the lane.
      column: its place in the call's tile.
      drawn: what the call drew, on the host.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    rollout = self.rollouts[lane]
    before = int(self.inputs.slot_B[lane])
    after = int(drawn.slot_B[column])
    scores_3Q = drawn.scores_3QB[:, : after - before, column]
    # Weights that are not finite show here first. Going on would sample nonsense for hours.
    if np.isnan(scores_3Q).any():
      raise FloatingPointError('the model gives log-probabilities that are not a number')
    self._tokens_BZ[lane, before:after] = drawn.tokens_QB[: after - before, column]
    self._scores_3BZ[:, lane, before:after] = scores_3Q
    stop = None
    # Only the host knows the text. The device may have drawn past a stop string: what lies behind
    # it is dropped.
    if rollout.sampling.stop:
      tokens = self._tokens_BZ[lane, :after].tolist()
      after, stop = _first_stop(tokens, before, rollout.sampling.stop, self._decode)
    self.inputs.slot_B[lane] = after
    top = None
    if rollout.top:
      # The device gives `TOP` alternatives to every lane of the tile; this rollout wants fewer.
      places = (slice(after - before), column, slice(rollout.top))
      top = Alternatives(drawn.top.token_BJ[places], drawn.top.logprob_BJ[places])
    # Copies: the table's rows are written again by the lane's next rollout.
    logprobs, full_logprobs, _ = self._scores_3BZ[:, lane, before:after].copy()
    # The device ends a rollout at its limit or at a stop token.
    ended = stop is not None or not drawn.live_B[column]
    return Progress(
      handle=rollout.handle,
      tokens=self._tokens_BZ[lane, before:after].copy(),
      logprobs=logprobs,
      full_logprobs=full_logprobs,
      completion=self._completion(lane, stop) if ended else None,
      top=top,
      prompt=rollout.take_scores(),
    )

  def _completion(self, lane: int, stop: str | None) -> Completion:
    """Returns all that a lane has drawn; `stop` is the stop string that it completed, if any."""
    count = int(self.inputs.slot_B[lane])
    tokens = self._tokens_BZ[lane, :count].copy()
    logprobs, full_logprobs, entropies = self._scores_3BZ[:, lane, :count].copy()
    return Completion(
      tokens=tokens,
      logprobs=logprobs,
      full_logprobs=full_logprobs,
      entropies=entropies,
      finished=bool(tokens[-1] in self._stop_ids),
      stop=stop,
      # A stop token that is also the last one that fits counts as finished.
      prompt_len=len(self.rollouts[lane].prompt),
    )


def empty_progress(rollout: InFlight) -> Progress:
  """Returns the end of a rollout that samples nothing."""
  tokens = np.zeros(0, np.int32)
  logprobs = np.zeros(0, np.float32)
  completion = Completion(
    tokens=tokens,
    logprobs=logprobs,
    full_logprobs=logprobs,
    entropies=logprobs,
    finished=False,
    stop=None,
    prompt_len=len(rollout.prompt),
  )
  return Progress(
    handle=rollout.handle,
    tokens=tokens,
    logprobs=logprobs,
    full_logprobs=logprobs,
    completion=completion,
    prompt=rollout.take_scores(),
  )


def _first_stop(
  tokens: list[int], before: int, stops: Sequence[str], decode: Decode
) -> tuple[int, str | None]:
  """Finds the first of the tokens from `before` on that completes a stop string.

  A string of n bytes lies in the last n tokens where it lies in any, since each token holds at
  least a byte.

  Returns:
    (tokens up to that one, the string), or (all tokens, None).
  """
  reach = max(len(text.encode()) for text in stops)
  # First all new tokens together, with what a string may have begun in: most calls complete none,
  # and decoding once is cheaper than once for each token.
  chunk = decode(tokens[max(0, before + 1 - reach) :])
  if any(text in chunk for text in stops):
    for end in range(before + 1, len(tokens) + 1):
      tail = decode(tokens[max(0, end - reach) : end])
      for text in stops:
        if text in tail:
          return end, text
  return len(tokens), None
