"""How large an engine is, and the lengths that its programs are compiled for."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from dcore_jax.models.config import DecoderConfig

# Lanes. Larger tiles fall out of a CPU's caches, smaller ones starve its matrix products.
_CPU_TILE = 32
# The last rollouts of a batch do not fill a tile, so that a quarter and a half of one are compiled
# as well; on a CPU an eighth and a single lane, too. There a step of 8 layers of width 512 (100 MB
# of weights) takes 6 ms for 1 lane, 8 for 4, 12 for 8, 17 for 16 and 30 for 32.
_PARTS = (4, 2, 1)
_CPU_PARTS = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class EngineSizes:
  """How much an engine holds, and how much it does in one call.

  Attributes:
    lanes: rollouts in flight at once.
    max_len: tokens of a prompt and its completion together.
    max_new: tokens that a lane can sample behind its trunk; 0: as many as `max_len` has room for.
    trunks: prompts held at once; 0: one for each lane. Fewer save memory where rollouts come in
      groups that share a prompt.
    tile: lanes that are decoded together; must divide `lanes`. Small tiles waste less when lengths
      differ or few lanes are live, large ones use the hardware better. 0: the largest divisor up to
      32 on a CPU, all lanes on an accelerator.
    steps_per_call: decode steps between two looks of the host. A lane that finishes idles for the
      rest of them.
  """

  lanes: int = 64
  max_len: int = 1024
  max_new: int = 0
  trunks: int = 0
  tile: int = 0
  steps_per_call: int = 16

  def resolved(self, config: DecoderConfig, platform: str) -> 'EngineSizes':
    """Returns the sizes with every 0 replaced by the number that it stands for.

    This is the only place that derives them: the engine and the plan of a run both ask here.

    Args:
      config: the model's configuration.
      platform: what the engine runs on (`sharding.platform`).

    Raises:
      ValueError: a size below 1, `max_len` below 2 or beyond the model's positions, or a tile that
        does not divide the lanes.
    """
    # 0 stands for a default here because it does so in a run's config.
    tile = self.tile or _default_tile(self.lanes, platform)
    max_new = self.max_new or self.max_len
    trunks = self.trunks or self.lanes
    # A last tile of another size would be a program of its own.
    if tile < 1 or self.lanes % tile:
      raise ValueError(f'tile={tile} does not divide lanes={self.lanes}')
    smallest = min(self.lanes, self.steps_per_call, max_new, trunks)
    # One token of prompt and one to sample are the least.
    if smallest < 1 or not 2 <= self.max_len <= config.max_position_embeddings:
      raise ValueError(
        f'lanes={self.lanes}, steps_per_call={self.steps_per_call}, max_new={max_new}, '
        f'trunks={trunks} must be at least 1 and max_len={self.max_len} in '
        f'2..{config.max_position_embeddings}, the positions of the model'
      )
    return dataclasses.replace(self, max_new=min(max_new, self.max_len), trunks=trunks, tile=tile)

  def tiles(self, platform: str) -> tuple[int, ...]:
    """Returns the numbers of lanes that are decoded together, ascending: a tile and parts of it."""
    parts = (self.tile, *_CPU_PARTS) if platform == 'cpu' else _PARTS
    # A set: the parts of a small tile coincide.
    return tuple(sorted({self.tile // part for part in parts if self.tile >= part}))


def _default_tile(lanes: int, platform: str) -> int:
  # No lanes, or fewer, are refused by the caller, with a message that names them.
  most = min(lanes, _CPU_TILE) if platform == 'cpu' else lanes
  return max((size for size in range(1, most + 1) if lanes % size == 0), default=1)


@functools.cache
def bucket_ladder(max_len: int) -> tuple[int, ...]:
  """Returns the lengths that programs are compiled for.

  They are 64, 128, 192, 256, 384, 512, 768, 1024, ... up to `max_len`.
  """
  # Each length is at most half as long again as the one before it (but for 64 to 128): padding
  # costs at most that much, and the number of programs grows with the logarithm of `max_len`.
  steps = {64, 192}
  for shift in range(32):
    steps.add(128 << shift)
    steps.add(192 << shift)
  return (*sorted(step for step in steps if step < max_len), max_len)


@functools.cache
def span_ladder(max_len: int) -> tuple[int, ...]:
  """Returns the spans of slots that decode programs are compiled for.

  They are 64, 128, 256, 512, 768, 1024, 1536, ... up to `max_len`. Short ones are coarser than for
  prompts: reading them is a small part of a step, and each pair of spans is a program.
  """
  kept = []
  for step in bucket_ladder(max_len):
    power_of_two = step.bit_count() == 1
    if step > 512 or step == max_len or power_of_two:
      # Powers of two alone up to 512, every step of the ladder above.
      kept.append(step)
  return tuple(kept)


def bucket(ladder: Sequence[int], length: int) -> int:
  """Returns the smallest step of the ladder that holds `length`."""
  return ladder[int(np.searchsorted(ladder, length))]
