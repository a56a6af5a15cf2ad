"""Counts four behaviours in the thoughts of a response (the paper's fig. 3a).

The paper counts decomposition, reflection, verification and deduction, and does not print its
patterns. These are our own small sets of English markers. Each is a phrase that announces the
behaviour, matched at word boundaries and in any case, so 'attribute' holds no 'but'. They serve to
compare models with each other, before and after training; a single count says little.

A thought is a sentence or a line. It has one label, by the first of these rules that holds:

1. A line that begins with a number and a dot is 'decomposition': an item of a plan.
2. The behaviour whose markers it holds most of. Of equally many, the one that is announced first.
3. 'other', where it holds none.
"""

import re
from typing import Sequence

import numpy as np

# One regular expression for each behaviour. Alternatives do not overlap, and longer ones stand
# before their prefixes, because the first that matches is taken.
MARKERS = {
  # Splitting the task, or moving on in a split task.
  'decomposition': r'sub-?tasks?|sub-?problems?|break (?:it|this|that|the \w+) down'
  r'|(?:first|second|next|final) step|step \d+|steps? by step|in parallel'
  r'|split (?:it|this|that|the \w+) into',
  # Doubting or turning back on what was just thought.
  'reflection': r'wait|hold on|however|alternatively|on second thoughts?|actually|hmm+'
  r'|let me (?:rethink|reconsider)|(?:i|we) (?:overlooked|missed|forgot)|but',
  # Testing a result or an input against what is known.
  'verification': r'(?:double[- ]?|re-?)check(?:s|ed|ing)?|verif(?:y|ies|ied|ying|ication)'
  r'|confirm(?:s|ed|ing)?|make sure|makes sure|making sure|ensur(?:e|es|ed|ing)'
  r'|let me check|(?:that|this) is correct',
  # Drawing a conclusion from what was said before.
  'deduction': r'therefore|thus|hence|consequently|(?:this|that|which) (?:means|implies)'
  r'|it follows|as a result|so (?:the|we|i|it|this|that)|because|since',
}
BEHAVIOURS = tuple(MARKERS)
OTHER = 'other'
LABELS = (*BEHAVIOURS, OTHER)
_PATTERNS = {
  name: re.compile(rf'\b(?:{pattern})\b', re.IGNORECASE) for name, pattern in MARKERS.items()
}
# Sentences end behind a letter or a bracket, so that '1. ' and '2.5' end none.
_ENDS = re.compile(r'(?<=[^\W\d_][.?!])\s+|(?<=[)\]"\'][.?!])\s+|\n+')
_ITEM = re.compile(r'\d+\s?\.\s*[^\W\d]')
_TAG = re.compile(r'</?think>')


def split_thoughts(text: str) -> list[str]:
  """Splits a reasoning into sentences and lines; pieces without a letter are left out."""
  pieces = [piece.strip() for piece in _ENDS.split(_TAG.sub('', text))]
  return [piece for piece in pieces if any(letter.isalpha() for letter in piece)]


def label_thought(thought: str) -> str:
  """Returns the label of a thought, one of LABELS, by the rules above."""
  if _ITEM.match(thought):
    return 'decomposition'
  best = OTHER
  # More markers win, then an earlier first marker.
  rank = (0, 0)
  for name, pattern in _PATTERNS.items():
    places = [found.start() for found in pattern.finditer(thought)]
    if places and (len(places), -places[0]) > rank:
      best = name
      rank = (len(places), -places[0])
  return best


def count_behaviours(text: str) -> dict[str, int]:
  """Counts how often each behaviour is announced in one response; matches do not overlap."""
  return {name: len(pattern.findall(text)) for name, pattern in _PATTERNS.items()}


def behaviour_counts(texts: Sequence[str]) -> dict[str, np.ndarray]:
  """Counts the behaviours of B responses -> int32 arrays [B] by behaviour."""
  rows = [count_behaviours(text) for text in texts]
  counts = {}
  for name in BEHAVIOURS:
    counts[name] = np.array([row[name] for row in rows], np.int32)
  return counts
