"""BFCL's executable APIs as an environment, on tasks of our own."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.chat.tool_specs import read_tools, system_text
from dcore_jax.worlds.acting import SandboxWorld
from dcore_jax.worlds.bfcl import CLASSES, BfclSandbox, package_folder
from dcore_jax.worlds.bfcl_tasks import KINDS, BfclTask, make_task
from dcore_jax.worlds.environment import Sandbox

# The order is part of every task's seed and must not change.
SPLITS = ('train', 'eval')


class BfclWorld(SandboxWorld):
  """See `worlds.environment.World`.

  Args:
    max_subtasks: the largest number of subtasks in a request of the kinds 'sequential' and
      'parallel', 2 to 4. Longer ones are drawn too rarely: a scenario has few independent things
      to ask for.
    classes: the APIs that tasks are about, names of `bfcl.CLASSES`; tasks take turns with them.
    extra_functions: how many functions are listed beside those that a task is about, at least 1.
      None lists the whole API, as BFCL does. A list has about 200 tokens a function with the
      organism's tokenizer, so models with short contexts need short lists.

  Raises:
    ValueError: BFCL is not installed, or an argument is wrong.
  """

  kinds = KINDS
  one_response = ('single', 'parallel', 'irrelevant')  # as in BFCL's single-turn categories

  def __init__(
    self,
    max_subtasks: int = 4,
    classes: Sequence[str] = tuple(CLASSES),
    extra_functions: int | None = None,
  ):
    # Asked now: without BFCL, the first task would fail in the middle of a run.
    package_folder()
    # A subtask is a clause, and a request of one clause is of the kind 'single'.
    if max_subtasks not in (2, 3, 4):
      raise ValueError(f'max_subtasks is {max_subtasks}; the world bfcl expects 2 to 4')
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or not classes:
      raise ValueError(f'classes is {list(classes)}; expected some of {sorted(CLASSES)}')
    # Without one, a task whose function is missing would list nothing.
    if extra_functions is not None and extra_functions < 1:
      raise ValueError(f'extra_functions is {extra_functions}; expected at least 1')
    # Plain values: a task is a pure function of them, its index and the seed.
    self._max_subtasks = max_subtasks
    self._classes = tuple(classes)
    self._extra_functions = extra_functions

  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[BfclTask]:
    """See `World.tasks`; the states of both splits are made of the same few names."""
    if split not in SPLITS:
      raise ValueError(f'unknown split {split!r}; expected one of {SPLITS}')
    # Even seeds are training, odd ones evaluation: no seed serves both.
    drawn = len(SPLITS) * seed + SPLITS.index(split)
    return [self._task(kind, index, drawn) for index in range(count)]

  def _task(self, kind: str, index: int, seed: int) -> BfclTask:
    return make_task(
      kind,
      index,
      seed=seed,
      classes=self._classes,
      max_subtasks=self._max_subtasks,
      extra_functions=self._extra_functions,
    )

  def system_text(self, task: BfclTask) -> str:
    """The policy, the listed functions as JSON, and how to call them."""
    # What a function returns is left out: its outputs show it, and contexts are short.
    return system_text(task.policy, read_tools(task.functions, left_out=('response',)))

  def listed(self, task: BfclTask) -> Collection[str]:
    """The names of the listed functions."""
    return {function['name'] for function in task.functions}

  def task_sandbox(self, task: BfclTask) -> Sandbox:
    """The listed functions over the scenario of the task."""
    # A call to a function that the prompt does not list must fail.
    return _ListedOnly(BfclSandbox(task.classes, task.config), self.listed(task))

  def sandbox_record(self, task: BfclTask, done: Sequence[ToolCall]) -> dict[str, Any]:
    """The APIs, their scenario, and the calls made before: the state itself is no plain data."""
    return {
      'name': 'bfcl',
      'classes': list(task.classes),
      'config': task.config,
      # Without the list's brackets: a record holds one call a line.
      # As text: a record is JSON.
      'done': [print_calls([call])[1:-1] for call in done],
    }

  @staticmethod
  def open_sandbox(record: Mapping[str, Any]) -> Sandbox:
    """See `World.open_sandbox`."""
    return BfclSandbox(record['classes'], record['config'], record['done'])


class _ListedOnly:
  """A sandbox with the listed functions alone: an API has public methods that no task lists."""

  def __init__(self, sandbox: Sandbox, listed: Collection[str]):
    self._sandbox = sandbox
    self._listed = listed

  @property
  def state(self) -> object:
    """The state of the sandbox inside."""
    return self._sandbox.state

  def run(self, call: ToolCall) -> str:
    """Runs a call of a listed function; any other has an error as its output."""
    if call.name not in self._listed:
      # The same words as for a name that no API has: the model cannot tell the two apart.
      return json.dumps({'error': f'there is no function {call.name[:80]}'})
    return self._sandbox.run(call)
