"""Names, ids and amounts of ToolWorld.

Every entity belongs to exactly one split, which a hash of its text decides, so that a model cannot
have seen the entities of held-out tasks.
"""

import itertools
import zlib

import numpy as np

# 25 + 25 syllables rather than 70, so that a name is two frequent tokens: a model of two million
# parameters copies them far more reliably than rare ones.
FIRST_SYLLABLES = tuple(map(''.join, itertools.product('BDKLM', 'aeiou')))
SECOND_SYLLABLES = tuple(map(''.join, itertools.product('nrstz', 'aeiou')))
ID_LETTER = {'order': 'R', 'flight': 'F', 'hotel': 'H', 'phone': 'P', 'file': 'D', 'code': 'C'}
EVAL_SHARE = 5  # one entity in five is held out for evaluation
SPLITS = ('train', 'eval')


def split_of(entity: str) -> str:
  """'eval' for about 20 % of all entity texts, 'train' for the rest; depends on the text alone."""
  return 'eval' if zlib.crc32(entity.encode()) % EVAL_SHARE == 0 else 'train'


class Entities:
  """Draws entities of one split, without repeating one inside the same task."""

  def __init__(self, rng: np.random.Generator, split: str):
    if split not in SPLITS:
      raise ValueError(f'unknown split {split!r}; expected one of {SPLITS}')
    self._rng = rng
    self._split = split
    self._used: set[str | int] = set()

  def draw(self, kind: str) -> str | int:
    """A fresh entity of a kind.

    Args:
      kind: 'name', 'amount' (20 to 999), 'nights' (2 to 9), or a kind of id in ID_LETTER.
    """
    # Eight values are too few to be split, or to be used up by a task.
    if kind == 'nights':
      return int(self._rng.integers(2, 10))
    # One value in five belongs to 'eval', the others to 'train': a few draws find a fresh one.
    while True:
      if kind == 'name':
        value = str(self._rng.choice(FIRST_SYLLABLES)) + str(self._rng.choice(SECOND_SYLLABLES))
      elif kind == 'amount':
        value = int(self._rng.integers(20, 1000))
      else:
        value = f'{ID_LETTER[kind]}{self._rng.integers(100, 1000)}'
      if value not in self._used and split_of(str(value)) == self._split:
        self._used.add(value)
        return value
