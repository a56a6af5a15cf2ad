"""Reads rows of messages {role, content, ...}, as OpenAI's interface has them, without loss.

Calls stand in `tool_calls` (or the older `function_call`), thoughts in `reasoning_content`,
`reasoning` or `thinking`, text in `content` as text or as parts. `tools` are objects or JSON text.
An unknown field is refused by its name, because a model would otherwise be trained on a row that
lacks what the field says.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import BOOKKEEPING, Message, ToolCall, refuse_unknown
from dcore_jax.chat.tagged_calls import call_arguments
from dcore_jax.chat.thoughts import bare_thoughts, holds_tag, take_thoughts
from dcore_jax.chat.tool_calls import ToolCallError, parse_calls
from dcore_jax.chat.tool_specs import read_tools
from dcore_jax.data.dialogues import Dialogue, DialogueTurn, Record, thought_block
from dcore_jax.data.record_files import parse_strictly, refuse_surrogates

MESSAGE_FIELDS = ('messages', 'conversations')
_TOOL_FIELDS = ('tools', 'functions')
_THOUGHT_FIELDS = ('reasoning_content', 'reasoning', 'thinking')
# Ways to say that a message is trained (1, true) or not (0, false).
TRAIN_FIELDS = ('weight', 'train', 'trainable', 'loss')
# OpenAI's roles, their newer and older names, and those of ShareGPT.
ROLES = {
  'system': 'system',
  'developer': 'system',
  'user': 'user',
  'human': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
  'tool': 'tool',
  'function': 'tool',
}
_BY_ASSISTANT = (*_THOUGHT_FIELDS, 'tool_calls', 'function_call', *TRAIN_FIELDS)
_BY_TOOL = ('name', 'tool_call_id')


@dataclasses.dataclass(frozen=True)
class _Call:
  """A call, and the id by which a tool's answer names it; '' for none."""

  call: ToolCall
  id: str


@dataclasses.dataclass(frozen=True)
class _Said:
  """A message as data. `name` and `call_id` say which call a tool's message answers."""

  role: str
  words: str
  thoughts: str = ''
  calls: tuple[_Call, ...] = ()
  name: str = ''
  call_id: str = ''
  trained: bool = True

  @property
  def text(self) -> str:
    """The message as one text: thoughts and words."""
    return '\n\n'.join(part for part in (thought_block(self.thoughts), self.words) if part)


# --- what a record's messages and tools are -------------------------------------------------------


def text_row(record: Record, name: str) -> Record | None:
  """Makes our row of a record without calls as data; calls that are text stay as they are.

  Its tools are left to the chat template. Returns None for a record with calls as data, and for one
  with tools that nobody calls: the call style decides how these are written.

  Raises:
    ValueError: as `chat_dialogue`.
  """
  said = _trained_part(record)
  # Tools are read even if no message calls them: a bad spec is an error in any case.
  tools = tool_records(record)
  if any(message.calls for message in said):
    return None
  # Without any call the text does not show a call style, so that the row follows the config's.
  if tools and not any(_calls_as_text(message) for message in said):
    return None
  messages = [Message(message.role, message.text, message.trained) for message in said]
  row: Record = {'id': name, 'conversations': [message.to_json() for message in messages]}
  if tools:
    row['tools'] = tools
  return row


def _calls_as_text(message: _Said) -> bool:
  if message.role != 'assistant':
    return False
  try:
    # Thoughts may quote calls that are never made.
    return bool(parse_calls(message.words.rpartition('</think>')[2]))
  except ToolCallError:
    return True  # it is meant as a list of calls


def chat_dialogue(record: Record, name: str) -> Dialogue:
  """Reads a row of messages as data, up to the last message of the assistant that may be trained.

  Nothing is learned from what follows that message. Calls in a text stay text.

  Args:
    record: with `messages` or `conversations`.
    name: the dialogue's id.

  Raises:
    ValueError: naming the message and the field that cannot be read.
  """
  return _dialogue(record, name, _trained_part(record))


