"""What every part of `benchmarks.device` is told: the machine, and the sizes that fit it."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.device import sizes as sizes_lib
from benchmarks.device.rows import LEAST_SHARES
from benchmarks.device.sizes import Sizes
from dcore_jax.plan.roofline import Accelerator


@dataclasses.dataclass(frozen=True)
class Machine:
  """The devices, and their peaks.

  Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    kind: what jax calls a device.
    count: devices.
    memory: bytes of each.
    flops: operations a second of 16-bit products (float32 on a CPU).
    memory_rate: bytes a second.
    link_rate: bytes a second that a device sends to its neighbours; 0 where it is not known.
    source: where these peaks are from: the name of a data sheet, or 'measured'.
  """

  platform: str
  kind: str
  count: int
  memory: int
  flops: float
  memory_rate: float
  link_rate: float
  source: str

  @property
  def published(self) -> bool:
    """Whether the peaks are those of a data sheet, so that a share of them says something."""
    return self.source != 'measured'

  @property
  def accelerator(self) -> Accelerator:
    """The peaks of one device as the plan has them."""
    # Links that are not known bound nothing.
    return Accelerator(self.flops, self.memory_rate, self.link_rate or math.inf)


class Setting(NamedTuple):
  """What a part is told.

  Attributes:
    machine: the devices.
    sizes: what is measured.
    folder: an empty folder of the part's own.
  """

  machine: Machine
  sizes: Sizes
  folder: pathlib.Path

  @property
  def published(self) -> bool:
    """Whether a share of a peak says something."""
    return self.machine.published

  def least(self, name: str) -> float | None:
    """Returns the least sound share of a kind of work; None where there is none to be expected."""
    return LEAST_SHARES[name] if self.published else None

  @property
  def dtype(self) -> str:
    """The dtype of computation."""
    return 'float32' if self.machine.platform == 'cpu' else 'bfloat16'


def make_setting(machine: Mapping[str, Any], size: str, folder: pathlib.Path) -> Setting:
  """Returns a part's setting from the fields of the machine and the name of a model ('' chooses).

  Raises:
    ValueError: an unknown name, or nothing fits.
  """
  known = Machine(**machine)
  chosen = sizes_lib.choose(known.platform, known.memory, known.count, size)
  return Setting(machine=known, sizes=chosen, folder=folder)
