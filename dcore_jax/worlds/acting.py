"""How a model acts in a world whose tools a sandbox runs: in tasks with a verdict, or in sessions.

`SandboxWorld` makes both from what a world says of its tasks.
"""

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import ToolCallError, calls_equal, parse_calls, tool_response
from dcore_jax.worlds.environment import Outcome, Sandbox, UserTurn, WorldTask

# Assistant messages to one request of a session. The longest reference plan has four calls, so a
# model that has not answered after twice as many is going round in circles.
SESSION_STEPS = 8
# Assistant messages of a turn beyond its reference calls and its report, before it is stopped: room
# for a wrong call or two, and not for trying every tool.
SPARE_STEPS = 2
# JSON, as the errors of the tools themselves are.
UNREADABLE = '{"error": "unreadable calls"}'  # a session's answer to calls that cannot be read


class TaskEpisode:
  """One task while a model acts in it; see `worlds.environment.Episode`.

  Args:
    task: what is asked for, with reference solutions.
    system: the system message.
    one_response: whether the first response is judged. Otherwise a turn goes on until the
      assistant answers without calls.
    listed: the names of the tools that `system` lists.
    open_sandbox: makes the tools over the initial state. It is called twice: the model's calls run
      in one sandbox, and the reference calls in the other.
  """

  def __init__(
    self,
    task: WorldTask,
    system: str,
    *,
    one_response: bool,
    listed: Collection[str],
    open_sandbox: Callable[[], Sandbox],
  ):
    self.messages = [Message('system', system), Message('user', task.turns[0].query)]
    self.done = False
    self._task = task
    self._one_response = one_response
    self._listed = listed
    # Each sandbox owns its state, so that a model's calls cannot reach the reference.
    self._sandbox = open_sandbox()
    self._reference = open_sandbox()
    self._turn = 0
    self._steps = 0
    self._steps_in_turn = 0
    # Outputs of all turns, because BFCL counts earlier ones as evidence.
    self._responses: list[str] = []
    self._failure = ''

  def step(self, text: str) -> None:
    """See `Episode.step`. Raises ValueError when the episode is over."""
    if self.done:
      raise ValueError(f'episode of {self._task.id} is over')
    # Thoughts are not shown to the world: calls that a model only thought about do not run.
    _, answer = split_reasoning(text)
    # Both counts include responses that turn out to be unreadable.
    self._steps += 1
    self._steps_in_turn += 1
    turn = self._task.turns[self._turn]
    # The answer alone, since the next prompt must not repeat earlier thoughts.
    self.messages.append(Message('assistant', answer))
    try:
      calls = parse_calls(answer)
    except ToolCallError:
      # Stricter than BFCL, for which an undecodable call counts as a text that ends the turn.
      self._fail('unreadable calls')
      return
    if self._one_response:
      self._failure = self._judge_response(text, answer, calls, turn)
      self.done = True
    elif calls:
      self._run(calls)
      if self._steps_in_turn >= self._most_steps(turn):
        self._fail('too many steps')
    else:
      self._end_turn(text, answer, turn)

  def stop(self, reason: str) -> None:
    """See `Episode.stop`."""
    self._fail(reason)

  def outcome(self) -> Outcome:
    """See `Episode.outcome`; an episode that is not over is not correct."""
    # A run that was cut short must not count as a success.
    if not self.done:
      return Outcome(False, 'unfinished', self._steps)
    return Outcome(not self._failure, self._failure, self._steps)

  def _most_steps(self, turn: UserTurn) -> int:
    """The assistant messages of a turn, before it is stopped."""
    # Its reference calls one at a time, its report, and some spare.
    return len(turn.calls) + 1 + SPARE_STEPS

  def _run(self, calls: list[ToolCall]) -> None:
    outputs = [self._sandbox.run(call) for call in calls]
    self._responses += outputs
    self.messages.append(_outputs_message(outputs))

  def _judge_response(
    self, text: str, answer: str, calls: list[ToolCall] | None, turn: UserTurn
  ) -> str:
    """Why the only response of a task is wrong; '' where it is right."""
    if not turn.calls:
      if calls:
        return 'called a tool'
      # A refusal, or a question for the missing value, is the right response here.
      return '' if _answers(text, answer) else 'no answer'
    if not calls:
      return 'no calls'
    unlisted = [call.name for call in calls if call.name not in self._listed]
    if unlisted:
      return f'tool {unlisted[0][:40]!r} is not listed'
    # Compared before they run: parallel calls may come in any order, but must be these.
    if not calls_equal(calls, list(turn.calls), ordered=False):
      return 'wrong calls'
    # They run nevertheless: in another order, equal calls may leave another state.
    self._run(calls)
    self._advance_reference(turn)
    return self._state_difference(turn)

  def _advance_reference(self, turn: UserTurn) -> None:
    for call in turn.calls:
      self._reference.run(call)

  def _end_turn(self, text: str, answer: str, turn: UserTurn) -> None:
    # The reference catches up turn by turn, so that states are compared at the same point.
    self._advance_reference(turn)
    failure = self._state_difference(turn)
    if not failure and not _answers(text, answer):
      failure = 'no answer'
    if failure:
      self._fail(failure)
      return
    # A failed turn ends the task: later turns build on its state.
    self._turn += 1
    self._steps_in_turn = 0
    if self._turn == len(self._task.turns):
      self.done = True
    else:
      self.messages.append(Message('user', self._task.turns[self._turn].query))

  def _state_difference(self, turn: UserTurn) -> str:
    """BFCL's two multi-turn checks (docs/method.md, section 5.1).

    The state must equal the reference's, and every output of the reference calls must be among the
    outputs that the model's calls have had so far.
    """
    if self._sandbox.state != self._reference.state:
      return 'wrong state'
    # Compared as text: both sides run the same code.
    if not all(response in self._responses for response in turn.responses):
      return 'missing output'
    return ''

  def _fail(self, reason: str) -> None:
    self._failure = reason
    self.done = True