def prompt_dialogue(record: Record, name: str) -> Dialogue:
  """Does the same for a row that asks: it is read to its end, and a user or a tool speaks last.

  Raises:
    ValueError: as `chat_dialogue`, or where somebody else speaks last.
  """
  said = _read_said(record)
  # A prompt that ends with the assistant has its answer inside, and nothing to ask for.
  if said[-1].role not in ('user', 'tool'):
    raise ValueError(f'the last message is by {said[-1].role!r}: a prompt ends with a question')
  return _dialogue(record, name, said)


def _trained_part(record: Record) -> list[_Said]:
  said = _read_said(record)
  # Two errors: no assistant speaks, or all of its messages are marked as untrained.
  speaks = [number for number, message in enumerate(said) if message.role == 'assistant']
  trained = [number for number in speaks if said[number].trained]
  if not speaks:
    raise ValueError('the assistant never speaks')
  if not trained:
    raise ValueError('every message of the assistant is marked as not to be trained')
  # Place 0 has no prompt: the template would have nothing to show before the answer.
  if not trained[-1]:
    raise ValueError('nothing stands before the message of the assistant')
  return said[: trained[-1] + 1]


def _dialogue(record: Record, name: str, said: Sequence[_Said]) -> Dialogue:
  policy = ''
  start = 0
  # The policy stands apart from the turns, since tools are listed behind it.
  if said[0].role == 'system':
    policy = said[0].words
    start = 1
  tools = []
  for number, tool in enumerate(tool_records(record)):
    spec = tool['function']
    free = BOOKKEEPING | {'strict'}  # how an endpoint samples, not what the model sees
    refuse_unknown(spec, ('name', 'description', 'parameters'), f'tools[{number}]', free)
    parameters = spec.get('parameters') or {}
    if isinstance(parameters.get('type'), str):
      # A schema without parameters may leave out their list.
      parameters = {'properties': {}, **parameters}
    tools += read_tools({**spec, 'parameters': parameters})
  return Dialogue(id=name, policy=policy, tools=tuple(tools), turns=_turns(said, start))


def message_list(record: Record) -> list[Any]:
  """Returns the messages of a record, whatever they are.

  Raises:
    ValueError: no list, an empty one, or two of them.
  """
  # Null fields count as absent: Parquet fills in the columns of other records.
  fields = [field for field in MESSAGE_FIELDS if record.get(field) is not None]
  if len(fields) != 1:
    raise ValueError(f'expected one of the fields {MESSAGE_FIELDS}, got {fields}')
  # Data sets with nested columns often store them as JSON text.
  messages = _from_json_text(record[fields[0]], fields[0])
  if not isinstance(messages, list) or not messages:
    raise ValueError(f'the field {fields[0]!r} holds no messages')
  return messages


def tool_records(record: Record) -> list[Record]:
  """Returns a record's tools as templates want them: {'type': 'function', 'function': spec}.

  They may be objects or JSON text, all of them or each, and bare or wrapped.

  Raises:
    ValueError: naming the field and what is wrong with it.
  """
  fields = [field for field in _TOOL_FIELDS if record.get(field) not in (None, '', [], {})]
  if not fields:
    return []
  # Two lists of tools could differ, and which one the model saw is unknown.
  if len(fields) > 1:
    raise ValueError(f'the tools stand in two fields: {fields}')
  (field,) = fields
  value = _from_json_text(record[field], field)
  tools = []
  for number, tool in enumerate(value if isinstance(value, list) else [value]):
    where = f'{field}[{number}]'
    tool = _from_json_text(tool, where)
    if not isinstance(tool, dict):
      raise ValueError(f'{where} is no object')
    # Other types, such as web search, run on a provider's side and have no spec.
    if tool.get('type', 'function') != 'function':
      raise ValueError(f'{where}.type is {tool["type"]!r}; a tool is a function')
    spec = tool.get('function')
    if spec is None:
      # A bare spec is the older form of `functions`.
      spec = {key: value for key, value in tool.items() if key != 'type'}
    else:
      # Keys beside a wrapped spec would be lost with the wrapper.
      refuse_unknown(tool, ('type', 'function'), where, BOOKKEEPING | {'strict'})
    if not isinstance(spec, dict) or not isinstance(spec.get('name'), str) or not spec['name']:
      raise ValueError(f'{where} has no name')
    if not isinstance(spec.get('description') or '', str):
      raise ValueError(f'{where}.description is no text')
    if not isinstance(spec.get('parameters') or {}, dict):
      raise ValueError(f'{where}.parameters is no object')
    tools.append({'type': 'function', 'function': spec})
  return tools


