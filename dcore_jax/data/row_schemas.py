"""Recognises the schemas of published rows for fine-tuning, and adapts each of them to ours.

    rows        messages or conversations of {role, content}, as OpenAI's interface has them, and
                tools: D-CORE's rows, too; self-distillation writes such rows
    completion  prompt, completion: texts or lists of such messages
    preference  chosen, rejected and perhaps prompt, or OpenAI's preferred_output; see `pairs`
    packed      conversations and single_conv_last_idx: D-CORE's packs, several rows in one
    toolrl      instruction, input, output: ToolRL
    xlam        query, tools, answers: Salesforce/xlam-function-calling-60k
    toolace     system, conversations of {from, value}: Team-ACE/ToolACE
    apigen_mt   the same and tools: Salesforce/APIGen-MT-5k, and other ShareGPT files with tools
    hermes      conversations of {from, value}, no system: NousResearch/hermes-function-calling-v1

Our row is {id, conversations: [{role, content}]}, with `tools` if the chat template is to show
them. Calls that are text in messages {role, content}, or in ToolRL's rows, stay as they are. Calls
that are data are written in one of the two styles of `dialogues`, so that rows of all sources look
alike. A field that no adapter reads is refused by name, unless it is known to say nothing about the
conversation.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.chat.call_text import CLOSE_THOUGHTS, OPEN_CALL, split_answer
from dcore_jax.chat.messages import Message, ToolCall, ToolSpec, refuse_unknown
from dcore_jax.chat.python_calls import ToolCallError
from dcore_jax.chat.tagged_calls import read_calls, tagged_blocks
from dcore_jax.chat.thoughts import take_thoughts
from dcore_jax.chat.tool_calls import parse_python, print_calls
from dcore_jax.chat.tool_specs import CALL_FORMAT, python_name, read_tools
from dcore_jax.data import chat_rows, pairs
from dcore_jax.data.dialogues import (
  FREE_FIELDS,
  Dialogue,
  DialogueTurn,
  Record,
  check_row,
  python_named,
  write_row,
)
from dcore_jax.data.seeds import DecisionPoint

_LISTED_NAME = re.compile(r'^(\d+\. Name: )(.*)$', re.MULTILINE)
# What begins a call. The tag alone may be a word about calls.
_TAGGED_CALL = re.compile(r'<tool_call>\s*[\[{]')
_TAGGED_RESPONSE = re.compile(r'<tool_response>\n?(.*?)\n?</tool_response>', re.DOTALL)
_MOST_TOOL_LISTS = 16
_TAGGED_TOOLS = re.compile(r'<tools>\s*([\[{].*?[\]}])\s*</tools>', re.DOTALL)
# How Hermes's prompts say what a row's own style says: the format of calls up to its example, and
# the sentences that introduce the tools.
_HERMES_FORMAT = re.compile(
  r'(?:For each function call|Use the following pydantic|Each function call should).*'
  r'</tool_call>(?:(?: XML)? tags[^\n]*)?',
  re.DOTALL,
)
_HERMES_SENTENCE = re.compile(
  r'(?:You are a function calling AI model|You are provided with function signatures|'
  r'You may call one or more functions|You can call (?:one or more )?(?:functions|tools)|'
  r"Don't make assumptions about what values|Here are the available tools|"
  r'For each function call|Use the following pydantic|Each function call should)'
  r'[^\n]*?(?:[.:](?=\s|$)|(?=\n)|$)[ ]*'
)
# ShareGPT's names of speakers and the variants that the data sets above use.
_ROLES = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'function_call': 'function_call',
  'tool': 'tool',
  'observation': 'tool',
  'function_response': 'tool',
}


# The fields that each adapter reads. `FREE_FIELDS` lists those that anybody may have.
_CHAT_FIELDS = ('system', 'tools', 'functions')
_FIELDS = {
  'rows': (*chat_rows.MESSAGE_FIELDS, *pairs.REJECTED_FIELDS, *_CHAT_FIELDS),
  'completion': ('prompt', 'completion', *_CHAT_FIELDS),
  'preference': (*pairs.PAIR_FIELDS, *_CHAT_FIELDS),
  'packed': ('conversations', 'single_conv_last_idx', *_CHAT_FIELDS),
  'toolrl': ('instruction', 'input', 'output'),
  'xlam': ('query', 'tools', 'answers'),
  'toolace': ('system', 'conversations'),
  'apigen_mt': ('system', 'conversations', 'tools'),
  'hermes': ('conversations', 'tools', 'schema'),  # the system text holds the schema, too
}


# Fields about sampling, and what they hold where a row is like any other.
_USUAL = {'tool_choice': ('auto', 'none'), 'reasoning': ('on', 'off')}
_NOTES = ('metadata', 'meta', 'info', 'extra_info')


# --- recognising and adapting ---------------------------------------------------------------------


def recognise(record: Record) -> str | None:
  """Tells the schema of a record by its fields; None for an unknown one.

  A field that is None counts as absent: readers of Parquet fill missing fields with None.
  """
  fields = {name for name, value in record.items() if value is not None}
  # The fields of ToolRL and xLAM are theirs alone, so they are tested first.
  if {'instruction', 'input', 'output'} <= fields:
    return 'toolrl'
  if {'query', 'tools', 'answers'} <= fields:
    return 'xlam'
  # Some pairs have messages as well.
  if fields & {'chosen', 'preferred_output'}:
    return 'preference'
  if fields & set(chat_rows.MESSAGE_FIELDS):
    return _message_schema(record, fields)
  return 'completion' if {'prompt', 'completion'} <= fields else None


def _message_schema(record: Record, fields: set[str]) -> str:
  try:
    messages = chat_rows.message_list(record)
  except ValueError:
    return 'rows'  # whose reader says what is wrong
  said = [message for message in messages if isinstance(message, dict)]
  # {from, value} is ShareGPT, {role, content} is OpenAI. The fields beside tell the ShareGPT sets
  # apart.
  if any('from' in message for message in said) and not any('role' in one for one in said):
    # Hermes has its system text among the messages.
    if 'system' not in fields:
      return 'hermes'
    return 'apigen_mt' if 'tools' in fields else 'toolace'
  return 'packed' if 'single_conv_last_idx' in fields else 'rows'


def to_dialogue(record: Record, schema: str, name: str) -> Dialogue | None:
  """Reads a record as data, with names that a Python-style call can have.

  Calls in a text are read, too. Returns None for ToolRL, whose tools are text, and for
  packs.

  Raises:
    ValueError, KeyError, TypeError: as `to_rows`.
  """
  name = _record_name(record, name)
  if schema in _CHATS:
    record = _chat_record(record, schema)
    # Calls in a text are read here, because seeds need them as data; rows keep the text.
    return python_named(_with_text_calls(chat_rows.chat_dialogue(record, name)))
  if schema not in _DIALOGUES:
    return None
  return python_named(_data_dialogue(record, schema, name))


def _with_text_calls(dialogue: Dialogue) -> Dialogue:
  turns = []
  for number, turn in enumerate(dialogue.turns):
    if turn.role == 'assistant' and not turn.calls:
      # The flag is kept: reading the text anew knows nothing of marks.
      read = _read_answer(turn.text, dialogue.tools, number)
      turn = dataclasses.replace(read, trained=turn.trained)
    turns.append(turn)
  return dataclasses.replace(dialogue, turns=tuple(turns))


def _record_name(record: Record, otherwise: str) -> str:
  return str(record['id']) if record.get('id') is not None else otherwise


def to_rows(record: Record, schema: str, name: str, style: str = 'python') -> list[Record]:
  """Makes our rows of one record: several of a pack, one of anything else.

  Args:
    record: as published.
    schema: one of SCHEMAS.
    name: the row's id where the record has none.
    style: one of CALL_STYLES.

  Raises:
    ValueError: a record that breaks what its schema promises, or says what nothing reads.
    KeyError, TypeError: one that lacks fields or nests them otherwise.
  """
  name = _record_name(record, name)
  if schema in _CHATS:
    rows = [_chat_row(_chat_record(record, schema), name, style)]
  elif schema in _DIALOGUES:
    rows = [write_row(_data_dialogue(record, schema, name), style)]
  else:
    rows = _TEXTS[schema](record, name, style)
    # Checked after reading, so that a wrong schema is named by what it lacks and not by a surplus
    # field.
    check_fields(record, schema)
  return [check_row(row) for row in rows]


def check_fields(record: Record, schema: str, more: Sequence[str] = ()) -> None:
  """Refuses a record with a field that no adapter of its schema reads.

  Args:
    record: as published.
    schema: one of SCHEMAS.
    more: fields that the caller reads.

  Raises:
    ValueError: naming the field.
  """
  # These say how an answer is sampled. Only their usual values are the same as saying nothing.
  usual = [field for field, values in _USUAL.items() if record.get(field) in values]
  known = (*_FIELDS[schema], *usual, *more)
  refuse_unknown(record, known, f'a row of schema {schema!r}', FREE_FIELDS)
  for field in _NOTES:
    # Some sets keep the tools among their notes, which nothing else reads.
    if not record.get('tools') and _names_tools(record.get(field)):
      raise ValueError(f'the field {field!r} holds tools; they are read from the field `tools`')


def _names_tools(notes: Any) -> bool:
  if isinstance(notes, str) and '"tools"' in notes:
    try:
      notes = json.loads(notes)
    except (ValueError, RecursionError):
      return False
  return isinstance(notes, dict) and bool(notes.get('tools'))


def _chat_record(record: Record, schema: str) -> Record:
  record = pairs.flat_pair(record)
  check_fields(record, schema)
  return record if schema == 'rows' else pairs.with_messages(record)


def _data_dialogue(record: Record, schema: str, name: str) -> Dialogue:
  adapted = record
  if 'conversations' in _FIELDS[schema]:
    # The list may have the other name, or be JSON text.
    adapted = {**record, 'conversations': chat_rows.message_list(record)}
  dialogue = _DIALOGUES[schema](adapted, name)
  check_fields(record, schema, chat_rows.MESSAGE_FIELDS)
  return dialogue


def _chat_row(record: Record, name: str, style: str) -> Record:
  row = chat_rows.text_row(record, name)
  return row if row is not None else write_row(chat_rows.chat_dialogue(record, name), style)


def _packed_rows(record: Record, name: str, style: str) -> list[Record]:
  """Takes a pack apart into its rows: each ends with the message that its index points to."""
  messages = record['conversations']
  lasts = record['single_conv_last_idx']
  # Tools and system text of a pack belong to each of its rows.
  shared = {field: record[field] for field in _CHAT_FIELDS if field in record}
  rows = []
  start = 0
  for last in lasts:
    # Indices must ascend inside the list, or rows would overlap.
    if not (isinstance(last, int) and start <= last < len(messages)):
      raise ValueError(f'single_conv_last_idx = {lasts} does not cut {len(messages)} messages')
    part = {**shared, 'conversations': messages[start : last + 1]}
    rows.append(_chat_row(part, f'{name}-{len(rows)}', style))
    start = last + 1
  # Messages behind the last index would be lost.
  if start != len(messages):
    raise ValueError(
      f'{len(messages) - start} messages stand behind the last of single_conv_last_idx'
    )
  return rows


def _toolrl_row(record: Record, name: str, style: str) -> list[Record]:
  if style != 'python':
    raise ValueError(
      "ToolRL describes its tools in words: only the call style 'python' can show them"
    )
  point, thought = toolrl_point(record, name)
  target = Message('assistant', f'<think>\n{thought}\n</think>\n\n{point.reference}')
  messages = [message.to_json() for message in (*point.messages, target)]
  return [{'id': point.id, 'conversations': messages}]


# --- records as data ------------------------------------------------------------------------------


def _xlam(record: Record, name: str) -> Dialogue:
  # xLAM answers with calls alone, without thoughts or words.
  calls = _read_calls(record['answers'])
  turns = (DialogueTurn('user', record['query']), DialogueTurn('assistant', '', calls))
  return Dialogue(id=name, policy='', tools=read_tools(record['tools']), turns=turns)


def _toolace(record: Record, name: str) -> Dialogue:
  """Reads a ToolACE record, whose tools stand as a JSON list in the system text.

  The text around the list says how to call them, which the row's own style says again.
  """
  system = record['system']
  tools = ()
  policy = system
  # ToolACE introduces the list by prose; its first '[{' begins the JSON.
  start = system.find('[{')
  if start >= 0:
    try:
      # raw_decode stops where the list ends, since prose follows it.
      listed, size = json.JSONDecoder().raw_decode(system[start:])
    # Besides text that is no JSON: an integer of too many digits, lists a thousand levels deep.
    except (ValueError, RecursionError) as error:
      raise ValueError(f'the list of functions in the system text is not JSON: {error}') from error
    tools = read_tools(listed)
    # The words that introduce the list ("Here is a list of functions:") go with it.
    before = system[:start].strip()
    if before.endswith(':'):
      # Found from the end: a regular expression would begin at every character of a long text.
      before = before[: max(before.rfind('.'), before.rfind('\n')) + 1].strip()
    after = system[start + size :].strip()
    # ToolACE's rule of the call format is left out, because the row's own style states one.
    kept = [part for part in (before, after) if part and 'in the format of [' not in part]
    policy = '\n\n'.join(kept)
  turns = _read_turns(record['conversations'], tools)
  return Dialogue(id=name, policy=policy, tools=tools, turns=turns)


def _apigen_mt(record: Record, name: str) -> Dialogue:
  tools = read_tools(record['tools'])
  policy = record['system'].strip()
  turns = _read_turns(record['conversations'], tools)
  return Dialogue(id=name, policy=policy, tools=tools, turns=turns)


def _hermes(record: Record, name: str) -> Dialogue:
  """Reads a Hermes record, whose tools are in a field or in the system text.

  What a system text with a <tools> block says of tools and how to call them is left out, because
  the row's own style says it again.
  """
  turns = record['conversations']
  policy = ''
  # The system text is the first message in this set, and not a field.
  if turns[0].get('from') == 'system':
    policy = turns[0]['value'].strip()
    turns = turns[1:]
  listed = record.get('tools')
  if not listed:
    # Some of its files have no field of tools; the <tools> block in the system text lists them.
    # Each tag may be followed to the end of the text.
    if policy.count('<tools>') > _MOST_TOOL_LISTS:
      raise ValueError(f'the system text holds more than {_MOST_TOOL_LISTS} <tools> tags')
    tagged = _TAGGED_TOOLS.search(policy)
    listed = tagged[1] if tagged else []
  tools = read_tools(listed)
  if tools and '<tools>' in policy:
    policy = _hermes_policy(policy)
  return Dialogue(id=name, policy=policy, tools=tools, turns=_read_turns(turns, tools))


def _hermes_policy(system: str) -> str:
  """Returns what a system text says beside the tools and the format of calls."""
  for pattern in (_TAGGED_TOOLS, _HERMES_FORMAT, _HERMES_SENTENCE):
    system = pattern.sub('', system)
  return re.sub(r'\n{3,}', '\n\n', system).strip()


def _read_turns(records: Sequence[Record], tools: Sequence[ToolSpec]) -> tuple[DialogueTurn, ...]:
  """Reads ShareGPT messages {from, value} up to the assistant's last one that is trained.

  What follows that one is cut off: nothing is learned after it.
  """
  turns = []
  last = -1
  for number, record in enumerate(records):
    if not isinstance(record, dict):
      raise ValueError(f'message {number} is of type {type(record).__name__}, and no object')
    speaker = record.get('from')
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    text = record.get('value')
    where = f'message {number} ({speaker})'
    refuse_unknown(record, ('from', 'value', *chat_rows.TRAIN_FIELDS), where)
    # Read for all speakers: a mark of a wrong type is an error wherever it stands.
    trained = chat_rows.is_trained(record, where)
    if role is None or not isinstance(text, str):
      raise ValueError(
        f'message {number} is by {speaker!r} with a value of type '
        f'{type(text).__name__}; expected text by one of {sorted(_ROLES)}'
      )
    if role == 'function_call':
      turns.append(DialogueTurn('assistant', '', _read_calls(text), trained=trained))
    elif role == 'tool':
      # One message may hold the outputs of several calls, each in its tags.
      turns += [DialogueTurn('tool', part) for part in _outputs(text)]
    elif role == 'assistant':
      turns.append(dataclasses.replace(_read_answer(text, tools, number), trained=trained))
    else:
      turns.append(DialogueTurn('user', text))
    # The row ends with its last trained message, which is its target.
    if turns[-1].role == 'assistant' and trained:
      last = len(turns) - 1
  if last < 0:
    raise ValueError('the assistant never speaks')
  return tuple(turns[: last + 1])


def _outputs(text: str) -> list[str]:
  """Returns the outputs that stand in tags; the whole text where there is more than that."""
  # A last tag that is never closed is text beside the outputs. Without this, each opening tag might
  # be followed to the end of the text.
  if text.rfind('<tool_response>') > text.rfind('</tool_response>'):
    return [text]
  outputs = _TAGGED_RESPONSE.findall(text)
  beside = _TAGGED_RESPONSE.sub('', text)
  return outputs if outputs and not beside.strip() else [text]


def _read_answer(text: str, tools: Sequence[ToolSpec], number: int) -> DialogueTurn:
  """Reads an assistant's text: thoughts, calls, and the words beside tagged calls."""
  thought, answer = split_answer(text)
  stripped = answer.strip()
  calls: tuple[ToolCall, ...] = ()
  words = ''
  if _TAGGED_CALL.search(answer):
    place = 0
    for block in tagged_blocks(answer):
      words += answer[place : answer.find(OPEN_CALL, place)]
      calls += tuple(block.calls)
      place = block.end
    words = (words + answer[place:]).strip()
  # Without tools a text in brackets is a text.
  elif tools and stripped[:1] == '[' and stripped[-1:] == ']':
    calls = _read_python_calls(stripped, tools)
  if not calls and not stripped:
    raise ValueError(f'message {number}: the assistant says nothing')
  if calls:
    try:
      # The calls are written anew behind the thoughts, which must then be one block.
      take_thoughts(thought + words)
    except ValueError as error:
      raise ValueError(f'message {number} {error}') from error
  # Without calls the text stays whole: thoughts and answer are not taken apart and joined again.
  return DialogueTurn('assistant', thought if calls else text, calls, words)


