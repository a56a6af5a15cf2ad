"""Acts tasks of a world out with a model: `act` with our engine, `act_through` with any backend.

All tasks are acted out together: while one waits for its response, the others are answered.
"""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcore_jax.chat.encoding import encode_rendered
from dcore_jax.chat.messages import Message, split_reasoning
from dcore_jax.chat.template import render_prompt
from dcore_jax.chat.thoughts import opened_thoughts, with_opening
from dcore_jax.rollout.backends import TOO_LONG, Backend, ChatRequest
from dcore_jax.rollout.engine import Completion, Engine, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.worlds.environment import Episode, Outcome, World, WorldTask


class Exchange(NamedTuple):
  """A prompt as token ids, and the completion that was sampled for it."""

  prompt: np.ndarray  # int32 [n]
  completion: Completion


@dataclasses.dataclass
class Trajectory:
  """One finished episode.

  Attributes:
    task: what was asked for.
    outcome: the world's verdict.
    texts: the assistant's whole responses in order, with the tag by which a prompt has opened their
      thoughts.
    reasonings: the thoughts of each response; '' where it has none.
    reasoning_tokens: the number of tokens of each reasoning.
    unfinished: how many responses were cut off by the token budget.
    messages: the conversation as prompts showed it, without thoughts.
    exchanges: the responses as they were sampled; empty behind an endpoint.
  """

  task: WorldTask
  outcome: Outcome
  texts: list[str]
  reasonings: list[str]
  reasoning_tokens: list[int]
  unfinished: int
  messages: list[Message]
  exchanges: list[Exchange]


def thoughts(text: str, finished: bool) -> str:
  """The thoughts of a response.

  An unclosed block counts, because it is what the model did instead of answering. So does a text
  without tags that was cut off, because some templates open the block in the prompt. A whole
  response without tags is an answer.
  """
  if '</think>' in text:
    return split_reasoning(text)[0]
  return text if '<think>' in text or not finished else ''


@dataclasses.dataclass
class _Acted:
  """One task while it is acted out: what `Trajectory` will say of it."""

  task: WorldTask
  episode: Episode
  key: tuple[int, ...]
  texts: list[str] = dataclasses.field(default_factory=list)
  reasonings: list[str] = dataclasses.field(default_factory=list)
  reasoning_tokens: list[int] = dataclasses.field(default_factory=list)
  unfinished: int = 0
  exchanges: list[Exchange] = dataclasses.field(default_factory=list)

  @property
  def next_key(self) -> tuple[int, ...]:
    """Names the random stream of the next response."""
    # The task's key and the number of the response: streams do not depend on scheduling.
    return (*self.key, len(self.texts))

  def trajectory(self) -> Trajectory:
    """The finished episode, with what was sampled in it."""
    return Trajectory(
      task=self.task,
      outcome=self.episode.outcome(),
      texts=self.texts,
      reasonings=self.reasonings,
      reasoning_tokens=self.reasoning_tokens,
      unfinished=self.unfinished,
      messages=self.episode.messages,
      exchanges=self.exchanges,
    )


def stream_names(tasks: Sequence[WorldTask]) -> list[tuple[int, ...]]:
  """(A hash of the kind's name, the place among the tasks of the kind) of each task.

  Tasks of two kinds share no random numbers, and what is sampled for one kind does not depend on
  which others there are.
  """
  counts: collections.Counter[str] = collections.Counter()
  names = []
  for task in tasks:
    names.append((zlib.crc32(task.kind.encode()), counts[task.kind]))
    counts[task.kind] += 1
  return names


class _Acting:
  """Tasks that are acted out together, and which of them waits for a response."""

  def __init__(
    self,
    world: World,
    tasks: Sequence[WorldTask],
    keys: Sequence[tuple[int, ...]] | None,
    progress: Callable[[int], Any] | None,
  ):
    if keys is None:
      keys = stream_names(tasks)
    self.acted = [
      _Acted(task, world.episode(task), key) for task, key in zip(tasks, keys, strict=True)
    ]
    # Deque: conversations go back to the front, new tasks wait behind them.
    self._waiting = collections.deque(range(len(tasks)))
    self._progress = progress

  def next(self) -> int | None:
    """The number of a task that waits for a response; None where none does."""
    # A conversation that has begun stands in front.
    return self._waiting.popleft() if self._waiting else None

  def take(self, number: int, text: str, reasoning_tokens: int, finished: bool) -> None:
    """Runs the calls of a response; the task waits again unless that was its end."""
    # Whole texts, thoughts included: reports and analyses show them.
    acted = self.acted[number]
    acted.texts.append(text)
    acted.reasonings.append(thoughts(text, finished))
    acted.reasoning_tokens.append(reasoning_tokens)
    acted.unfinished += not finished
    # A text without tags that was cut off is thoughts or half an answer. The world must not take it
    # for an answer, so it is shown a block that was never closed.
    acted.episode.step(text if finished or 'think>' in text else '<think>\n' + text)
    if acted.episode.done:
      self._finished_one()
    else:
      # Before new tasks, because the engine still holds the conversation so far.
      self._waiting.appendleft(number)

  def stop(self, number: int, reason: str) -> None:
    """Ends a task as a failure."""
    # The world counts it as a failure; the caller goes on with the other tasks.
    self.acted[number].episode.stop(reason)
    self._finished_one()

  def trajectories(self) -> list[Trajectory]:
    """The finished episodes in the order of the tasks."""
    return [acted.trajectory() for acted in self.acted]

  def _finished_one(self) -> None:
    if self._progress is not None:
      self._progress(1)


