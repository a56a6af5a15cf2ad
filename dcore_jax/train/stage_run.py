"""Where a training stage of a run writes, and what it draws from."""

import dataclasses
import pathlib

from dcore_jax.train.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class StageRun:
  """One training stage of one run.

  Attributes:
    metrics: where its rows go.
    checkpoints: its own folder, for parameters, optimizer and position.
    seed: of everything that it draws.
  """

  metrics: Metrics
  checkpoints: pathlib.Path
  seed: int
