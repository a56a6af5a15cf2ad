"""The conversation types that every part of the system exchanges.

They are plain and frozen, and go to JSON and back.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from dcore_jax.chat.call_text import closing_tags

ROLES = ('system', 'user', 'assistant', 'tool')
# Fields of messages that say nothing which a model should see or learn. Logs of endpoints and
# public data sets carry them beside role and content.
BOOKKEEPING = frozenset(
  'id index uuid timestamp created created_at date model finish_reason stop_reason logprobs usage '
  'token_ids token_count num_tokens metadata'.split()
)


def refuse_unknown(
  record: dict[str, Any], known: Collection[str], where: str, free: Collection[str] = BOOKKEEPING
) -> None:
  """Refuses a record that says something in a field which nothing reads.

  Fields without a value (null, '', [] and {}) say nothing.

  Raises:
    ValueError: naming the field.
  """
  for name, value in record.items():
    # A table's rows have a column for every field, empty in most of them.
    if name not in known and name not in free and value not in (None, '', [], {}):
      raise ValueError(f'{where}: the field {name!r} is not known, and would be lost')


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """One call of a tool.

  Arguments are JSON-like values. Positional arguments stand apart, because the Python-style grammar
  allows them and a call must print as it was read.
  """

  name: str
  arguments: dict[str, Any]
  # A tuple, so that nobody changes the call of somebody else; a JSON-style call leaves it empty.
  positional: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class ToolSpec:
  """The description of a tool that a model sees.

  `parameters` is a JSON-schema object: {'type', 'properties', 'required'}.
  """

  name: str
  description: str
  parameters: dict[str, Any]

  def to_json(self) -> dict[str, Any]:
    """Returns the spec as {name, description, parameters}."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, record: dict[str, Any]) -> 'ToolSpec':
    """Reads a spec; raises ValueError where name or parameters are missing."""
    # A tool without parameters says so by an empty schema; without the field the record is no spec.
    missing = {'name', 'parameters'} - record.keys()
    if missing:
      raise ValueError(f'tool spec {record.get("name", "?")!r} lacks {sorted(missing)}')
    # Many functions of public data sets have no description.
    return cls(record['name'], record.get('description', ''), record['parameters'])


@dataclasses.dataclass(frozen=True)
class Message:
  """One message of a conversation.

  `content` is the text as the model sees or wrote it, with its `<think>` block where there is one.
  An assistant's message that is not `trained` is context alone, whatever a loss mask would train.
  """

  role: str
  content: str
  trained: bool = True

  def __post_init__(self):
    if self.role not in ROLES:
      raise ValueError(f'unknown role {self.role!r}; expected one of {ROLES}')

  def to_json(self) -> dict[str, Any]:
    """Returns the message as {role, content}, and train = False where it is not trained."""
    # `train` is written only where it differs from the default, so that older files and templates,
    # which do not know the field, see the record that they always saw.
    record: dict[str, Any] = {'role': self.role, 'content': self.content}
    if not self.trained:
      record['train'] = False
    return record

  @classmethod
  def from_json(cls, record: dict[str, Any]) -> 'Message':
    """Reads a message that `to_json` wrote.

    Raises:
      ValueError: no role, no text content, or another field that says something.
    """
    if not (
      isinstance(record, dict) and isinstance(record.get('content'), str) and 'role' in record
    ):
      raise ValueError(f'a message needs a role and a text content, got {str(record)[:120]!r}')
    refuse_unknown(record, ('role', 'content', 'train'), f'a message of role {record["role"]!r}')
    # Only false takes a message out of training: null or an absent field leave it in.
    return cls(record['role'], record['content'], record.get('train', True) is not False)


def split_reasoning(text: str) -> tuple[str, str]:
  """Splits an assistant text into (reasoning, answer), as docs/method.md, section 5.1, says.

  The reasoning is '' where no `<think>` block is closed.
  """
  closings = closing_tags(text)
  if not closings:
    return '', text
  # A model may open or close its thoughts more than once. The reasoning ends at the first closing
  # tag, and the answer begins after the last one that is not a part of a call.
  reasoning = text[: closings[0]].rsplit('<think>', 1)[-1].strip('\n')
  answer = text[closings[-1] + len('</think>') :].lstrip('\n')
  return reasoning, answer
