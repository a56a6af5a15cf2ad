"""The two instructions of self-distillation: decompose with the reference calls in view, and explain what is missing.

The slots follow the paper's prompt A.3 (method: section 1.2); policy and tools stand in the record's own system message
and the history in the messages before, so the instruction holds what is left: query, reference calls, and the cue.
"""
import json
import re

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls

DECOMPOSE = 'list the subtasks of this request as json.\nrequest: {query}\ncalls: {calls}\nsubtasks:'
EXPLAIN_MISSING = 'say which tool or value is missing for this request.\nrequest: {query}'
_ARRAY = re.compile(r'\[\s*\{')


def decompose_messages(context: list[Message], query: str, calls: list[ToolCall]) -> list[Message]:
  """The conversation before the query, then the decomposition instruction with the reference calls in view."""
  return [*context, Message('user', DECOMPOSE.format(query=query, calls=print_calls(calls)))]


def explain_messages(context: list[Message], query: str) -> list[Message]:
  """The conversation before the query, then the instruction to name what keeps the request from being carried out."""
  return [*context, Message('user', EXPLAIN_MISSING.format(query=query))]


def print_subtasks(subtasks: list[str], index: list[list[int]] | None = None) -> str:
  """The JSON list a decomposition consists of; by default subtask i owns call i."""
  index = index or [[i] for i in range(len(subtasks))]
  return json.dumps([{'step': i + 1, 'description': text, 'index': owned}
                     for i, (text, owned) in enumerate(zip(subtasks, index, strict=True))])


def parse_subtasks(text: str) -> list[tuple[str, list[int]]] | None:
  """[(description, call indices)] from the first JSON array of objects in `text`; None when there is none."""
  match = _ARRAY.search(text)
  if match is None:
    return None
  try:
    items, _ = json.JSONDecoder().raw_decode(text, match.start())
  except (ValueError, RecursionError):  # ValueError: no JSON, or an integer of more digits than Python reads
    return None
  subtasks = []
  for item in items:
    if not isinstance(item, dict) or not isinstance(item.get('description'), str):
      return None
    index = item.get('index')
    if not isinstance(index, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in index):
      return None
    subtasks.append((item['description'], index))
  return subtasks
