"""What goes through the model together: the rows of a pass, and what is drawn behind them.

A row is one token of a text at its position. A pass holds rows of many texts: the last token of
each that waits for its next one, tokens that are guessed to come, and pieces of prompts. What is
drawn from a row is drawn for each rollout whose text agrees so far.

Letters of this room, beside those of models/config.py (D, H, K, L, N, T, V):

| letter | dimension |
|---|---|
| N | texts of a pass (in executors; elsewhere query heads) |
| R | rows of a pass |
| A | draws of a pass |
| P | pages of a text |
| C | slots of a page; a slot holds the keys and values of one token |
| W | texts that read the same pages together |
| B | lanes of the engine; a lane holds what one rollout has drawn |
| Z | tokens that a rollout may draw |
| X, S | rows and positions of the table of texts (branches.py) |
| J | alternatives of a token |

Small n counts what an array has an entry for: texts, parts, places.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.rollout.branches import Branch, BranchTable
from dcore_jax.rollout.drafts import Drafts
from dcore_jax.rollout.lane_table import LaneTable
from dcore_jax.rollout.programs import DrawInputs

# Tokens of prompts that are read between two passes of those who draw, where they have no place in
# these: as many as make a product efficient.
_PIECE = 128


@dataclasses.dataclass(eq=False)
class Part:
  """The rows of one branch in a pass.

  Attributes:
    branch: the branch.
    first: its first row of the pass.
    position: of that row.
    tokens: of its rows; the guessed ones come last.
    guesses: how many of them are guessed.
    complete: whether the rows reach the end of the text, so that the next token can be drawn.
    draws: its first draw of the pass, meaningful where it is complete.
    ahead: whether its guesses were not guessed, but drawn one after the other.
  """

  branch: Branch
  first: int
  position: int
  tokens: list[int]
  guesses: int
  complete: bool
  draws: int = 0
  ahead: bool = False

  @property
  def guessed(self) -> list[int]:
    """The guessed tokens."""
    return self.tokens[len(self.tokens) - self.guesses :]


class Pass(NamedTuple):
  """A pass as an executor takes it.

  Attributes:
    tokens_R: int32.
    position_R: int32.
    text_R: int32, the place in `pages` of each row's text.
    pages: for each text the pages that hold its positions, those of its rows included.
    left_N: int32, tokens that each text may still get.
    draws: what is drawn, none where no text is complete.
    lane_A: int32, the lane of each draw.
    step_A: int32, how many guesses stand between each draw and the text's end.
    scores: what is scored, if anything.
  """

  tokens_R: np.ndarray
  position_R: np.ndarray
  text_R: np.ndarray
  pages: Sequence[Sequence[int]]
  left_N: np.ndarray
  draws: DrawInputs
  lane_A: np.ndarray
  step_A: np.ndarray
  scores: DrawInputs | None


class Planner:
  """Chooses what goes through the model next.

  Args:
    table: the texts.
    lanes: the rollouts.
    drafts: the guesses.
    rows: rows of a pass at most.
    apart: whether prompts, and texts with guesses, go in passes of their own.

  Attributes:
    patient: whether prompts are read first, and nobody draws meanwhile. Rollouts then draw side by
      side, in fewer passes.
  """

  def __init__(
    self, table: BranchTable, lanes: LaneTable, drafts: Drafts, rows: int, *, apart: bool
  ):
    self.patient = False
    self._apart = apart
    self._table = table
    self._lanes = lanes
    self._drafts = drafts
    self._rows = rows

  def plan(self, branches: Sequence[Branch]) -> list[tuple[list[Part], Pass]]:
    """Returns passes in which every branch that waits for its next token gets one.

    Prompts fill the rows that are left over in the last of them. Where those are less than half a
    pass, prompts get one more, so that a long prompt holds up who draws for one pass at a time.
    """
    waiting = []
    unread = []
    for branch in branches:
      missing = int(self._table.length_X[branch.row] - self._table.computed_X[branch.row])
      (waiting if missing == 1 else unread).append(branch)
    rounds = [] if self.patient and unread else self._waiting(waiting)
    if unread:
      room = self._rows - sum(len(part.tokens) for part in rounds[-1]) if rounds else 0
      if self._apart or 2 * room < self._rows:
        # Who draws waits for a piece of a prompt, and not for as much as there could be.
        room = min(_PIECE, self._rows) if rounds else self._rows
        rounds.append([])
      rounds[-1].extend(self._prompts(unread, room))
    return [(parts, self._pass(parts)) for parts in rounds]

  def _left(self, branches: Sequence[Branch]) -> list[int]:
    """Returns how many tokens each text may still get: those of the rollout that may draw most."""
    left = self._lanes.left()
    return [max([left[rollout.lane] for rollout in branch.rollouts]) for branch in branches]

  def _waiting(self, waiting: Sequence[Branch]) -> list[list[Part]]:
    """Returns the parts of branches that lack one token, as many to a pass as fit."""
    rounds = []
    # Behind the last right guess one more token is drawn, which must be within the limit as well.
    rooms = [count - 1 for count in self._left(waiting)]
    row_n = np.array([branch.row for branch in waiting], np.int32)
    room_n = np.array(rooms, np.int32)
    end_n = self._table.length_X[row_n]
    last_n = self._table.text_XS[row_n, end_n - 1]
    for first in range(0, len(waiting), self._rows):
      some = slice(first, first + self._rows)
      guesses = self._drafts.guess(row_n[some], room_n[some], len(row_n[some]))
      # Every text has its own row before any guess gets one.
      spare = self._rows - len(guesses)
      parts = []
      for branch, end, last, guessed in zip(
        waiting[some], end_n[some].tolist(), last_n[some].tolist(), guesses, strict=True
      ):
        guessed = guessed[:spare]
        spare -= len(guessed)
        parts.append(
          Part(
            branch=branch,
            first=0,
            position=end - 1,
            tokens=[last, *guessed],
            guesses=len(guessed),
            complete=True,
          )
        )
      if self._apart:
        # What draws several tokens at once takes only texts without guesses.
        rounds.append([part for part in parts if part.guesses])
        parts = [part for part in parts if not part.guesses]
      rounds.append(parts)
    return [parts for parts in rounds if parts]

  def _prompts(self, unread: Sequence[Branch], room: int) -> list[Part]:
    """Returns pieces of prompts, first come, first served."""
    parts = []
    for branch in unread:
      if not room:
        break
      start = int(self._table.computed_X[branch.row])
      end = int(self._table.length_X[branch.row])
      # The last token of a prompt that is scored waits until all scores are there: who only wants
      # those does not draw.
      stop = min(end - branch.scored, start + room)
      room -= stop - start
      parts.append(
        Part(
          branch=branch,
          first=0,
          position=start,
          tokens=self._table.text_XS[branch.row, start:stop].tolist(),
          guesses=0,
          complete=stop == end,
        )
      )
    return parts

  def _pass(self, parts: Sequence[Part]) -> Pass:
    """Lays the parts out, and gives their branches the pages that they write."""
    row = 0
    draw = 0
    lanes = []
    counts = []
    firsts = []
    for part in parts:
      self._table.extend(part.branch, part.position + len(part.tokens))
      part.first = row
      row += len(part.tokens)
      if part.complete:
        part.draws = draw
        draw += len(part.branch.rollouts) * (1 + part.guesses)
        for rollout in part.branch.rollouts:
          lanes.append(rollout.lane)
          counts.append(1 + part.guesses)
          # The row of the last known token, from which the first draw is; those of guesses follow.
          firsts.append(row - 1 - part.guesses)
    count_n = np.array(counts, np.int32)
    lane_A = np.repeat(np.array(lanes, np.int32), count_n)
    begin_n = np.cumsum(count_n) - count_n
    step_A = np.arange(draw, dtype=np.int32) - np.repeat(begin_n, count_n).astype(np.int32)
    length_n = np.array([len(part.tokens) for part in parts], np.int32)
    position_n = np.array([part.position for part in parts], np.int32)
    first_n = np.array([part.first for part in parts], np.int32)
    position_R = np.arange(row, dtype=np.int32) + np.repeat(position_n - first_n, length_n)
    return Pass(
      tokens_R=np.array([token for part in parts for token in part.tokens], np.int32),
      position_R=position_R,
      text_R=np.repeat(np.arange(len(parts), dtype=np.int32), length_n),
      pages=[part.branch.pages for part in parts],
      left_N=np.array(self._left([part.branch for part in parts]), np.int32),
      draws=self._lanes.draw_inputs(
        lane_A, np.repeat(np.array(firsts, np.int32), count_n) + step_A, step_A
      ),
      lane_A=lane_A,
      step_A=step_A,
      scores=self._scores(parts),
    )

  def _scores(self, parts: Sequence[Part]) -> DrawInputs | None:
    """Returns what is scored: the token behind each row of a scored prompt but for the last."""
    rows = []
    targets = []
    for part in parts:
      if part.branch.scored and not part.complete:
        start = part.position + 1
        rows.append(part.first + np.arange(len(part.tokens), dtype=np.int32))
        targets.append(self._table.text_XS[part.branch.row, start : start + len(part.tokens)])
    if not rows:
      return None
    return self._lanes.score_inputs(np.concatenate(rows), np.concatenate(targets))


def as_guessed(parts: Sequence[Part], work: Pass, token_NQ: np.ndarray) -> Pass:
  """Returns a pass of single rows as if the tokens that followed had been guessed.

  Args:
    parts: its parts, to which the tokens are added.
    work: the pass.
    token_NQ: int32, Q tokens that each text went on with.
  """
  # One rule then settles both: a draw counts if its text is the rollout's own up to there.
  steps = token_NQ.shape[1]
  for number, part in enumerate(parts):
    # The last token has no row yet: nothing was drawn behind it.
    part.tokens += token_NQ[number, :-1].tolist()
    part.guesses = steps - 1
    part.ahead = True
    part.draws *= steps
  step_A = np.tile(np.arange(steps, dtype=np.int32), len(work.lane_A))
  index_A = np.repeat(work.draws.index_A, steps) + step_A
  return work._replace(
    lane_A=np.repeat(work.lane_A, steps),
    step_A=step_A,
    draws=work.draws._replace(index_A=index_A),
  )
