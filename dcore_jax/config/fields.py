"""What a field of a config knows beside its type: default, meaning, range, and if it may change."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# Counts are numbers of 32 bits where arrays are made of them.
_LARGEST_COUNT = 2**31 - 1
# Logits that are divided by less overflow, and 0/0 in one lane would end the engine.
LEAST_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers that a field may hold; all of them are finite.

  Attributes:
    least: the smallest.
    most: the largest.
    above: all are larger than this.
    also: further values, which stand for something else than a number.
  """

  least: float | None = None
  most: float | None = None
  above: float | None = None
  also: tuple[float, ...] = ()

  def problem(self, value: float) -> str:
    """Returns what a value must be, or '' where it is allowed."""
    if not math.isfinite(value):
      return 'must be finite'
    if value in self.also:
      return ''
    if self.most is None and isinstance(value, int) and value > _LARGEST_COUNT:
      return f'must be at most {_LARGEST_COUNT}'
    held = self.least is None or value >= self.least
    held &= self.most is None or value <= self.most
    held &= self.above is None or value > self.above
    return '' if held else 'must be ' + self.words()

  def words(self) -> str:
    """Returns the allowed numbers in words; something must bound them."""
    if self.least is not None and self.most is not None:
      words = f'in {self.least}..{self.most}'
    elif self.most is not None:
      words = f'above {self.above} and at most {self.most}'
    elif self.least is not None:
      words = f'at least {self.least}'
    else:
      words = f'above {self.above}'
    return ' or '.join([words, *(f'{value}' for value in self.also)])


def option(default: Any, doc: str, *, free: bool = False, **limits: Any) -> Any:
  """A field of a section.

  Args:
    default: its default.
    doc: what it means, in units.
    free: whether it may change between two starts of a run, since it says where or how fast
      something is done and not what: results do not depend on it, but for the order of sums.
    **limits: fields of `Range`, for a number or a mapping to numbers.
  """
  metadata = {'doc': doc, 'free': free, 'range': Range(**limits)}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def choice(default: str, choices: tuple[str, ...], doc: str) -> Any:
  """A field that holds one of a few texts, checked before anything is run."""
  return dataclasses.field(
    default=default, metadata={'doc': doc, 'free': False, 'choices': choices}
  )


def presets(known: Mapping[str, Mapping[str, Any]], doc: str) -> Any:
  """A field that names a set of values for other fields of its section; '' is none."""
  metadata = {'doc': doc, 'free': False, 'presets': known}
  return dataclasses.field(default='', metadata=metadata)


def section(kind: type, doc: str, *, free: bool = False) -> Any:
  """A field that holds another section; `free` is of all that is in it."""
  return dataclasses.field(default_factory=kind, metadata={'doc': doc, 'free': free})
