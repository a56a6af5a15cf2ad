"""What a decomposition, a solution and a composed row must satisfy; every refusal has a reason that is counted."""
import re

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import ToolCallError, calls_equal, parse_calls, print_calls
from dcore_jax.distill.seeds import Seed

_FACT = re.compile(r'[A-Z][A-Za-z0-9]+|\d+')  # ids, numbers and capitalised names


def decomposition_problem(seed: Seed, subtasks: list[tuple[str, list[int]]] | None) -> str:
  """'' or why the decomposition is refused: the index lists must partition the reference calls in order, without leaks."""
  if not subtasks:
    return 'decomposition unparsable'
  if [i for _, index in subtasks for i in index] != list(range(len(seed.calls))) or not all(i for _, i in subtasks):
    return 'decomposition does not partition the calls'
  if any(not text.strip() for text, _ in subtasks):
    return 'empty subtask'
  return 'leaks a fact' if leaked_facts(seed, [text for text, _ in subtasks]) else ''


def leaked_facts(seed: Seed, subtasks: list[str]) -> set[str]:
  """Facts of the subtasks that only the reference calls can have given away: they stand in neither history nor query
  (method: section 1.2, requirement 3)."""
  known = set(_FACT.findall(' '.join(m.content for m in seed.conversations)))
  given = set(_FACT.findall(print_calls(list(seed.calls)))) if seed.calls else set()
  return set(_FACT.findall(' '.join(subtasks))) & given - known


def read_solution(text: str) -> tuple[str, str] | None:
  """(reasoning, answer) of a solved subtask; None unless exactly one `</think>` closes the reasoning (method: section 1.5)."""
  if text.count('</think>\n\n') != 1:
    return None
  reasoning, answer = split_reasoning(text)
  return (reasoning, answer.strip()) if answer.strip() else None


def calls_problem(answer: str, expected: list[ToolCall]) -> str:
  """'' when the answer makes exactly the expected calls, in order."""
  try:
    calls = parse_calls(answer)
  except ToolCallError:
    return 'unreadable call'
  if not calls:
    return 'no call'
  return '' if calls_equal(calls, expected, ordered=True) else 'wrong call'


def row_problem(messages: list[Message], max_chars: int) -> str:
  """'' or why a composed row is unfit for training: the format the reward asks for, and length."""
  text = messages[-1].content
  if not re.match(r'<think>\n.*?\n</think>\n\n.', text, re.DOTALL):
    return 'bad format'
  return 'too long' if sum(len(m.content) for m in messages) > max_chars else ''

