"""What reinforcement learning asks, and the scored groups of rollouts that come back.

Two sources offer the same three things, so that the loop need not know which it has: `sample` makes the rollouts of some of its
items with an engine, `judge` scores them, `fingerprint` tells whether a checkpoint was made from the same items.
`Questions` are decision points, answered once and compared with a reference (the paper's setting); `Episodes` are tasks of a
world, acted out over all their turns and judged by the state that is left behind.
Letters: P prompts (items), G rollouts of a prompt.
"""

import collections
import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dcore_jax import tokentree
from dcore_jax.chat.template import render_prompt
from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.evaluate.lazy_reasoning import LOGGED_WORDS, count_reflections
from dcore_jax.evaluate.rollouts import Exchange, act
from dcore_jax.learn import advantages, rewards
from dcore_jax.rollout.engine import Engine, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.train.journal import JournaledEngine
from dcore_jax.worlds.environment import Outcome, World


class Rollout(NamedTuple):
  """One attempt: what was sampled, turn by turn, as ids and as texts; `outcome` where a world judged it."""

  exchanges: list[Exchange]
  texts: list[str]
  outcome: Outcome | None = None


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
  """P x G rollouts of one policy, prompt by prompt. `right_PG`: as good an answer as the reference."""

  kinds: list[str]  # P
  rollouts: list[Rollout]  # P * G
  total_PG: np.ndarray
  format_PG: np.ndarray
  correctness_PG: np.ndarray
  right_PG: np.ndarray

  def of(self, first: int, last: int) -> list[Rollout]:
    """The rollouts of the prompts first .. last - 1."""
    group = self.total_PG.shape[1]
    return self.rollouts[first * group : last * group]


def take_groups(batches: Sequence[RolloutBatch], groups: Sequence[int]) -> RolloutBatch:
  """The groups with these numbers of the batches laid end to end, equally many rollouts in each."""
  kinds = [kind for batch in batches for kind in batch.kinds]
  rollouts = [batch.of(place, place + 1) for batch in batches for place in range(len(batch.kinds))]
  joined = lambda name: np.concatenate([getattr(batch, name) for batch in batches])[groups]
  return RolloutBatch(
    [kinds[group] for group in groups],
    [rollout for group in groups for rollout in rollouts[group]],
    *map(joined, ('total_PG', 'format_PG', 'correctness_PG', 'right_PG')),
  )


def sequences(rollouts: Sequence[Rollout]) -> list[tokentree.Sequence]:
  """What is trained on, a sequence a response: its prompt carries no weight and may be shared with other sequences.

  A later prompt of an episode replays the answers before it without their thoughts: it leaves the earlier response where that
  begins, and merges with the other turns and rollouts of the task as far as they agree.
  """
  result = []
  for rollout in rollouts:
    for prompt, completion in rollout.exchanges:
      weights = np.concatenate(
        [np.zeros(len(prompt), np.float32), np.ones(len(completion.tokens), np.float32)]
      )
      result.append(
        tokentree.Sequence(np.concatenate([prompt, completion.tokens]), weights, shared=len(prompt))
      )
  return result


def by_rollout(tree: tokentree.TokenTree, rollouts: Sequence[Rollout]) -> tokentree.TokenTree:
  """The tree of `sequences(rollouts)` with one path a rollout, which holds the tokens of all its responses: an advantage belongs
  to a rollout."""
  ends = np.cumsum([len(rollout.exchanges) for rollout in rollouts])[:-1]
  empty = np.zeros(0, np.int64)
  paths = [
    np.concatenate([empty, *tree.paths[first:last]])
    for first, last in zip([0, *ends], [*ends, len(tree.paths)])
  ]
  return dataclasses.replace(tree, paths=paths)


class Source(Protocol):
  """Items to ask about; see the module."""

  kinds: list[str]  # of every item
  fingerprint: int
  longest_prompt: int  # tokens
  responses: (
    int  # that a rollout has at most, or as many as are usual: what shapes are compiled for
  )

  def sample(
    self,
    engine: Engine | JournaledEngine,
    chosen: Sequence[int],
    keys: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
  ) -> list[Rollout]:
    """A rollout for each of `chosen`, an item more than once as a rule; keys[i] names the random stream of the i-th."""

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    """Scores the rollouts of the items `chosen`, equally many of each, item by item."""


