"""What a decomposition, a solution and a composed row must satisfy; every refusal has a reason that is counted."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import parse_calls, print_calls
from dcore_jax.data.leakage import leaked_facts
from dcore_jax.data.seeds import Seed
from dcore_jax.distill.decompose import Subtasks, own_calls
from dcore_jax.worlds.sandbox import open_sandbox

_FOREIGN = 0.1  # share of a reasoning's letters from which a script that its conversation lacks is another language


def decomposition_problem(seed: Seed, subtasks: Subtasks, *, seen: bool, strict_count: bool) -> str:
  """'' or why a decomposition is refused.

  Args:
    seed: what was decomposed.
    subtasks: as read, at least one.
    seen: whether the decomposer saw the reference calls, which the subtasks then must share out, and without leaks.
    strict_count: see `decompose.own_calls`.
  """
  if any(not text.strip() for text, _ in subtasks):
    return 'empty subtask'
  if strict_count and len(subtasks) != len(seed.calls):
    return 'not as many subtasks as calls'
  if not seen:
    return ''
  if own_calls(subtasks, len(seed.calls), strict_count) is None:
    return 'decomposition does not partition the calls'
  return 'leaks a fact' if leaked_facts(seed, [text for text, _ in subtasks]) else ''


def read_solution(text: str) -> tuple[str, str] | None:
  """(reasoning, answer) of a solved subtask; None unless exactly one `</think>` closes the reasoning (method: section 1.5)."""
  if text.count('</think>\n\n') != 1:
    return None
  reasoning, answer = split_reasoning(text)
  return (reasoning, answer.strip()) if answer.strip() else None


def read_calls(answer: str) -> tuple[list[ToolCall], str]:
  """(the calls that an answer makes, '' or why there are none that could be written down again)."""
  try:
    calls = parse_calls(answer)
    print_calls(calls or [])
  except ValueError:
    return [], 'unreadable call'
  return (calls, '') if calls else ([], 'no call')


def state_problem(seed: Seed, calls: Sequence[ToolCall]) -> str:
  """'' or how executing `calls` differs from executing the reference: BFCL's two checks, equal state and the reference's
  outputs among those of the calls. Seeds without a world pass, since nothing can be executed."""
  if not seed.world:
    return ''
  mine, reference = open_sandbox(seed.world), open_sandbox(seed.world)
  outputs = Counter(map(mine.run, calls))
  expected = Counter(map(reference.run, seed.calls))
  if mine.state != reference.state:
    return 'wrong state'
  return 'missing output' if expected - outputs else ''


def row_problem(messages: Sequence[Message], max_chars: int) -> str:
  """'' or why a composed row is unfit for training: the format the reward asks for, length, and language."""
  text = messages[-1].content
  if not re.match(r'<think>\n.*?\n</think>\n\n.', text, re.DOTALL):
    return 'bad format'
  if sum(len(m.content) for m in messages) > max_chars:
    return 'too long'
  return 'another language' if foreign_script(text, [m.content for m in messages[:-1]]) else ''


def foreign_script(text: str, context: Sequence[str]) -> str:
  """A script that the context never uses and a tenth of the letters of `text` belong to, as where a model goes on in Chinese
  though asked in English; '' for none."""
  letters: Counter[str] = Counter()
  for character, count in Counter(text).items():
    if character.isalpha():
      letters[_script(character)] += count
  known = {_script(character) for character in set().union(*context) if character.isalpha()}
  enough = _FOREIGN * letters.total()
  return next(
    (script for script, count in letters.most_common() if script not in known and count >= enough),
    '',
  )


@functools.lru_cache(maxsize=65_536)
def _script(letter: str) -> str:
  """The first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HANGUL."""
  return 'LATIN' if letter.isascii() else unicodedata.name(letter, '?').split(' ')[0].split('-')[0]
