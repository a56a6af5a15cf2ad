"""What each rollout of an engine is, and what it has drawn.

Letters as in passes.py.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from dcore_jax.rollout.programs import DrawInputs, Drawn
from dcore_jax.rollout.requests import Completion, Progress, PromptScores
from dcore_jax.rollout.sampling import TOP, Alternatives, SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

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
    prompt_top: the same for the tokens of the prompt; None: they are not scored, or have been.
    lane: None while it waits.
    reported: tokens that the caller knows of.
    listed: alternatives of the tokens that the caller does not know of yet.
    prompt_scores: those that the next progress reports.
    stop: the stop string that its last token completed.
  """

  handle: int
  prompt: np.ndarray
  limit: int
  # The random key is that of the request, whichever lane runs it.
  key: np.ndarray
  sampling: SamplingParams
  top: int
  prompt_top: int | None
  lane: int | None = None
  reported: int = 0
  listed: list[Alternatives] = dataclasses.field(default_factory=list)
  prompt_scores: PromptScores | None = None
  stop: str | None = None


class LaneTable:
  """What each lane has drawn, and the rule it draws by.

  Args:
    sizes: resolved sizes.
    stop_ids: tokens that end a rollout.
    decode: turns token ids into text; needed where rollouts have stop strings.

  Attributes:
    count_B: int32, tokens that each lane's rollout has drawn.
    limit_B: int32, tokens that it may draw.
  """

  def __init__(self, sizes: EngineSizes, stop_ids: np.ndarray, decode: Decode | None):
    lanes = sizes.lanes
    self.count_B = np.zeros(lanes, np.int32)
    self.limit_B = np.zeros(lanes, np.int32)
    self._key_B2 = np.zeros((lanes, 2), np.uint32)
    rule = SamplingParams().rule()
    self._rule = jax.tree.map(lambda number: np.zeros(lanes, number.dtype), rule)
    self._lists_B = np.zeros(lanes, bool)
    self._rollouts: dict[int, InFlight] = {}  # by their lane
    self._stop_ids = stop_ids
    self._decode = decode
    # A dict as an ordered set: taking the lane that is free for longest is quick, and which lane a
    # rollout gets depends on nothing but the order of events.
    self._free = dict.fromkeys(range(lanes))  # in the order of release
    self._tokens_BZ = np.zeros((lanes, sizes.max_new), np.int32)
    self._scores_3BZ = np.zeros((3, lanes, sizes.max_new), np.float32)

  @property
  def free(self) -> int:
    """The number of lanes without a rollout."""
    return len(self._free)

  def start(self, rollout: InFlight) -> None:
    """Gives a rollout the lane that has been free for longest."""
    lane = next(iter(self._free))
    del self._free[lane]
    rollout.lane = lane
    self._rollouts[lane] = rollout
    self.count_B[lane] = 0
    self.limit_B[lane] = rollout.limit
    self._key_B2[lane] = rollout.key
    self._lists_B[lane] = rollout.top > 0
    # In the order of `Rule`'s fields, which both sides share.
    for number_B, number in zip(self._rule, rollout.sampling.rule(), strict=True):
      number_B[lane] = number

  def text(self, rollout: InFlight) -> np.ndarray:
    """Returns int32, the prompt of a rollout and what it has drawn."""
    if rollout.lane is None:
      return rollout.prompt
    drawn = self._tokens_BZ[rollout.lane, : self.count_B[rollout.lane]]
    return np.concatenate([rollout.prompt, drawn])

  def vacate(self, lane: int) -> None:
    """Frees a lane."""
    del self._rollouts[lane]
    self._free[lane] = None

  def left(self) -> list[int]:
    """Returns how many tokens each lane's rollout may still draw."""
    return (self.limit_B - self.count_B).tolist()

  def draw_inputs(self, lane_A: np.ndarray, row_A: np.ndarray, step_A: np.ndarray) -> DrawInputs:
    """Returns what is drawn for lanes, from rows of a pass, so many tokens ahead of each."""
    return DrawInputs(
      row_A=row_A.astype(np.int32),
      key_A2=self._key_B2[lane_A],
      index_A=self.count_B[lane_A] + step_A,
      rule=jax.tree.map(lambda number_B: number_B[lane_A], self._rule),
      target_A=np.zeros(len(lane_A), np.int32),
      scoring=np.bool_(False),
      listing=np.bool_(self._lists_B[lane_A].any()),
    )

  def score_inputs(self, row_A: np.ndarray, target_A: np.ndarray) -> DrawInputs:
    """Returns what is scored: tokens behind rows of a pass."""
    count = len(row_A)
    return DrawInputs(
      row_A=row_A,
      key_A2=np.zeros((count, 2), np.uint32),
      index_A=np.zeros(count, np.int32),
      rule=jax.tree.map(lambda number: np.full(count, number), SamplingParams().rule()),
      target_A=target_A,
      scoring=np.bool_(True),
      listing=np.bool_(True),
    )

  def stops(self, token_A: np.ndarray) -> np.ndarray:
    """Returns bool: tokens that end a rollout."""
    return np.isin(token_A, self._stop_ids)

  def stop_string(self, rollout: InFlight, tokens: list[int]) -> str | None:
    """Returns the stop string that the last of these tokens completes.

    Args:
      rollout: the rollout.
      tokens: those behind what it has drawn so far.
    """
    stops = rollout.sampling.stop
    if not stops:
      return None
    # A string of n bytes lies in the last n tokens where it lies in any, since each token holds at
    # least a byte.
    reach = max(len(text.encode()) for text in stops)
    count = int(self.count_B[rollout.lane])
    drawn = self._tokens_BZ[rollout.lane, max(0, count - reach) : count]
    tail = self._decode([*drawn.tolist(), *tokens][-reach:])
    return next((text for text in stops if text in tail), None)

  def record(self, lane_A: np.ndarray, step_A: np.ndarray, drawn: Drawn) -> None:
    """Takes draws in; those of a lane follow each other from step 0 on.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    scores_3A = np.stack([drawn.logprob_A, drawn.full_logprob_A, drawn.entropy_A])
    # Weights that are not finite show here first. Going on would sample nonsense for hours.
    if np.isnan(scores_3A).any():
      raise FloatingPointError('the model gives log-probabilities that are not a number')
    place_A = self.count_B[lane_A] + step_A
    self._tokens_BZ[lane_A, place_A] = drawn.token_A
    self._scores_3BZ[:, lane_A, place_A] = scores_3A
    self.count_B += np.bincount(lane_A, minlength=len(self.count_B)).astype(np.int32)
    for lane in np.unique(lane_A[self._lists_B[lane_A]]).tolist():
      mine_A = lane_A == lane
      self._rollouts[lane].listed.append(
        Alternatives(drawn.top.token_BJ[mine_A], drawn.top.logprob_BJ[mine_A])
      )

  def has_news(self, rollout: InFlight) -> bool:
    """Whether there is something that the caller does not know of."""
    return self.count_B[rollout.lane] > rollout.reported or rollout.prompt_scores is not None

  def progress(self, rollout: InFlight, *, ended: bool) -> Progress:
    """Returns what the caller does not know of yet."""
    places = slice(rollout.reported, int(self.count_B[rollout.lane]))
    rollout.reported = places.stop
    # Copies: the table's rows are written again by the lane's next rollout.
    logprobs, full_logprobs, _ = self._scores_3BZ[:, rollout.lane, places].copy()
    top = None
    if rollout.top:
      none = np.zeros((0, TOP))
      listed = rollout.listed or [Alternatives(none.astype(np.int32), none.astype(np.float32))]
      top = Alternatives(
        token_BJ=np.concatenate([one.token_BJ for one in listed])[:, : rollout.top],
        logprob_BJ=np.concatenate([one.logprob_BJ for one in listed])[:, : rollout.top],
      )
      rollout.listed = []
    scores = rollout.prompt_scores
    rollout.prompt_scores = None
    return Progress(
      handle=rollout.handle,
      tokens=self._tokens_BZ[rollout.lane, places].copy(),
      logprobs=logprobs,
      full_logprobs=full_logprobs,
      completion=self._completion(rollout) if ended else None,
      top=top,
      prompt=scores,
    )

  def _completion(self, rollout: InFlight) -> Completion:
    """Returns all that a rollout has drawn."""
    count = int(self.count_B[rollout.lane])
    tokens = self._tokens_BZ[rollout.lane, :count].copy()
    logprobs, full_logprobs, entropies = self._scores_3BZ[:, rollout.lane, :count].copy()
    return Completion(
      tokens=tokens,
      logprobs=logprobs,
      full_logprobs=full_logprobs,
      entropies=entropies,
      # A stop token that is also the last one that fits counts as finished.
      finished=bool(count and tokens[-1] in self._stop_ids),
      stop=rollout.stop,
      prompt_len=len(rollout.prompt),
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
  )
