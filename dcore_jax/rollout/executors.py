"""What runs the passes of an engine: layer by layer on a CPU, as one program elsewhere."""

from collections.abc import Callable
from typing import Protocol

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device, mesh_programs
from dcore_jax.rollout.layer_executor import LayerExecutor
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import Drawn
from dcore_jax.rollout.sizes import EngineSizes


class Executor(Protocol):
  """Holds the weights and the cache of an engine, and runs its passes.

  Attributes:
    rows: rows of a pass at most.
    slots: positions of a page.
    overhead: what a pass costs beside its rows, in rows.
  """

  rows: int
  slots: int
  overhead: float

  def run(self, work: Pass) -> tuple[Drawn | None, Drawn | None]:
    """Runs a pass: what was drawn and what was scored, on the host; None: there was nothing."""

  def copy(self, source: int, target: int, positions: int) -> None:
    """Copies the first positions of a page into another."""

  def prepare(self, progress: Callable[[int, int], None]) -> None:
    """Compiles all programs; `progress` is called with (those that are ready, all)."""

  def unload(self) -> None:
    """Lets the weights go."""

  def load(self, params: decoder.Params) -> None:
    """Takes other weights of the same shapes."""


def make_executor(params: decoder.Params, config: DecoderConfig, sizes: EngineSizes) -> Executor:
  """Returns what runs passes where the parameters are."""
  placement = mesh_programs.cache_placement(params, config)
  # Layer by layer a cache has the dtype of the parameters.
  if placement is None and sharding.platform() == 'cpu' and not sizes.cache_dtype:
    return LayerExecutor(params, config, sizes)
  return device.MeshExecutor(params, config, sizes, placement)
