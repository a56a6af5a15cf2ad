"""Composition: subtask reasonings become one trace, as in docs/method.md, section 1.7.

The sentences around the reasonings are data (wording.py).
"""

import dataclasses
from collections.abc import Sequence

from dcore_jax.distill.wording import Templates

# White space matters below. The format reward (docs/method.md, section 4.3) asks for newlines after
# `<think>` and around `</think>`, and models are trained on exactly these targets.


@dataclasses.dataclass(frozen=True)
class Solved:
  """One solved subtask: its text, the model's own reasoning for it, and its answer.

  The answer is a call list as `print_calls` writes it.
  """

  subtask: str
  reasoning: str
  answer: str


def clean_reasoning(text: str) -> str:
  """Returns a reasoning without an opening tag and without outer white space."""
  # The composed trace has an opening tag of its own.
  return text.rsplit('<think>\n', 1)[-1].strip()


def _listed(subtasks: Sequence[str], templates: Templates) -> str:
  # Numbered from 1, as the plan's readers count.
  lines = [
    templates.item.format(number=number, subtask=subtask) + '\n'
    for number, subtask in enumerate(subtasks, 1)
  ]
  return ''.join(lines)


# The released templates begin forms S and P with two newlines, and form F with one.
def _opening(query: str, templates: Templates) -> str:
  return '<think>\n\n' + templates.open.format(query=query) + '\n'


def _plan(subtasks: Sequence[str], templates: Templates) -> str:
  return f' {templates.plan}\n' + _listed(subtasks, templates)


def _now(number: int, subtask: str, reasoning: str, templates: Templates) -> str:
  # The model's own reasoning stands under a heading with its subtask.
  heading = templates.now.format(number=number, subtask=subtask)
  return f'{heading}\n{clean_reasoning(reasoning)}\n'


def sequential(
  query: str, subtasks: Sequence[str], current: int, solved: Solved, templates: Templates
) -> str:
  """Composes the target of step `current` (0-based) of a sequential seed (form S).

  It holds the request, the plan, what is solved, and this subtask's reasoning and answer. The plan
  stands on every step, as in the paper's cases; the released composer leaves it out
  (docs/method.md, section 7, point 14).
  """
  done = ''
  # The first step has nothing behind it, and no such heading.
  if current:
    done = f'{templates.done}\n' + _listed(subtasks[:current], templates)
  return (
    _opening(query, templates)
    + _plan(subtasks, templates)
    + done
    + _now(current + 1, subtasks[current], solved.reasoning, templates)
    + '</think>\n\n'
    + solved.answer
  )


def parallel(
  query: str, solved: Sequence[Solved], templates: Templates, *, newline_before_close: bool = True
) -> str:
  """Composes one target for all subtasks of a parallel seed (form P).

  `newline_before_close=False` gives the released form, which the format reward scores 0
  (docs/method.md, section 7, point 9).
  """
  # Each answer is a list in brackets, and the target makes all calls in one list.
  calls = '[' + ', '.join(one.answer[1:-1] for one in solved) + ']'
  # Reasonings in the order of the subtasks, whatever order they were made in.
  body = ''
  for number, one in enumerate(solved, 1):
    body += _now(number, one.subtask, one.reasoning, templates)
  # The calls stand twice: at the end of the reasoning, and as the answer.
  closing = templates.close + calls
  if newline_before_close:
    closing += '\n'
  return (
    _opening(query, templates)
    + _plan([one.subtask for one in solved], templates)
    + f'{templates.reflect}\n'
    + body
    + closing
    + '</think>\n\n'
    + calls
  )


def irrelevant(query: str, reasoning: str, answer: str, templates: Templates) -> str:
  """Composes the target where no tool fits (form I').

  It holds the doubt, then the model's own account of what is missing.
  """
  return (
    _opening(query, templates)
    + f' {templates.irrelevant}\n{clean_reasoning(reasoning)}\n</think>\n\n{answer}'
  )


def finished(query: str, answer: str, templates: Templates) -> str:
  """Composes the target that ends a turn after its last tool response (form F)."""
  return f'<think>\n{templates.finished.format(query=query)}\n</think>\n\n{answer}'


def single(reasoning: str, answer: str) -> str:
  """Wraps a verified native trace of a single call anew (form R)."""
  return f'<think>\n\n{clean_reasoning(reasoning)}\n</think>\n\n{answer}'
