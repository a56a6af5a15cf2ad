"""What reinforcement learning asks: made from a config, its files, or the recipe of a run."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from dcore_jax.config import RunConfig
from dcore_jax.data import recipe
from dcore_jax.data.records import rl_points
from dcore_jax.data.seed_sources import RL, training_tasks
from dcore_jax.data.seeds import DecisionPoint, decision_points
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.learn.advantages import uses_teacher
from dcore_jax.train.sources import Episodes, Questions, RolloutSource, encode_prompts, short_tasks
from dcore_jax.worlds.environment import World
from dcore_jax.worlds.registry import make_world


def rl_seed(config: RunConfig) -> int:
  """Returns the seed of prompt order and sampling: a sweep repeats a run with other `rl.seed`s.

  Which prompts are set aside follows from `config.seed` alone. All repetitions start from one SFT
  model, which has seen every prompt but these (`sft.hold_out`).
  """
  # 1000 keeps the repetitions of one run apart from runs with the next seeds.
  return config.seed + 1000 * config.rl.seed


def rl_source(
  config: RunConfig,
  tokenizer: Any,
  world: World,
  points: Sequence[DecisionPoint] | None = None,
) -> tuple[RolloutSource, int]:
  """Returns what reinforcement learning asks, and how many prompts were dropped for their length.

  Args:
    config: the whole config; its sections `rl` and `world`, and its `seed`.
    tokenizer: renders and counts the prompts.
    world: where episodes are acted out.
    points: decision points to ask, instead of those that the config names.
  """
  section = config.rl
  # Too long prompts are dropped and counted now: they would end the step that draws them.
  if section.episodes:
    tasks = training_tasks(config, section.tasks, RL)
    short, dropped = short_tasks(tokenizer, world, tasks, section.max_prompt_tokens)
    return Episodes(tokenizer, world, short), dropped
  if points is None:
    if section.files:
      points = rl_points(section.files, unreadable=section.unreadable)
    else:
      points = _world_points(config)
  teacher = section.teacher if uses_teacher(section.estimator) else ''
  prompts, dropped = encode_prompts(tokenizer, points, section.max_prompt_tokens, teacher)
  return Questions(tokenizer, prompts, section.reward), dropped


def run_source(
  config: RunConfig, tokenizer: Any, world: World, workdir: pathlib.Path
) -> tuple[RolloutSource, int]:
  """`rl_source` of a run, whose recipe may have left prompts in its work directory."""
  points = None
  if config.recipe.prompts:
    points = []
    for seed in recipe.read_part(workdir / recipe.FOLDER, 'prompts'):
      points += decision_points(seed)
  return rl_source(config, tokenizer, world, points)


def _world_points(config: RunConfig) -> list[DecisionPoint]:
  world = make_world(config.world)
  points = []
  for task in training_tasks(config, config.rl.tasks, RL):
    for seed in task_seeds(world, task):
      # A turn of a dialogue is a seed of another kind than the dialogue.
      for point in decision_points(seed):
        points.append(dataclasses.replace(point, task=task.id, task_kind=task.kind))
  return points
