"""Names, ids and amounts of ToolWorld. Every entity belongs to exactly one split, decided by a hash of its text."""

import zlib

import numpy as np

# 25 + 25 syllables rather than 70: a copied name is two draws from few, frequent tokens, which a 2-million-parameter
# model copies far more reliably than many rare ones.
FIRST_SYLLABLES = tuple(c + v for c in 'BDKLM' for v in 'aeiou')
SECOND_SYLLABLES = tuple(c + v for c in 'nrstz' for v in 'aeiou')
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
    self._rng, self._split, self._used = rng, split, set()

  def draw(self, kind: str) -> str | int:
    """A fresh entity: 'name', an id kind of ID_LETTER, 'amount' (20 .. 999) or 'nights' (2 .. 9, in both splits)."""
    if kind == 'nights':
      return int(self._rng.integers(2, 10))
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
