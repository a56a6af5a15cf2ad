"""Decomposition: the prompt that asks for it, the tolerant reader of what comes back, and whose call is whose."""

import json
import re
from collections.abc import Iterator, Sequence

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.distill.wording import Example, Prompts

Subtasks = list[
  tuple[str, list[int] | None]
]  # (description, positions of its reference calls; None: not said)

MAX_CHARS = 65_536  # of a decomposition that is read; an answer of 16k tokens fits
_STARTS = 64  # arrays that are tried
_TOKEN = re.compile(
  r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL
)  # a JSON string, or a bracket outside of one
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)


def decompose_messages(
  context: Sequence[Message],
  query: str,
  calls: Sequence[ToolCall] | None,
  prompts: Prompts,
  examples: int = 0,
) -> list[Message]:
  """The prompt for a decomposition.

  Args:
    context: everything before the query: system message and history.
    query: what is to be decomposed.
    calls: the reference calls in view; None for a decomposition that does not see them.
    prompts: its texts.
    examples: how many of `prompts.examples` are shown.

  Raises:
    ValueError: more examples than there are.
  """
  if not 0 <= examples <= len(prompts.examples):
    raise ValueError(f'{examples} examples are asked for, and there are {len(prompts.examples)}')
  blind, shown = calls is None, prompts.examples[:examples]
  has_system = bool(context) and context[0].role == 'system'
  system, history = (list(context[:1]), list(context[1:])) if has_system else ([], list(context))
  text = prompts.decompose_blind if blind else prompts.decompose
  told = json.dumps([m.to_json() for m in history], ensure_ascii=False) if history else ''
  message = Message(
    'user',
    text.format(
      query=query,
      calls='' if blind else print_calls(calls),
      history=told,
      system=system[0].content if system else '',
    ),
  )
  instructions = prompts.instructions_blind if blind else prompts.instructions
  if instructions:
    blocks = ''.join(
      _example_block(prompts, example, number, blind) for number, example in enumerate(shown, 1)
    )
    return [
      Message('system', instructions.format(examples='\n' + blocks if blocks else '')),
      message,
    ]
  turns = [
    turn
    for example in shown
    for turn in (
      Message(
        'user',
        text.format(
          query=example.query, calls=example.calls, system=example.system, history=example.history
        ),
      ),
      Message('assistant', _solution(example, blind)),
    )
  ]
  return [*system, *turns, *history, message]


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
  texts, index = zip(*example.subtasks)
  return print_subtasks(list(texts), None if blind else [list(owned) for owned in index])


def explain_messages(context: Sequence[Message], query: str, prompts: Prompts) -> list[Message]:
  """The conversation before the query, then the instruction to name what keeps the request from being carried out."""
  return [*context, Message('user', prompts.explain.format(query=query))]


def print_subtasks(subtasks: Sequence[str], index: Sequence[Sequence[int]] | None) -> str:
  """The JSON list that a decomposition consists of; without `index` where there are no calls to own."""
  items = [{'step': number, 'description': text} for number, text in enumerate(subtasks, 1)]
  if index is not None:
    items = [item | {'index': list(owned)} for item, owned in zip(items, index, strict=True)]
  return json.dumps(items, ensure_ascii=False)


def parse_subtasks(text: str) -> Subtasks | None:
  """The first JSON array of objects with a description each, wherever it stands; None when there is none.

  Words and code fences around it, any order of keys, further keys and trailing commas are let pass.
  """
  for candidate in _arrays(text[:MAX_CHARS]):
    try:
      items = json.loads(_TRAILING_COMMA.sub(lambda match: match[1] or '', candidate))
    except (
      ValueError,
      RecursionError,
    ):  # ValueError: no JSON, or an integer of more digits than Python reads
      continue
    if (subtasks := _read_items(items)) is not None:
      return subtasks
  return None


def _arrays(text: str) -> Iterator[str]:
  """Balanced `[{...}]` of the text, from left to right; what lies inside one that was given is not given again."""
  end = 0
  starts = [match.start() for match in re.finditer(r'\[\s*\{', text)]
  for start in starts[:_STARTS]:
    if start < end:
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
    if index is not None:
      if not isinstance(index, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) for i in index
      ):
        return None
    subtasks.append((item['description'], index))
  return subtasks or None


def own_calls(
  subtasks: Subtasks, calls: int, strict_count: bool
) -> list[tuple[str, list[int]]] | None:
  """Which of the reference calls belong to which subtask; None where the subtasks do not share them out.

  Args:
    subtasks: as read.
    calls: number of reference calls.
    strict_count: as the released code has it (method: section 1.4): one call each, whatever the index says. Else the index
      lists must hold 0..calls-1 in order, none empty; where no subtask has one, each owns the call in its place.
  """
  if strict_count or all(index is None for _, index in subtasks):
    return [(text, [i]) for i, (text, _) in enumerate(subtasks)] if len(subtasks) == calls else None
  owned = [(text, index or []) for text, index in subtasks]
  in_order = [i for _, index in owned for i in index] == list(range(calls))
  return owned if in_order and all(index for _, index in owned) else None
