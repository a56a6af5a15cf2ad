"""Decomposition of a request into subtasks.

Here are the prompt that asks for it, the tolerant reader of the reply, and the rule which call
belongs to which subtask.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.distill.wording import Example, Prompts

# (description, positions of its reference calls; None where the model named none)
Subtasks = list[tuple[str, list[int] | None]]

MAX_CHARS = 65_536  # characters of a reply that are read; an answer of 16k tokens fits
_STARTS = 64  # arrays that are tried; a long reply full of brackets must not take minutes
# Finds a JSON string as a whole, so that the brackets inside of it are not counted, or a bracket
# outside of one. A string that never ends is taken to the end of the text: else each quote in it
# would be looked at as a beginning.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
# Finds a comma before a closing bracket. Strings are matched first, to keep the commas in them.
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+(?:"|\\?\Z))|,(?=\s*[\]}])', re.DOTALL)


def decompose_messages(
  context: Sequence[Message],
  query: str,
  calls: Sequence[ToolCall] | None,
  prompts: Prompts,
  examples: int = 0,
) -> list[Message]:
  """Writes the prompt that asks for a decomposition.

  Args:
    context: everything before the query: system message and history.
    query: what is to be decomposed.
    calls: the reference calls, which the prompt shows; None for a decomposition that does not see
      them.
    prompts: texts of the prompt.
    examples: how many of `prompts.examples` are shown.

  Raises:
    ValueError: more examples than there are.
  """
  if not 0 <= examples <= len(prompts.examples):
    raise ValueError(f'{examples} examples are asked for, and there are {len(prompts.examples)}')
  blind = calls is None
  shown = prompts.examples[:examples]
  # The system message is taken apart: it is either replaced by the instructions, or stays in front
  # of the examples.
  system = []
  history = list(context)
  if history and history[0].role == 'system':
    system.append(history.pop(0))
  text = prompts.decompose_blind if blind else prompts.decompose
  question = text.format(
    query=query,
    calls='' if blind else print_calls(calls),
    history=_history_json(history),
    system=system[0].content if system else '',
  )
  message = Message('user', question)
  instructions = prompts.instructions_blind if blind else prompts.instructions
  if instructions:
    blocks = ''
    for number, example in enumerate(shown, 1):
      blocks += _example_block(prompts, example, number, blind)
    if blocks:
      blocks = '\n' + blocks
    return [Message('system', instructions.format(examples=blocks)), message]
  # Without instructions of its own the prompt is a conversation, and examples are turns of it.
  turns = []
  for example in shown:
    asked = text.format(
      query=example.query, calls=example.calls, system=example.system, history=example.history
    )
    turns += [Message('user', asked), Message('assistant', _solution(example, blind))]
  return [*system, *turns, *history, message]


def _history_json(history: Sequence[Message]) -> str:
  if not history:
    return ''
  return json.dumps([message.to_json() for message in history], ensure_ascii=False)


def _example_block(prompts: Prompts, example: Example, number: int, blind: bool) -> str:
  text = prompts.example_blind if blind else prompts.example
  return text.format(
    number=number,
    system=example.system,
    history=example.history,
    query=example.query,
    calls=example.calls,
    subtasks=_solution(example, blind),
  )


def _solution(example: Example, blind: bool) -> str:
  texts = [text for text, _ in example.subtasks]
  index = None if blind else [owned for _, owned in example.subtasks]
  return print_subtasks(texts, index)


def explain_messages(context: Sequence[Message], query: str, prompts: Prompts) -> list[Message]:
  """Writes the prompt that asks which tool or value a request lacks.

  The conversation before the query comes first.
  """
  return [*context, Message('user', prompts.explain.format(query=query))]


def print_subtasks(subtasks: Sequence[str], index: Sequence[Sequence[int]] | None) -> str:
  """Writes a decomposition as a JSON list; without `index` where there are no calls to own."""
  # Steps count from 1, positions of calls from 0, as the prompts say.
  items = [{'step': number, 'description': text} for number, text in enumerate(subtasks, 1)]
  if index is not None:
    items = [item | {'index': list(owned)} for item, owned in zip(items, index, strict=True)]
  return json.dumps(items, ensure_ascii=False)


def parse_subtasks(text: str) -> Subtasks | None:
  """Reads the first JSON array of objects with a description each; None where there is none.

  Words and code fences around it, any order of keys, further keys and trailing commas are allowed.
  """
  for candidate in _arrays(text[:MAX_CHARS]):
    # A trailing comma is not JSON, but models write it; strings keep theirs.
    try:
      items = json.loads(_TRAILING_COMMA.sub(lambda match: match[1] or '', candidate))
    except (ValueError, RecursionError):
      # ValueError: no JSON, or an integer of more digits than Python reads.
      continue
    subtasks = _read_items(items)
    if subtasks is not None:
      return subtasks
  return None


def _arrays(text: str) -> Iterator[str]:
  """Yields the balanced `[{...}]` of a text from left to right, those inside others left out."""
  # A regular expression cannot match nested brackets, and a JSON parser fails on the text around
  # them, so brackets are counted here.
  end = 0
  starts = [match.start() for match in re.finditer(r'\[\s*\{', text)]
  for start in starts[:_STARTS]:
    if start < end:
      # An array inside one that was read already.
      continue
    depth = 0
    for token in _TOKEN.finditer(text, start):
      depth += (token[0] in '[{') - (token[0] in ']}')
      if depth == 0:
        end = token.end()
        yield text[start:end]
        break


def _read_items(items: list) -> Subtasks | None:
  subtasks: Subtasks = []
  for item in items:
    if not isinstance(item, dict) or not isinstance(item.get('description'), str):
      return None
    index = item.get('index')
    if index is not None and not _is_list_of_integers(index):
      return None
    subtasks.append((item['description'], index))
  return subtasks or None


def _is_list_of_integers(value: Any) -> bool:
  # `true` is an integer to Python, but no position.
  if not isinstance(value, list):
    return False
  return all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def own_calls(
  subtasks: Subtasks, calls: int, strict_count: bool
) -> list[tuple[str, list[int]]] | None:
  """Tells which reference calls belong to which subtask.

  Returns None where the subtasks do not share the calls out.

  Args:
    subtasks: as read.
    calls: number of reference calls.
    strict_count: whether each subtask owns one call, whatever the index says, as the released code
      has it (docs/method.md, section 1.4). Otherwise the index lists must hold 0..calls-1 in order,
      and none may be empty. Where no subtask has an index, each owns the call in its place.
  """
  if strict_count or all(index is None for _, index in subtasks):
    if len(subtasks) != calls:
      return None
    return [(text, [place]) for place, (text, _) in enumerate(subtasks)]
  # The positions must rise, because a step is compared with the reference calls from where the step
  # before it ended.
  owned = [(text, index or []) for text, index in subtasks]
  places = list(itertools.chain.from_iterable(index for _, index in owned))
  if places != list(range(calls)) or not all(index for _, index in owned):
    return None
  return owned
