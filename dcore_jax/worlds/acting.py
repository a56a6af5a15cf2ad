"""Acting in a world whose tools a sandbox runs: tasks with a verdict, and sessions without."""

from collections.abc import Callable, Collection, Sequence

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import ToolCallError, calls_equal, parse_calls, tool_response
from dcore_jax.worlds.environment import Outcome, Sandbox, Turn

SESSION_STEPS = 8  # assistant messages to one request of a session: twice the longest plan
SPARE_STEPS = (
  2  # assistant messages of a turn beyond its reference calls and report, before it is stopped
)
UNREADABLE = '{"error": "unreadable calls"}'  # a session's answer to calls that cannot be read


class TaskEpisode:
  """One task being acted in; see `worlds.environment.Episode`.

  Args:
    name: of the task.
    system: the system message.
    turns: what is asked for, with reference solutions.
    one_response: whether the first response is judged, as in BFCL's single-turn categories; else turns go on to a report.
    listed: names of the tools that `system` lists.
    open_sandbox: makes them over the initial state; the model has one of its own, and the reference another.
  """

  def __init__(
    self,
    name: str,
    system: str,
    turns: Sequence[Turn],
    *,
    one_response: bool,
    listed: Collection[str],
    open_sandbox: Callable[[], Sandbox],
  ):
    self.messages = [Message('system', system), Message('user', turns[0].query)]
    self.done = False
    self._name, self._turns, self._one_response, self._listed = (
      name,
      tuple(turns),
      one_response,
      listed,
    )
    self._sandbox, self._reference = open_sandbox(), open_sandbox()
    self._turn, self._steps, self._steps_in_turn = 0, 0, 0
    self._responses: list[str] = []  # of all turns: BFCL counts earlier outputs as evidence too
    self._failure = ''

  def step(self, text: str) -> None:
    if self.done:
      raise ValueError(f'episode of {self._name} is over')
    _, answer = split_reasoning(text)
    self._steps += 1
    self._steps_in_turn += 1
    turn = self._turns[self._turn]
    self.messages.append(Message('assistant', answer))
    try:
      calls = parse_calls(answer)
    except ToolCallError:
      # Stricter than BFCL, for which an undecodable call counts as a text that ends the turn.
      return self._fail('unreadable calls')
    if self._one_response:
      self._failure = self._judge_response(text, answer, calls, turn)
      self.done = True
    elif calls:
      self._run(calls)
      if self._steps_in_turn >= len(turn.calls) + 1 + SPARE_STEPS:
        self._fail('too many steps')
    else:
      self._end_turn(text, answer)

  def stop(self, reason: str) -> None:
    self._fail(reason)

  def outcome(self) -> Outcome:
    if not self.done:
      return Outcome(False, 'unfinished', self._steps)
    return Outcome(not self._failure, self._failure, self._steps)

  def _run(self, calls: list[ToolCall]) -> None:
    outputs = [self._sandbox.run(call) for call in calls]
    self._responses += outputs
    self.messages.append(_shown(outputs))

  def _judge_response(
    self, text: str, answer: str, calls: list[ToolCall] | None, turn: Turn
  ) -> str:
    if not turn.calls:
      if calls:
        return 'called a tool'
      return '' if _answers(text, answer) else 'no answer'
    if not calls:
      return 'no calls'
    unlisted = [call.name for call in calls if call.name not in self._listed]
    if unlisted:
      return f'tool {unlisted[0][:40]!r} is not listed'
    if not calls_equal(calls, list(turn.calls), ordered=False):
      return 'wrong calls'
    self._run(calls)
    self._advance_reference(turn)
    return self._state_difference(turn)

  def _advance_reference(self, turn: Turn) -> None:
    for call in turn.calls:
      self._reference.run(call)

  def _end_turn(self, text: str, answer: str) -> None:
    turn = self._turns[self._turn]
    self._advance_reference(turn)
    failure = self._state_difference(turn)
    if not failure and not _answers(text, answer):
      failure = 'no answer'
    if failure:
      return self._fail(failure)
    self._turn += 1
    self._steps_in_turn = 0
    if self._turn == len(self._turns):
      self.done = True
    else:
      self.messages.append(Message('user', self._turns[self._turn].query))

  def _state_difference(self, turn: Turn) -> str:
    """BFCL's two multi-turn checks: equal state, and the reference's outputs among the model's (method: section 5.1)."""
    if self._sandbox.state != self._reference.state:
      return 'wrong state'
    return '' if all(r in self._responses for r in turn.responses) else 'missing output'

  def _fail(self, reason: str) -> None:
    self._failure, self.done = reason, True


class SandboxSession:
  """A sandbox's tools for requests of one's own; see `worlds.environment.Session`."""

  def __init__(self, system: str, sandbox: Sandbox):
    self.messages = [Message('system', system)]
    self.asked = False
    self._sandbox, self._steps = sandbox, 0

  @property
  def state(self) -> object:
    return self._sandbox.state

  def ask(self, text: str) -> None:
    self.messages.append(Message('user', text))
    self.asked, self._steps = True, 0

  def step(self, text: str) -> None:
    _, answer = split_reasoning(text)
    self._steps += 1
    self.messages.append(Message('assistant', answer))
    try:
      outputs = [self._sandbox.run(call) for call in parse_calls(answer) or ()]
    except ToolCallError:
      outputs = [UNREADABLE]
    if outputs:
      self.messages.append(_shown(outputs))
    self.asked = bool(outputs) and self._steps < SESSION_STEPS


def _answers(text: str, answer: str) -> bool:
  """Whether a response says something: behind its thoughts, or without any."""
  return bool(answer.strip()) and ('</think>' in text or '<think>' not in text)


def _shown(outputs: Sequence[str]) -> Message:
  return Message('user', '\n'.join(map(tool_response, outputs)))
