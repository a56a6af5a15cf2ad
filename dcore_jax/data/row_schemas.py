"""The schemas that rows for fine-tuning are published in, and one adapter from each to ours.

    schema      recognised by                                       published as
    rows        conversations of {role, content}                    D-CORE's rows; self-distillation writes them too
    packed      the same and single_conv_last_idx                   D-CORE's packs: several rows in one
    toolrl      instruction, input, output                          ToolRL
    xlam        query, tools, answers                               Salesforce/xlam-function-calling-60k
    toolace     system, conversations of {from, value}              Team-ACE/ToolACE
    apigen_mt   the same and tools                                  Salesforce/APIGen-MT-5k, and other ShareGPT files with tools
    hermes      conversations of {from, value}, no system           NousResearch/hermes-function-calling-v1

Our row is {id, conversations: [{role, content}]}, with `tools` where the chat template is to show them. The first three come
with their tools and calls as text, which stays as it is. The others are read as data and written in one of two styles, so
that rows of different sources ask and answer alike:
    python  specs in the system message, calls as [f(a=1)], tool responses as user messages (as in D-CORE's and ToolRL's rows)
    hermes  specs through the template's `tools`, calls as <tool_call> JSON, tool responses in the role `tool`
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.chat.tool_calls import parse_python, print_calls, tool_response
from dcore_jax.chat.tool_specs import CALL_FORMAT, _read_literal, read_tools, system_text
from dcore_jax.data.seeds import DecisionPoint

CALL_STYLES = ('python', 'hermes')

Record = dict[str, Any]

_LISTED_NAME = re.compile(r'^(\d+\. Name: )(.*)$', re.MULTILINE)
_TAGGED_CALL = re.compile(r'<tool_call>(.*?)</tool_call>', re.DOTALL)
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
class Turn:
  """What was said: by 'user', 'assistant' or 'tool'. An assistant's `text` is its thought, if any, where it makes calls."""

  role: str
  text: str
  calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """A record as data. Names of tools are those of the source."""

  id: str
  policy: str  # system text without the tools; '' for none
  tools: tuple[ToolSpec, ...]
  turns: tuple[Turn, ...]


# --- recognising and adapting ------------------------------------------------------------------------------------------------


def recognise(record: Record) -> str | None:
  """The schema of a record by its fields; None for none of them. A field that is None counts as absent."""
  fields = {name for name, value in record.items() if value is not None}
  for name, needed in (
    ('toolrl', {'instruction', 'input', 'output'}),
    ('xlam', {'query', 'tools', 'answers'}),
  ):
    if needed <= fields:
      return name
  turns = record.get('conversations')
  first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
  if {'role', 'content'} <= first.keys():
    return 'packed' if 'single_conv_last_idx' in fields else 'rows'
  if {'from', 'value'} <= first.keys():
    return ('apigen_mt' if 'tools' in fields else 'toolace') if 'system' in fields else 'hermes'
  return None


def to_dialogue(record: Record, schema: str, name: str) -> Dialogue | None:
  """The record as data, with names that a Python-style call can have; None for schemas whose calls are text.

  Raises:
    as `to_rows`.
  """
  if schema not in _DIALOGUES:
    return None
  dialogue = _DIALOGUES[schema](record, str(record['id']) if record.get('id') is not None else name)
  named = lambda thing: dataclasses.replace(thing, name=_python_name(thing.name))
  tools = tuple(map(named, dialogue.tools))
  if len({tool.name for tool in tools}) < len(tools):
    raise ValueError(f'two tools have one name: {sorted(tool.name for tool in tools)}')
  turns = tuple(
    dataclasses.replace(turn, calls=tuple(map(named, turn.calls))) for turn in dialogue.turns
  )
  return dataclasses.replace(dialogue, tools=tools, turns=turns)


def to_rows(record: Record, schema: str, name: str, style: str = 'python') -> list[Record]:
  """Our rows of one record: one, but for a pack.

  Args:
    record: as published.
    schema: one of SCHEMAS.
    name: the row's id where the record has none.
    style: one of CALL_STYLES.

  Raises:
    ValueError: a record that breaks what its schema promises (KeyError, TypeError: that lacks fields or nests them otherwise).
  """
  name = str(record['id']) if record.get('id') is not None else name
  if schema in _DIALOGUES:
    return [write_row(_DIALOGUES[schema](record, name), style)]
  return _TEXTS[schema](record, name, style)


def _our_row(record: Record, name: str, style: str) -> list[Record]:
  del style  # the rows say how calls are made
  messages = [Message.from_json(message) for message in record['conversations']]
  if not any(message.role == 'assistant' for message in messages):
    raise ValueError('the assistant never speaks')
  tools = {'tools': record['tools']} if record.get('tools') else {}
  return [{'id': name, 'conversations': record['conversations'], **tools}]


