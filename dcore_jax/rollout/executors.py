"""What runs the passes of an engine: layer by layer on a CPU, as one program elsewhere."""

from collections.abc import Callable
from typing import Protocol

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device
from dcore_jax.rollout.layer_executor import LayerExecutor
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import Drawn
from dcore_jax.rollout.sizes import EngineSizes


class Executor(Protocol):
  """Holds the weights and the cache of an engine, and runs its passes.

  Attributes:
    rows: rows of a pass at most.
    slots: positions of a page.
    pages: number of pages.
    places: pages of a text that are kept apart (`PagePool`).
    overhead: what a pass costs beside its rows, in rows.
  """

  rows: int
  slots: int
  pages: int
  places: int
  overhead: float

  def run(self, work: Pass) -> tuple[Drawn | None, Drawn | None]:
    """Runs a pass: what was drawn and what was scored, on the host; None: there was nothing."""

  def copy(self, source: int, target: int) -> None:
    """Copies a page into another."""

  def prepare(self, progress: Callable[[int, int], None]) -> None:
    """Compiles all programs; `progress` is called with (those that are ready, all)."""

  def unload(self) -> None:
    """Lets the weights go."""

  def load(self, params: decoder.Params) -> None:
    """Takes other weights of the same shapes."""


def make_executor(params: decoder.Params, config: DecoderConfig, sizes: EngineSizes) -> Executor:
  """Returns what runs passes where the parameters are."""
  placement = device.cache_placement(params, config)
  if placement is None and sharding.platform() == 'cpu':
    return LayerExecutor(params, config, sizes)
  return device.MeshExecutor(params, config, sizes, placement)
