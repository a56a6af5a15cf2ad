"""BFCL's executable APIs as an environment, on tasks of our own (bfcl_tasks): acted out, judged, or talked to."""

import json
from collections.abc import Callable, Collection

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.acting import SandboxSession, TaskEpisode
from dcore_jax.worlds.bfcl import BfclSandbox, package_folder
from dcore_jax.worlds.bfcl_tasks import BfclTask, make_task
from dcore_jax.worlds.environment import Sandbox

SPLITS = ('train', 'eval')
ONE_RESPONSE = (
  'single',
  'parallel',
  'irrelevant',
)  # as BFCL's single-turn categories, and ToolWorld's


class BfclWorld:
  """See `worlds.environment.World`.

  Args:
    system_text: the system message of a task, which lists its functions.

  Raises:
    ValueError: BFCL is not installed.
  """

  def __init__(self, system_text: Callable[[BfclTask], str]):
    package_folder()
    self._system_text = system_text

  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[BfclTask]:
    """The splits are other draws; states are made of the same few names in both."""
    return [
      make_task(kind, index, seed=len(SPLITS) * seed + SPLITS.index(split))
      for index in range(count)
    ]

  def episode(self, task: BfclTask) -> TaskEpisode:
    return TaskEpisode(
      task.id,
      self._system_text(task),
      task.turns,
      one_response=task.kind in ONE_RESPONSE,
      listed=_listed(task),
      open_sandbox=lambda: _open(task),
    )

  def session(self, task: BfclTask) -> SandboxSession:
    return SandboxSession(self._system_text(task), _open(task))


def _listed(task: BfclTask) -> Collection[str]:
  return {function['name'] for function in task.functions}


def _open(task: BfclTask) -> Sandbox:
  return _ListedOnly(BfclSandbox(task.classes, task.config), _listed(task))


class _ListedOnly:
  """A sandbox that has the listed functions alone: an API has public methods that no task lists."""

  def __init__(self, sandbox: Sandbox, listed: Collection[str]):
    self._sandbox, self._listed = sandbox, listed

  @property
  def state(self) -> object:
    return self._sandbox.state

  def run(self, call: ToolCall) -> str:
    if call.name not in self._listed:
      return json.dumps({'error': f'there is no function {call.name[:80]}'})
    return self._sandbox.run(call)