# --- decision points ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A decision point as token ids."""

  point: DecisionPoint
  tokens: np.ndarray  # int32 [n]


def encode_prompts(
  tokenizer: Any, points: Sequence[DecisionPoint], max_tokens: int
) -> tuple[list[Prompt], int]:
  """(prompts of at most `max_tokens` tokens, number of those dropped for being longer)."""
  prompts = []
  for point in points:
    text = render_prompt(tokenizer, list(point.messages))
    tokens = np.array(tokenizer(text, add_special_tokens=False)['input_ids'], np.int32)
    if len(tokens) <= max_tokens:
      prompts.append(Prompt(point, tokens))
  return prompts, len(points) - len(prompts)


class Questions:
  """Decision points with the reference answers that `reward`, a name of `rewards.REWARDS`, compares with; ValueError for an
  unknown one, and for a reference that it cannot read: before the step that draws it."""

  def __init__(self, tokenizer: Any, prompts: Sequence[Prompt], reward: str):
    self._tokenizer, self._prompts, self._reward = tokenizer, prompts, reward
    self.kinds, self.responses = [prompt.point.kind for prompt in prompts], 1
    self.longest_prompt = max((len(prompt.tokens) for prompt in prompts), default=0)
    self.fingerprint = zlib.crc32(
      b'\n'.join(p.tokens.tobytes() + p.point.reference.encode() for p in prompts)
    )
    references = [prompt.point.reference for prompt in prompts]
    best = rewards.batch_reward(
      reward, [f'<think>\n \n</think>\n\n{r}' for r in references], references
    )
    self._best = np.asarray(best.correctness)

  def sample(
    self,
    engine: Engine | JournaledEngine,
    chosen: Sequence[int],
    keys: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
  ) -> list[Rollout]:
    prompts = [self._prompts[index].tokens for index in chosen]
    completions = engine.generate(
      [Request(prompt, key) for prompt, key in zip(prompts, keys, strict=True)], sampling
    )
    texts = self._tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    return [
      Rollout([Exchange(*made)], [text])
      for *made, text in zip(prompts, completions, texts, strict=True)
    ]

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    P, G = len(chosen), len(rollouts) // len(chosen)
    references = [self._prompts[index].point.reference for index in chosen]
    reward = rewards.batch_reward(
      self._reward, [r.texts[0] for r in rollouts], [r for r in references for _ in range(G)]
    )
    total_PG, format_PG, correctness_PG = (
      np.asarray(part).reshape(P, G) for part in (reward.total, reward.format, reward.correctness)
    )
    return RolloutBatch(
      [self.kinds[index] for index in chosen],
      rollouts,
      total_PG,
      format_PG,
      correctness_PG,
      correctness_PG == self._best[list(chosen), None],
    )


# --- episodes ----------------------------------------------------------------------------------------------------------------


def short_tasks(
  tokenizer: Any, world: World, tasks: Sequence[Any], max_tokens: int
) -> tuple[list[Any], int]:
  """(tasks whose first prompt has at most `max_tokens` tokens, number of those dropped for a longer one)."""
  short = [task for task in tasks if _first_prompt_tokens(tokenizer, world, task) <= max_tokens]
  return short, len(tasks) - len(short)


def _first_prompt_tokens(tokenizer: Any, world: World, task: Any) -> int:
  return len(
    tokenizer(render_prompt(tokenizer, world.episode(task).messages), add_special_tokens=False)[
      'input_ids'
    ]
  )