def act(
  engine: Engine,
  tokenizer: Any,
  world: World,
  tasks: Sequence[WorldTask],
  sampling: SamplingParams,
  progress: Callable[[int], Any] | None = None,
  *,
  keys: Sequence[tuple[int, ...]] | None = None,
) -> list[Trajectory]:
  """Acts out all tasks together on the engine's lanes.

  The next prompt of an episode shows the answer without its thoughts, so it does not continue the
  tokens that were sampled. It continues the prompt before it, and only what is new is prefilled.

  Args:
    engine: the model.
    tokenizer: its tokenizer, whose chat template renders the prompts.
    world: the world that made the tasks.
    tasks: what to do.
    sampling: how responses are drawn.
    progress: called with 1 for every finished task.
    keys: names the random stream of each task, by default its kind and its place among the tasks of
      this kind. The number of the response is appended.

  Returns:
    The trajectories in the order of the tasks. A task whose prompt does not fit the engine is a
    failure with the reason `TOO_LONG`.
  """
  acting = _Acting(world, tasks, keys, progress)
  # Prompts of the tasks that are being answered, int32 [n] each.
  prompts: dict[int, np.ndarray] = {}
  # What these prompts end in where they have opened the thoughts; '' where they have not.
  openings: dict[int, str] = {}
  count_reasoning = _TokenCounter(tokenizer)

  def source(free: int) -> list[tuple[int, Request]]:
    """Gives the engine the prompts of tasks that wait."""
    requests = []
    while len(requests) < free:
      number = acting.next()
      if number is None:
        break
      acted = acting.acted[number]
      # Rendered anew each time, since the template drops earlier thoughts.
      text = render_prompt(tokenizer, acted.episode.messages)
      prompt = encode_rendered(tokenizer, text)
      # A response of a hundred calls is followed by a hundred outputs, so any prompt can grow too
      # long.
      if len(prompt) >= engine.max_len:
        acting.stop(number, TOO_LONG)
        continue
      # Kept until the answer comes: a trainer needs the ids, not the text.
      prompts[number] = np.array(prompt, np.int32)
      openings[number] = opened_thoughts(text)
      requests.append((number, Request(prompts[number], acted.next_key)))
    return requests

  for number, completion in engine.stream(source, sampling):
    exchange = Exchange(prompts.pop(number), completion)
    acting.acted[number].exchanges.append(exchange)
    # The stop token ends the turn, and is no part of the text.
    tokens = completion.tokens[:-1] if completion.finished else completion.tokens
    # Special tokens are kept: the tags of thoughts and calls may be among them.
    said = tokenizer.decode(tokens, skip_special_tokens=False)
    text = with_opening(said, openings.pop(number))
    # Whether the response holds the opening tag itself: then it is no part of the reasoning.
    tagged = text == said
    length = count_reasoning.of_tokens(tokens, text, completion.finished, tagged=tagged)
    acting.take(number, text, length, completion.finished)
  return acting.trajectories()


def act_through(
  backend: Backend,
  tokenizer: Any,
  world: World,
  tasks: Sequence[WorldTask],
  sampling: SamplingParams,
  progress: Callable[[int], Any] | None = None,
) -> list[Trajectory]:
  """As `act`, with any backend: a model behind an endpoint shows its text, and no tokens.

  Args:
    backend: answers; its own template renders the prompts.
    tokenizer: counts the tokens of reasonings.
    world, tasks, sampling, progress: see `act`.

  Returns:
    The trajectories in the order of the tasks, without exchanges. A task whose prompt is refused
    or never answered is a failure with that reason.

  Raises:
    ConnectionError: an endpoint that stays away, see `OpenAIBackend`.
  """
  # Without keys, the random streams follow the places of the tasks.
  acting = _Acting(world, tasks, None, progress)
  count_reasoning = _TokenCounter(tokenizer)

  def source(free: int) -> list[tuple[int, ChatRequest]]:
    """Gives the backend the conversations of tasks that wait."""
    requests = []
    while len(requests) < free:
      number = acting.next()
      if number is None:
        break
      acted = acting.acted[number]
      # No tools beside the messages: the system message lists them in the world's own form.
      requests.append((number, ChatRequest(tuple(acted.episode.messages), acted.next_key)))
    return requests

  for number, reply in backend.stream(source, sampling):
    if reply.error:
      # The kind of error alone: behind the colon stands the endpoint's message.
      acting.stop(number, reply.error.partition(':')[0])
      continue
    length = count_reasoning.of_text(reply.text, reply.finished)
    acting.take(number, reply.text, length, reply.finished)
  return acting.trajectories()


class _TokenCounter:
  """Counts the tokens of a response between its tags, line breaks included."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    end = tokenizer.convert_tokens_to_ids('</think>')
    # A tokenizer for which the tag is several tokens answers None, or the unknown token's id.
    self._think_end = None if end == tokenizer.unk_token_id else end

  def of_text(self, text: str, finished: bool) -> int:
    """Counts the tokens between the tags of a text, by tokenizing it anew."""
    inside, closed, _ = text.partition('</think>')
    if not closed:
      inside = thoughts(text, finished)
    inside = inside.removeprefix('<think>')
    return len(self._tokenizer(inside, add_special_tokens=False)['input_ids'])

  def of_tokens(self, tokens: np.ndarray, text: str, finished: bool, *, tagged: bool = True) -> int:
    """The same for a response as token ids, int32 [n], whose text is `text`.

    Without `tagged` the opening tag of the text is not among the tokens.
    """
    if self._think_end is None:
      return self.of_text(text, finished)
    # By the tag's id: tokenizing the text anew may split it elsewhere.
    ends = np.flatnonzero(tokens == self._think_end)
    if len(ends):
      before = int(ends[0])
    elif thoughts(text, finished):
      before = len(tokens)
    else:
      return 0
    return max(0, before - tagged)  # the opening tag is one token