class SandboxSession:
  """A sandbox's tools for requests that a person makes up; see `worlds.environment.Session`."""

  def __init__(self, system: str, sandbox: Sandbox):
    self.messages = [Message('system', system)]
    self.asked = False
    self._sandbox = sandbox
    self._steps = 0

  @property
  def state(self) -> object:
    """The sandbox's state."""
    return self._sandbox.state

  def ask(self, text: str) -> None:
    """See `Session.ask`."""
    self.messages.append(Message('user', text))
    self.asked = True
    self._steps = 0

  def step(self, text: str) -> None:
    """See `Session.step`."""
    _, answer = split_reasoning(text)
    self._steps += 1
    self.messages.append(Message('assistant', answer))
    try:
      outputs = [self._sandbox.run(call) for call in parse_calls(answer) or ()]
    # An error in place of outputs, so that the model can correct itself.
    except ToolCallError:
      outputs = [UNREADABLE]
    if outputs:
      self.messages.append(_outputs_message(outputs))
    # Without calls the assistant has answered, and the person speaks next.
    self.asked = bool(outputs) and self._steps < SESSION_STEPS


class SandboxWorld(abc.ABC):
  """The base of worlds whose tools a sandbox runs: it makes episodes and sessions.

  A subclass has `kinds`, `one_response` and the methods below; `worlds.environment.World` says what
  each of them is.
  """

  kinds: Sequence[str]
  one_response: Collection[str]

  @abc.abstractmethod
  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[WorldTask]:
    """See `World.tasks`."""

  @abc.abstractmethod
  def system_text(self, task: WorldTask) -> str:
    """See `World.system_text`."""

  @abc.abstractmethod
  def listed(self, task: WorldTask) -> Collection[str]:
    """The names of the tools that `system_text` lists."""

  @abc.abstractmethod
  def sandbox_record(self, task: WorldTask, done: Sequence[ToolCall]) -> dict[str, Any]:
    """See `World.sandbox_record`."""

  @staticmethod
  @abc.abstractmethod
  def open_sandbox(record: Mapping[str, Any]) -> Sandbox:
    """See `World.open_sandbox`."""

  def task_sandbox(self, task: WorldTask) -> Sandbox:
    """The tools of a task over its initial state, as a model has them that acts in it."""
    # Called twice by an episode, which needs two independent states.
    return self.open_sandbox(self.sandbox_record(task, ()))

  def episode(self, task: WorldTask) -> TaskEpisode:
    """See `World.episode`."""
    return TaskEpisode(
      task,
      self.system_text(task),
      one_response=task.kind in self.one_response,
      listed=self.listed(task),
      open_sandbox=lambda: self.task_sandbox(task),
    )

  def session(self, task: WorldTask) -> SandboxSession:
    """See `World.session`."""
    return SandboxSession(self.system_text(task), self.task_sandbox(task))


def _answers(text: str, answer: str) -> bool:
  """Whether a response says something: after its thoughts, or without any."""
  return bool(answer.strip()) and ('</think>' in text or '<think>' not in text)


def _outputs_message(outputs: Sequence[str]) -> Message:
  """The user message in which the outputs of a response's calls are shown to the model."""
  return Message('user', '\n'.join(map(tool_response, outputs)))
