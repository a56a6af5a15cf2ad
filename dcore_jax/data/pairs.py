"""Rows of a prompt and an answer, and preference pairs, as rows of messages.

Of a pair the chosen answer is taken, and the rejected one is not read. The prompt may be a field of
its own (`prompt`, `question`), the messages of the row, or the beginning of the chosen
conversation. OpenAI's preference files nest it in `input`.
"""

from typing import Any

from dcore_jax.data.chat_rows import MESSAGE_FIELDS, ROLES, message_list
from dcore_jax.data.dialogues import Record

# Names of the answer that is not to be given.
REJECTED_FIELDS = ('rejected', 'rejected_response', 'rejected_messages')
PAIR_FIELDS = ('prompt', 'question', 'chosen', *REJECTED_FIELDS, *MESSAGE_FIELDS)


def flat_pair(record: Record) -> Record:
  """Returns a pair of OpenAI's preference files with the fields that other pairs have.

  Every other record stays as it is.

  Raises:
    ValueError: an `input` that is no object, or has a field of the record's own.
  """
  if record.get('preferred_output') is None:
    return record
  rest = dict(record)
  asked = rest.pop('input', None)
  if not isinstance(asked, dict):
    raise ValueError("the field 'input' is no object")
  rest['chosen'] = rest.pop('preferred_output')
  rest['rejected'] = rest.pop('non_preferred_output', None)
  twice = sorted(asked.keys() & rest.keys())
  if twice:
    raise ValueError(f"the field {twice[0]!r} stands in 'input' and beside it")
  return {**rest, **asked}


def with_messages(record: Record) -> Record:
  """Returns a record of prompt and completion, or of a preference, with `messages` in their place.

  Raises:
    ValueError: parts that do not make a conversation.
  """
  record = dict(record)
  for field in REJECTED_FIELDS:
    # SFT needs the chosen answer alone.
    record.pop(field, None)
  field = 'completion' if record.get('completion') is not None else 'chosen'
  answer = record.pop(field, None)
  before = _prompt(record)
  after = _as_messages(answer, 'assistant', field)
  # Some preference sets hold a whole conversation as one text, with its own marks of speakers.
  if not before and isinstance(answer, str):
    raise ValueError(f'{field!r} is a text without a prompt')
  # A completion that begins with another speaker than the assistant is a conversation.
  whole = _speaker(after[0]) in ('system', 'user')
  if before and whole:
    # Some sets repeat the prompt, or all of it, in another field. It must be the same one.
    if after[: len(before)] != before and before[-1] not in after:
      raise ValueError(f'{field!r} begins anew, with another prompt than the row')
    before = []
  elif field == 'chosen' and before and _speaker(before[-1]) == 'assistant':
    # The messages of some pairs end with the chosen answer, which would be trained twice.
    if before[-1] != after[-1]:
      raise ValueError("the prompt ends with an answer that is not 'chosen'")
    after = []
  return {**record, 'messages': before + after}


def _prompt(record: Record) -> list[Any]:
  """Takes the messages before the answer out of a record; [] for none."""
  found = {}
  for field in ('prompt', 'question', *MESSAGE_FIELDS):
    value = record.get(field)
    if value is not None:
      # A prompt that is a text is what the user says.
      messages = message_list({field: value}) if field in MESSAGE_FIELDS else value
      found[field] = _as_messages(messages, 'user', field)
    record.pop(field, None)
  # UltraFeedback has the prompt twice: as a text, and as the beginning of the messages.
  longest = max(found, key=lambda field: len(found[field]), default='')
  for field, messages in found.items():
    if messages[-1] not in found[longest]:
      raise ValueError(f'the fields {field!r} and {longest!r} hold different prompts')
  return found.get(longest, [])


def _speaker(message: Any) -> str | None:
  role = message.get('role') if isinstance(message, dict) else None
  return ROLES.get(role) if isinstance(role, str) else None


def _as_messages(value: Any, role: str, field: str) -> list[Any]:
  if isinstance(value, str):
    return [{'role': role, 'content': value}]
  if isinstance(value, dict):
    return [_openai_message(value)]
  if not isinstance(value, list) or not value:
    raise ValueError(f'the field {field!r} is neither a text nor a list of messages')
  return [_openai_message(message) for message in value]


def _openai_message(message: Any) -> Any:
  """Returns ShareGPT's {from, value} as {role, content}, and any other message as it is."""
  if not isinstance(message, dict) or message.keys() & {'role', 'content'}:
    return message
  names = {'from': 'role', 'value': 'content'}
  return {names.get(key, key): value for key, value in message.items()}
