"""Which pages of the key-value cache are in use.

A page holds the keys and values of neighbouring positions of a text, for all layers. Texts with a
common beginning share its full pages. A text writes only behind what it has computed, into pages
that are its own.
"""

import heapq
from collections.abc import Iterable

import numpy as np


class PagePool:
  """Counts who reads each page.

  A page is live while a text that is being written reads it, and kept while only texts do that have
  ended: those may be given up at any time.

  Args:
    pages: number of pages.

  Attributes:
    promised: pages that running rollouts may still take.
  """

  def __init__(self, pages: int):
    self.promised = 0
    self._pages = pages
    self._live_N = np.zeros(pages, np.int32)
    self._kept_N = np.zeros(pages, np.int32)
    # The smallest free page comes first: pages in use stay close together, and which page a text
    # gets depends on nothing but the order of events.
    self._free = list(range(pages))

  @property
  def available(self) -> int:
    """Pages that are neither live nor promised: free ones, and those of ended texts."""
    return self._pages - int(np.count_nonzero(self._live_N)) - self.promised

  @property
  def empty(self) -> bool:
    """Whether every page is in use, if only by a text that has ended."""
    return not self._free

  def count_live(self, pages: Iterable[int]) -> int:
    """Returns how many of these pages are live."""
    return int(np.count_nonzero(self._live_N[list(pages)]))

  def take(self) -> int:
    """Returns a free page, which is then live.

    Raises:
      IndexError: there is none.
    """
    page = heapq.heappop(self._free)
    self._live_N[page] = 1
    return page

  def share(self, pages: Iterable[int]) -> None:
    """Notes one more live reader of pages that are in use."""
    for page in pages:
      self._live_N[page] += 1

  def keep(self, pages: Iterable[int]) -> None:
    """Notes that a live reader of these pages has ended, and may be asked for again."""
    for page in pages:
      self._live_N[page] -= 1
      self._kept_N[page] += 1

  def release(self, pages: Iterable[int]) -> None:
    """Notes that a live reader of these pages is gone."""
    for page in pages:
      self._live_N[page] -= 1
      self._free_if_unused(page)

  def give_up(self, pages: Iterable[int]) -> None:
    """Notes that a reader that had ended is gone."""
    for page in pages:
      self._kept_N[page] -= 1
      self._free_if_unused(page)

  def _free_if_unused(self, page: int) -> None:
    if not self._live_N[page] and not self._kept_N[page]:
      heapq.heappush(self._free, page)
