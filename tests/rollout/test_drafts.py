"""Guesses of what comes next in a text."""

import types

import numpy as np

from dcore_jax.rollout.drafts import Drafts


def table(*texts):
  """Texts of one origin, as `Drafts` reads them of a table of branches."""
  text_XS = np.zeros((len(texts), 64), np.int32)
  for row, text in enumerate(texts):
    text_XS[row, : len(text)] = text
  length_X = np.array([len(text) for text in texts])
  return types.SimpleNamespace(
    text_XS=text_XS, length_X=length_X, family_X=np.zeros(len(texts), int)
  )


def guess(texts, cost, most=8):
  """What is guessed to follow the last of some texts."""
  drafts = Drafts(table(*texts), longest=15, overhead=4.0, cost=cost)
  for row in range(len(texts)):
    drafts.start(row)
  return drafts.guess(np.array([len(texts) - 1]), np.array([most]), 1)[0]


def test_what_followed_the_same_tokens_is_guessed():
  assert guess([[1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 4]], cost=1.0, most=3) == [5, 6, 7]


def test_a_text_that_goes_in_circles_is_guessed_to_go_on_so():
  assert guess([[9, 1, 2, 3, 1, 2, 3]], cost=1.0, most=4) == [1, 2, 3, 1]
  assert guess([[9, 4, 4, 4]], cost=1.0, most=4) == [4] * 4


def test_too_few_tokens_are_not_worth_a_pass_of_their_own():
  short = [[1, 2, 3, 4], [0, 1, 2, 3]]
  assert guess(short, cost=1.0) == [4]
  assert guess(short, cost=2.0) == []
  assert guess([[1, 2, 3, *range(20, 30)], [0, 1, 2, 3]], cost=2.0) == list(range(20, 28))


def test_nothing_is_guessed_of_tokens_that_are_new():
  assert guess([[1, 2, 3], [4, 5, 6]], cost=1.0) == []


def test_how_a_text_went_on_says_whether_guesses_are_worth_a_pass():
  drafts = Drafts(table([9, 1, 2, 1, 2, 1, 2]), longest=15, overhead=4.0, cost=3.0)
  drafts.start(0)

  def found():
    return drafts.guess(np.array([0]), np.array([15]), 1)[0]

  assert found() == [1, 2] * 7 + [1]
  drafts.learn(0, guessed=15, right=0)
  assert found() == []
  # It was wrong once more, as far as one can see from what was drawn without it.
  drafts.check(0, [5, 5, 5])
  assert found() == []
  drafts.check(0, [1, 2] * 7)
  assert found()
