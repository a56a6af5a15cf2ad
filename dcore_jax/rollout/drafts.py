"""Guesses of what comes next in a text, from what stands in texts of the same origin.

A guess is the continuation of the latest place at which the last tokens stood before: in the text
itself, in its prompt, or in a text that began as it did (a sibling in a group of rollouts, an
earlier turn). Guessed tokens go through the model together with the last token. A token's random
number depends on its place alone, so that a guess is right if and only if it is what is drawn
anyway: guesses change what a pass costs, and never what is drawn.

Letters as in branches.py; n places, k tokens.
"""

from collections.abc import Sequence

import numpy as np

from dcore_jax.rollout.branches import BranchTable

# Tokens that must agree, the longest first.
_LENGTHS = (6, 4, 3, 2)
_SIZE = 1 << 18  # entries of the index
# A guess is expected to be right so often, before anything is known.
_FIRST_RATE = 0.7
# Weight of a token that was put to the test in the running mean: about ten of them count.
_WEIGHT = 0.1
# Tokens that may wait for the index.
_MOST_NEW = 1 << 16


class Drafts:
  """An index of the places where sequences of tokens were followed by something.

  Args:
    table: the texts.
    longest: tokens that are guessed at once at most; 0 turns guessing off.
    overhead: what a pass costs beside its rows, in rows.
    cost: what a pass with guesses for one text costs, in passes without.
  """

  def __init__(self, table: BranchTable, longest: int, overhead: float, cost: float):
    self._table = table
    self._longest = longest
    self._overhead = overhead
    self._cost = cost
    # Row and position of the latest continuation. Two sequences may share an entry; the tokens are
    # compared when it is used.
    self._row = np.zeros((len(_LENGTHS), _SIZE), np.int32)
    self._place = np.zeros((len(_LENGTHS), _SIZE), np.int32)
    self._rate_X = np.full(len(table.length_X), _FIRST_RATE)
    # Guesses that were not worth their pass, by row. Whether they would have been right is known
    # when the text has gone on, and costs nothing.
    self._kept: dict[int, list[int]] = {}
    # Rows and places that are not in the index yet: it is brought up to date when it is asked.
    self._new: list[tuple[Sequence[int], Sequence[int]]] = []
    self._new_tokens = 0

  def forget(self) -> None:
    """Forgets all: how often something is guessed must not depend on what was there before."""
    self._row[:] = 0
    self._place[:] = 0
    self._rate_X[:] = _FIRST_RATE
    self._kept.clear()
    self._new.clear()
    self._new_tokens = 0

  def start(self, row: int) -> None:
    """Notes the prompt of a text that begins."""
    self._rate_X[row] = _FIRST_RATE
    self._kept.pop(row, None)
    length = int(self._table.length_X[row])
    self.add([row] * (length - 1), range(1, length))

  def part(self, row: int, other: int) -> None:
    """Notes that a text goes on from another one."""
    self._rate_X[other] = self._rate_X[row]
    self._kept.pop(other, None)

  def add(self, rows: Sequence[int], places: Sequence[int]) -> None:
    """Notes that texts have got a token at these places."""
    if not self._longest:
      return
    self._new.append((rows, places))
    self._new_tokens += len(rows)
    if self._new_tokens > _MOST_NEW:
      self._take_in()

  def _take_in(self) -> None:
    """Brings the index up to date."""
    if not self._new:
      return
    row_n = np.concatenate([np.asarray(rows, np.int32) for rows, _ in self._new])
    place_n = np.concatenate([np.asarray(places, np.int32) for _, places in self._new])
    self._new.clear()
    self._new_tokens = 0
    # A row may belong to another, shorter text by now.
    there_n = place_n < self._table.length_X[row_n]
    for which, length in enumerate(_LENGTHS):
      enough_n = there_n & (place_n >= length)
      row = row_n[enough_n]
      place = place_n[enough_n]
      entry = self._entry(which, row, place)
      self._row[which, entry] = row
      self._place[which, entry] = place

  def guess(self, row_n: np.ndarray, room_n: np.ndarray, rows: int) -> list[list[int]]:
    """Returns guesses for some texts that wait for their next token.

    Args:
      row_n: the texts.
      room_n: tokens that may be guessed for each at most.
      rows: rows that the pass has besides.
    """
    none: list[int] = []
    if not self._longest or not len(row_n):
      return [none] * len(row_n)
    rate_n = self._rate_X[row_n]
    most_n = np.minimum(room_n, self._longest)
    self._take_in()
    from_n, place_n = self._places(row_n)
    # A text that goes on from its own end does so for as long as one likes.
    known_n = np.where(from_n == row_n, most_n, self._table.length_X[from_n] - place_n)
    most_n = np.where(from_n < 0, 0, np.minimum(most_n, known_n))
    want_n = self._worth(rate_n, most_n, rows)
    # What is not worth its pass is compared with what is drawn: one token, or all that are drawn
    # before the host looks, where guesses have passes of their own.
    told_n = np.where(want_n > 0, want_n, most_n if self._cost > 1 else np.minimum(most_n, 1))
    result = []
    for row, source, place, told, want in zip(
      row_n.tolist(),
      from_n.tolist(),
      place_n.tolist(),
      told_n.tolist(),
      want_n.tolist(),
      strict=True,
    ):
      found = self._continued(row, source, place, told) if told else none
      # What is guessed is put to the test by the pass itself.
      self._kept[row] = none if want else found
      result.append(found if want else none)
    return result

  def _continued(self, row: int, source: int, place: int, want: int) -> list[int]:
    """Returns up to `want` tokens that stand in a text from a place on.

    A text that goes in circles is guessed to go on so: behind its end it begins again at the place.
    """
    length = int(self._table.length_X[source])
    found: list[int] = self._table.text_XS[source, place : min(place + want, length)].tolist()
    if source == row and found:
      found = (found * -(-want // len(found)))[:want]
    return found

  def _worth(self, rate_n: np.ndarray, most_n: np.ndarray, rows: int) -> np.ndarray:
    """Returns int [n]: how many tokens are worth guessing, given how often guesses were right."""
    rate_n = np.minimum(rate_n, 0.999)
    if self._cost > 1:
      # Texts with guesses leave the others, each for a pass of its own, which costs the same
      # however many they are.
      expected_n = (1 - rate_n ** (most_n + 1)) / (1 - rate_n)
      return np.where(expected_n > self._cost * max(1, rows / 2), most_n, 0)
    # A guess is worth its row where it is right more often than a pass yields tokens a row.
    yielded = rows / (rows + self._overhead)
    with np.errstate(divide='ignore'):
      worth_n = np.floor(np.log(yielded) / np.log(rate_n))
    return np.minimum(worth_n, most_n).astype(np.int64)

  def learn(self, row: int, guessed: int, right: int) -> None:
    """Takes note of how many of the guesses for a text were right."""
    # What stands behind the first wrong guess was not put to the test.
    tested = min(right + 1, guessed)
    weight = 1 - (1 - _WEIGHT) ** tested
    self._rate_X[row] += weight * (right / tested - self._rate_X[row])

  def check(self, row: int, tokens: Sequence[int]) -> None:
    """Takes note of how a text went on for which nothing was guessed."""
    kept = self._kept.pop(row, None)
    count = min(len(kept), len(tokens)) if kept else 0
    if count:
      right = 0
      while right < count and kept[right] == tokens[right]:
        right += 1
      self.learn(row, count, right)

  def _places(self, row_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (row, position) where each text's last tokens were followed by something; row -1."""
    table = self._table
    length_n = table.length_X[row_n]
    from_n = np.full(len(row_n), -1, np.int64)
    place_n = np.zeros(len(row_n), np.int64)
    for which, length in enumerate(_LENGTHS):
      open_n = np.flatnonzero((from_n < 0) & (length_n >= length))
      if not len(open_n):
        continue
      row = row_n[open_n]
      end = length_n[open_n]
      entry = self._entry(which, row, end)
      other = self._row[which, entry]
      place = self._place[which, entry]
      back = np.arange(-length, 0)
      # A place near a text's beginning would read from its end; it never agrees by length.
      same = (place >= length) & (place < table.length_X[other])
      same &= table.family_X[other] == table.family_X[row]
      mine = table.text_XS[row[:, None], end[:, None] + back[None, :]]
      theirs = table.text_XS[other[:, None], np.maximum(place[:, None] + back[None, :], 0)]
      same &= (mine == theirs).all(axis=1)
      from_n[open_n[same]] = other[same]
      place_n[open_n[same]] = place[same]
    return from_n, place_n

  def _entry(self, which: int, row_n: np.ndarray, place_n: np.ndarray) -> np.ndarray:
    """Returns the entry of the tokens before each place, and of the text's origin."""
    length = _LENGTHS[which]
    back = np.arange(-length, 0)
    gram_nk = self._table.text_XS[row_n[:, None], place_n[:, None] + back[None, :]].astype(
      np.uint64
    )
    mixed_n = self._table.family_X[row_n].astype(np.uint64)
    # Multiplication modulo 2^64 by an odd constant spreads the tokens over all bits.
    for k in range(length):
      mixed_n = (mixed_n ^ gram_nk[:, k]) * np.uint64(0x9E3779B97F4A7C15)
    # The upper 18 of 64 bits, which is a place among the `_SIZE` entries: a product's lower bits
    # depend on the lower bits of its factors alone.
    return (mixed_n >> np.uint64(46)).astype(np.int64)