def _from_json_text(value: Any, where: str) -> Any:
  """Returns the value of JSON text; what is no text stays as it is."""
  if not isinstance(value, str):
    return value
  try:
    return parse_strictly(value)
  except ValueError as error:
    raise ValueError(f'{where} {error}') from error


# --- messages -------------------------------------------------------------------------------------


def _read_said(record: Record) -> list[_Said]:
  said = []
  for number, message in enumerate(message_list(record)):
    said.append(_read_message(message, f'message {number}'))
  system = record.get('system')
  if system not in (None, ''):
    if not isinstance(system, str):
      raise ValueError("the field 'system' is no text")
    # Some sets keep the system message in a field of its own.
    if said[0].role != 'system':
      said.insert(0, _Said('system', system))
    elif said[0].words != system:
      raise ValueError("the field 'system' and the first message say different things")
  # Checked last, because an answer is matched with the calls of the message before it.
  _check_answers(said)
  return said


def _read_message(message: Any, where: str) -> _Said:
  if not isinstance(message, dict):
    raise ValueError(f'{where} is of type {type(message).__name__}, not an object')
  role = ROLES.get(message['role']) if isinstance(message.get('role'), str) else None
  if role is None:
    raise ValueError(f'{where} has the role {message.get("role")!r}; known are {sorted(ROLES)}')
  # Fields are known by role: `tool_calls` in a user's message would never be shown.
  own = {'assistant': _BY_ASSISTANT, 'tool': _BY_TOOL}.get(role, ())
  where = f'{where} ({role})'
  # Training is not asked of what others say, so that marks may say so.
  free = BOOKKEEPING if own is _BY_ASSISTANT else BOOKKEEPING | _untrained_fields(message)
  refuse_unknown(message, ('role', 'content', *own), where, free)
  words = _content(message, role, where)
  if role == 'tool':
    for field in _BY_TOOL:
      if not isinstance(message.get(field) or '', str):
        raise ValueError(f'{where}: the field {field!r} is no text')
    return _Said(
      role=role,
      words=words,
      name=message.get('name') or '',
      call_id=message.get('tool_call_id') or '',
    )
  if role != 'assistant':
    return _Said(role, words)
  calls = _message_calls(message, where)
  thoughts = _thoughts(message, words, where)
  # The same calls as text and as data would be written twice.
  if calls and '<tool_call>' in words:
    raise ValueError(f"{where}: 'content' holds a <tool_call> beside the field of calls")
  # An empty answer would train the model to end its turn at once.
  if not calls and not words.strip():
    raise ValueError(f"{where} says nothing: neither 'content' nor calls")
  if calls and holds_tag(words):
    # Thoughts inside the content go where fields put them, in front of what is said.
    try:
      thoughts, words = take_thoughts(words)
    except ValueError as error:
      raise ValueError(f"{where}: 'content' {error}") from error
  return _Said(
    role=role,
    # Words beside calls are placed by the call style, which sets the white space itself.
    words=words.strip() if calls else words,
    thoughts=thoughts,
    calls=calls,
    trained=is_trained(message, where),
  )


def _untrained_fields(message: Record) -> set[str]:
  return {field for field in TRAIN_FIELDS if message.get(field) in (0, False)}


