"""A world over any MCP server: its tools are listed, and it executes the calls."""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import calls_equal, print_calls
from dcore_jax.chat.tool_specs import system_text
from dcore_jax.files import read_json
from dcore_jax.worlds.acting import SESSION_STEPS, SandboxWorld, TaskEpisode
from dcore_jax.worlds.environment import Sandbox, UserTurn, WorldTask
from dcore_jax.worlds.mcpworld.connection import require_sdk
from dcore_jax.worlds.mcpworld.sandbox import (
  McpSandbox,
  ServerOptions,
  Toolbox,
  open_record,
  sandbox_record,
)
from dcore_jax.worlds.mcpworld.tasks import KINDS, ONE_RESPONSE, SPLITS, McpTask, read_tasks

# How tools are listed: as JSON schemas, or a line each with the names of their parameters.
LISTINGS = ('json', 'names')
SERVER_LOST = 'server lost'
# What a world without a file of tasks begins a conversation with.
_INTRODUCTION = McpTask(
  'mcp-introduction',
  'introduction',
  (UserTurn('What can you do with your tools?', (), (), (), ''),),
  split='eval',
)


class McpWorld(SandboxWorld):
  """See `worlds.environment.World`.

  Args:
    max_subtasks: not read; the tasks are those of the file.
    tasks: the file of tasks, see `tasks.py`. Without one there is a conversation alone.
    policy: the text in front of the tools.
    listing: one of LISTINGS.
    **server: the fields of `ServerOptions`.

  Raises:
    ValueError: the SDK is not installed, the server cannot be started, or an option or the file is
      wrong.
  """

  kinds = KINDS
  one_response = ONE_RESPONSE

  def __init__(
    self,
    max_subtasks: int = 4,
    tasks: str = '',
    policy: str = '',
    listing: str = 'json',
    **server: Any,
  ):
    del max_subtasks
    require_sdk()
    known = [field.name for field in dataclasses.fields(ServerOptions)]
    unknown = sorted(set(server) - set(known))
    if unknown:
      raise ValueError(
        f'the world mcp has no option {unknown[0]!r}; it has tasks, policy, listing, '
        + ', '.join(known)
      )
    if listing not in LISTINGS:
      raise ValueError(f'listing is {listing!r}; expected one of {LISTINGS}')
    # The file first: its errors need no server.
    found = read_tasks(tasks) if tasks else [_INTRODUCTION]
    self.toolbox = Toolbox(ServerOptions(**server))
    self._policy = policy
    self._listing = listing
    self._tasks = [self._named(task) for task in found]
    if not tasks:
      self.kinds = (_INTRODUCTION.kind,)
    # Tasks with the outputs of their reference calls, by id.
    self._executed: dict[str, McpTask] = {}

  @classmethod
  def named(cls, place: str) -> 'McpWorld':
    """Makes the world of what stands behind `mcp:` on a command line.

    That is a command, the address of a server on HTTP, or a JSON file with the world's options.

    Raises:
      ValueError: as the constructor.
    """
    # A command may end with the name of such a file as well.
    if place.endswith('.json') and (pathlib.Path(place).is_file() or ' ' not in place):
      return cls(**read_options(place))
    if place.startswith(('http://', 'https://')):
      return cls(url=place)
    return cls(command=place)

  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[WorldTask]:
    """See `World.tasks`; at most as many as the file has, in its order, whatever the seed."""
    if split not in SPLITS:
      raise ValueError(f'unknown split {split!r}; expected one of {SPLITS}')
    if kind not in self.kinds:
      raise ValueError(f'unknown kind {kind!r}; expected one of {self.kinds}')
    found = [task for task in self._tasks if (task.kind, task.split) == (kind, split)]
    return [self._with_outputs(task) for task in found[:count]]

  def system_text(self, task: WorldTask) -> str:
    """The policy, the listed tools, and how to call them."""
    own = task.policy if isinstance(task, McpTask) else None
    policy = self._policy if own is None else own
    specs = self.toolbox.specs
    if self._listing == 'json':
      return system_text(policy, specs)
    # For models with short contexts: a schema has fifty tokens and more.
    lines = [f'{spec.name}({", ".join(spec.parameters["properties"])})' for spec in specs]
    return '\n'.join([policy, 'tools:', *lines] if policy else ['tools:', *lines])

  def listed(self, task: WorldTask) -> Collection[str]:
    """The tools of the server, without the hidden ones."""
    return self.toolbox.listed

  def task_sandbox(self, task: WorldTask) -> McpSandbox:
    """The listed tools over the server's first state."""
    return McpSandbox(self.toolbox)

  def sandbox_record(self, task: WorldTask, done: Sequence[ToolCall]) -> dict[str, Any]:
    """How the server is started, and the calls made before."""
    return sandbox_record(self.toolbox.options, done)

  @staticmethod
  def open_sandbox(record: Mapping[str, Any]) -> Sandbox:
    """See `World.open_sandbox`."""
    return open_record(record)

  def episode(self, task: WorldTask) -> 'McpEpisode':
    """See `World.episode`."""
    return McpEpisode(self, task)

  def execute(self, turns: Sequence[UserTurn]) -> list[UserTurn]:
    """Returns turns with the outputs of their reference calls, executed from the first state.

    Raises:
      ValueError: a call fails, with its text and what the server says.
    """
    sandbox = self.task_sandbox(_INTRODUCTION)
    executed = []
    for turn in turns:
      outputs = []
      for call in turn.calls:
        outputs.append(sandbox.run(call))
        if sandbox.lost or sandbox.made[-1].failed:
          raise ValueError(f'the call {print_calls([call])[1:-1]} fails: {outputs[-1][:200]}')
      executed.append(dataclasses.replace(turn, responses=tuple(outputs)))
    sandbox.close()
    return executed

  def _named(self, task: McpTask) -> McpTask:
    """Gives the calls of a task the names that the model sees."""
    turns = []
    for turn in task.turns:
      turns.append(dataclasses.replace(turn, calls=self.our_calls(turn.calls, task.id)))
    check = task.check
    if check:
      name = self.toolbox.named(check.call.name, f'the check of {task.id!r}')
      check = dataclasses.replace(check, call=ToolCall(name, check.call.arguments))
    return dataclasses.replace(task, turns=tuple(turns), check=check)

  def our_calls(self, calls: Sequence[ToolCall], where: str) -> tuple[ToolCall, ...]:
    """Returns calls by the names that the model sees.

    Raises:
      ValueError: a tool that the server lacks, or that is hidden.
    """
    named = []
    for call in calls:
      name = self.toolbox.named(call.name, f'a call of {where!r}')
      if name not in self.toolbox.listed:
        raise ValueError(f'a call of {where!r}: the model does not see the tool {name!r}')
      named.append(ToolCall(name, call.arguments))
    return tuple(named)

  def _with_outputs(self, task: McpTask) -> McpTask:
    if all(len(turn.responses) == len(turn.calls) for turn in task.turns):
      return task
    if task.id not in self._executed:
      try:
        turns = tuple(self.execute(task.turns))
      except ValueError as error:
        raise ValueError(f'the reference of {task.id!r}: {error}') from error
      self._executed[task.id] = dataclasses.replace(task, turns=turns)
    return self._executed[task.id]


