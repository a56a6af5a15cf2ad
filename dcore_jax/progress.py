"""Progress for a person who waits: bars on a terminal, a line now and then in a log file."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import tqdm

LOG_INTERVAL = 60.0  # seconds between lines where stderr is not a terminal
SLOW = 5.0  # seconds from which on work beside the work is shown
FIRST_LINE = 10.0  # seconds until the first of them, so that rate and time left are soon known
COMPILE = 'compile'  # description of the bars of `show_compiling`

# (description, done since the bar was made, total) -> None
Watcher = Callable[[str, float, float | None], None]


class _Watched:
  """Whoever is told of the bars of this process; None at most times."""

  watcher: Watcher | None = None


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
  """Tells `watcher` of every bar that is made and of each `update` of it, from any thread."""
  before = _Watched.watcher
  _Watched.watcher = watcher
  try:
    yield
  finally:
    _Watched.watcher = before


def tell(description: str, done: float, total: float | None) -> None:
  """Tells whoever watches of a step; for what shows progress otherwise than by a bar."""
  if _Watched.watcher is not None:
    _Watched.watcher(description, done, total)


class _Bar(tqdm.tqdm):
  """A tqdm bar on a terminal."""

  def __init__(self, iterable: Iterable | None, *, description: str, delay: float, **options: Any):
    # A bar that TQDM_DISABLE turns off has no more than its count, and that stays at 0.
    self.initial = 0
    self.postfix = None
    self._description = description
    self._silent = delay > 0
    super().__init__(iterable, desc=description, delay=delay, **options)

  def update(self, n: float | None = 1) -> bool | None:
    """Moves the bar; iterating over it does so now and then."""
    shown = super().update(n)
    if self.disable:
      self.n += n
    if self._silent:
      return shown
    total = None if self.total is None else self.total - self.initial
    tell(self._description, self.n - self.initial, total)
    return shown


class _LineBar(_Bar):
  """A tqdm bar for logs.

  It prints whole lines: the first after `FIRST_LINE` seconds, then one every `LOG_INTERVAL`, and a
  last one when it is done.
  """

  def display(self, msg: str | None = None, pos: int | None = None) -> bool:
    """Prints the bar as a line; tqdm calls this wherever it would redraw."""
    # `pos` is the bar's line on a terminal, which a log does not have.
    del pos
    # The empty bar that tqdm shows at once says nothing in a log.
    if self.n:
      print(msg or str(self), file=self.fp, flush=True)
      self.mininterval = LOG_INTERVAL
    return True

  def set_postfix(self, ordered_dict: Any = None, refresh: bool = False, **figures: Any) -> None:
    """Sets the figures behind the bar, for the next line."""
    # False, whatever the caller asks: tqdm's own default would print a line at every call.
    super().set_postfix(ordered_dict, False, **figures)

  def close(self) -> None:
    """Prints the last line, once."""
    # tqdm closes a bar at the end of its loop, and again when it is deleted.
    if self.disable:
      return
    # tqdm's own `close` would rub the line out or move the cursor.
    self.disable = True
    self._decr_instances(self)
    if self.format_dict['elapsed'] >= self.delay:
      self.display()


def progress(
  iterable: Iterable | None = None,
  *,
  total: int | None = None,
  description: str = '',
  unit: str = 'it',
  stream: TextIO | None = None,
  delay: float = 0.0,
) -> tqdm.tqdm:
  """Makes a progress bar on stderr.

  Iterate over it, or `update(n)` it inside a `with`; `set_postfix(loss=..)` adds figures.

  Args:
    total: number of `unit`s expected; taken from the iterable where it has a length. Without one
      there is no time left.
    stream: where to write; stderr by default, as stdout belongs to the JSON that programs print.
    delay: shows nothing of what takes fewer seconds; for work beside the work, which nobody that
      watches is told of.
  """
  stream = stream or sys.stderr
  if not delay:
    tell(description, 0, total)
  # `unit_scale` prints 12.3k tokens; counts of steps stay exact.
  if stream.isatty():
    return _Bar(
      iterable,
      total=total,
      description=description,
      unit=unit,
      unit_scale=unit == 'tok',
      file=stream,
      dynamic_ncols=True,
      smoothing=0.1,
      delay=delay,
    )
  # `miniters=1` looks at the clock on each update: tqdm would otherwise guess how many updates fill
  # an interval. tqdm's monitor thread (maxinterval) then has nothing to correct.
  return _LineBar(
    iterable,
    total=total,
    description=description,
    unit=unit,
    unit_scale=unit == 'tok',
    file=stream,
    ascii=True,
    mininterval=min(FIRST_LINE, LOG_INTERVAL),
    maxinterval=float('inf'),
    miniters=1,
    ncols=100,
    delay=delay,
  )


def show_compiling(prepare: Callable[[Callable[[int, int], None]], Any]) -> None:
  """Shows a bar while programs are compiled.

  Args:
    prepare: compiles them. It is called with a function of (programs that are ready, all), which it
      calls now and then.
  """
  # How many there are is known from the first call on.
  with progress(total=0, description=COMPILE, unit='program') as bar:

    def show(ready: int, total: int) -> None:
      bar.total = total
      bar.update(ready - bar.n)

    prepare(show)


@dataclasses.dataclass
class StageTimer:
  """Wall-clock time of a stage."""

  name: str
  started: float
  ended: float | None = None

  @property
  def seconds(self) -> float:
    """The time of the stage once it has ended, the time so far before that."""
    return (time.perf_counter() if self.ended is None else self.ended) - self.started


@contextlib.contextmanager
def stage(name: str, stream: TextIO | None = None) -> Iterator[StageTimer]:
  """Times a stage, and prints one line before it and one after it, also when it fails."""
  stream = stream or sys.stderr
  timer = StageTimer(name, time.perf_counter())
  print(f'==> {name}', file=stream, flush=True)
  # It stays so if the body raises.
  outcome = 'failed after'
  try:
    yield timer
    outcome = 'done in'
  finally:
    timer.ended = time.perf_counter()
    print(f'<== {name}: {outcome} {format_seconds(timer.seconds)}', file=stream, flush=True)


def format_seconds(seconds: Any) -> str:
  """Writes a duration for people: '8.4 s', '3 min 20 s', '2 h 5 min'."""
  if seconds < 60:
    return f'{seconds:.1f} s'
  # Rounded before it is split, so that 119.7 s reads 2 min and not 1 min 60 s.
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest} s' if rest else f'{minutes} min'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if minutes else f'{hours} h'
