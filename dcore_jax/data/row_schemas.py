"""The schemas that rows for fine-tuning are published in, and one adapter from each to ours.

    rows        conversations of {role, content}: D-CORE's rows; self-distillation writes them too
    packed      the same and single_conv_last_idx: D-CORE's packs, several rows in one
    toolrl      instruction, input, output: ToolRL
    xlam        query, tools, answers: Salesforce/xlam-function-calling-60k
    toolace     system, conversations of {from, value}: Team-ACE/ToolACE
    apigen_mt   the same and tools: Salesforce/APIGen-MT-5k, and other ShareGPT files with tools
    hermes      conversations of {from, value}, no system: NousResearch/hermes-function-calling-v1

Our row is {id, conversations: [{role, content}]}, with `tools` where the chat template is to show
them. The first three schemas come with their tools and calls as text, which stays as it is. The
others are read as data and written in one of two styles, so that rows of different sources ask and
answer alike:
    python  specs in the system message, calls as [f(a=1)], tool responses as user messages (as in
            D-CORE's and ToolRL's rows)
    hermes  specs through the template's `tools`, calls as <tool_call> JSON, tool responses in the
            role `tool`
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from dcore_jax.chat.call_text import CLOSE_THOUGHTS, split_answer
from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.chat.python_calls import ToolCallError
from dcore_jax.chat.tagged_calls import read_calls, tagged_blocks
from dcore_jax.chat.tool_calls import parse_python, print_calls, tool_response
from dcore_jax.chat.tool_specs import CALL_FORMAT, read_tools, system_text
from dcore_jax.data.seeds import DecisionPoint

CALL_STYLES = ('python', 'hermes')

Record = dict[str, Any]
Named = TypeVar('Named', ToolCall, ToolSpec)

_LISTED_NAME = re.compile(r'^(\d+\. Name: )(.*)$', re.MULTILINE)
# What begins a call. The tag alone may be a word about calls.
_TAGGED_CALL = re.compile(r'<tool_call>\s*[\[{]')
_TAGGED_RESPONSE = re.compile(r'<tool_response>\n?(.*?)\n?</tool_response>', re.DOTALL)
_TAGGED_TOOLS = re.compile(r'<tools>\s*([\[{].*?[\]}])\s*</tools>', re.DOTALL)
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


@dataclasses.dataclass(frozen=True)
class DialogueTurn:
  """One message of a dialogue, by 'user', 'assistant' or 'tool'.

  Where an assistant makes calls, its `text` is the thought before them, '' for none.
  """

  role: str
  text: str
  calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """A record as data. Tools are named as in the source."""

  id: str
  policy: str  # system text without the tools; '' for none
  tools: tuple[ToolSpec, ...]
  turns: tuple[DialogueTurn, ...]


# --- recognising and adapting ---------------------------------------------------------------------


def recognise(record: Record) -> str | None:
  """Tells the schema of a record by its fields; None for an unknown one.

  A field that is None counts as absent: readers of Parquet fill missing fields with None.
  """
  fields = {name for name, value in record.items() if value is not None}
  if {'instruction', 'input', 'output'} <= fields:
    return 'toolrl'
  if {'query', 'tools', 'answers'} <= fields:
    return 'xlam'
  turns = record.get('conversations')
  if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
    return None
  if {'role', 'content'} <= turns[0].keys():
    return 'packed' if 'single_conv_last_idx' in fields else 'rows'
  if {'from', 'value'} <= turns[0].keys():
    if 'system' not in fields:
      return 'hermes'
    return 'apigen_mt' if 'tools' in fields else 'toolace'
  return None


def to_dialogue(record: Record, schema: str, name: str) -> Dialogue | None:
  """Reads a record as data, with names that a Python-style call can have.

  Returns None for schemas whose calls are text.

  Raises:
    ValueError, KeyError, TypeError: as `to_rows`.
  """
  if schema not in _DIALOGUES:
    return None
  dialogue = _DIALOGUES[schema](record, _record_name(record, name))
  turns = tuple(
    dataclasses.replace(turn, calls=_with_python_names(turn.calls)) for turn in dialogue.turns
  )
  return dataclasses.replace(dialogue, tools=_python_named_tools(dialogue.tools), turns=turns)


def _record_name(record: Record, otherwise: str) -> str:
  return str(record['id']) if record.get('id') is not None else otherwise


def _with_python_names(things: Iterable[Named]) -> tuple[Named, ...]:
  return tuple(dataclasses.replace(thing, name=_python_name(thing.name)) for thing in things)


def _python_named_tools(tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
  renamed = _with_python_names(tools)
  _refuse_equal_names(renamed)
  return renamed


def _refuse_equal_names(tools: Sequence[ToolSpec]) -> None:
  names = [tool.name for tool in tools]
  if len(set(names)) < len(names):
    raise ValueError(f'two tools have one name: {sorted(names)}')


def to_rows(record: Record, schema: str, name: str, style: str = 'python') -> list[Record]:
  """Makes our rows of one record: several of a pack, one of anything else.

  Args:
    record: as published.
    schema: one of SCHEMAS.
    name: the row's id where the record has none.
    style: one of CALL_STYLES.

  Raises:
    ValueError: a record that breaks what its schema promises.
    KeyError, TypeError: one that lacks fields or nests them otherwise.
  """
  name = _record_name(record, name)
  if schema in _DIALOGUES:
    return [write_row(_DIALOGUES[schema](record, name), style)]
  return _TEXTS[schema](record, name, style)


def _our_row(record: Record, name: str, style: str) -> list[Record]:
  del style  # these rows hold their calls as text, which is not rewritten
  messages = [Message.from_json(message) for message in record['conversations']]
  if not any(message.role == 'assistant' for message in messages):
    raise ValueError('the assistant never speaks')
  row = {'id': name, 'conversations': record['conversations']}
  if record.get('tools'):
    row['tools'] = record['tools']
  return [row]


def _packed_rows(record: Record, name: str, style: str) -> list[Record]:
  """Takes a pack apart into its rows: each ends with the message that its index points to."""
  del style
  messages = record['conversations']
  lasts = record['single_conv_last_idx']
  rows = []
  start = 0
  for last in lasts:
    if not (isinstance(last, int) and start <= last < len(messages)):
      raise ValueError(f'single_conv_last_idx = {lasts} does not cut {len(messages)} messages')
    rows.append({'id': f'{name}-{len(rows)}', 'conversations': messages[start : last + 1]})
    start = last + 1
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
  start = system.find('[{')
  if start >= 0:
    try:
      listed, size = json.JSONDecoder().raw_decode(system[start:])
    except json.JSONDecodeError as error:
      raise ValueError(f'the list of functions in the system text is not JSON: {error}') from error
    tools = read_tools(listed)
    # The words that introduce the list ("Here is a list of functions:") go with it.
    before = re.sub(r'[^.\n]*:\s*$', '', system[:start]).strip()
    after = system[start + size :].strip()
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
  """Reads a Hermes record, whose tools stand in a field or in the system text.

  A system text with a <tools> block only says which tools there are and how to call them, which the
  row's own style says again.
  """
  turns = record['conversations']
  policy = ''
  if turns[0].get('from') == 'system':
    policy = turns[0]['value'].strip()
    turns = turns[1:]
  listed = record.get('tools')
  if not listed:
    tagged = _TAGGED_TOOLS.search(policy)
    listed = tagged[1] if tagged else []
  tools = read_tools(listed)
  if tools and '<tools>' in policy:
    policy = ''
  return Dialogue(id=name, policy=policy, tools=tools, turns=_read_turns(turns, tools))


def _read_turns(records: Sequence[Record], tools: Sequence[ToolSpec]) -> tuple[DialogueTurn, ...]:
  """Reads ShareGPT messages {from, value} up to the assistant's last one.

  What follows that one is cut off: no answer is given after it.
  """
  turns = []
  last = -1
  for number, record in enumerate(records):
    role = _ROLES.get(record.get('from'))
    text = record.get('value')
    if role is None or not isinstance(text, str):
      raise ValueError(
        f'message {number} is by {record.get("from")!r} with a value of type '
        f'{type(text).__name__}; expected text by one of {sorted(_ROLES)}'
      )
    if role == 'function_call':
      turns.append(DialogueTurn('assistant', '', _read_calls(text)))
    elif role == 'tool':
      turns += [DialogueTurn('tool', part) for part in _TAGGED_RESPONSE.findall(text) or [text]]
    elif role == 'assistant':
      turns.append(_read_answer(text, tools, number))
    else:
      turns.append(DialogueTurn('user', text))
    if turns[-1].role == 'assistant':
      last = len(turns) - 1
  if last < 0:
    raise ValueError('the assistant never speaks')
  return tuple(turns[: last + 1])


def _read_answer(text: str, tools: Sequence[ToolSpec], number: int) -> DialogueTurn:
  """Reads an assistant's text; words beside tagged calls are dropped, as calls stand alone."""
  thought, answer = split_answer(text)
  stripped = answer.strip()
  calls: tuple[ToolCall, ...] = ()
  if _TAGGED_CALL.search(answer):
    for block in tagged_blocks(answer):
      calls += tuple(block.calls)
  elif tools and stripped[:1] == '[' and stripped[-1:] == ']':
    calls = _read_python_calls(stripped, tools)
  if not calls and not stripped:
    raise ValueError(f'message {number}: the assistant says nothing')
  return DialogueTurn('assistant', thought if calls else text, calls)


