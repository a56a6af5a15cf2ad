"""The branches that are being computed, and the rollouts that ride on them.

Letters as in passes.py.
"""

from collections.abc import Sequence

import jax
import numpy as np

from dcore_jax.rollout.branches import Branch, BranchTable
from dcore_jax.rollout.drafts import Drafts
from dcore_jax.rollout.executors import Executor
from dcore_jax.rollout.lane_table import InFlight, LaneTable
from dcore_jax.rollout.page_budget import PageBudget
from dcore_jax.rollout.page_pool import PagePool
from dcore_jax.rollout.passes import Part, Pass, Planner, as_guessed
from dcore_jax.rollout.programs import Drawn
from dcore_jax.rollout.requests import EngineStats, PromptScores
from dcore_jax.rollout.scoring import PromptScoring, first_alternatives
from dcore_jax.rollout.settle import Verdicts, settle
from dcore_jax.rollout.sizes import EngineSizes


class LiveBranches:
  """Gives rollouts their branches, and computes these pass by pass.

  Args:
    sizes: resolved sizes.
    executor: runs the passes.
    lanes: what the rollouts have drawn.
    stats: are counted on.
  """

  def __init__(self, sizes: EngineSizes, executor: Executor, lanes: LaneTable, stats: EngineStats):
    self._executor = executor
    self._lanes = lanes
    self._stats = stats
    pool = PagePool(executor.pages)
    self._table = BranchTable(sizes.lanes, sizes.trunks, sizes.max_len, executor.slots, pool)
    self._budget = PageBudget(pool, self._table, lanes)
    self._drafts = Drafts(self._table, sizes.guesses, executor.overhead, executor.guess_cost)
    self._planner = Planner(
      self._table,
      lanes,
      self._drafts,
      executor.rows,
      # What draws several tokens at once reads no prompts beside them.
      apart=executor.steps > 1,
    )
    self._scoring = PromptScoring()
    # In the order in which they came.
    self._branches: dict[Branch, None] = {}
    # Branches from which nothing has been drawn, by their prompt: others may still join.
    self._fresh: dict[bytes, Branch] = {}
    self._ended: list[InFlight] = []  # without having had a branch

  def __bool__(self) -> bool:
    return bool(self._branches or self._ended)

  def be_patient(self, patient: bool) -> None:
    """Says whether all prompts are read before anybody draws."""
    self._planner.patient = patient

  def forget(self) -> None:
    """Gives up the texts that have ended, their scores, and what was learned of guesses."""
    self._table.forget()
    self._drafts.forget()
    self._scoring.forget()

  def start_round(self) -> None:
    """Notes how many pages the rollouts that run may still take, before others are admitted."""
    self._budget.start_round(self._branches)

  def admit(self, rollout: InFlight) -> bool:
    """Lets a rollout ride on a branch, if there is room for it now (after `start_round`).

    Returns:
      Whether it does. If not, it waits: for pages, or for a text that it shares much with.
    """
    # One that was suspended has drawn already, and reads its own tokens as a prompt.
    prompt = self._lanes.text(rollout)
    n = len(prompt)
    most = self._budget.most(rollout)
    key = prompt.tobytes()
    scored = rollout.prompt_top is not None
    if scored and (scores := self._scoring.known(key)):
      _give_scores(rollout, scores)
      scored = False
      if not rollout.limit:
        self._lanes.start(rollout)
        self._ended.append(rollout)
        return True
    branch = self._fresh.get(key)
    # On a CPU all draws of a text are made in one tile, which has room for so many.
    if branch and len(branch.rollouts) == self._executor.riders:
      branch = None
    # Scores come from the pass that reads a prompt: who wants them needs all of it still unread.
    if branch and (not scored or branch.scored and not self._table.computed_X[branch.row]):
      # From the page on in which its prompt ends it may need pages of its own.
      own = most - n // self._table.slots
      if not self._budget.has(own):
        return False
      self._stats.reused_tokens += n - 1
    else:
      source, shared, wait = self._table.find(prompt)
      # For the same reason nothing is taken from another text. Others wait for a text of which they
      # could share much, instead of computing it beside it.
      if scored:
        shared = 0
      elif wait:
        return False
      if not self._budget.has(most - self._table.shared_pages(source, shared)):
        return False
      branch = self._open(prompt, source, shared)
      branch.scored = scored
      branch.key = key
      self._fresh[key] = branch
      self._drafts.start(branch.row)
      own = most - len(branch.pages)
      self._stats.reused_tokens += shared
      self._stats.scored_tokens += n if scored else 0
    self._budget.promise(own)
    if rollout.lane is None:
      self._lanes.start(rollout)
    branch.rollouts.append(rollout)
    return True

  def suspend(self) -> list[InFlight]:
    """Takes all rollouts off their branches, in the order in which they came.

    They keep their lanes, and go on where they are admitted again. Scores of prompts that are not
    complete are lost with the branches.
    """
    rollouts = []
    for branch in list(self._branches):
      rollouts += branch.rollouts
      self._close(branch)
    return sorted(rollouts, key=lambda rollout: rollout.handle)

  def leave(self, rollout: InFlight) -> None:
    """Takes a rollout off its branch."""
    if rollout in self._ended:
      self._ended.remove(rollout)
      return
    branch = next(branch for branch in self._branches if rollout in branch.rollouts)
    branch.rollouts.remove(rollout)
    if not branch.rollouts:
      self._close(branch)

  def run(self) -> list[InFlight]:
    """Computes the next token of every branch that waits for one, and pieces of prompts.

    Returns:
      The rollouts that have ended.

    Raises:
      FloatingPointError: a log-probability is not a number.
    """
    ended = [*self._ended, *self._end_scored(list(self._branches))]
    self._ended.clear()
    for parts, work in self._planner.plan(list(self._branches)):
      # Tokens are drawn ahead where every text has one row: prompts and guesses have several.
      if self._executor.steps > 1 and all(
        part.complete and len(part.tokens) == 1 for part in parts
      ):
        drawn, token_NQ = self._executor.run_ahead(work)
        work = as_guessed(parts, work, token_NQ)
        # [A, steps] -> [A * steps], in which guesses are laid out too.
        drawn = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn)
        scored = None
      else:
        drawn, scored = self._executor.run(work)
      self._count(parts, work)
      self._advance(parts, scored)
      complete = [part for part in parts if part.complete]
      if complete:
        ended += self._settle(complete, work, drawn)
      ended += self._end_scored([part.branch for part in parts if part.branch.rollouts])
    return ended

  def _open(self, text: np.ndarray, source: int, shared: int) -> Branch:
    branch, copied = self._table.open(text, source, shared)
    # At once: the page that is copied may be given up for the next branch.
    if copied:
      self._executor.copy(*copied, shared % self._table.slots)
    self._branches[branch] = None
    return branch

  def _close(self, branch: Branch) -> None:
    del self._branches[branch]
    self._not_fresh(branch)
    self._scoring.drop(branch.row)
    self._table.close(branch)

  def _not_fresh(self, branch: Branch) -> None:
    if self._fresh.get(branch.key) is branch:
      del self._fresh[branch.key]

  def _count(self, parts: Sequence[Part], work: Pass) -> None:
    stats = self._stats
    stats.passes += 1
    stats.rows += len(work.tokens_R)
    stats.slots_read += self._slots(work)
    for part in parts:
      stats.guessed_tokens += 0 if part.ahead else part.guesses
      # The last token of a prompt counts as one that is drawn from.
      stats.prefill_tokens += len(part.tokens) - part.guesses - part.complete

  def _slots(self, work: Pass) -> int:
    return sum(len(pages) for pages in work.pages) * self._table.slots

  def _advance(self, parts: Sequence[Part], scored: Drawn | None) -> None:
    """Notes which positions are computed, and takes the scores of prompts."""
    first = 0
    for part in parts:
      count = len(part.tokens)
      self._table.computed_X[part.branch.row] = part.position + count - part.guesses
      if part.branch.scored and not part.complete:
        places = slice(first, first + count)
        piece = jax.tree.map(lambda x, places=places: x[places], scored)
        self._scoring.add(part.branch.row, piece)
        first += count

  def _end_scored(self, branches: Sequence[Branch]) -> list[InFlight]:
    """Gives scores to whom they are due, and ends the rollouts that wanted no more."""
    ended = []
    for branch in branches:
      row = branch.row
      if not branch.scored or self._table.computed_X[row] < self._table.length_X[row] - 1:
        continue
      branch.scored = False
      scores = self._scoring.take(row, branch.key)
      for rollout in branch.rollouts:
        if rollout.prompt_top is not None:
          _give_scores(rollout, scores)
      done = [rollout for rollout in branch.rollouts if not rollout.limit]
      branch.rollouts = [rollout for rollout in branch.rollouts if rollout.limit]
      ended += done
      if not branch.rollouts:
        self._close(branch)
    return ended

  def _settle(self, parts: Sequence[Part], work: Pass, drawn: Drawn) -> list[InFlight]:
    """Takes what was drawn, lets branches part, and returns the rollouts that have ended."""
    lanes = self._lanes
    verdicts = Verdicts(
      tokens=drawn.token_A.tolist(),
      stops=lanes.stops(drawn.token_A).tolist(),
      fulls=(work.draws.index_A + 1 >= lanes.limit_B[work.lane_A]).tolist(),
    )
    ended = []
    accepted_n = []
    width_n = []
    rows = []
    places = []
    steps = 1
    for part in parts:
      outcome = settle(part, verdicts, lanes)
      accepted_n += outcome.accepted
      width_n += [1 + part.guesses] * len(outcome.accepted)
      ended += outcome.ended
      branch = part.branch
      length = int(self._table.length_X[branch.row])
      # Guesses that were right are computed already.
      tokens, branch.rollouts = outcome.stays
      if part.guesses and not part.ahead:
        self._stats.right_guesses += len(tokens) - 1
        self._drafts.learn(branch.row, part.guesses, len(tokens) - 1)
      else:
        self._stats.rows += len(tokens) - 1
        steps = max(steps, len(tokens))
        self._drafts.check(branch.row, tokens)
      for given, rollouts in outcome.leaves:
        # All but the last of their tokens are computed, in the pages of the branch that they leave.
        text = np.concatenate([self._table.text_XS[branch.row, :length], given]).astype(np.int32)
        other = self._open(text, branch.row, length + len(given) - 1)
        other.rollouts = rollouts
        self._drafts.part(branch.row, other.row)
        rows.append(other.row)
        places.append(len(text) - 1)
      self._table.append(branch, tokens)
      rows += [branch.row] * len(tokens)
      places += range(length, length + len(tokens))
      # Something has been drawn: who has the same prompt can no longer join, but read its pages.
      self._not_fresh(branch)
      if not branch.rollouts:
        self._close(branch)
    # Draws behind a rollout's first wrong guess are of a text that is not its own.
    counted_A = work.step_A < np.repeat(accepted_n, width_n)
    taken = jax.tree.map(lambda x: x[counted_A], drawn)
    lanes.record(work.lane_A[counted_A], work.step_A[counted_A], taken)
    self._stats.decoded_tokens += len(taken.token_A)
    # Each step of those who draw ahead reads all once more.
    self._stats.passes += steps - 1
    self._stats.slots_read += (steps - 1) * self._slots(work)
    self._drafts.add(rows, places)
    return ended


def _give_scores(rollout: InFlight, scores: PromptScores) -> None:
  rollout.prompt_scores = first_alternatives(scores, rollout.prompt_top)
  # Not asked for again where the rollout is admitted once more.
  rollout.prompt_top = None
