"""Makes tasks of an MCP server's world from recorded conversations.

Every user turn becomes a request with the recorded calls as its reference. They are executed on the
server, from its first state: a conversation whose calls fail there, or call tools that it does not
have, is left out and counted.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from dcore_jax.data import row_schemas
from dcore_jax.data.dialogues import Dialogue
from dcore_jax.data.record_files import Unreadable
from dcore_jax.data.records import ODD
from dcore_jax.data.seed_sources import DialogueRequest, dialogue_requests
from dcore_jax.progress import SLOW, progress
from dcore_jax.worlds.environment import UserTurn
from dcore_jax.worlds.mcpworld.tasks import read_task
from dcore_jax.worlds.mcpworld.world import McpWorld

# One conversation of this many is held out.
_HELD_OUT = 5


@dataclasses.dataclass
class Converted:
  """Tasks of recorded conversations.

  Attributes:
    tasks: records of a file of tasks, see `worlds/mcpworld/tasks.py`.
    dropped: reason -> number of conversations that gave no task.
    problems: the reason of each of them in words.
    other_outputs: calls whose output is now another than the recorded one.
  """

  tasks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  problems: list[str] = dataclasses.field(default_factory=list)
  other_outputs: int = 0

  def drop(self, name: str, reason: str, error: Exception) -> None:
    """Counts a conversation that gives no task."""
    self.dropped[reason] += 1
    self.problems.append(f'{name}: {reason}: {error}')


def conversation_tasks(world: McpWorld, records: Sequence[Any], stem: str) -> Converted:
  """Makes a task of every conversation; every fifth is held out.

  Args:
    world: the server's world, without tasks.
    records: rows of messages, or of another schema of `row_schemas`.
    stem: begins the ids of records without one.
  """
  made = Converted()
  bar = progress(records, description='execute calls', unit='conversation', delay=SLOW)
  for number, record in enumerate(bar):
    name = f'{stem}-{number}'
    try:
      dialogue = _read(record, name)
      turns, outputs = _turns(world, dialogue)
    except ODD as error:
      made.drop(name, 'unreadable', error)
      continue
    try:
      executed = world.execute(turns)
    except ValueError as error:
      made.drop(name, 'a call fails', error)
      continue
    for turn, recorded in zip(executed, outputs, strict=True):
      pairs = zip(turn.responses, recorded, strict=False)
      made.other_outputs += sum(now.strip() != before.strip() for now, before in pairs)
    # By their order, so that ten conversations have two of them; the first ones are trained on.
    split = 'eval' if len(made.tasks) % _HELD_OUT == _HELD_OUT - 1 else 'train'
    task = {'id': dialogue.id, 'split': split, 'turns': [_record(turn) for turn in executed]}
    if dialogue.policy:
      task['policy'] = dialogue.policy
    # What the world could not read again is not written.
    read_task(task)
    made.tasks.append(task)
  return made


def _read(record: Any, name: str) -> Dialogue:
  if isinstance(record, Unreadable):
    raise ValueError(record.reason)
  if not isinstance(record, dict):
    raise ValueError(f'it is of type {type(record).__name__}, not an object')
  schema = row_schemas.recognise(record)
  dialogue = row_schemas.to_dialogue(record, schema, name) if schema else None
  if dialogue is None:
    raise ValueError(f'rows of schema {schema} hold no dialogue; its fields are {sorted(record)}')
  return dialogue


def _turns(world: McpWorld, dialogue: Dialogue) -> tuple[list[UserTurn], list[tuple[str, ...]]]:
  """The user turns of a dialogue, and the recorded outputs of each."""
  if any(turn.role == 'system' for turn in dialogue.turns):
    raise ValueError('a system message stands inside the dialogue, where no task can show it')
  requests = dialogue_requests(dialogue.turns)
  if not any(request.calls for request in requests):
    raise ValueError('no call')
  turns = [_turn(world, request, dialogue.id) for request in requests]
  return turns, [request.outputs for request in requests]


def _turn(world: McpWorld, request: DialogueRequest, name: str) -> UserTurn:
  calls = world.our_calls(request.calls, name)
  if not calls and not request.answer:
    raise ValueError(f'nothing answers the request {request.query[:60]!r}')
  return UserTurn(request.query, calls, (), (), request.answer)


def _record(turn: UserTurn) -> dict[str, Any]:
  calls = [{'name': call.name, 'arguments': call.arguments} for call in turn.calls]
  record = {'query': turn.query, 'calls': calls, 'outputs': list(turn.responses)}
  return record | ({'answer': turn.answer} if turn.answer else {})