def is_trained(message: Record, where: str) -> bool:
  """Says whether an assistant's message is to be trained.

  Raises:
    ValueError: a weight between the two, or marks that contradict each other.
  """
  verdicts = set()
  for field in TRAIN_FIELDS:
    value = message.get(field)
    if value is None:
      continue
    # The step has no weights by message, so 0.5 cannot be honoured.
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
      raise ValueError(f'{where}: {field} = {value!r}; a message is trained (1) or not (0)')
    verdicts.add(bool(value))
  if len(verdicts) > 1:
    raise ValueError(f'{where}: its fields {TRAIN_FIELDS} contradict each other')
  return verdicts != {False}


def _content(message: Record, role: str, where: str) -> str:
  content = message.get('content')
  if isinstance(content, str):
    return content
  if content is None:
    if role == 'assistant':
      return ''
    raise ValueError(f"{where} has no 'content'")
  # A tool may answer with an object; the model sees its JSON text.
  if isinstance(content, dict) and role == 'tool':
    return json.dumps(content, ensure_ascii=False)
  if not isinstance(content, list):
    raise ValueError(f"{where}: 'content' is of type {type(content).__name__}")
  texts = []
  for number, part in enumerate(content):
    kind = part.get('type') if isinstance(part, dict) else type(part).__name__
    # Images and audio cannot be shown to a model of text.
    if kind != 'text' or not isinstance(part.get('text'), str):
      raise ValueError(f'{where}: content[{number}] is of kind {kind!r}; only text can be read')
    free = BOOKKEEPING | {'cache_control'}
    refuse_unknown(part, ('type', 'text'), f'{where}: content[{number}]', free)
    texts.append(part['text'])
  return '\n'.join(texts)


def _thoughts(message: Record, words: str, where: str) -> str:
  found = {}
  for field in _THOUGHT_FIELDS:
    value = message.get(field)
    if value is None:
      continue
    if not isinstance(value, str):
      raise ValueError(f'{where}: the field {field!r} is no text')
    # Some servers leave the tags around the thoughts, which the row would then hold twice.
    bare = bare_thoughts(value)
    if bare.strip():
      found[field] = bare
  # Some servers send the same thoughts under two names: equal copies are one.
  if len(set(found.values())) > 1:
    raise ValueError(f'{where}: its fields {sorted(found)} hold different thoughts')
  thoughts = next(iter(found.values()), '')
  if thoughts and holds_tag(words):
    raise ValueError(f"{where}: thoughts stand in {sorted(found)} and in 'content'")
  # A tag would open the block twice, or close it early and make the rest a part of the answer.
  if holds_tag(thoughts):
    raise ValueError(f'{where}: the field {next(iter(found))!r} holds <think> or </think>')
  return thoughts


def _message_calls(message: Record, where: str) -> tuple[_Call, ...]:
  listed = message.get('tool_calls')
  older = message.get('function_call')
  if listed and older:
    raise ValueError(f"{where} has both 'tool_calls' and 'function_call'")
  if older:
    return (_named_call({'function': older}, f'{where}: function_call'),)
  listed = _from_json_text(listed or [], f'{where}: tool_calls')
  if not isinstance(listed, list):
    raise ValueError(f"{where}: 'tool_calls' is no list")
  calls = [
    _named_call(item, f'{where}: tool_calls[{number}]') for number, item in enumerate(listed)
  ]
  ids = [call.id for call in calls if call.id]
  # Answers are matched by id, and two calls of one id cannot be distinguished.
  if len(set(ids)) < len(ids):
    raise ValueError(f'{where}: two of its calls have one id')
  return tuple(calls)


def read_call(item: Any, where: str) -> ToolCall:
  """Reads a call {name, arguments}, which may be wrapped as {'type': 'function', 'function': call}.

  Arguments are what `tagged_calls.read_arguments` takes.

  Raises:
    ValueError: naming the place `where`, and what is wrong there.
  """
  return _named_call(item, where).call