def _packed_rows(record: Record, name: str, style: str) -> list[Record]:
  """The rows that a pack was made of: each ends with the message that its index points to."""
  del style
  messages, start, rows = record['conversations'], 0, []
  for last in record['single_conv_last_idx']:
    if not (isinstance(last, int) and start <= last < len(messages)):
      raise ValueError(
        f'single_conv_last_idx = {record["single_conv_last_idx"]} does not cut {len(messages)} messages'
      )
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
  target = f'<think>\n{thought}\n</think>\n\n{point.reference}'
  return [
    {
      'id': point.id,
      'conversations': [
        *(m.to_json() for m in point.messages),
        {'role': 'assistant', 'content': target},
      ],
    }
  ]


# --- records as data ---------------------------------------------------------------------------------------------------------


def _xlam(record: Record, name: str) -> Dialogue:
  calls = _read_calls(record['answers'])
  return Dialogue(
    name,
    '',
    read_tools(record['tools']),
    (Turn('user', record['query']), Turn('assistant', '', calls)),
  )


def _toolace(record: Record, name: str) -> Dialogue:
  """The tools stand as a JSON list in the system text; around it there is what to do with them, which we say ourselves."""
  system = record['system']
  tools, policy = (), system
  start = system.find('[{')
  if start >= 0:
    try:
      listed, size = json.JSONDecoder().raw_decode(system[start:])
    except json.JSONDecodeError as error:
      raise ValueError(f'the list of functions in the system text is not JSON: {error}') from error
    tools = read_tools(listed)
    parts = (re.sub(r'[^.\n]*:\s*$', '', system[:start]).strip(), system[start + size :].strip())
    policy = '\n\n'.join(part for part in parts if part and 'in the format of [' not in part)
  return Dialogue(name, policy, tools, _read_turns(record['conversations'], tools))


def _apigen_mt(record: Record, name: str) -> Dialogue:
  tools = read_tools(record['tools'])
  return Dialogue(
    name, record['system'].strip(), tools, _read_turns(record['conversations'], tools)
  )


def _hermes(record: Record, name: str) -> Dialogue:
  """A system text with a <tools> block only says which tools there are and how to call them, which we say ourselves."""
  turns, policy = record['conversations'], ''
  if turns[0].get('from') == 'system':
    policy, turns = turns[0]['value'].strip(), turns[1:]
  listed = _TAGGED_TOOLS.search(policy)
  tools = read_tools(record.get('tools') or (listed[1] if listed else []))
  return Dialogue(
    name, '' if tools and '<tools>' in policy else policy, tools, _read_turns(turns, tools)
  )


def _read_turns(records: Sequence[Record], tools: Sequence[ToolSpec]) -> tuple[Turn, ...]:
  """Turns of ShareGPT messages {from, value}, up to the assistant's last: what follows is nobody's context."""
  turns = []
  for number, record in enumerate(records):
    role, text = _ROLES.get(record.get('from')), record.get('value')
    if role is None or not isinstance(text, str):
      raise ValueError(
        f'message {number} is by {record.get("from")!r} with a value of type {type(text).__name__}; '
        f'expected text by one of {sorted(_ROLES)}'
      )
    if role == 'function_call':
      turns.append(Turn('assistant', '', _read_calls(text)))
    elif role == 'tool':
      turns += [Turn('tool', part) for part in _TAGGED_RESPONSE.findall(text) or [text]]
    else:
      turns.append(_read_answer(text, tools, number) if role == 'assistant' else Turn('user', text))
  last = max((i for i, turn in enumerate(turns) if turn.role == 'assistant'), default=-1)
  if last < 0:
    raise ValueError('the assistant never speaks')
  return tuple(turns[: last + 1])


def _read_answer(text: str, tools: Sequence[ToolSpec], number: int) -> Turn:
  """An assistant's text; the words beside tagged calls go, as a call list stands alone."""
  thought, closed, answer = text.rpartition('</think>')
  bodies = _TAGGED_CALL.findall(answer)
  stripped = answer.strip()
  if bodies:
    calls = tuple(call for body in bodies for call in _read_calls(body))
  elif tools and stripped[:1] == '[' and stripped[-1:] == ']':
    names = {_python_name(tool.name): tool.name for tool in tools}
    # Names may hold spaces ('Market Trends API'): they are made readable where a call begins, and put back afterwards.
    odd = sorted((spec for spec in names.values() if spec not in names), key=len, reverse=True)
    if odd:
      pattern = r'(?<=[\[,\s])(' + '|'.join(map(re.escape, odd)) + r')(?=\()'
      stripped = re.sub(pattern, lambda match: _python_name(match[1]), stripped)
    calls = tuple(
      dataclasses.replace(call, name=names.get(call.name, call.name))
      for call in parse_python(stripped)
    )
  else:
    calls = ()
  if not calls and not stripped:
    raise ValueError(f'message {number}: the assistant says nothing')
  return Turn('assistant', thought + closed if calls else text, calls)