class McpEpisode(TaskEpisode):
  """A task on a server, whose state nobody can see from outside.

  A turn is right where the calls that may have changed the server are the reference's, in its order
  (in any order for the kind `parallel`), and its look-ups are among those made. Failed calls do not
  count. With a `check`, its output at the end is the verdict.
  """

  def __init__(self, world: McpWorld, task: WorldTask):
    super().__init__(
      task,
      world.system_text(task),
      one_response=task.kind in world.one_response,
      listed=world.listed(task),
      open_sandbox=lambda: world.task_sandbox(task),
    )
    self._toolbox = world.toolbox
    self._check = task.check if isinstance(task, McpTask) else None
    # How many of the calls belong to turns that are over.
    self._judged = 0

  def step(self, text: str) -> None:
    """See `Episode.step`."""
    super().step(text)
    # The next response would have to be made without a server.
    if self._sandbox.lost and not self.done:
      self._fail(SERVER_LOST)
    self._close_if_done()

  def stop(self, reason: str) -> None:
    """See `Episode.stop`."""
    super().stop(reason)
    self._close_if_done()

  def _close_if_done(self) -> None:
    # Finished episodes stay in memory until all are, and must not keep their processes.
    if self.done:
      self._sandbox.close()
      self._reference.close()

  def _most_steps(self, turn: UserTurn) -> int:
    # Without reference calls nobody knows how many it takes.
    return super()._most_steps(turn) if turn.calls else SESSION_STEPS

  def _advance_reference(self, turn: UserTurn) -> None:
    # Only a check without an expected output needs a second server.
    if self._check and self._check.expect is None:
      super()._advance_reference(turn)

  def _state_difference(self, turn: UserTurn) -> str:
    made = self._sandbox.made[self._judged :]
    self._judged = len(self._sandbox.made)
    if self._sandbox.lost:
      return SERVER_LOST
    if self._check:
      return self._check_difference() if turn is self._task.turns[-1] else ''
    expected = [self._toolbox.completed(call) for call in turn.calls]
    changes = [call for call in expected if self._toolbox.changes(call.name)]
    look_ups = [call for call in expected if call not in changes]
    done = [one.call for one in made if not one.failed]
    mine = [one.call for one in made if one.changes and not one.failed]
    if not calls_equal(mine, changes, ordered=self._task.kind != 'parallel'):
      return 'wrong calls'
    missing = [call for call in look_ups if not any(calls_equal([call], [one]) for one in done)]
    return 'missing call' if missing else ''

  def _check_difference(self) -> str:
    mine = self._sandbox.ask(self._check.call)
    expect = self._check.expect
    if self._sandbox.lost:
      return SERVER_LOST
    if expect is None:
      reference = self._reference.ask(self._check.call)
      if self._reference.lost:
        return SERVER_LOST
      return '' if (mine.text, mine.failed) == (reference.text, reference.failed) else 'wrong state'
    return '' if not mine.failed and _says(mine.text, expect) else 'wrong state'


def read_options(name: str) -> dict[str, Any]:
  """Reads the options of the world from a JSON file.

  Raises:
    ValueError: it is not there, or holds no object.
  """
  try:
    options = read_json(name)
  except OSError as error:
    raise ValueError(f'the options of the world mcp: {error}') from error
  if not isinstance(options, dict):
    raise ValueError(f'{name} holds no object of options')
  return options


def _says(text: str, expect: Any) -> bool:
  """Whether an output is the expected text, or the JSON of the expected value."""
  if isinstance(expect, str) and text.strip() == expect.strip():
    return True
  try:
    # The server's text is data, of which only equality is asked.
    return json.loads(text) == expect
  except (ValueError, RecursionError):
    return False