class Episodes:
  """Tasks of a world. The reward is `rewards.state_reward`'s correctness: 3 where the state and the outputs that an episode
  leaves behind are the reference's and every response has closed its thoughts, else -3; its format is logged and not rewarded."""

  def __init__(self, tokenizer: Any, world: World, tasks: Sequence[Any]):
    self._tokenizer, self._world, self._tasks = tokenizer, world, tasks
    self.kinds = [task.kind for task in tasks]
    self.responses = max((task.steps + len(task.turns) for task in tasks), default=1)
    self.longest_prompt = max(
      (_first_prompt_tokens(tokenizer, world, task) for task in tasks), default=0
    )
    self.fingerprint = zlib.crc32('\n'.join(task.id for task in tasks).encode())

  def sample(
    self,
    engine: Engine | JournaledEngine,
    chosen: Sequence[int],
    keys: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
  ) -> list[Rollout]:
    made = act(
      engine,
      self._tokenizer,
      self._world,
      [self._tasks[index] for index in chosen],
      sampling,
      keys=keys,
    )
    return [
      Rollout(trajectory.exchanges, trajectory.texts, trajectory.outcome) for trajectory in made
    ]

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    shape = len(chosen), len(rollouts) // len(chosen)
    scored = [rewards.state_reward(rollout.texts, rollout.outcome) for rollout in rollouts]
    format_PG, correctness_PG = (
      np.array([getattr(reward, part) for reward in scored], np.float32).reshape(shape)
      for part in ('format', 'correctness')
    )
    return RolloutBatch(
      [self.kinds[index] for index in chosen],
      rollouts,
      correctness_PG,
      format_PG,
      correctness_PG,
      correctness_PG > 0,
    )


# --- of either ---------------------------------------------------------------------------------------------------------------


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
  """What the rollouts of a step say by themselves. Zero variance is exact equality of a group's rewards; a rollout alone has it
  where its reward is 0 (`advantages.uniform_groups`)."""
  zero_P = advantages.uniform_groups(batch.total_PG)[:, 0]
  right_P = batch.right_PG.all(axis=1)
  exchanges = [exchange for rollout in batch.rollouts for exchange in rollout.exchanges]
  lengths = np.array([len(completion.tokens) for _, completion in exchanges])
  texts = [text for rollout in batch.rollouts for text in rollout.texts]
  kinds = collections.defaultdict(list)
  for kind, row in zip(batch.kinds, batch.total_PG, strict=True):
    kinds[kind].append(row.mean())
  return {
    'reward': float(batch.total_PG.mean()),
    'reward_format': float(batch.format_PG.mean()),
    'reward_correctness': float(batch.correctness_PG.mean()),
    'right_fraction': float(batch.right_PG.mean()),
    'zero_variance_fraction': float(zero_P.mean()),
    'all_right_fraction': float((zero_P & right_P).mean()),
    'all_wrong_fraction': float((zero_P & ~batch.right_PG.any(axis=1)).mean()),
    'reflections': float(np.mean([count_reflections(t, LOGGED_WORDS) for t in texts])),
    'reflections_lazy_words': float(np.mean([count_reflections(t) for t in texts])),
    'response_tokens': float(lengths.mean()),
    'response_tokens_max': int(lengths.max()),
    'prompt_tokens': float(np.mean([len(prompt) for prompt, _ in exchanges])),
    'responses': len(exchanges) / len(batch.rollouts),
    'unfinished': float(np.mean([not completion.finished for _, completion in exchanges])),
    **{f'reward_{kind}': float(np.mean(values)) for kind, values in kinds.items()},
  }


def prompt_means(batch: RolloutBatch) -> dict[str, list[float]]:
  """Means over the rollouts of every prompt, of what is compared between two policies: pairs are prompts, see
  `summary.paired_difference`."""
  reflections = [
    np.mean([count_reflections(text, LOGGED_WORDS) for text in r.texts] or [0])
    for r in batch.rollouts
  ]
  values = {
    'reward': batch.total_PG,
    'right_fraction': batch.right_PG,
    'reflections': np.reshape(reflections, batch.total_PG.shape),
  }
  return {
    name: values_PG.mean(axis=1, dtype=np.float64).tolist() for name, values_PG in values.items()
  }


def set_aside(kinds: Sequence[str], count: int) -> tuple[list[int], list[int]]:
  """(`count` items, always the same ones and of every kind its share; the others). Neighbours stay together: they may be steps
  of one task."""
  if count > len(kinds):
    raise ValueError(f'rl.validation = {count} exceeds the {len(kinds)} prompts')
  members = collections.defaultdict(list)
  for index, kind in enumerate(kinds):
    members[kind].append(index)
  shares = np.floor(
    np.array([len(group) for group in members.values()]) * count / max(1, len(kinds))
  ).astype(int)
  shares[: count - shares.sum()] += 1
  aside = [index for group, share in zip(members.values(), shares) for index in group[:share]]
  rest = [index for group, share in zip(members.values(), shares) for index in group[share:]]
  return aside, rest
