"""Composition: subtask reasonings become one trace (method: section 1.7). The sentences around them are data (wording.py)."""

import dataclasses
from collections.abc import Sequence

from dcore_jax.distill.wording import Templates


@dataclasses.dataclass(frozen=True)
class Solved:
  """One solved subtask: its text, the model's own reasoning for it, and its answer (a call list as `print_calls` writes it)."""

  subtask: str
  reasoning: str
  answer: str


def _plan(subtasks: Sequence[str], t: Templates) -> str:
  return (
    ' '
    + t.plan
    + '\n'
    + ''.join(t.item.format(number=i + 1, subtask=s) + '\n' for i, s in enumerate(subtasks))
  )


def _now(number: int, subtask: str, reasoning: str, t: Templates) -> str:
  return t.now.format(number=number, subtask=subtask) + '\n' + clean_reasoning(reasoning) + '\n'


def clean_reasoning(text: str) -> str:
  """A reasoning as it is glued in: without an opening tag and without outer white space."""
  return text.rsplit('<think>\n', 1)[-1].strip()


def sequential(
  query: str, subtasks: Sequence[str], current: int, solved: Solved, t: Templates
) -> str:
  """The target of step `current` (0-based): request, plan, what is solved, this subtask's reasoning and answer (form S).

  The plan stands on every step, as in the paper's cases; the released composer leaves it out (method: section 7, 14).
  """
  done = ''
  if current:
    done = (
      t.done
      + '\n'
      + ''.join(
        t.item.format(number=i + 1, subtask=s) + '\n' for i, s in enumerate(subtasks[:current])
      )
    )
  return (
    '<think>\n\n'
    + t.open.format(query=query)
    + '\n'
    + _plan(subtasks, t)
    + done
    + _now(current + 1, subtasks[current], solved.reasoning, t)
    + '</think>\n\n'
    + solved.answer
  )


def parallel(
  query: str, solved: Sequence[Solved], t: Templates, *, newline_before_close: bool = True
) -> str:
  """One target for all subtasks (form P).

  `newline_before_close=False` gives the released form, which the format reward scores 0 (method: section 7, 9).
  """
  calls = '[' + ', '.join(s.answer[1:-1] for s in solved) + ']'
  body = ''.join(_now(i + 1, s.subtask, s.reasoning, t) for i, s in enumerate(solved))
  return (
    '<think>\n\n'
    + t.open.format(query=query)
    + '\n'
    + _plan([s.subtask for s in solved], t)
    + t.reflect
    + '\n'
    + body
    + t.close
    + calls
    + ('\n' if newline_before_close else '')
    + '</think>\n\n'
    + calls
  )


def irrelevant(query: str, reasoning: str, answer: str, t: Templates) -> str:
  """The target where nothing fits: the doubt, then the model's own account of what is missing (form I')."""
  return (
    '<think>\n\n'
    + t.open.format(query=query)
    + '\n '
    + t.irrelevant
    + '\n'
    + clean_reasoning(reasoning)
    + '\n</think>\n\n'
    + answer
  )


def finished(query: str, answer: str, t: Templates) -> str:
  """The target that ends a turn after its last tool response (form F)."""
  return '<think>\n' + t.finished.format(query=query) + '\n</think>\n\n' + answer


def single(reasoning: str, answer: str) -> str:
  """A verified native trace of a single call, re-wrapped (form R)."""
  return '<think>\n\n' + clean_reasoning(reasoning) + '\n</think>\n\n' + answer
