"""Updates whose gradient is no finite number: skipped on the device, counted, and not for ever."""

from collections.abc import Sequence
from typing import Any


class Skips:
  """Counts the steps in a row of which no update was made, and ends a run that has too many.

  A skipped update leaves parameters and moments as they were (`learn.optimizer.apply_gradients`),
  so that one bad batch costs nothing else. A run that skips all of them would only burn time.

  Args:
    section: of the config, 'sft' or 'rl', for the error.
    most: steps in a row that may be skipped; 0 for any number.
    updates: optimizer steps of a step; it counts if all of them were skipped.
    rows: metrics of the steps before, of a run that is resumed.
  """

  def __init__(
    self, section: str, most: int, *, updates: int = 1, rows: Sequence[dict[str, Any]] = ()
  ):
    self._section = section
    self._most = most
    self._updates = updates
    self._in_a_row = 0
    for row in rows:
      self._count(row)

  def _count(self, row: dict[str, Any]) -> None:
    skipped = row['skipped'] >= self._updates
    self._in_a_row = self._in_a_row + 1 if skipped else 0

  def see(self, step: int, row: dict[str, Any]) -> None:
    """Takes the metrics of a step.

    Raises:
      ValueError: it is one skipped step too many.
    """
    self._count(row)
    if self._most and self._in_a_row > self._most:
      first = step + 1 - self._in_a_row
      raise ValueError(
        f'the gradients of steps {first} to {step} are no finite numbers, and their updates were '
        f'skipped: {self._section}.most_skipped = {self._most}. Parameters are those of step '
        f'{first}. Look at grad_norm in metrics.jsonl before it; a lower '
        f'{self._section}.learning_rate, or execution.compute = float32, may help'
      )
