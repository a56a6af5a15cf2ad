"""What runs the passes of an engine: in tiles on a CPU, over a paged cache elsewhere."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device, mesh_programs
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import Drawn
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.rollout.tile_executor import TileExecutor


class Executor(Protocol):
  """Holds the weights and the cache of an engine, and runs its passes.

  Attributes:
    rows: rows of a pass at most.
    slots: positions of a page.
    pages: number of pages.
    overhead: what a pass costs beside its rows, in rows.
    guess_cost: what a pass with guesses for one text costs, in passes without.
    riders: rollouts that may ride on a text.
    steps: tokens that are drawn for each text before the host looks, where nothing is guessed.
  """

  rows: int
  slots: int
  pages: int
  overhead: float
  guess_cost: float
  riders: int
  steps: int

  def run(self, work: Pass) -> tuple[Drawn | None, Drawn | None]:
    """Runs a pass: what was drawn and what was scored, on the host; None: there was nothing."""

  def run_ahead(self, work: Pass) -> tuple[Drawn, np.ndarray]:
    """Draws `steps` tokens for texts that have one row each; only where `steps` > 1.

    Each text goes on with what the first of its rollouts draws.

    Returns:
      (what was drawn [A, steps], the tokens that each text went on with [texts, steps]).
    """

  def copy(self, source: int, target: int, positions: int) -> None:
    """Copies at least the first positions of a page into another."""

  def prepare(self, progress: Callable[[int, int], None]) -> None:
    """Compiles all programs; `progress` is called with (those that are ready, all)."""

  def unload(self) -> None:
    """Lets the weights go."""

  def load(self, params: decoder.Params) -> None:
    """Takes other weights of the same shapes."""


def make_executor(
  params: decoder.Params, config: DecoderConfig, sizes: EngineSizes, stop_ids: np.ndarray
) -> Executor:
  """Returns what runs passes where the parameters are."""
  placement = mesh_programs.cache_placement(params, config)
  # In tiles a cache has the dtype of the parameters.
  if placement is None and sharding.platform() == 'cpu' and not sizes.cache_dtype:
    return TileExecutor(params, config, sizes, stop_ids)
  return device.MeshExecutor(params, config, sizes, placement)