def _read_python_calls(text: str, tools: Sequence[ToolSpec]) -> tuple[ToolCall, ...]:
  """Reads a Python-style call list whose tool names may hold spaces ('Market Trends API').

  Such a name is made readable where a call begins, and put back afterwards.
  """
  names = {_python_name(tool.name): tool.name for tool in tools}
  odd = [name for name in names.values() if name not in names]
  if odd:
    # The longest name comes first, since one name may begin another.
    odd.sort(key=len, reverse=True)
    pattern = r'(?<=[\[,\s])(' + '|'.join(map(re.escape, odd)) + r')(?=\()'
    text = re.sub(pattern, lambda match: _python_name(match[1]), text)
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


# --- writing our rows -----------------------------------------------------------------------------


def write_row(dialogue: Dialogue, style: str) -> Record:
  """Writes a dialogue as our row in one of CALL_STYLES.

  Raises:
    ValueError: two tools get the same name, or a call cannot be written.
  """
  if style == 'python':
    return _python_row(dialogue)
  _refuse_equal_names(dialogue.tools)
  messages = [Message('system', dialogue.policy)] if dialogue.policy else []
  messages += [Message(turn.role, _turn_text(turn, turn.calls, style)) for turn in dialogue.turns]
  row = {'id': dialogue.id, 'conversations': [message.to_json() for message in messages]}
  if dialogue.tools:
    row['tools'] = [{'type': 'function', 'function': tool.to_json()} for tool in dialogue.tools]
  return row


