"""ToolWorld as an environment: shows a task and runs the model's calls."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.acting import SandboxWorld
from dcore_jax.worlds.environment import Sandbox
from dcore_jax.worlds.toolworld.tasks import KINDS, ONE_RESPONSE, Task, make_task
from dcore_jax.worlds.toolworld.tools import TOOLS, Tables, execute


def system_text(task: Task) -> str:
  """The policy, and one line with a tool's name and parameters for every listed tool.

  The line has no types: they would double the prompt of a model of two million parameters.
  """
  # A model reads them in every task, so that each tool is one short line.
  lines = [f'{name}({", ".join(TOOLS[name].parameters)})' for name in task.tools]
  return '\n'.join([task.policy, 'tools:', *lines])


class ToolWorldSandbox:
  """The listed tools over a copy of `state`; see `worlds.environment.Sandbox`."""

  def __init__(self, tools: Sequence[str], state: Tables):
    self._tools = tuple(tools)
    # A copy, so that an episode's calls do not change the task.
    self.state = copy.deepcopy(state)

  def run(self, call: ToolCall) -> str:
    """See `Sandbox.run`; an output is a JSON object."""
    # Unlisted tools do not exist for a model, whatever the world can do.
    if call.name not in self._tools:
      output = {'error': 'unknown tool'}
    # Arguments are always named: a listed line gives the names, and no order to rely on.
    elif call.positional:
      output = {'error': 'wrong arguments'}
    else:
      output = execute(self.state, call.name, call.arguments)
    # JSON, as chat templates show the outputs of tools.
    return json.dumps(output)


class ToolWorld(SandboxWorld):
  """The procedural world; see `worlds.environment.World`.

  Args:
    max_subtasks: the largest number of subtasks in one request, 2 to 5.
  """

  kinds = KINDS
  one_response = ONE_RESPONSE

  def __init__(self, max_subtasks: int = 4):
    self.max_subtasks = max_subtasks

  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[Task]:
    """See `World.tasks`; the splits have no name, id or amount in common."""
    # Each task from its own random stream, so that the first ones do not depend on `count`.
    return [
      make_task(kind, index, seed=seed, split=split, max_subtasks=self.max_subtasks)
      for index in range(count)
    ]

  def system_text(self, task: Task) -> str:
    """See `system_text`."""
    return system_text(task)

  def listed(self, task: Task) -> Sequence[str]:
    """The tools of the task."""
    return task.tools

  def sandbox_record(self, task: Task, done: Sequence[ToolCall]) -> dict[str, Any]:
    """The listed tools and the state that `done` leaves."""
    # Calls made before are executed, and the record holds the state that they leave.
    sandbox = ToolWorldSandbox(task.tools, task.initial_state)
    for call in done:
      sandbox.run(call)
    return {'name': 'toolworld', 'tools': list(task.tools), 'state': sandbox.state}

  @staticmethod
  def open_sandbox(record: Mapping[str, Any]) -> Sandbox:
    """See `World.open_sandbox`."""
    return ToolWorldSandbox(record['tools'], record['state'])
