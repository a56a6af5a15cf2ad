"""Tasks on an MCP server, from a file of JSON lines.

    {"id": "refund-1", "query": "Refund order A7.",
     "calls": [{"name": "refund", "arguments": {"order": "A7"}}], "answer": "Refunded."}
    {"id": "refund-2", "query": "Cancel whatever Ada ordered last.",
     "check": {"name": "get_order", "arguments": {"order": "A9"}, "expect": "cancelled"}}
    {"id": "trip", "split": "eval", "turns": [{"query": ..., "calls": ...}, {"query": ...}]}

id        the task's name
query     what the user asks for; or `turns`, several of them with their own query, calls and so on
calls     the reference calls in order, {name, arguments}; none where no tool fits
answer    the text that ends the turn
outputs   what the calls returned; where it is absent, they are executed when the task is made
subtasks  the reference decomposition, a line each
check     a call that judges the task at its end, in place of the calls. Its output must be `expect`
          (a text, or a JSON value); without `expect`, what it is after the reference calls
kind      one of KINDS; guessed from the calls where it is absent
split     'train' or 'eval'; where it is absent, a fifth of the ids are 'eval', by their hash
policy    the text in front of the tools, in place of the world's
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall, refuse_unknown
from dcore_jax.files import data_path, read_json_lines
from dcore_jax.worlds.environment import UserTurn, WorldTask

KINDS = ('single', 'sequential', 'parallel', 'irrelevant', 'multi_turn')
# All calls of these go out in one response, or none does. A single call is followed by its report.
ONE_RESPONSE = ('parallel', 'irrelevant')
SPLITS = ('train', 'eval')
_TURN = ('query', 'calls', 'answer', 'outputs', 'subtasks')
_TASK = ('id', 'kind', 'split', 'policy', 'check', 'turns')
# One task of this many is held out.
_HELD_OUT = 5


@dataclasses.dataclass(frozen=True)
class Check:
  """A call that judges a task at its end.

  Attributes:
    call: the call.
    expect: its right output; None for what it is after the reference calls.
  """

  call: ToolCall
  expect: Any = None


@dataclasses.dataclass(frozen=True)
class McpTask(WorldTask):
  """A task of the file; see the module's docstring."""

  split: str = 'train'
  policy: str | None = None
  check: Check | None = None


def read_tasks(name: str) -> list[McpTask]:
  """Reads the tasks of a file, by its path or below the data folder.

  Raises:
    ValueError: a file that is not there or has no task, a record that is no task, by its line, or
      two tasks of one id.
  """
  path = pathlib.Path(data_path(name))
  tasks = []
  for number, record in enumerate(read_json_lines(path), 1):
    try:
      tasks.append(read_task(record))
    except ValueError as error:
      raise ValueError(f'{path.name}, task {number}: {error}') from error
  ids = [task.id for task in tasks]
  twice = sorted({one for one in ids if ids.count(one) > 1})
  if twice:
    raise ValueError(f'{path.name}: several tasks have the id {twice[0]!r}')
  if not tasks:
    raise ValueError(f'{path.name} holds no task')
  return tasks


def read_task(record: Any) -> McpTask:
  """Reads one task.

  Raises:
    ValueError: a field that is missing, unknown or wrong, by its name.
  """
  if not isinstance(record, dict):
    raise ValueError(f'a task is an object, got {str(record)[:80]!r}')
  several = record.get('turns') is not None
  known = _TASK if several else (*_TASK, *_TURN)
  refuse_unknown(record, known, 'the task', ())
  identity = record.get('id')
  if not isinstance(identity, (str, int)) or identity == '':
    raise ValueError(f'id is {identity!r}; expected a name')
  turns = record['turns'] if several else [{name: record.get(name) for name in _TURN}]
  if not isinstance(turns, list) or not turns:
    raise ValueError('turns is no list of user turns')
  read = tuple(_read_turn(turn, f'turn {n}' if several else '') for n, turn in enumerate(turns))
  check = _read_check(record['check']) if record.get('check') else None
  if check and check.expect is None and not any(turn.calls for turn in read):
    raise ValueError('check has no expect, and there are no calls after which it could be asked')
  split = record.get('split') or _split_of(str(identity))
  kind = record.get('kind') or _kind_of(read, check)
  policy = record.get('policy')
  for field, value, allowed in (('split', split, SPLITS), ('kind', kind, KINDS)):
    if value not in allowed:
      raise ValueError(f'{field} is {value!r}; expected one of {allowed}')
  if policy is not None and not isinstance(policy, str):
    raise ValueError('policy is no text')
  if kind in ONE_RESPONSE and (len(read) > 1 or (kind == 'irrelevant') == bool(read[0].calls)):
    raise ValueError(f'kind {kind!r} does not fit the turns and calls')
  return McpTask(f'mcp-{identity}', kind, read, split=split, policy=policy, check=check)


def _read_turn(record: Any, where: str) -> UserTurn:
  where = f'{where}: ' if where else ''
  if not isinstance(record, dict):
    raise ValueError(f'{where}a turn is an object, got {str(record)[:80]!r}')
  refuse_unknown(record, _TURN, f'{where}the turn', ())
  query = record.get('query')
  if not isinstance(query, str) or not query.strip():
    raise ValueError(f'{where}query is {query!r}; expected what the user asks for')
  calls = record.get('calls') or []
  if not isinstance(calls, list):
    raise ValueError(f'{where}calls is no list')
  read = tuple(read_call(call, f'{where}calls[{n}]') for n, call in enumerate(calls))
  answer = record.get('answer') or ''
  if not isinstance(answer, str):
    raise ValueError(f'{where}answer is no text')
  outputs = _texts(record, 'outputs', where)
  if outputs and len(outputs) != len(read):
    raise ValueError(f'{where}{len(read)} calls but {len(outputs)} outputs')
  return UserTurn(query, read, outputs, _texts(record, 'subtasks', where), answer)


def _texts(record: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
  value = record.get(field) or []
  if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
    raise ValueError(f'{where}{field} is no list of texts')
  return tuple(value)


def read_call(record: Any, where: str, also: Sequence[str] = ()) -> ToolCall:
  """Reads a call {name, arguments}; `also` names further fields that are read elsewhere.

  Raises:
    ValueError: it is none, with the place `where`.
  """
  if not isinstance(record, dict) or not isinstance(record.get('name'), str):
    raise ValueError(f'{where} is no call {{name, arguments}}: {str(record)[:80]!r}')
  refuse_unknown(record, ('name', 'arguments', *also), where, ())
  arguments = record.get('arguments') or {}
  if not isinstance(arguments, dict):
    raise ValueError(f'{where}.arguments is no object')
  return ToolCall(record['name'], arguments)


def _read_check(record: Any) -> Check:
  call = read_call(record, 'check', ('expect',))
  return Check(call, record.get('expect'))


def _split_of(identity: str) -> str:
  # By the name alone: a task stays where it is when others are added.
  return 'eval' if zlib.crc32(identity.encode()) % _HELD_OUT == 0 else 'train'


def _kind_of(turns: Sequence[UserTurn], check: Check | None) -> str:
  if len(turns) > 1:
    return 'multi_turn'
  if not turns[0].calls:
    # What is checked has to be done, although nobody says how.
    return 'sequential' if check else 'irrelevant'
  return 'single' if len(turns[0].calls) == 1 else 'sequential'
