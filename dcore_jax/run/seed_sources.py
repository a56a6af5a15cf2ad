"""Where seeds come from: ToolWorld's tasks and files of seeds."""
from collections.abc import Mapping

import ml_collections

from dcore_jax.distill.seeds import Seed
from dcore_jax.run.sources import data_path, read_rows
from dcore_jax.worlds.toolworld.seeds import task_seeds
from dcore_jax.worlds.toolworld.tasks import KINDS
from dcore_jax.worlds.toolworld.world import ToolWorld

# Task sets that must not overlap get different seeds: the train split serves distillation, reinforcement learning and the
# organism's pretraining, whose stages take the seeds from its own on.
DISTILL, RL = 1001, 1002


def toolworld_seeds(config: ml_collections.ConfigDict, counts: Mapping[str, int], purpose: int) -> list[Seed]:
  """Training tasks of a pipeline config as seeds; the same purpose gives the same ones."""
  world = ToolWorld(config.world.max_subtasks)
  return [seed for kind in KINDS for task in world.tasks(kind, counts[kind], seed=config.seed * 10 + purpose, split='train')
          for seed in task_seeds(task)]


def config_seeds(config: ml_collections.ConfigDict) -> list[Seed]:
  """The seeds that the config's section `distill` asks for: of its files, or ToolWorld's.

  Raises:
    ValueError: a file that is not there, or a record that is no seed, by its id.
  """
  if config.distill.files:
    return [Seed.from_json(record) for name in config.distill.files for record in read_rows(data_path(name))]
  return toolworld_seeds(config, config.distill.tasks, DISTILL)
