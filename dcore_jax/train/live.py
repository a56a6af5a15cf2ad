"""Shows reinforcement learning while it goes on: a table on a terminal, lines in a log.

The table has, for each figure, its newest value, the mean of the last steps, and its course.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dcore_jax.progress import SLOW, format_seconds, progress, tell

_RECENT = 10  # steps of the mean, and of the time that a step takes
_WIDTH = 40  # steps of the course that is drawn
_BLOCKS = '▁▂▃▄▅▆▇█'
_REFRESHES = 2  # a second, for the clock; the figures change once a step


@dataclasses.dataclass(frozen=True)
class _Figure:
  label: str
  name: str
  form: str


# What says first whether a run is well: it learns, has something to learn from, does not collapse.
_FIGURES = (
  _Figure('reward', 'reward', '.3f'),
  _Figure('right', 'right_fraction', '.1%'),
  _Figure('groups without variance', 'zero_variance_fraction', '.0%'),
  _Figure('entropy, nats', 'entropy', '.4f'),
  _Figure('psi, share of the gradient', 'psi_grad_share', '.1%'),
  _Figure('KL to the start, nats', 'kl', '.4f'),
  _Figure('tokens of a response', 'response_tokens', '.0f'),
  _Figure('tokens/s', 'tokens_per_second', ',.0f'),
  _Figure('seconds a step', 'seconds', '.1f'),
)


class StepView(Protocol):
  """What a loop shows its steps on; a context manager."""

  def resume(self, step: int) -> None:
    """Says that the steps before this one are done already."""

  def see(self, step: int, row: Mapping[str, Any]) -> None:
    """Takes the row of a step that is over."""

  def beside(self, what: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Shows work between two steps while it goes on; what it returns is told of each part.

    `total` is the number of parts, where that is known.
    """

  def __enter__(self) -> 'StepView':
    """Begins to show."""

  def __exit__(self, *_: Any) -> None:
    """Leaves what was shown last."""


def step_view(total: int, description: str, stream: TextIO | None = None) -> StepView:
  """Returns the table on a terminal that can draw one, else a bar or lines.

  Args:
    total: steps of the run.
    description: the estimator's name.
    stream: where to write; stderr by default.
  """
  stream = stream or sys.stderr
  console = Console(file=stream)
  # A dumb terminal cannot go back up.
  if console.is_terminal and not console.is_dumb_terminal:
    return LiveView(total, description, console)
  return BarView(total, description, stream)


