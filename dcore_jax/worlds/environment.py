"""What every world offers: tasks for a model, a way to act in them, and a verdict on the result.

`worlds/acting.py` holds a base class that fills in most of `World`, and `worlds/registry.py` gives
worlds their names.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from dcore_jax.chat.messages import Message, ToolCall


@dataclasses.dataclass(frozen=True)
class UserTurn:
  """One request of the user with its reference solution.

  Attributes:
    query: the request in words.
    calls: the reference calls; empty where no listed tool can do what is asked.
    responses: the output of each call when it was executed.
    subtasks: the reference decomposition, one line a subtask.
    answer: the text that ends the turn: a report of what was done, or a refusal without calls.
  """

  query: str
  # Calls are data: parsed, compared and run, never evaluated as Python.
  calls: tuple[ToolCall, ...]
  # Kept with the task, so that nobody has to run the world to write training rows.
  responses: tuple[str, ...]
  # A reference for decompositions; worlds know how they have put a request together.
  subtasks: tuple[str, ...]
  # Trained as it is, so that every row of a world ends in the world's own words.
  answer: str


@dataclasses.dataclass(frozen=True)
class WorldTask:
  """What everything outside a world reads of its tasks; a world's own class adds the rest.

  Attributes:
    id: unique over all worlds, splits and seeds.
    kind: one of the world's `kinds`.
    turns: the user's requests in order, at least one.
  """

  id: str
  # Results are shown by kind.
  kind: str
  # Requests of later turns may speak of what earlier ones did.
  turns: tuple[UserTurn, ...]

  @property
  def steps(self) -> int:
    """The number of reference calls over all turns."""
    # One call a step: how many of them a response holds is the model's choice.
    return sum(len(turn.calls) for turn in self.turns)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How an episode ended.

  Attributes:
    correct: whether the task was solved.
    reason: why it was not, in a few words; '' where it was.
    steps: the number of assistant messages.
  """

  # A verdict, not a score: rewards are made from it elsewhere.
  correct: bool
  # Reasons are counted, so that they must be few and short.
  reason: str
  steps: int


class Sandbox(Protocol):
  """A world's tools over a state of their own.

  Attributes:
    state: plain data; two states are equal where `==` says so.
  """

  # Equality of states is how two ways to reach a goal are compared.
  state: Any

  def run(self, call: ToolCall) -> str:
    """Executes a call and returns its output.

    A wrong call has an output too, which says what is wrong: nothing that a model wrote raises.
    """


class Episode(Protocol):
  """One task while a model acts in it.

  Attributes:
    messages: the conversation as the next prompt must show it, without earlier reasoning.
    done: whether the episode is over.
  """

  # The caller renders prompts: a world knows neither templates nor tokens.
  messages: list[Message]
  done: bool

  def step(self, text: str) -> None:
    """Takes the assistant's whole text, runs its calls, and appends answer and tool responses."""

  def stop(self, reason: str) -> None:
    """Ends the episode as a failure, for example because its prompt has grown too long."""

  def outcome(self) -> Outcome:
    """Judges the finished episode."""


class Session(Protocol):
  """A task's tools and state for requests that a person makes up: nothing is judged.

  Attributes:
    messages: the conversation.
    asked: whether the assistant is the next to speak.
    state: what the calls act on; it keeps what they have done.
  """

  messages: list[Message]
  # Whose turn it is: a session has no end of its own.
  asked: bool
  state: Any

  def ask(self, text: str) -> None:
    """Takes the user's next request."""

  def step(self, text: str) -> None:
    """Takes the assistant's whole text and runs its calls.

    A text without calls ends the assistant's turn, and so do too many steps.
    """


class World(Protocol):
  """A source of tasks, deterministic from a seed.

  A world's class is called with `max_subtasks` (the largest number of subtasks in one request) and
  with the options that a config gives it; see `worlds.registry.make_world`.

  Attributes:
    kinds: the kinds of its tasks, in the order in which results show them.
    one_response: the kinds that are judged on their first response. All calls of such a task go
      out together, as in BFCL's single-turn categories.
  """

  # An order, since tables and charts list kinds in it.
  kinds: Sequence[str]
  # Kept by the world, since only it knows what its verdict needs.
  one_response: Collection[str]

  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[WorldTask]:
    """Makes `count` tasks of one kind from the 'train' or the 'eval' split.

    The two splits have no task in common. The first tasks do not depend on `count`.

    Raises:
      ValueError: an unknown kind or split.
    """

  def system_text(self, task: WorldTask) -> str:
    """The system message of a task: its policy, and the tools that the model may call."""

  def episode(self, task: WorldTask) -> Episode:
    """Starts a task afresh."""

  def session(self, task: WorldTask) -> Session:
    """Starts a session on a task's tools and initial state."""

  def sandbox_record(self, task: WorldTask, done: Sequence[ToolCall]) -> dict[str, Any]:
    """The tools and state of a task after the calls `done`, as JSON data.

    The entry 'name' is the world's name in the registry; `open_sandbox` reads the others.
    """

  # Static: distillation opens sandboxes from files, without a world.
  @staticmethod
  def open_sandbox(record: Mapping[str, Any]) -> Sandbox:
    """Makes a fresh sandbox from a `sandbox_record`; no world object is needed for it.

    Raises:
      KeyError: an entry is missing.
      ValueError: an entry is wrong, or the world is not installed.
    """
