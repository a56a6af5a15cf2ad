"""Rows that hold a prompt and its reference answer, for reinforcement learning and as seeds.

    ToolRL rows, and every schema of `row_schemas` that ends with the assistant's message: the
        messages before it are the prompt
    pivot rows, see `pivot_rows`
    messages (or a prompt that is a list of them), tools, and the reference in a field of its own:
        ground_truth, answer, answers, reference, or reward_model.ground_truth
    seeds, which give one prompt for each step of their reference

A reference is calls, as data or as text, or an answer in words. Tools and calls are written in the
Python style, in which rewards compare them.
"""

import dataclasses
from collections.abc import Set
from typing import Any, NamedTuple

from dcore_jax.chat.call_text import split_answer
from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tagged_calls import read_text
from dcore_jax.chat.tool_calls import parse_calls, parse_reference, print_calls
from dcore_jax.chat.tool_specs import python_name
from dcore_jax.data import chat_rows, pivot_rows, row_schemas
from dcore_jax.data.dialogues import Record, check_row, python_messages
from dcore_jax.data.record_files import refuse_surrogates
from dcore_jax.data.seeds import DecisionPoint, Seed, decision_points

# Names under which data sets for reinforcement learning publish the right answer.
REFERENCE_FIELDS = ('ground_truth', 'answer', 'answers', 'reference', 'reference_calls')

_RESPONSE = ('<response>', '</response>')


class Asked(NamedTuple):
  """The prompt of a row, and its reference: calls, or else words."""

  messages: tuple[Message, ...]
  calls: tuple[ToolCall, ...]
  words: str


def read_points(record: Record, schema: str | None, name: str) -> list[DecisionPoint]:
  """Reads the decision points of a record: several of a seed, one of anything else.

  Args:
    record: as published.
    schema: one of `row_schemas.SCHEMAS`; None guesses it.
    name: the point's id where the record has none.

  Raises:
    ValueError, KeyError, TypeError: a record that cannot be read.
  """
  # A seed also has a reference field, and would lose its later steps if it were read as one.
  if schema is None and is_seed(record):
    return list(decision_points(Seed.from_json(record)))
  if schema is None and has_reference(record):
    asked = read_asked(record, name)
  else:
    schema = schema or row_schemas.recognise(record)
    if schema is None:
      raise ValueError(
        f'no known schema has the fields {sorted(record)}; known are {row_schemas.SCHEMAS}, and '
        f'messages with one of {REFERENCE_FIELDS}'
      )
    # ToolRL's reference is in the text of its output, behind the thoughts.
    if schema == 'toolrl':
      point, _ = row_schemas.toolrl_point(record, name)
      # Checked after the point: a row that lacks its fields is the more useful error.
      row_schemas.check_fields(record, schema)
      return [_checked(point)]
    asked = _last_answer(record, schema, name)
  # Calls of one reference are one response, so that several of them are parallel.
  kind = 'irrelevant' if not asked.calls else 'single' if len(asked.calls) == 1 else 'parallel'
  point = DecisionPoint(
    id=str(record['id']) if record.get('id') is not None else name,
    kind=kind,
    messages=asked.messages,
    reference=print_calls(asked.calls) if asked.calls else asked.words,
  )
  return [_checked(point)]


def _checked(point: DecisionPoint) -> DecisionPoint:
  check_row({'prompt': [m.to_json() for m in point.messages], 'reference': point.reference})
  return point


def is_seed(record: Record) -> bool:
  """Says whether a record is a seed as `Seed.to_json` writes it."""
  # A plain row has ground_truth as well. These four fields only a seed has.
  own = {'kind', 'tool_response', 'world', 'dialogue'} & record.keys()
  return bool(own) and {'id', 'conversations', 'ground_truth'} <= record.keys()


def has_reference(record: Record) -> bool:
  """Says whether a record has messages and, in another field, a reference."""
  if pivot_rows.is_pivot(record):
    return True
  has_messages = any(record.get(field) is not None for field in chat_rows.MESSAGE_FIELDS)
  # A prompt that is a text belongs to the schema `completion`, which has no reference.
  return (has_messages or isinstance(record.get('prompt'), list)) and bool(_references(record))


