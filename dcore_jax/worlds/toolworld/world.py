"""ToolWorld as an environment: shows a task and runs the model's calls."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.acting import SandboxSession, TaskEpisode
from dcore_jax.worlds.toolworld.tasks import ONE_RESPONSE, Task, make_task
from dcore_jax.worlds.toolworld.tools import TOOLS, State, execute


def system_text(task: Task) -> str:
  """Policy and one signature a line. Types are left out: they would double the prompt of a two-million-parameter model."""
  lines = [f'{name}({", ".join(TOOLS[name].parameters)})' for name in task.tools]
  return '\n'.join([task.policy, 'tools:', *lines])


def _execute(state: State, tools: Sequence[str], call: ToolCall) -> dict[str, Any]:
  if call.name not in tools or call.positional:
    return {'error': 'unknown tool' if call.name not in tools else 'wrong arguments'}
  return execute(state, call.name, call.arguments)


class ToolWorldSandbox:
  """The listed tools over a copy of `state`; see `worlds.environment.Sandbox`."""

  def __init__(self, tools: Sequence[str], state: State):
    self._tools, self.state = tuple(tools), copy.deepcopy(state)

  def run(self, call: ToolCall) -> str:
    return json.dumps(_execute(self.state, self._tools, call))


class ToolWorld:
  """The procedural world; see `worlds.environment.World`."""

  def __init__(self, max_subtasks: int = 4):
    self.max_subtasks = max_subtasks

  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[Task]:
    return [
      make_task(kind, i, seed=seed, split=split, max_subtasks=self.max_subtasks)
      for i in range(count)
    ]

  def episode(self, task: Task) -> TaskEpisode:
    return TaskEpisode(
      task.id,
      system_text(task),
      task.turns,
      one_response=task.kind in ONE_RESPONSE,
      listed=task.tools,
      open_sandbox=lambda: ToolWorldSandbox(task.tools, task.initial_state),
    )

  def session(self, task: Task) -> SandboxSession:
    return SandboxSession(system_text(task), ToolWorldSandbox(task.tools, task.initial_state))