class BarView:
  """A progress bar with reward and zero variance."""

  def __init__(self, total: int, description: str, stream: TextIO):
    self._stream = stream
    self._bar = progress(total=total, description=description, unit='step', stream=stream)

  def resume(self, step: int) -> None:
    """See `StepView`."""
    # Both, since tqdm computes its rate from `initial`.
    self._bar.initial = step
    self._bar.n = step

  def see(self, step: int, row: Mapping[str, Any]) -> None:
    """See `StepView`."""
    del step
    shown = {'reward': 'reward', 'zero': 'zero_variance_fraction', 'H': 'entropy'}
    self._bar.set_postfix(
      {label: f'{row[name]:.2g}' for label, name in shown.items() if row.get(name) is not None}
    )
    self._bar.update(1)

  @contextlib.contextmanager
  def beside(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """See `StepView`."""
    with progress(
      total=total, description=what, unit='answer', stream=self._stream, delay=SLOW
    ) as bar:
      yield bar.update

  def __enter__(self) -> 'BarView':
    self._bar.__enter__()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._bar.__exit__(*exception)


class LiveView:
  """A table that is drawn in place."""

  def __init__(self, total: int, description: str, console: Console):
    self._total = total
    self._description = description
    self._begun = 0
    self._done = 0
    self._rows: list[Mapping[str, Any]] = []
    self._since = time.monotonic()
    # (work between two steps, parts of it that are done, all parts where known)
    self._beside: tuple[str, int, int | None] | None = None
    self._live = Live(
      console=console, get_renderable=self.drawing, refresh_per_second=_REFRESHES, transient=False
    )
    tell(description, 0, total)

  def resume(self, step: int) -> None:
    """See `StepView`."""
    self._begun = step
    self._done = step

  def see(self, step: int, row: Mapping[str, Any]) -> None:
    """See `StepView`."""
    self._rows.append(row)
    self._done = step + 1
    self._since = time.monotonic()
    tell(self._description, self._done - self._begun, self._total - self._begun)

  @contextlib.contextmanager
  def beside(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """See `StepView`."""

    def count(parts: int) -> None:
      self._beside = (what, self._beside[1] + parts, total)

    self._beside = (what, 0, total)
    try:
      yield count
    finally:
      self._beside = None

  def __enter__(self) -> 'LiveView':
    self._live.__enter__()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._live.__exit__(*exception)

  def drawing(self) -> Group:
    """Returns what is drawn; the thread that draws calls it."""
    # Before the first step is over the title is all there is.
    parts = [self._title(), self._table()] if self._rows else [self._title()]
    return Group(*parts)

  def _table(self) -> Table:
    table = Table()
    table.add_column('')
    for column in ('now', f'mean of {_RECENT}'):
      table.add_column(column, justify='right')
    table.add_column(f'last {_WIDTH} steps', no_wrap=True)
    # A copy: the loop's thread adds rows meanwhile.
    rows = list(self._rows)
    for figure in _FIGURES:
      values = [_number(row.get(figure.name)) for row in rows]
      known = [value for value in values if value is not None]
      # Which figures a step has depends on estimator and loss.
      if not known:
        continue
      now = '–' if values[-1] is None else format(values[-1], figure.form)
      recent = known[-_RECENT:]
      mean = format(sum(recent) / len(recent), figure.form)
      table.add_row(figure.label, now, mean, sparkline(values[-_WIDTH:]))
    return table

  def _title(self) -> Text:
    running = time.monotonic() - self._since
    parts = [f'{self._description}: step {self._done} of {self._total}']
    left = seconds_left([_number(row.get('seconds')) for row in self._rows], self._left(), running)
    # Before the first step is over nothing is measured.
    parts.append('time left after the first step' if left is None else _left_text(left))
    # A copy: the loop's thread may have ended it by the next line.
    beside = self._beside
    if beside:
      what, done, total = beside
      parts.append(f'{what}: {done}' if total is None else f'{what}: {done} of {total}')
    elif self._left():
      parts.append(f'this step {format_seconds(running)}')
    return Text(', '.join(parts))

  def _left(self) -> int:
    return self._total - self._done


def _left_text(seconds: float) -> str:
  return f'{format_seconds(seconds)} left' if seconds else 'done'


def seconds_left(steps: Sequence[float | None], left: int, running: float) -> float | None:
  """Returns the seconds until the last step is over; None before one was measured.

  Args:
    steps: seconds of the steps so far. The first one compiles, and counts while it is the only one.
    left: steps that are not over.
    running: seconds that the present step has taken.
  """
  if not left:
    return 0.0
  known = [seconds for seconds in steps if seconds is not None]
  if not known:
    return None
  counted = known[1:][-_RECENT:] or known
  one = sum(counted) / len(counted)
  # A step that takes longer than others is about to end, and not over already.
  return one * (left - 1) + max(0.0, one - running)


def sparkline(values: Sequence[float | None]) -> str:
  """Draws values as blocks of eight heights; a gap where a value is not known."""
  known = [value for value in values if value is not None]
  if not known:
    return ''
  low = min(known)
  spread = max(known) - low
  text = ''
  for value in values:
    if value is None:
      text += ' '
    else:
      # Values that never change stay at the lowest height.
      height = (value - low) / spread if spread else 0.0
      text += _BLOCKS[min(len(_BLOCKS) - 1, int(height * len(_BLOCKS)))]
  return text


def _number(value: Any) -> float | None:
  """Returns a finite number; None for null and NaN, which a skipped step has."""
  if value is None or value != value or value in (float('inf'), float('-inf')):
    return None
  return float(value)
