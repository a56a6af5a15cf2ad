"""What reinforcement learning asks, and how answers are judged.

Two sources offer the same interface, so that the loop need not know which it has. `Questions` are
decision points, answered once and compared with a reference (the paper's setting). `Episodes` are
tasks of a world, acted out over all their turns and judged by the state that is left behind.
Letters: P prompts (items of a source), G rollouts of a prompt.
"""

import collections
import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dcore_jax.chat.encoding import encode_rendered
from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import render_prompt
from dcore_jax.chat.thoughts import opened_thoughts, with_opening
from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.learn import rewards
from dcore_jax.rollout.engine import Engine, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.streams import Stream
from dcore_jax.train.prompt_order import Label
from dcore_jax.train.rollout_batch import Rollout, RolloutBatch
from dcore_jax.worlds.environment import World
from dcore_jax.worlds.rollouts import Exchange, act


class RolloutSource(Protocol):
  """Items to ask about, by number.

  Attributes:
    kinds: what each item is, by which rewards are reported.
    labels: the task that each item belongs to.
    reward_bounds: the least and the largest reward of a rollout.
    fingerprint: tells whether a checkpoint was made from the same items.
    longest_prompt: tokens of the longest first prompt.
    longest_teacher_prompt: the same of the prompts that a teacher reads; 0 without one.
    responses: the most responses that a rollout has, or as many as are usual; shapes are compiled
      for this number.
  """

  kinds: list[str]
  labels: list[Label]
  reward_bounds: tuple[float, float]
  fingerprint: int
  longest_prompt: int
  longest_teacher_prompt: int
  responses: int

  def sample(
    self,
    engine: Engine | Stream,
    chosen: Sequence[int],
    keys: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
  ) -> list[Rollout]:
    """Makes a rollout for each entry of `chosen`, which as a rule names an item more than once.

    keys[i] names the random stream of the i-th rollout.
    """

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    """Scores the rollouts of the items `chosen`, equally many of each, item by item."""


