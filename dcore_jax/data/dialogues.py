"""Dialogues as data, and how they are written as our rows in either call style.

python  specs in the system message, calls as [f(a=1)], tool responses as user messages (as in
        D-CORE's and ToolRL's rows)
hermes  specs through the template's `tools`, calls as <tool_call> JSON, tool responses in the
        role `tool`
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from dcore_jax.chat.messages import BOOKKEEPING, Message, ToolCall, ToolSpec
from dcore_jax.chat.tool_calls import print_calls, tool_response
from dcore_jax.chat.tool_specs import python_name, system_text

CALL_STYLES = ('python', 'hermes')

# Fields of records that say nothing about the conversation: where it is from, how good it is held
# to be, and how an endpoint was asked.
FREE_FIELDS = BOOKKEEPING | frozenset(
  'idx row_id example_id sample_id conversation_id dialogue_id session_id prompt_id question_id '
  'hash source sources dataset dataset_name data_source origin url license language lang split '
  'version category categories subcategory domain topic task task_type type kind difficulty '
  'level tags meta info extra_info author annotator generator model_name provider object '
  'system_fingerprint created_by updated_at score scores rating quality reward margin '
  'used_in chosen_rating rejected_rating chosen_avg_rating rejected_avg_rating score_chosen '
  'score_rejected chosen_score rejected_score chosen_model rejected_model '
  'num_turns turns n_turns length ability temperature top_p top_k min_p seed n stream '
  'stream_options max_tokens max_completion_tokens user frequency_penalty presence_penalty '
  'parallel_tool_calls '
  # Rows of our own distillation say how they were made.
  'provenance'.split()
)

Record = dict[str, Any]
Named = TypeVar('Named', ToolCall, ToolSpec)


@dataclasses.dataclass(frozen=True)
class DialogueTurn:
  """One message of a dialogue, by 'user', 'assistant' or 'tool' ('system' for a later instruction).

  Attributes:
    role: whose message it is.
    text: what is said. Where an assistant makes calls, the thought before them, '' for none.
    calls: the calls that an assistant makes.
    words: what an assistant says to the user beside its calls.
    trained: False for an assistant's message that is context alone.
  """

  role: str
  text: str
  calls: tuple[ToolCall, ...] = ()
  words: str = ''
  trained: bool = True


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """A record as data. Tools are named as in the source."""

  id: str
  policy: str  # system text without the tools; '' for none
  tools: tuple[ToolSpec, ...]
  turns: tuple[DialogueTurn, ...]


def thought_block(thoughts: str) -> str:
  """Writes thoughts as they stand in a message; '' for none."""
  return f'<think>\n{thoughts}\n</think>' if thoughts else ''


def python_named(dialogue: Dialogue) -> Dialogue:
  """Returns the dialogue with names that a Python-style call can have.

  Raises:
    ValueError: two tools get the same name.
  """
  # Calls are renamed like the tools, or they would call tools that are not listed.
  turns = tuple(
    dataclasses.replace(turn, calls=_with_python_names(turn.calls)) for turn in dialogue.turns
  )
  return dataclasses.replace(dialogue, tools=_python_named_tools(dialogue.tools), turns=turns)


def _with_python_names(things: Iterable[Named]) -> tuple[Named, ...]:
  return tuple(dataclasses.replace(thing, name=python_name(thing.name)) for thing in things)


def _python_named_tools(tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
  # Renaming may make two names equal ('a b' and 'a/b'), so names are compared afterwards.
  renamed = _with_python_names(tools)
  _refuse_equal_names(renamed)
  return renamed


def _refuse_equal_names(tools: Sequence[ToolSpec]) -> None:
  names = [tool.name for tool in tools]
  if len(set(names)) < len(names):
    raise ValueError(f'two tools have one name: {sorted(names)}')


def write_row(dialogue: Dialogue, style: str) -> Record:
  """Writes a dialogue as our row in one of CALL_STYLES.

  Raises:
    ValueError: two tools get the same name, or a call cannot be written.
  """
  if style == 'python':
    return _python_row(dialogue)
  # With two tools of one name nobody could say which of them a call means.
  _refuse_equal_names(dialogue.tools)
  messages = [Message('system', dialogue.policy)] if dialogue.policy else []
  for turn in dialogue.turns:
    messages.append(Message(turn.role, _turn_text(turn, turn.calls, style), turn.trained))
  row = {'id': dialogue.id, 'conversations': [message.to_json() for message in messages]}
  if dialogue.tools:
    # Chat templates expect OpenAI's wrapper around each spec.
    row['tools'] = [{'type': 'function', 'function': tool.to_json()} for tool in dialogue.tools]
  return row


def _python_row(dialogue: Dialogue) -> Record:
  messages = python_messages(dialogue)
  return {'id': dialogue.id, 'conversations': [message.to_json() for message in messages]}


def python_messages(dialogue: Dialogue) -> list[Message]:
  """Writes a dialogue as messages of the Python style.

  Raises:
    ValueError: as `write_row`.
  """
  tools = _python_named_tools(dialogue.tools)
  # Without tools there is no list to show, and no rule for calls.
  system = system_text(dialogue.policy, tools) if tools else dialogue.policy
  messages = [Message('system', system)] if system else []
  before = ''  # role of the turn before
  for turn in dialogue.turns:
    if turn.role != 'tool':
      text = _turn_text(turn, _with_python_names(turn.calls), 'python')
      messages.append(Message(turn.role, text, turn.trained))
    elif before == 'tool':
      # Responses that follow each other share a message, as in Qwen3's template.
      text = messages[-1].content + '\n' + tool_response(turn.text)
      messages[-1] = Message('user', text)
    else:
      messages.append(Message('user', tool_response(turn.text)))
    before = turn.role
  return messages


def _turn_text(turn: DialogueTurn, calls: Sequence[ToolCall], style: str) -> str:
  if not calls:
    return turn.text
  thought = turn.text
  words = turn.words
  if words and style == 'python':
    # A list of calls is read as one only where it stands alone, so that the words before it go
    # where they do no harm: to the end of the thoughts.
    body = thought.strip().removeprefix('<think>').removesuffix('</think>').strip('\n')
    thought = thought_block(f'{body}\n\n{words}' if body else words)
    words = ''
  thought = thought + '\n\n' if thought else ''
  words = words + '\n' if words else ''
  return thought + words + print_calls(calls, style)


def check_row(row: Record) -> Record:
  """Returns a row of ours as it is if it can be written to a file and tokenized.

  Raises:
    ValueError: text with half of a surrogate pair, or numbers that JSON does not have.
  """
  # Writing the row once is the check: both faults are errors of JSON or of UTF-8.
  json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
  return row
