"""What every world offers: tasks that can be shown to a model, acted in step by step, and judged by the state left behind."""

import dataclasses
from typing import Any, Protocol

from dcore_jax.chat.messages import Message, ToolCall


@dataclasses.dataclass(frozen=True)
class Turn:
  """One user turn with its reference solution.

  `subtasks` are the reference decomposition (one line each), `calls[i]` solves `subtasks[i]`, `responses[i]` is the
  recorded output of that call. `answer` is the reference text that ends the turn: a report, or a refusal when `calls`
  is empty because nothing fits.
  """

  query: str
  calls: tuple[ToolCall, ...]
  responses: tuple[str, ...]
  subtasks: tuple[str, ...]
  answer: str


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How an episode ended. `reason` says in a few words why it is not correct ('' when it is)."""

  correct: bool
  reason: str
  steps: int  # assistant messages


class Episode(Protocol):
  """One task being acted in. `messages` is the conversation as the next prompt must show it (no reasoning replayed)."""

  messages: list[Message]
  done: bool

  def step(self, text: str) -> None:
    """Takes the assistant's whole text, runs its calls, appends the answer and the tool responses."""

  def stop(self, reason: str) -> None:
    """Ends the episode as a failure from outside, e.g. because its prompt has grown too long."""

  def outcome(self) -> Outcome:
    """Judges the finished episode."""


class Session(Protocol):
  """A task's tools and state without its request, for requests of one's own: nothing is judged, and what was done stays done.

  `messages` is the conversation, `asked` whether the assistant is the next to speak, `state` what the calls act on.
  """

  messages: list[Message]
  asked: bool
  state: Any

  def ask(self, text: str) -> None:
    """The user's next request."""

  def step(self, text: str) -> None:
    """Takes the assistant's whole text and runs its calls; text without calls, or too many steps, end its turn."""


class World(Protocol):
  """A source of tasks, deterministic from a seed."""

  def tasks(self, kind: str, count: int, *, seed: int, split: str) -> list[Any]:
    """`count` tasks of one kind from the 'train' or 'eval' split, which share no entities."""

  def episode(self, task: Any) -> Episode:
    """A fresh episode of one task."""

  def session(self, task: Any) -> Session:
    """A fresh session on its tools and state."""


class Sandbox(Protocol):
  """A world's tools over a state of their own, for calls that do not come from an episode."""

  state: Any  # plain data, compared with ==

  def run(self, call: ToolCall) -> str:
    """Executes a call -> its output. What is wrong with a call is an output too; nothing that a model wrote raises."""
