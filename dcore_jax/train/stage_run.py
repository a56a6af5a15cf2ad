"""Where a training stage of a run writes, and what it draws from."""

import dataclasses
import pathlib

from dcore_jax.config import LoraSection
from dcore_jax.train.metrics import Metrics


# What the loops of all stages take.
@dataclasses.dataclass(frozen=True)
class StageRun:
  """One training stage of one run.

  Attributes:
    metrics: where its rows go.
    checkpoints: its own folder, for parameters, optimizer and position.
    seed: of everything that it draws.
    held_out_seed: of what is set aside; None: `seed`. Stages of one run, and repetitions that start
      from one of them, set the same aside.
    lora: with a rank, adapters are trained, and checkpoints hold them without their base.
  """

  # Rows of other stages share the file, told apart by the stage's name.
  metrics: Metrics
  # Not shared: two stages in one folder would go on with each other's steps.
  checkpoints: pathlib.Path
  seed: int
  lora: LoraSection = LoraSection()
  held_out_seed: int | None = None