def _read_python_calls(text: str, tools: Sequence[ToolSpec]) -> tuple[ToolCall, ...]:
  """Reads a Python-style call list whose tool names may hold spaces ('Market Trends API').

  Such a name is made readable where a call begins, and put back afterwards.
  """
  names = {python_name(tool.name): tool.name for tool in tools}
  odd = [name for name in names.values() if name not in names]
  # Python's grammar has no names with spaces, so that the text could not be parsed.
  if odd:
    # The longest name comes first, since one name may begin another.
    odd.sort(key=len, reverse=True)
    pattern = r'(?<=[\[,\s])(' + '|'.join(map(re.escape, odd)) + r')(?=\()'
    text = re.sub(pattern, lambda match: python_name(match[1]), text)
  return tuple(
    dataclasses.replace(call, name=names.get(call.name, call.name)) for call in parse_python(text)
  )


def _read_calls(value: Any) -> tuple[ToolCall, ...]:
  """Reads calls {name, arguments} from JSON values, their text, or a Python literal."""
  if isinstance(value, list):
    # Readers of Parquet fill the fields of other records' calls with None.
    value = [_without_empty(call) for call in value]
  calls = tuple(read_calls(value))
  if not calls:
    raise ValueError('the list of calls is empty')
  return calls


def _without_empty(call: Any) -> Any:
  if not isinstance(call, dict):
    return call
  return {name: field for name, field in call.items() if field is not None}