def _named_call(item: Any, where: str) -> _Call:
  if not isinstance(item, dict):
    raise ValueError(f'{where} is no object')
  if item.get('type') not in (None, 'function'):
    raise ValueError(f'{where}.type is {item["type"]!r}; a call is of a function')
  function = item.get('function')
  if function is None:
    function = {key: value for key, value in item.items() if key not in ('id', 'type', 'index')}
  else:
    refuse_unknown(item, ('id', 'type', 'index', 'function'), where)
    where += '.function'
  # The whole function may be JSON text, as arguments may.
  function = _from_json_text(function, where)
  if not isinstance(function, dict):
    raise ValueError(f'{where} is no object')
  refuse_unknown(function, ('name', 'arguments', 'parameters'), where, ('id', 'index'))
  if not isinstance(function.get('name'), str) or not function['name']:
    raise ValueError(f'{where}.name is no name: {function.get("name")!r}')
  try:
    arguments = call_arguments(function)
    refuse_surrogates(arguments)
  except ValueError as error:
    raise ValueError(f'{where}.arguments cannot be read: {error}') from error
  identity = item.get('id')
  if identity is not None and not isinstance(identity, str):
    raise ValueError(f'{where}: the id of a call is a text, got {identity!r}')
  return _Call(ToolCall(function['name'], arguments), identity or '')


# --- which call a tool's message answers ----------------------------------------------------------


def _check_answers(said: list[_Said]) -> None:
  """Puts tools' messages into the order of the calls that they answer by id or name.

  Rows of ours keep no ids: the order says which answer belongs to which call.
  """
  start = 0
  while start < len(said):
    stop = start
    while stop < len(said) and said[stop].role == 'tool':
      stop += 1
    if stop > start:
      calls = _calls_before(said, start)
      answers = said[start:stop]
      # Calls that are text are not counted: they may be words that only look like calls.
      if start and said[start - 1].calls and len(answers) > len(calls):
        raise ValueError(f'message {start}: {len(answers)} tool messages answer {len(calls)} calls')
      said[start:stop] = _in_order(answers, calls, start)
    start = stop + 1


def _calls_before(said: Sequence[_Said], start: int) -> tuple[_Call, ...]:
  if not start or said[start - 1].role != 'assistant':
    return ()
  message = said[start - 1]
  if message.calls:
    return message.calls
  try:
    found = parse_calls(message.words.rpartition('</think>')[2]) or []
  except ToolCallError:
    found = []
  return tuple(_Call(call, '') for call in found)


def _in_order(answers: Sequence[_Said], calls: Sequence[_Call], start: int) -> list[_Said]:
  ids = [call.id for call in calls]
  places = []
  for number, answer in enumerate(answers):
    where = f'message {start + number} (tool)'
    # Without an id the order of the answers is taken for that of the calls.
    place = number
    # Calls that are text have no ids to compare with. Without any call an id names nothing.
    if answer.call_id and (any(ids) or not calls):
      if answer.call_id not in ids:
        raise ValueError(f"{where}: 'tool_call_id' {answer.call_id!r} names no call before it")
      place = ids.index(answer.call_id)
    if answer.name:
      if place >= len(calls):
        raise ValueError(f"{where}: 'name' {answer.name!r} names no call before it")
      if calls[place].call.name != answer.name:
        raise ValueError(
          f"{where}: 'name' {answer.name!r} is not that of its call, {calls[place].call.name!r}"
        )
    places.append(place)
  if len(set(places)) < len(places):
    raise ValueError(f'message {start}: two tool messages answer one call')
  # Missing answers at the end are fine: a dialogue may be cut there.
  if sorted(places) != list(range(len(places))):
    raise ValueError(f'message {start}: a call before it has no answer, and a later one has')
  return [answer for _, answer in sorted(zip(places, answers, strict=True), key=lambda one: one[0])]


def _turns(said: Sequence[_Said], start: int) -> tuple[DialogueTurn, ...]:
  turns = []
  for message in said[start:]:
    calls = tuple(item.call for item in message.calls)
    if calls:
      turn = DialogueTurn(
        role='assistant',
        text=thought_block(message.thoughts),
        calls=calls,
        words=message.words,
        trained=message.trained,
      )
    else:
      turn = DialogueTurn(message.role, message.text, trained=message.trained)
    turns.append(turn)
  return tuple(turns)