def _references(record: Record) -> dict[str, Any]:
  found = {field: record[field] for field in REFERENCE_FIELDS if record.get(field) is not None}
  # verl's data sets nest the reference in this field.
  model = record.get('reward_model')
  if isinstance(model, dict) and model.get('ground_truth') is not None:
    found['reward_model'] = model['ground_truth']
  return found


def read_asked(record: Record, name: str) -> Asked:
  """Reads a row of messages with the reference in a field of its own.

  Raises:
    ValueError: naming the message or field that cannot be read.
  """
  if pivot_rows.is_pivot(record):
    record = pivot_rows.with_messages(record)
  references = _references(record)
  # To choose one of them would be a guess, and rewards would depend on it.
  if len(references) > 1:
    raise ValueError(f'the fields {sorted(references)} all hold references')
  ((field, value),) = references.items()
  # The reference is taken away before the check, as the schema of rows does not have it.
  fields = {key: item for key, item in record.items() if key not in references}
  if isinstance(fields.get('prompt'), list):
    fields['messages'] = fields.pop('prompt')
  row_schemas.check_fields(fields, 'rows')
  dialogue = chat_rows.prompt_dialogue(fields, name)
  calls, words = _read_reference(value, field, {python_name(tool.name) for tool in dialogue.tools})
  return Asked(tuple(python_messages(dialogue)), _python_calls(calls), words)


def _last_answer(record: Record, schema: str, name: str) -> Asked:
  dialogue = row_schemas.to_dialogue(record, schema, name)
  if dialogue is None:
    raise ValueError(f'rows of schema {schema!r} hold no reference')
  # The dialogue ends with the assistant's last message, which is the reference.
  *before, last = dialogue.turns
  messages = python_messages(dataclasses.replace(dialogue, turns=tuple(before)))
  if not messages or messages[-1].role != 'user':
    raise ValueError('nothing is asked before the last message of the assistant')
  if last.calls:
    return Asked(tuple(messages), last.calls, '')
  calls, words = _read_reference(last.text, 'the last message', set())
  return Asked(tuple(messages), _python_calls(calls), words)


def _python_calls(calls: list[ToolCall]) -> tuple[ToolCall, ...]:
  return tuple(dataclasses.replace(call, name=python_name(call.name)) for call in calls)


def _read_reference(value: Any, where: str, tools: Set[str]) -> tuple[list[ToolCall], str]:
  """Reads a reference -> (calls, words); one of the two is empty."""
  if isinstance(value, str):
    # Thoughts are no part of a reference: rewards compare answers.
    text = split_answer(value)[1].strip()
    # ToolRL's tag of an answer in words.
    if text.startswith(_RESPONSE[0]) and text.endswith(_RESPONSE[1]):
      text = text.removeprefix(_RESPONSE[0]).removesuffix(_RESPONSE[1]).strip()
    if not text:
      raise ValueError(f'{where} is empty: there is nothing to compare with')
    # A bracket begins JSON or a Python-style list. The next character decides, because a call list
    # begins with a name.
    if text[0] == '{' or text[:1] == '[' and text[1:].lstrip()[:1] in ('{', '"', "'"):
      try:
        value = read_text(text)
        refuse_surrogates(value)
      except ValueError as error:
        raise ValueError(f'{where}: {error}') from error
    else:
      # Other text is a call list in the Python style, or an answer in words.
      calls = parse_calls(text) or _bare_call(text, tools)
      return (calls, '') if calls else ([], text)
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list) or not value:
    raise ValueError(f'{where} holds neither calls nor words')
  # A list of texts is a list of call strings, as in seeds and in BFCL.
  if all(isinstance(item, str) for item in value):
    return parse_reference(value), ''
  calls = [chat_rows.read_call(item, f'{where}[{number}]') for number, item in enumerate(value)]
  return calls, ''


def _bare_call(text: str, tools: Set[str]) -> list[ToolCall]:
  """Reads one call without brackets, as BFCL writes them; none where no tool has its name."""
  # Words may look like a call too: `yes (of course)` is one to Python's parser.
  if text.partition('(')[0] not in tools or text[-1:] != ')':
    return []
  return parse_reference([text])
