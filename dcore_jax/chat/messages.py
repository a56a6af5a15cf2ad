"""The conversation types that every part of the system exchanges: plain, frozen, JSON in and JSON out."""

import dataclasses
from typing import Any

ROLES = ('system', 'user', 'assistant', 'tool')


@dataclasses.dataclass(frozen=True)
class ToolCall:
  """One call of a tool. Arguments are JSON-like values; positional ones are kept apart as the grammar allows them."""

  name: str
  arguments: dict[str, Any]
  positional: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class ToolSpec:
  """What a model is told of a tool. `parameters` is a JSON-schema object: {'type', 'properties', 'required'}."""

  name: str
  description: str
  parameters: dict[str, Any]

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, record: dict[str, Any]) -> 'ToolSpec':
    missing = {'name', 'parameters'} - record.keys()
    if missing:
      raise ValueError(f'tool spec {record.get("name", "?")!r} lacks {sorted(missing)}')
    return cls(record['name'], record.get('description', ''), record['parameters'])


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn. `content` is the text as the model sees or wrote it, `<think>` block included where there is one."""

  role: str
  content: str

  def __post_init__(self):
    if self.role not in ROLES:
      raise ValueError(f'unknown role {self.role!r}; expected one of {ROLES}')

  def to_json(self) -> dict[str, str]:
    return {'role': self.role, 'content': self.content}

  @classmethod
  def from_json(cls, record: dict[str, Any]) -> 'Message':
    if not (
      isinstance(record, dict) and isinstance(record.get('content'), str) and 'role' in record
    ):
      raise ValueError(f'a message needs a role and a text content, got {str(record)[:120]!r}')
    return cls(record['role'], record['content'])


def split_reasoning(text: str) -> tuple[str, str]:
  """(reasoning, answer) of an assistant text; reasoning is '' without a closed `<think>` block (method: section 5.1)."""
  if '</think>' not in text:
    return '', text
  reasoning = text.split('</think>', 1)[0].rsplit('<think>', 1)[-1].strip('\n')
  return reasoning, text.rsplit('</think>', 1)[-1].lstrip('\n')