# --- ToolRL ---------------------------------------------------------------------------------------


def toolrl_point(record: Record, name: str) -> tuple[DecisionPoint, str]:
  """Reads a ToolRL row {instruction, input, output} -> (decision point, thought).

  Its output holds `<think>`, `<tool_call>` (JSON lines) and `<response>` parts. The reference is
  the calls in Python style, or the response text where there are none.

  Raises:
    ValueError: naming the row and what it lacks.
  """
  missing = {'instruction', 'input', 'output'} - record.keys()
  if missing:
    raise ValueError(f'row {name!r} is no ToolRL row: it lacks {", ".join(sorted(missing))}')
  # A thought may speak of `<tool_call>` itself, so only the text behind it is searched.
  thought, rest = split_answer(record['output'])
  # An output has calls or a response; where both stand, the calls are the reference.
  calls = _toolrl_calls(rest, name) if _TAGGED_CALL.search(rest) else []
  reference = print_calls(calls) if calls else _part(rest, 'response')
  if not reference:
    raise ValueError(f'row {name!r} has neither calls nor a response')
  # The instruction's tool list is kept, with names that a Python-style call can have. ToolRL's own
  # output format, which follows the list, is replaced by ours.
  tools = record['instruction'].split('**Steps for Each Turn**')[0]
  tools = _LISTED_NAME.sub(lambda match: match[1] + python_name(match[2]), tools)
  messages = (
    Message('system', tools.rstrip() + '\n\n' + CALL_FORMAT),
    Message('user', record['input']),
  )
  thought = thought.removesuffix(CLOSE_THOUGHTS).split('<think>', 1)[-1].strip()
  point = DecisionPoint(id=name, kind='toolrl', messages=messages, reference=reference)
  return point, thought


def _part(output: str, tag: str) -> str:
  start = output.find(f'<{tag}>')
  end = output.find(f'</{tag}>')
  # An unclosed tag gives nothing, and the row is refused by its caller.
  if not 0 <= start < end:
    return ''
  return output[start + len(tag) + 2 : end].strip()


def _toolrl_calls(text: str, name: str) -> list[ToolCall]:
  """Reads the calls of the first tag, one a line; text behind the tag is no part of the row."""
  try:
    calls = next(tagged_blocks(text)).calls
  except ToolCallError as error:
    raise ValueError(f'row {name!r}: a tool call needs a name and parameters ({error})') from error
  return [dataclasses.replace(call, name=python_name(call.name)) for call in calls]


_CHATS = ('rows', 'completion', 'preference')
_TEXTS: dict[str, Callable[[Record, str, str], list[Record]]] = {
  'packed': _packed_rows,
  'toolrl': _toolrl_row,
}
_DIALOGUES: dict[str, Callable[[Record, str], Dialogue]] = {
  'xlam': _xlam,
  'toolace': _toolace,
  'apigen_mt': _apigen_mt,
  'hermes': _hermes,
}
SCHEMAS = (*_CHATS, *_TEXTS, *_DIALOGUES)