def _python_row(dialogue: Dialogue) -> Record:
  tools = _python_named_tools(dialogue.tools)
  system = system_text(dialogue.policy, tools) if tools else dialogue.policy
  messages = [Message('system', system)] if system else []
  before = ''  # role of the turn before
  for turn in dialogue.turns:
    if turn.role != 'tool':
      text = _turn_text(turn, _with_python_names(turn.calls), 'python')
      messages.append(Message(turn.role, text))
    elif before == 'tool':
      # Responses that follow each other share a message, as in Qwen3's template.
      text = messages[-1].content + '\n' + tool_response(turn.text)
      messages[-1] = Message('user', text)
    else:
      messages.append(Message('user', tool_response(turn.text)))
    before = turn.role
  return {'id': dialogue.id, 'conversations': [message.to_json() for message in messages]}


def _turn_text(turn: DialogueTurn, calls: Sequence[ToolCall], style: str) -> str:
  if not calls:
    return turn.text
  thought = turn.text + '\n\n' if turn.text else ''
  return thought + print_calls(calls, style)


def _python_name(name: str) -> str:
  """Makes a dotted identifier of a tool name that may hold spaces, slashes or quotes."""
  parts = []
  for word in name.split('.'):
    part = re.sub(r'\W+', '_', word).strip('_')
    if part[:1].isdigit():
      part = '_' + part
    if part:
      parts.append(part)
  return '.'.join(parts) or 'unnamed'


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
  # A thought may speak of `<tool_call>` itself, so only what stands behind it is searched.
  thought, rest = split_answer(record['output'])
  calls = _toolrl_calls(rest, name) if _TAGGED_CALL.search(rest) else []
  reference = print_calls(calls) if calls else _part(rest, 'response')
  if not reference:
    raise ValueError(f'row {name!r} has neither calls nor a response')
  # The instruction's tool list is kept, with names that a Python-style call can have. ToolRL's own
  # output format, which stands behind it, is replaced by ours.
  tools = record['instruction'].split('**Steps for Each Turn**')[0]
  tools = _LISTED_NAME.sub(lambda match: match[1] + _python_name(match[2]), tools)
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
  if not 0 <= start < end:
    return ''
  return output[start + len(tag) + 2 : end].strip()


def _toolrl_calls(text: str, name: str) -> list[ToolCall]:
  """Reads the calls of the first tag, one a line; what stands behind it is no part of the row."""
  try:
    calls = next(tagged_blocks(text)).calls
  except ToolCallError as error:
    raise ValueError(f'row {name!r}: a tool call needs a name and parameters ({error})') from error
  return [dataclasses.replace(call, name=_python_name(call.name)) for call in calls]


_TEXTS: dict[str, Callable[[Record, str, str], list[Record]]] = {
  'rows': _our_row,
  'packed': _packed_rows,
  'toolrl': _toolrl_row,
}
_DIALOGUES: dict[str, Callable[[Record, str], Dialogue]] = {
  'xlam': _xlam,
  'toolace': _toolace,
  'apigen_mt': _apigen_mt,
  'hermes': _hermes,
}
SCHEMAS = (*_TEXTS, *_DIALOGUES)
