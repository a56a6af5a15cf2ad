"""ToolWorld as an environment: shows a task, runs the model's calls, and judges by the state they leave behind."""
import copy
import json
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import ToolCallError, calls_equal, parse_calls, tool_response
from dcore_jax.worlds.environment import Outcome
from dcore_jax.worlds.toolworld.tasks import ONE_RESPONSE, Task, make_task
from dcore_jax.worlds.toolworld.tools import TOOLS, State, execute

SESSION_STEPS = 8  # assistant messages to one request of a session: twice the longest plan
SPARE_STEPS = 2  # assistant messages of a turn beyond its reference calls and report, before it is stopped


def system_text(task: Task) -> str:
  """Policy and one signature a line. Types are left out: they would double the prompt of a two-million-parameter model."""
  lines = [f'{name}({", ".join(TOOLS[name].parameters)})' for name in task.tools]
  return '\n'.join([task.policy, 'tools:', *lines])


class ToolWorldEpisode:
  """One task being acted in; see `worlds.environment.Episode`."""

  def __init__(self, task: Task):
    self.task = task
    self.messages = [Message('system', system_text(task)), Message('user', task.turns[0].query)]
    self.done = False
    self._state = copy.deepcopy(task.initial_state)
    self._reference = copy.deepcopy(task.initial_state)
    self._turn, self._steps, self._steps_in_turn = 0, 0, 0
    self._responses: list[str] = []  # of all turns: BFCL counts earlier outputs as evidence too
    self._failure = ''

  def step(self, text: str) -> None:
    if self.done:
      raise ValueError(f'episode of {self.task.id} is over')
    _, answer = split_reasoning(text)
    self._steps += 1
    self._steps_in_turn += 1
    turn = self.task.turns[self._turn]
    self.messages.append(Message('assistant', answer))
    try:
      calls = parse_calls(answer)
    except ToolCallError:
      # Stricter than BFCL, for which an undecodable call counts as a text that ends the turn.
      return self._fail('unreadable calls')
    if self.task.kind in ONE_RESPONSE:
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
    outputs = [json.dumps(_execute(self._state, self.task.tools, call)) for call in calls]
    self._responses += outputs
    self.messages.append(Message('user', '\n'.join(tool_response(output) for output in outputs)))

  def _judge_response(self, text: str, answer: str, calls: list[ToolCall] | None, turn) -> str:
    if not turn.calls:
      if calls:
        return 'called a tool'
      return '' if '</think>' in text and answer.strip() else 'no answer'
    if not calls:
      return 'no calls'
    unlisted = [call.name for call in calls if call.name not in self.task.tools]
    if unlisted:
      return f'tool {unlisted[0][:40]!r} is not listed'
    if not calls_equal(calls, list(turn.calls), ordered=False):
      return 'wrong calls'
    self._run(calls)
    self._advance_reference(turn)
    return self._state_difference(turn)

  def _advance_reference(self, turn) -> None:
    for call in turn.calls:
      execute(self._reference, call.name, call.arguments)

  def _end_turn(self, text: str, answer: str) -> None:
    turn = self.task.turns[self._turn]
    self._advance_reference(turn)
    failure = self._state_difference(turn)
    if not failure and not ('</think>' in text and answer.strip()):
      failure = 'no answer'
    if failure:
      return self._fail(failure)
    self._turn += 1
    self._steps_in_turn = 0
    if self._turn == len(self.task.turns):
      self.done = True
    else:
      self.messages.append(Message('user', self.task.turns[self._turn].query))

  def _state_difference(self, turn) -> str:
    """BFCL's two multi-turn checks: equal state, and the reference's outputs among the model's (method: section 5.1)."""
    if self._state != self._reference:
      return 'wrong state'
    return '' if all(r in self._responses for r in turn.responses) else 'missing output'

  def _fail(self, reason: str) -> None:
    self._failure, self.done = reason, True


class ToolWorldSession:
  """The tools and the state of one task, for requests of one's own: nothing is judged, and what was done stays done.

  `messages` is the conversation, `asked` whether the assistant is the next to speak, `state` what the calls act on.
  """

  def __init__(self, task: Task):
    self.messages = [Message('system', system_text(task))]
    self.asked = False
    self.state = copy.deepcopy(task.initial_state)
    self._task, self._steps = task, 0

  def ask(self, text: str) -> None:
    """The user's next request."""
    self.messages.append(Message('user', text))
    self.asked, self._steps = True, 0

  def step(self, text: str) -> None:
    """Takes the assistant's whole text and runs its calls; text without calls, or too many steps, end its turn."""
    _, answer = split_reasoning(text)
    self._steps += 1
    self.messages.append(Message('assistant', answer))
    try:
      outputs = [_execute(self.state, self._task.tools, call) for call in parse_calls(answer) or ()]
    except ToolCallError:
      outputs = [{'error': 'unreadable calls'}]
    if outputs:
      self.messages.append(Message('user', '\n'.join(tool_response(json.dumps(output)) for output in outputs)))
    self.asked = bool(outputs) and self._steps < SESSION_STEPS


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
    return [make_task(kind, i, seed=seed, split=split, max_subtasks=self.max_subtasks) for i in range(count)]

  def episode(self, task: Task) -> ToolWorldEpisode:
    return ToolWorldEpisode(task)

  def session(self, task: Task) -> ToolWorldSession:
    """The task's tools and state without its request."""
    return ToolWorldSession(task)
