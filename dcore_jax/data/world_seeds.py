"""Makes seeds of a world's tasks: one for each user turn, after its reference history."""

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.data.seeds import Seed, reference_steps
from dcore_jax.worlds.environment import UserTurn, World, WorldTask


def task_seeds(world: World, task: WorldTask) -> list[Seed]:
  """Makes a seed of each turn of a task, with what executes calls from that turn on.

  A turn with neither calls nor an answer has nothing to learn from. It gives no seed, and ends the
  dialogue, since nobody knows what has been done in it.

  Args:
    world: the world that made the task.
    task: one of its tasks.
  """
  one_response = task.kind in world.one_response
  seeds = []
  history = [Message('system', world.system_text(task))]
  done: list[ToolCall] = []
  for number, turn in enumerate(task.turns):
    if not turn.calls and not turn.answer:
      break
    # A task that is judged on its first response ends with its calls. Only where the dialogue goes
    # on, or nothing is called, is a text part of the reference.
    answer = '' if one_response and turn.calls else turn.answer
    query = Message('user', turn.query)
    seed = Seed(
      id=f'{task.id}/{number}',
      # The kind is that of the turn: a dialogue has turns of one call and of several.
      kind=_seed_kind(turn, one_response),
      conversations=(*history, query),
      calls=turn.calls,
      tool_response=turn.responses,
      answer=answer,
      world=world.sandbox_record(task, done),
      dialogue=task.id,
    )
    seeds.append(seed)
    history += [query, *reference_steps(seed, len(turn.calls)), Message('assistant', turn.answer)]
    # The sandbox of the next turn starts from the state that these calls leave.
    done += turn.calls
  return seeds


def _seed_kind(turn: UserTurn, one_response: bool) -> str:
  """Returns how the subtasks of a turn relate, as one of `seeds.KINDS`."""
  if not turn.calls:
    return 'irrelevant'
  if len(turn.calls) == 1:
    return 'single'
  return 'parallel' if one_response else 'sequential'
