"""Pivot rows: one step of a recorded dialogue, as NVIDIA's NeMo Gym publishes them.

`responses_create_params` is a request to OpenAI's Responses API: `input` is the dialogue so far,
`tools` what may be called. `expected_action` is what the recorded agent did next: a message, a call
or a batch of calls. They become messages, tools and a reference.
"""

from typing import Any

from dcore_jax.chat.messages import refuse_unknown
from dcore_jax.data.dialogues import FREE_FIELDS, Record

_REQUEST = 'responses_create_params'
_ACTION = 'expected_action'
# What beside the request describes the recorded dialogue and how often a model was right.
_NOTES = (
  'trajectory_id',
  'scenario',
  'num_unique_actions',
  'meta_info',
  'qwen_235b_info',
  'agent_ref',
  'pass_rate',
  'pass_rate_total',
  'pass_rate_passed',
)
_TEXTS = ('input_text', 'output_text', 'text')


def is_pivot(record: Record) -> bool:
  """Whether a record is a pivot row."""
  return {_REQUEST, _ACTION} <= record.keys()


def with_messages(record: Record) -> Record:
  """Returns a pivot row as {messages, tools, reference or reference_calls}.

  Thoughts of the recorded agent are left out, as in the history of all rows.

  Raises:
    ValueError: naming the part that cannot be read.
  """
  refuse_unknown(record, (_REQUEST, _ACTION, *_NOTES), 'a pivot row', FREE_FIELDS)
  request = record[_REQUEST]
  if not isinstance(request, dict) or not isinstance(request.get('input'), list):
    raise ValueError(f'{_REQUEST} holds no list `input`')
  known = ('input', 'tools', 'tool_choice', 'instructions')
  refuse_unknown(request, known, _REQUEST, FREE_FIELDS)
  messages: list[Record] = []
  if request.get('instructions'):
    messages.append({'role': 'system', 'content': request['instructions']})
  for number, item in enumerate(request['input']):
    _add(messages, item, f'{_REQUEST}.input[{number}]')
  row = {'messages': messages, 'tools': request.get('tools') or [], **_reference(record[_ACTION])}
  if record.get('id') is not None:
    row['id'] = record['id']
  return row


def _add(messages: list[Record], item: Any, where: str) -> None:
  if not isinstance(item, dict):
    raise ValueError(f'{where} is no object')
  kind = item.get('type') or 'message'
  if kind == 'message':
    role = item.get('role')
    # The API's newer word for the system.
    role = 'system' if role == 'developer' else role
    messages.append({'role': role, 'content': _text(item.get('content'), where)})
  elif kind == 'function_call':
    call = {'id': item.get('call_id'), 'type': 'function', 'function': _call(item, where)}
    # Calls that follow the agent's words, or each other, are of one message.
    if not messages or messages[-1]['role'] != 'assistant':
      messages.append({'role': 'assistant', 'content': ''})
    messages[-1].setdefault('tool_calls', []).append(call)
  elif kind == 'function_call_output':
    text = _text(item.get('output'), where)
    messages.append({'role': 'tool', 'tool_call_id': item.get('call_id'), 'content': text})
  elif kind != 'reasoning':
    raise ValueError(f'{where}.type is {kind!r}; expected a message, a call, an output or thoughts')


def _text(content: Any, where: str) -> str:
  if isinstance(content, str):
    return content
  if isinstance(content, list):
    parts = [part for part in content if isinstance(part, dict) and part.get('type') in _TEXTS]
    if len(parts) == len(content) and all(isinstance(part.get('text'), str) for part in parts):
      return ''.join(part['text'] for part in parts)
  raise ValueError(f'{where} holds no text')


def _call(item: Any, where: str) -> Record:
  if not isinstance(item, dict) or not isinstance(item.get('name'), str):
    raise ValueError(f'{where} is no call: it has no name')
  return {'name': item['name'], 'arguments': item.get('arguments') or {}}


def _reference(action: Any) -> Record:
  kind = action.get('type') if isinstance(action, dict) else None
  if kind == 'message':
    return {'reference': _text(action.get('content'), _ACTION)}
  if kind == 'function_call':
    return {'reference_calls': [_call(action, _ACTION)]}
  if kind == 'function_call_batch' and isinstance(action.get('calls'), list) and action['calls']:
    return {'reference_calls': [_call(call, _ACTION) for call in action['calls']]}
  raise ValueError(f'{_ACTION} is neither a message nor calls: {str(action)[:80]!r}')
