"""The texts that an engine computes, and the pages that hold their keys and values.

A branch is one text, a prompt and what was drawn behind it. Rollouts whose texts agree so far ride
on the same branch: it is computed once for all of them. A branch on which no rollout rides any more
is kept for texts that begin as it does, until its pages or its row are needed.

Letters as in passes.py; X rows of the table, S positions.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dcore_jax.rollout.lane_table import InFlight
from dcore_jax.rollout.page_pool import PagePool

# Tokens in common that are worth waiting for, while another text is being computed.
_MIN_PREFIX = 32


@dataclasses.dataclass(eq=False)
class Branch:
  """A text that is being computed.

  Attributes:
    row: its row of the table.
    pages: those that hold its positions, in order.
    rollouts: those that ride on it, in the order in which they came.
    scored: whether the tokens of its prompt are scored as they are computed.
    key: its prompt, where others may join while nothing has been drawn.
  """

  row: int
  pages: list[int]
  rollouts: list[InFlight]
  scored: bool = False
  key: bytes = b''


class BranchTable:
  """The texts of all branches, those that are kept included.

  Args:
    live: branches that may be computed at once.
    kept: ended branches that may be kept.
    max_len: tokens of a text at most.
    slots: positions of a page.
    pool: the pages.

  Attributes:
    text_XS: int32; -1 behind the text.
    length_X: int32, tokens of each text.
    computed_X: int32, positions of each text whose keys and values are there.
    family_X: int64, a number that texts with a common origin share.
    slots: positions of a page.
  """

  def __init__(self, live: int, kept: int, max_len: int, slots: int, pool: PagePool):
    # One more: a branch is opened before the one that it takes the place of is given up.
    rows = live + kept + 1
    self.text_XS = np.full((rows, max_len), -1, np.int32)
    self.length_X = np.zeros(rows, np.int32)
    self.computed_X = np.zeros(rows, np.int32)
    self.family_X = np.zeros(rows, np.int64)
    self.slots = slots
    self._pool = pool
    self._most_kept = kept
    self._pages: dict[int, list[int]] = {}  # of every row in use
    self._kept: dict[int, None] = {}  # as an ordered set, the oldest first
    self._free = list(range(rows))
    self._families = 0

  def find(self, prompt: np.ndarray) -> tuple[int, int, bool]:
    """Finds the text that has most in common with a prompt.

    At least the last token of a prompt is always computed: the first draw needs it.

    Returns:
      (its row, positions that can be shared, whether a text that is still being computed has much
      more in common).
    """
    n = len(prompt)
    # -1 is no token: a comparison with a longer prompt ends where the text ends.
    differs_XS = self.text_XS[:, :n] != prompt[None, :]
    common_X = np.where(differs_XS.any(axis=1), differs_XS.argmax(axis=1), n)
    common_X = np.minimum(common_X, n - 1)
    there_X = np.minimum(common_X, self.computed_X)
    best = int(there_X.argmax())
    missing = int(common_X.max() - there_X[best])
    return best, int(there_X[best]), missing >= max(_MIN_PREFIX, n // 4)

  def open(
    self, text: np.ndarray, source: int, shared: int
  ) -> tuple[Branch, tuple[int, int] | None]:
    """Makes a branch of a text whose first `shared` positions are those of the row `source`.

    Returns:
      (the branch, the page to be copied and the page that it is copied to: where the shared
      positions end inside a page; else None).
    """
    pages: list[int] = []
    torn = None
    if shared:
      there = self._pages[source]
      pages = there[: shared // self.slots]
      if shared % self.slots:
        torn = there[shared // self.slots]
    # Counted before anything is given up to make room, which may be the source.
    self._pool.share(pages if torn is None else [*pages, torn])
    row = self._free.pop()
    n = len(text)
    self.text_XS[row, :n] = text
    self.length_X[row] = n
    self.computed_X[row] = shared
    self._families += not shared
    self.family_X[row] = self.family_X[source] if shared else self._families
    self._pages[row] = pages
    branch = Branch(row=row, pages=pages, rollouts=[])
    if torn is None:
      return branch, None
    own = self._take_page()
    pages.append(own)
    self._pool.release([torn])
    return branch, (torn, own)

  def extend(self, branch: Branch, positions: int) -> None:
    """Gives a branch the pages that hold so many positions."""
    while len(branch.pages) * self.slots < positions:
      branch.pages.append(self._take_page())

  def append(self, branch: Branch, tokens: Sequence[int]) -> None:
    """Adds tokens to a text; all but the last of them have been computed."""
    row = branch.row
    length = int(self.length_X[row])
    self.text_XS[row, length : length + len(tokens)] = tokens
    self.length_X[row] = length + len(tokens)
    self.computed_X[row] = length + len(tokens) - 1

  def close(self, branch: Branch) -> None:
    """Keeps a branch on which no rollout rides any more."""
    row = branch.row
    # What was not computed of it never will be, and nobody must wait for it.
    self.length_X[row] = min(self.length_X[row], self.computed_X[row] + 1)
    self.text_XS[row, self.length_X[row] :] = -1
    self._pool.keep(branch.pages)
    self._kept[branch.row] = None
    if len(self._kept) > self._most_kept:
      self._give_up(next(iter(self._kept)))

  def forget(self) -> None:
    """Gives up all branches that are kept; none may be live."""
    for row in list(self._kept):
      self._give_up(row)
    # Nothing that comes must depend on what was there before.
    self._free.sort(reverse=True)
    self._families = 0

  def shared_pages(self, source: int, shared: int) -> int:
    """Returns how many pages a branch from a row would have in common with live branches."""
    full = self._pages[source][: shared // self.slots] if shared else []
    return self._pool.count_live(full)

  def _take_page(self) -> int:
    while self._pool.empty:
      self._give_up(next(iter(self._kept)))
    return self._pool.take()

  def _give_up(self, row: int) -> None:
    del self._kept[row]
    self._pool.give_up(self._pages.pop(row))
    self.text_XS[row] = -1
    self.length_X[row] = 0
    self.computed_X[row] = 0
    self._free.append(row)
