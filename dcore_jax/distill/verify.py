"""What a decomposition, a solution and a composed row must satisfy.

Every refusal has a reason, which is counted.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from dcore_jax.chat.call_text import closing_tags
from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.thoughts import holds_tag
from dcore_jax.chat.tool_calls import parse_calls, print_calls
from dcore_jax.data.leakage import leaked_facts
from dcore_jax.data.seeds import Seed
from dcore_jax.distill.decompose import Subtasks, own_calls
from dcore_jax.worlds.registry import open_sandbox

# A script that the conversation lacks is another language from this share of a reasoning's letters.
# A few letters, as in a formula or a name, are not.
_FOREIGN = 0.1
TAG_IN_TEXT = 'tag of thoughts in a text'  # why a row, a subtask or a seed is refused


def decomposition_problem(seed: Seed, subtasks: Subtasks, *, seen: bool, strict_count: bool) -> str:
  """Returns why a decomposition is refused, '' where it is not.

  Args:
    seed: what was decomposed.
    subtasks: as read, at least one.
    seen: whether the decomposer saw the reference calls. If so, the subtasks must share them out
      and leak nothing of them.
    strict_count: see `decompose.own_calls`.
  """
  # An empty description would be a prompt without a request.
  if any(not text.strip() for text, _ in subtasks):
    return 'empty subtask'
  if any(holds_tag(text) for text, _ in subtasks):
    return TAG_IN_TEXT
  if strict_count and len(subtasks) != len(seed.calls):
    return 'not as many subtasks as calls'
  # What the decomposer has not seen it can neither share out nor leak.
  if not seen:
    return ''
  if own_calls(subtasks, len(seed.calls), strict_count) is None:
    return 'decomposition does not partition the calls'
  texts = [text for text, _ in subtasks]
  return 'leaks a fact' if leaked_facts(seed, texts) else ''


def read_solution(text: str) -> tuple[str, str] | None:
  """Splits the text of a solved subtask into (reasoning, answer).

  Returns None unless exactly one `</think>` closes the reasoning (docs/method.md, section 1.5).
  """
  closings = closing_tags(text)
  if sum(text.startswith('</think>\n\n', place) for place in closings) != 1:
    return None
  reasoning, answer = split_reasoning(text)
  return (reasoning, answer.strip()) if answer.strip() else None


def read_calls(answer: str) -> tuple[list[ToolCall], str]:
  """Reads the calls that an answer makes -> (calls, problem).

  The problem is '' or why there are no calls that could be written down again.
  """
  try:
    calls = parse_calls(answer)
    # A call may be readable but have a name or a value that our own form cannot express.
    print_calls(calls or [])
  except ValueError:
    return [], 'unreadable call'
  return (calls, '') if calls else ([], 'no call')


def state_problem(seed: Seed, calls: Sequence[ToolCall]) -> str:
  """Returns how executing `calls` differs from executing the reference, '' where it does not.

  The checks are BFCL's two: equal state, and the reference's outputs among those of the calls.
  Seeds without a world pass, since nothing can be executed.
  """
  if not seed.world:
    return ''
  # Two fresh worlds: each sees one list of calls alone.
  mine = open_sandbox(seed.world)
  reference = open_sandbox(seed.world)
  # More outputs than the reference has are allowed: an additional look-up does no harm.
  # Counted, so that an output that the reference has twice must be there twice.
  outputs = Counter(map(mine.run, calls))
  expected = Counter(map(reference.run, seed.calls))
  if mine.state != reference.state:
    return 'wrong state'
  return 'missing output' if expected - outputs else ''


def row_problem(messages: Sequence[Message], max_chars: int) -> str:
  """Returns why a composed row is unfit for training, '' where it is fit.

  The row needs the format that the reward asks for, at most `max_chars` characters in all, and the
  language of its conversation.
  """
  text = messages[-1].content
  if not re.match(r'<think>\n.*?\n</think>\n\n.', text, re.DOTALL):
    return 'bad format'
  # A tag that a request, a subtask or an answer has brought along would end the thoughts early.
  if text.count('<think>') != 1 or text.count('</think>') != 1:
    return TAG_IN_TEXT
  if sum(len(m.content) for m in messages) > max_chars:
    return 'too long'
  return 'another language' if foreign_script(text, [m.content for m in messages[:-1]]) else ''


def foreign_script(text: str, context: Sequence[str]) -> str:
  """Finds a script that the context never uses, but a tenth of the letters of `text` belong to.

  A model that was asked in English may go on in Chinese. Returns '' where there is no such script.
  """
  # Different characters are few, so each is classified once and weighs as often as it occurs.
  letters: Counter[str] = Counter()
  for character, count in Counter(text).items():
    if character.isalpha():
      letters[_script(character)] += count
  known = {_script(character) for character in set().union(*context) if character.isalpha()}
  enough = _FOREIGN * letters.total()
  for script, count in letters.most_common():
    if script not in known and count >= enough:
      return script
  return ''


# Looking a name up takes much longer than a dictionary, and texts repeat their letters. The cache
# holds the whole Basic Multilingual Plane.
@functools.lru_cache(maxsize=65_536)
def _script(letter: str) -> str:
  """Returns the first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, HANGUL."""
  if letter.isascii():
    return 'LATIN'
  return unicodedata.name(letter, '?').split(' ')[0].split('-')[0]
