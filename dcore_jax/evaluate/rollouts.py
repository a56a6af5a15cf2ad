"""Evaluation in a world: every task is acted out to its end, and the responses are measured on the way."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcore_jax.chat.messages import Message, split_reasoning
from dcore_jax.chat.template import render_prompt
from dcore_jax.evaluate.behaviours import behaviour_counts
from dcore_jax.evaluate.lazy_reasoning import count_reflections, lazy_ratio
from dcore_jax.rollout.backends import TOO_LONG, Backend, ChatRequest
from dcore_jax.rollout.engine import Completion, Engine, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.worlds.environment import Episode, Outcome, World


class Exchange(NamedTuple):
  """A prompt as token ids and what was sampled behind it."""

  prompt: np.ndarray  # int32 [n]
  completion: Completion


@dataclasses.dataclass
class Trajectory:
  """One finished episode. `texts` are whole assistant responses, `reasonings` what they think, `reasoning_tokens` the lengths of
  that, `exchanges` the same responses as they were sampled."""

  task: Any
  outcome: Outcome
  texts: list[str]
  reasonings: list[str]
  reasoning_tokens: list[int]
  unfinished: int  # responses cut off by the token budget
  messages: list[Message]
  exchanges: list[Exchange]


def thoughts(text: str, finished: bool) -> str:
  """What a response thinks. An unclosed block counts: it is what the model did instead of answering; and so does a text without
  tags that was cut off, as some templates open the block in the prompt. A whole response without tags is an answer."""
  if '</think>' in text:
    return split_reasoning(text)[0]
  return text if '<think>' in text or not finished else ''


class _Acting:
  """Tasks that are acted out together: which is to be answered next, and what was answered."""

  def __init__(
    self,
    world: World,
    tasks: Sequence[Any],
    keys: Sequence[tuple[int, ...]] | None,
    progress: Callable[[int], Any] | None,
  ):
    self.tasks, self.keys = (
      tasks,
      [(number,) for number in range(len(tasks))] if keys is None else keys,
    )
    self.episodes: list[Episode] = [world.episode(task) for task in tasks]
    self.texts: list[list[str]] = [[] for _ in tasks]
    self.reasonings: list[list[str]] = [[] for _ in tasks]
    self.lengths: list[list[int]] = [[] for _ in tasks]
    self.unfinished = [0] * len(tasks)
    self._waiting = collections.deque(range(len(tasks)))
    self._progress = progress or (lambda count: None)

  def next(self) -> int | None:
    """The number of a task whose conversation waits for a response, None while there is none."""
    return self._waiting.popleft() if self._waiting else None

  def key(self, number: int) -> tuple[int, ...]:
    """Names the random stream of the task's next response."""
    return (*self.keys[number], len(self.texts[number]))

  def take(self, number: int, text: str, reasoning_tokens: int, finished: bool) -> None:
    """Runs the calls of a response; the task waits again unless that was its end."""
    self.texts[number].append(text)
    self.reasonings[number].append(thoughts(text, finished))
    self.lengths[number].append(reasoning_tokens)
    self.unfinished[number] += not finished
    # Without tags and cut off, it is thoughts or half an answer: for the world a block that was never closed.
    self.episodes[number].step(text if finished or 'think>' in text else '<think>\n' + text)
    if self.episodes[number].done:
      self._progress(1)
    else:
      self._waiting.appendleft(
        number
      )  # before new tasks: its conversation is still held where it was computed

  def stop(self, number: int, reason: str) -> None:
    self.episodes[number].stop(reason)
    self._progress(1)

  def trajectories(self, exchanges: Sequence[list[Exchange]]) -> list[Trajectory]:
    """In the order of the tasks."""
    return [
      Trajectory(task, episode.outcome(), *rest, episode.messages, made)
      for task, episode, *rest, made in zip(
        self.tasks,
        self.episodes,
        self.texts,
        self.reasonings,
        self.lengths,
        self.unfinished,
        exchanges,
      )
    ]


def act(
  engine: Engine,
  tokenizer: Any,
  world: World,
  tasks: Sequence[Any],
  sampling: SamplingParams,
  progress: Callable[[int], Any] | None = None,
  *,
  keys: Sequence[tuple[int, ...]] | None = None,
) -> list[Trajectory]:
  """Acts out all tasks together on the engine's lanes; trajectories come back in the order of the tasks.

  The next prompt of an episode shows the answer without its thoughts, so that it does not continue the branch that was sampled
  (`Engine.extend` would keep them in view): it continues the trunk of the prompt before, and only what is new is prefilled.

  Args:
    engine: the model.
    tokenizer: its tokenizer; its chat template renders the prompts.
    world: where the tasks come from.
    tasks: what to do.
    sampling: how responses are drawn.
    progress: told 1 for every finished task.
    keys: names the random stream of each task, by default its place; the number of the response is added.
  """
  acting = _Acting(world, tasks, keys, progress)
  exchanges: list[list[Exchange]] = [[] for _ in tasks]
  asked: dict[int, np.ndarray] = {}  # the prompts under way
  think_end = tokenizer.convert_tokens_to_ids(
    '</think>'
  )  # None, or that of an unknown token, where it takes several

  def source(free: int) -> list[tuple[int, Request]]:
    requests = []
    while len(requests) < free and (number := acting.next()) is not None:
      messages = acting.episodes[number].messages
      prompt = tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False)['input_ids']
      if (
        len(prompt) >= engine.max_len
      ):  # a response of a hundred calls is answered by a hundred outputs
        acting.stop(number, TOO_LONG)
        continue
      asked[number] = np.array(prompt, np.int32)
      requests.append((number, Request(asked[number], acting.key(number))))
    return requests

  for number, completion in engine.stream(source, sampling):
    exchanges[number].append(Exchange(asked.pop(number), completion))
    tokens = completion.tokens[:-1] if completion.finished else completion.tokens
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    if think_end in (None, tokenizer.unk_token_id):
      length = _count(tokenizer, text, completion.finished)
    else:
      ends = np.flatnonzero(tokens == think_end)
      # Without a closing tag all of it, or nothing; the opening tag is one token.
      whole = len(tokens) if thoughts(text, completion.finished) else 1
      length = max(0, (int(ends[0]) if len(ends) else whole) - 1)
    acting.take(number, text, length, completion.finished)
  return acting.trajectories(exchanges)