# --- decision points ---


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A decision point with its prompt as token ids, int32 [n].

  `opening` is the tag by which the prompt opens the thoughts, '' where it does not. `taught` is the
  prompt that the teacher reads, int32, where there is one.
  """

  point: DecisionPoint
  tokens: np.ndarray
  opening: str = ''
  taught: np.ndarray | None = None


def encode_prompts(
  tokenizer: Any, points: Sequence[DecisionPoint], max_tokens: int, teacher: str = ''
) -> tuple[list[Prompt], int]:
  """Returns (prompts of at most `max_tokens` tokens, number of prompts dropped as longer).

  A prompt is dropped as well where the teacher's is longer.

  Args:
    tokenizer: the policy's.
    points: what to ask.
    max_tokens: of a prompt.
    teacher: what the teacher reads behind the last message; see `rl.teacher`. '' for none.
  """
  prompts = []
  for point in points:
    text = render_prompt(tokenizer, list(point.messages))
    tokens = np.array(encode_rendered(tokenizer, text), np.int32)
    taught = _taught_tokens(tokenizer, point, teacher) if teacher else None
    # Never truncated: a prompt without its end is another question.
    if max(len(tokens), 0 if taught is None else len(taught)) <= max_tokens:
      prompts.append(Prompt(point, tokens, opened_thoughts(text), taught))
  return prompts, len(points) - len(prompts)


def _taught_tokens(tokenizer: Any, point: DecisionPoint, teacher: str) -> np.ndarray:
  """The prompt with the reference in view."""
  *before, last = point.messages
  # Replaced and not formatted: requests and calls hold braces of their own.
  shown = last.content + teacher.replace('{reference}', point.reference)
  text = render_prompt(tokenizer, [*before, dataclasses.replace(last, content=shown)])
  return np.array(encode_rendered(tokenizer, text), np.int32)


def opening(point: DecisionPoint) -> str:
  """Returns a digest of how a task begins: its prompt up to the end of the first request.

  The later steps and turns of a dialogue all begin with it.
  """
  told = []
  for message in point.messages:
    # ToolRL's rows hold a dialogue in one message, whose requests each end with this tag.
    text, end, _ = message.content.partition('</user>')
    told.append(f'{message.role}: {text}')
    if message.role == 'user' or end:
      break
  return hashlib.sha256('\n'.join(told).encode()).hexdigest()


def first_request(messages: Sequence[Message]) -> str:
  """Returns what is asked first in a dialogue, whatever its system message says; '' for nothing."""
  for message in messages:
    if message.role == 'user':
      # ToolRL's rows hold a dialogue in one message.
      return message.content.partition('</user>')[0].strip()
  return ''


def _labels(prompts: Sequence[Prompt]) -> list[Label]:
  """Returns the labels of decision points; one that names no task is known by how it begins."""
  tasks = [prompt.point.task or opening(prompt.point) for prompt in prompts]
  kinds = collections.defaultdict(set)
  for task, prompt in zip(tasks, prompts, strict=True):
    kinds[task].add(prompt.point.task_kind or prompt.point.kind)
  labels = []
  for task, prompt in zip(tasks, prompts, strict=True):
    # A dialogue whose turns are of several kinds is of a kind of its own.
    kind = ' and '.join(sorted(kinds[task]))
    # Of the prompt itself, so that no other prompt has a part in what is sampled for this one.
    labels.append(Label(task=task, kind=kind, stream=zlib.crc32(prompt.tokens.tobytes())))
  return labels


class Questions:
  """Decision points with reference answers.

  Args:
    tokenizer: the policy's.
    prompts: from `encode_prompts`.
    reward: a name of `rewards.REWARDS`, which compares an answer with the reference.

  Raises:
    ValueError: an unknown reward, or a reference that it cannot read; now, and not at the step that
      draws it.
  """

  def __init__(self, tokenizer: Any, prompts: Sequence[Prompt], reward: str):
    self._tokenizer = tokenizer
    self._prompts = prompts
    self._reward = reward
    self.points = [prompt.point for prompt in prompts]
    # Rewards are reported by the kind of the point, which is finer than the kind of its task.
    self.kinds = [prompt.point.kind for prompt in prompts]
    self.labels = _labels(prompts)
    self.reward_bounds = rewards.BOUNDS
    self.responses = 1
    self.longest_prompt = max((len(prompt.tokens) for prompt in prompts), default=0)
    taught = [len(prompt.taught) for prompt in prompts if prompt.taught is not None]
    self.longest_teacher_prompt = max(taught, default=0)
    # Prompt and reference both shape the rewards: a run with other references is another run.
    contents = [prompt.tokens.tobytes() + prompt.point.reference.encode() for prompt in prompts]
    self.fingerprint = zlib.crc32(b'\n'.join(contents))
    references = [prompt.point.reference for prompt in prompts]
    # An answer counts as right if it earns what the reference itself would earn. The reference gets
    # empty thoughts, because rewards read whole answers.
    answers = [f'<think>\n \n</think>\n\n{reference}' for reference in references]
    best = rewards.batch_reward(reward, answers, references)
    self._best = np.asarray(best.correctness)

  def sample(
    self,
    engine: Engine | Stream,
    chosen: Sequence[int],
    keys: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
  ) -> list[Rollout]:
    """Answers each chosen decision point once."""
    prompts = [self._prompts[index].tokens for index in chosen]
    # The engine computes the prompt of a group once, since its requests hold equal tokens.
    requests = [Request(prompt, key) for prompt, key in zip(prompts, keys, strict=True)]
    completions = engine.generate(requests, sampling)
    # Rewards read text, in which special tokens would be words that the model did not mean.
    texts = self._tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    rollouts = []
    for index, completion, text in zip(chosen, completions, texts, strict=True):
      prompt = self._prompts[index]
      exchange = Exchange(prompt.tokens, completion)
      rollouts.append(
        Rollout(
          exchanges=[exchange],
          texts=[with_opening(text, prompt.opening)],
          teacher_prompt=prompt.taught,
        )
      )
    return rollouts

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    """Compares every answer with the reference of its item."""
    P = len(chosen)
    G = len(rollouts) // P
    references = []
    for index in chosen:
      # The rollouts of an item stand side by side.
      references += [self._prompts[index].point.reference] * G
    texts = [rollout.texts[0] for rollout in rollouts]
    reward = rewards.batch_reward(self._reward, texts, references, whole=True)
    correctness_PG = np.asarray(reward.correctness).reshape(P, G)
    return RolloutBatch(
      kinds=[self.kinds[index] for index in chosen],
      rollouts=rollouts,
      total_PG=np.asarray(reward.total).reshape(P, G),
      format_PG=np.asarray(reward.format).reshape(P, G),
      correctness_PG=correctness_PG,
      # Exact: the same function has computed both numbers from texts.
      right_PG=correctness_PG == self._best[list(chosen), None],
    )


# --- episodes ---


def short_tasks(
  tokenizer: Any, world: World, tasks: Sequence[Any], max_tokens: int
) -> tuple[list[Any], int]:
  """Returns (tasks whose first prompt has at most `max_tokens` tokens, number of tasks dropped)."""
  # Later prompts of an episode grow with its answers, and are not known yet.
  short = [task for task in tasks if _first_prompt_tokens(tokenizer, world, task) <= max_tokens]
  return short, len(tasks) - len(short)


def _first_prompt_tokens(tokenizer: Any, world: World, task: Any) -> int:
  text = render_prompt(tokenizer, world.episode(task).messages)
  return len(encode_rendered(tokenizer, text))


class Episodes:
  """Tasks of a world, acted out to their end.

  The reward is `rewards.state_reward`'s correctness: 3 where the state and the outputs that an
  episode leaves behind are the reference's and every response has closed its thoughts, else -3. Its
  format part is logged and not rewarded.
  """

  def __init__(self, tokenizer: Any, world: World, tasks: Sequence[Any]):
    self._tokenizer = tokenizer
    self._world = world
    self._tasks = tasks
    self.kinds = [task.kind for task in tasks]
    self.labels = [
      # The stream follows from the task's name alone, whichever other tasks there are.
      Label(task=task.id, kind=task.kind, stream=zlib.crc32(task.id.encode()))
      for task in tasks
    ]
    # The range of ToolRL's correctness reward, which `state_reward` keeps.
    self.reward_bounds = (-3.0, 3.0)
    # A response for each call, and one that ends each turn.
    self.responses = max((task.steps + len(task.turns) for task in tasks), default=1)
    lengths = [_first_prompt_tokens(tokenizer, world, task) for task in tasks]
    self.longest_prompt = max(lengths, default=0)
    self.longest_teacher_prompt = 0
    # Tasks are drawn from a seed, so that their names identify them.
    self.fingerprint = zlib.crc32('\n'.join(task.id for task in tasks).encode())

  def sample(
    self,
    engine: Engine | Stream,
    chosen: Sequence[int],
    keys: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
  ) -> list[Rollout]:
    """Acts each chosen task out once."""
    tasks = [self._tasks[index] for index in chosen]
    rollouts = []
    # The world answers between the turns, so that an episode is several requests to the engine.
    for acted in act(engine, self._tokenizer, self._world, tasks, sampling, keys=keys):
      rollouts.append(Rollout(exchanges=acted.exchanges, texts=acted.texts, outcome=acted.outcome))
    return rollouts

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    """Scores every episode by the state that it left."""
    P = len(chosen)
    G = len(rollouts) // P
    scored = [rewards.state_reward(rollout.texts, rollout.outcome.correct) for rollout in rollouts]
    # float32, as advantages are computed in it.
    format_PG = np.array([reward.format for reward in scored], np.float32).reshape(P, G)
    correctness_PG = np.array([reward.correctness for reward in scored], np.float32).reshape(P, G)
    return RolloutBatch(
      kinds=[self.kinds[index] for index in chosen],
      rollouts=rollouts,
      total_PG=correctness_PG,
      format_PG=format_PG,
      correctness_PG=correctness_PG,
      right_PG=correctness_PG > 0,
    )
