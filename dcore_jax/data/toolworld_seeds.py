"""ToolWorld tasks as seeds: one per user turn, with the reference history before it."""

import copy

from dcore_jax.chat.messages import Message
from dcore_jax.data.seeds import Seed, reference_steps
from dcore_jax.worlds.toolworld.tasks import Task
from dcore_jax.worlds.toolworld.world import ToolWorldSandbox, system_text


def task_seeds(task: Task) -> list[Seed]:
  """The turns of a task, in order; each with the state that the turns before it have left."""
  seeds, history = [], [Message('system', system_text(task))]
  sandbox = ToolWorldSandbox(task.tools, task.initial_state)
  for number, turn in enumerate(task.turns):
    several = 'parallel' if task.kind == 'parallel' else 'sequential'
    kind = 'irrelevant' if not turn.calls else 'single' if len(turn.calls) == 1 else several
    # A single-turn BFCL item ends with its call; only where the dialogue goes on is the report part of the reference.
    answer = '' if task.kind in ('single', 'parallel') else turn.answer
    world = {'name': 'toolworld', 'tools': list(task.tools), 'state': copy.deepcopy(sandbox.state)}
    seed = Seed(
      f'{task.id}/{number}',
      kind,
      (*history, Message('user', turn.query)),
      turn.calls,
      turn.responses,
      answer,
      world,
      task.id,
    )
    seeds.append(seed)
    for call in turn.calls:
      sandbox.run(call)
    history += [
      Message('user', turn.query),
      *reference_steps(seed, len(turn.calls)),
      Message('assistant', turn.answer),
    ]
  return seeds
