"""Which rollouts there are pages for.

Letters as in passes.py.
"""

from collections.abc import Iterable

from dcore_jax.rollout.branches import Branch, BranchTable
from dcore_jax.rollout.lane_table import InFlight, LaneTable
from dcore_jax.rollout.page_pool import PagePool


class PageBudget:
  """Promises pages to rollouts before they begin.

  One that has begun is never made to wait for a page: if all waited, none would end and free one.
  So a rollout begins only where the pages of the longest text that it may draw are there, beside
  those that others have been promised.

  Args:
    pool: the pages.
    table: the texts, whose first pages rollouts have already.
    lanes: how much each rollout may still draw.
  """

  def __init__(self, pool: PagePool, table: BranchTable, lanes: LaneTable):
    self._pool = pool
    self._table = table
    self._lanes = lanes

  def start_round(self, branches: Iterable[Branch]) -> None:
    """Counts anew what was promised to those that run, before others are admitted."""
    self._pool.promised = sum(self._left(branch) for branch in branches)

  def has(self, pages: int) -> bool:
    """Whether so many pages can be promised."""
    return self._pool.available >= pages

  def promise(self, pages: int) -> None:
    """Sets pages aside until the next round."""
    self._pool.promised += pages

  def most(self, rollout: InFlight) -> int:
    """Returns the pages of a rollout that draws all that it may."""
    return self._pages(len(rollout.prompt) + rollout.limit)

  def _pages(self, positions: int) -> int:
    return -(-positions // self._table.slots)

  def _left(self, branch: Branch) -> int:
    """Returns the pages that the rollouts of a branch may still take."""
    positions = int(self._table.length_X[branch.row])
    lanes = [rollout.lane for rollout in branch.rollouts]
    left = (self._lanes.limit_B[lanes] - self._lanes.count_B[lanes]).tolist()
    # Whoever stays on the branch has its pages; the others need all from the one on in which their
    # text ends.
    most = max(self._pages(positions + count) for count in left) - len(branch.pages)
    others = sorted(left, reverse=True)[1:]
    own = positions // self._table.slots
    return max(0, most) + sum(self._pages(positions + count) - own for count in others)