def act_through(
  backend: Backend,
  tokenizer: Any,
  world: World,
  tasks: Sequence[Any],
  sampling: SamplingParams,
  progress: Callable[[int], Any] | None = None,
) -> list[Trajectory]:
  """As `act`, with any backend: the model may be behind an endpoint, which shows text and no tokens (no `exchanges`).

  Args:
    backend: answers; its own template renders the prompts.
    tokenizer: counts the tokens of reasonings.
    world, tasks, sampling, progress: see `act`.

  A task whose prompt is refused, or never answered, is a failure with that reason.

  Raises:
    ConnectionError: an endpoint that stays away, see `OpenAIBackend`.
  """
  acting = _Acting(world, tasks, None, progress)

  def source(free: int) -> list[tuple[int, ChatRequest]]:
    requests = []
    while len(requests) < free and (number := acting.next()) is not None:
      requests.append(
        (number, ChatRequest(tuple(acting.episodes[number].messages), acting.key(number)))
      )
    return requests

  for number, reply in backend.stream(source, sampling):
    if reply.error:
      acting.stop(number, reply.error.partition(':')[0])
      continue
    acting.take(number, reply.text, _count(tokenizer, reply.text, reply.finished), reply.finished)
  return acting.trajectories([[] for _ in tasks])


def _count(tokenizer: Any, text: str, finished: bool) -> int:
  """Tokens between the tags, line breaks included."""
  inside, closed, _ = text.partition('</think>')
  inside = inside if closed else thoughts(text, finished)
  return len(tokenizer(inside.removeprefix('<think>'), add_special_tokens=False)['input_ids'])


def measure(trajectories: dict[str, list[Trajectory]]) -> dict[str, Any]:
  """Figures of one stage by kind, in the shape of `summary.json`.

  Lazy reasoning is counted per response, with the verdict of the whole episode, over right and wrong ones. What could not be
  measured, as no task came to a response, is None.
  `decomposition_rate` is the share of requests of several subtasks whose first response announces a decomposition.
  """
  accuracy, lazy, count, reasons, unfinished = {}, {}, {}, {}, {}
  for kind, group in trajectories.items():
    accuracy[kind] = float(np.mean([t.outcome.correct for t in group]))
    count[kind] = len(group)
    wrong = [not t.outcome.correct for t in group for _ in t.texts]
    tokens = [n for t in group for n in t.reasoning_tokens]
    lazy[kind] = lazy_ratio([r for t in group for r in t.reasonings], tokens, wrong)['ratio']
    reasons[kind] = dict(
      collections.Counter(t.outcome.reason for t in group if t.outcome.reason).most_common()
    )
    unfinished[kind] = sum(t.unfinished for t in group)
  everything = [t for group in trajectories.values() for t in group]
  first = [
    r
    for kind in ('sequential', 'parallel')
    for t in trajectories.get(kind, [])
    for r in t.reasonings[:1]
  ]
  reasonings = [r for t in everything for r in t.reasonings]
  behaviours = behaviour_counts(reasonings)
  return {
    'accuracy': accuracy,
    'lazy_ratio': lazy,
    'n': count,
    'failures': reasons,
    'unfinished': unfinished,
    'accuracy_by_subtasks': {
      kind: _by_subtasks(trajectories.get(kind, [])) for kind in ('sequential', 'parallel')
    },
    'decomposition_rate': float(np.mean(behaviour_counts(first)['decomposition'] > 0))
    if first
    else None,
    'reflections_per_response': _mean([count_reflections(r) for r in reasonings]),
    'reasoning_tokens_mean': _mean([n for t in everything for n in t.reasoning_tokens]),
    'behaviours': {name: _mean(counts) for name, counts in behaviours.items()},
  }


def _mean(values: Sequence[float]) -> float | None:
  """None where no task came to a response."""
  return float(np.mean(values)) if len(values) else None


def _by_subtasks(group: list[Trajectory]) -> dict[str, dict[str, float]]:
  """Accuracy and number of tasks by their number of reference calls."""
  sizes = sorted({t.task.steps for t in group})
  return {
    str(k): {
      'accuracy': float(np.mean([t.outcome.correct for t in group if t.task.steps == k])),
      'n': sum(t.task.steps == k for t in group),
    }
    for k in sizes
  }