def _read_calls(value: Any) -> tuple[ToolCall, ...]:
  """Calls {name, arguments} from JSON, its text, or the Python literal that some rows of Hermes hold instead."""
  value = _read_literal(value)
  calls = []
  for call in value if isinstance(value, list) else [value]:
    arguments = _read_literal(call.get('arguments', {})) if isinstance(call, dict) else None
    if not isinstance(arguments, dict) or not isinstance(call.get('name'), str):
      raise ValueError(f'a tool call needs a name and arguments, got {str(call)[:80]!r}')
    calls.append(ToolCall(call['name'], arguments))
  if not calls:
    raise ValueError('the list of calls is empty')
  return tuple(calls)


# --- writing our rows --------------------------------------------------------------------------------------------------------


def write_row(dialogue: Dialogue, style: str) -> Record:
  """Our row of a dialogue in one of CALL_STYLES; ValueError where two tools get the same name or a call cannot be written."""
  python = style == 'python'
  tools = (
    [dataclasses.replace(tool, name=_python_name(tool.name)) for tool in dialogue.tools]
    if python
    else dialogue.tools
  )
  if len({tool.name for tool in tools}) < len(tools):
    raise ValueError(f'two tools have one name: {sorted(tool.name for tool in tools)}')
  system = dialogue.policy
  if tools and python:
    system = system_text(system, tools)
  messages = [Message('system', system)] if system else []
  turns = dialogue.turns
  for index, turn in enumerate(turns):
    if turn.role == 'tool' and python:
      text = tool_response(turn.text)
      if (
        index and turns[index - 1].role == 'tool'
      ):  # what follows each other shares a message, as in Qwen3's template
        messages[-1] = Message('user', messages[-1].content + '\n' + text)
      else:
        messages.append(Message('user', text))
    else:
      messages.append(Message(turn.role, _spoken(turn, style) if turn.calls else turn.text))
  row = {'id': dialogue.id, 'conversations': [message.to_json() for message in messages]}
  if tools and not python:
    row['tools'] = [{'type': 'function', 'function': tool.to_json()} for tool in tools]
  return row


def _spoken(turn: Turn, style: str) -> str:
  calls = turn.calls
  if style == 'python':
    calls = [dataclasses.replace(call, name=_python_name(call.name)) for call in calls]
  return (turn.text + '\n\n' if turn.text else '') + print_calls(calls, style)


def _python_name(name: str) -> str:
  """A dotted identifier for a tool name that may hold spaces, slashes or quotes."""
  parts = [re.sub(r'\W+', '_', part).strip('_') for part in name.split('.')]
  return '.'.join(f'_{part}' if part[:1].isdigit() else part for part in parts if part) or 'unnamed'


# --- ToolRL ------------------------------------------------------------------------------------------------------------------


def toolrl_point(record: Record, name: str) -> tuple[DecisionPoint, str]:
  """(decision point, thought) of a ToolRL row {instruction, input, output}.

  Its output holds `<think>`, `<tool_call>` (JSON lines) and `<response>` parts; the reference is the calls in Python style,
  or the response text where there are none.

  Raises:
    ValueError: naming the row and what it lacks.
  """
  missing = {'instruction', 'input', 'output'} - record.keys()
  if missing:
    raise ValueError(f'row {name!r} is no ToolRL row: it lacks {", ".join(sorted(missing))}')
  thought, _, rest = record['output'].rpartition(
    '</think>'
  )  # a thought may speak of `<tool_call>` itself
  calls = [
    _toolrl_call(line, name) for line in _part(rest, 'tool_call').split('\n') if line.strip()
  ]
  reference = print_calls(calls) if calls else _part(rest, 'response')
  if not reference:
    raise ValueError(f'row {name!r} has neither calls nor a response')
  # The tool list, without ToolRL's own output format behind it, and with names that a Python-style call can have.
  tools = record['instruction'].split('**Steps for Each Turn**')[0]
  tools = _LISTED_NAME.sub(lambda match: match[1] + _python_name(match[2]), tools)
  messages = (
    Message('system', tools.rstrip() + '\n\n' + CALL_FORMAT),
    Message('user', record['input']),
  )
  return DecisionPoint(name, 'toolrl', messages, reference), thought.split('<think>', 1)[-1].strip()


def _part(output: str, tag: str) -> str:
  start, end = output.find(f'<{tag}>'), output.find(f'</{tag}>')
  return output[start + len(tag) + 2 : end].strip() if 0 <= start < end else ''


def _toolrl_call(line: str, name: str) -> ToolCall:
  try:
    call = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f'a tool call of row {name!r} is not JSON: {error}') from error
  if (
    not isinstance(call, dict)
    or not isinstance(call.get('name'), str)
    or not isinstance(call.get('parameters'), dict)
  ):
    raise ValueError(f'row {name!r}: a tool call needs a name and parameters, got {line[:80]!r}')
  return ToolCall(_python_name(call['name']), call['parameters'])


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
