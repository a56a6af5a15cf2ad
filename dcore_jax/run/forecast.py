"""Says before a run what it will do and where it writes, and soon how long it takes here.

The time is measured: as soon as the first stage has worked for some seconds, its pace gives that of
the others, by what a unit of their work costs beside one of its own. Every stage that ends makes
the rest more exact.
"""

import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence

import tqdm

from dcore_jax.config import RunConfig
from dcore_jax.progress import COMPILE, format_seconds
from dcore_jax.run.needed import WORLD

# Seconds of work before the first word on time: what is measured before shows how work begins.
_FIRST = 5.0
# What a unit costs, held-out tasks being 1. Guesses, and not measured: the pace of the first
# seconds and of each stage that ends corrects the sum, not these shares.
_TASK = 1.0
_SEED = 0.8
_ROW = 0.1  # of an epoch
_ROLLOUT = 0.25  # with its part of the updates
_ROWS_OF_SEED = 2.0


@dataclasses.dataclass(frozen=True)
class Part:
  """A stage that is still to be run.

  Attributes:
    name: of the stage.
    does: what it does, for a person.
    cost: its work in held-out tasks; None where that is not known before it begins.
  """

  name: str
  does: str
  cost: float | None


def find_parts(
  config: RunConfig, kinds: int, workdir: pathlib.Path, names: Sequence[str]
) -> list[Part]:
  """Returns the stages `names` of a run with what each does.

  Args:
    config: the run's.
    kinds: of tasks that its world has.
    workdir: the run's folder.
    names: stages in the order in which they are run.
  """
  measured = f'{config.evaluate.tasks * kinds:,} held-out tasks'
  tasks: float | None = _TASK * config.evaluate.tasks * kinds
  suites = [name for name in config.evaluate.suites if name != WORLD]
  if suites:
    # How many tasks a suite has is known when it has been read.
    measured = ', '.join(config.evaluate.suites)
    tasks = None
  seeds = sum(config.distill.tasks.values())
  given = config.distill.files or config.recipe.seeds
  rl = config.rl
  rollouts = rl.steps * rl.prompts * rl.group
  files = ', '.join(config.sft.files)
  made = {
    'evaluate': Part('', measured, tasks),
    'distill': Part(
      '',
      'training rows for the seeds that are given'
      if given
      else f'training rows for {seeds:,} tasks',
      None if given else _SEED * seeds,
    ),
    'sft': Part(
      '',
      f'{config.sft.epochs} epochs on {files or "these rows"}',
      None if files or given else _ROW * _ROWS_OF_SEED * seeds * config.sft.epochs,
    ),
    'rl': Part(
      '',
      f'{rl.steps:,} steps of {rl.estimator}, {rl.prompts} prompts x {rl.group} rollouts each',
      _ROLLOUT * rollouts,
    ),
    'export': Part('', f'{workdir / "export"}, {config.export.dtype}', 0.0),
    'report': Part('', f'{workdir / "report.html"}', 0.0),
  }
  return [dataclasses.replace(made[name.partition('_')[0]], name=name) for name in names]


def describe(
  model: str, workdir: pathlib.Path, waiting: Sequence[Part], done: Sequence[str]
) -> str:
  """Returns what a run will do, in lines for a terminal.

  Args:
    model: what is trained, in words.
    workdir: the run's folder.
    waiting: the stages that will be run.
    done: the names of those that have a result.
  """
  # The folder itself may not be there yet.
  there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
  free = shutil.disk_usage(there).free
  lines = [f'trains {model}; all results go to {workdir} ({free / 1e9:,.0f} GB free there)']
  if done:
    lines.append(f'  done already: {", ".join(done)}')
  lines += [f'  {part.name:<14} {part.does}' for part in waiting]
  if any(part.cost for part in waiting):
    lines.append('How long it takes here is said when some seconds of it are measured.')
  return '\n'.join(lines)


class Forecast:
  """Watches the bars of a run, and says how much time is left.

  Args:
    waiting: the stages that will be run.
    say: takes a line for a person.
    clock: seconds that never go back.
  """

  def __init__(
    self,
    waiting: Sequence[Part],
    say: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._waiting = {part.name: part for part in waiting}
    self._say = say or _say
    self._clock = clock
    self._now = ''
    self._since = clock()
    self._seconds = 0.0  # of the work that is measured
    self._cost = 0.0  # of the same work
    self._said = False

  def begin(self, name: str) -> None:
    """A stage begins."""
    self._now = name
    self._since = self._clock()

  def see(self, description: str, done: float, total: float | None) -> None:
    """A bar has moved: `done` of `total` since it was made."""
    if description == COMPILE or not done:
      # Loading and compiling are no measure of the work that follows.
      self._since = self._clock()
      return
    part = self._waiting.get(self._now)
    seconds = self._clock() - self._since
    # One word from within a stage, the first; the bar itself has the time of its own stage.
    if self._said or part is None or not part.cost or not total or seconds < _FIRST:
      return
    share = min(1.0, done / total)
    self._said = True
    left = self._left(self._seconds + seconds, self._cost + part.cost * share, share)
    self._say(left)

  def end(self, name: str) -> None:
    """A stage has ended."""
    part = self._waiting.pop(name, None)
    self._now = ''
    if part is None or not part.cost:
      return
    self._seconds += self._clock() - self._since
    self._cost += part.cost
    if any(other.cost is None or other.cost for other in self._waiting.values()):
      self._said = True
      self._say(self._left(self._seconds, self._cost, 0.0))

  def _left(self, seconds: float, cost: float, share: float) -> str:
    """What is left, at a pace of `seconds` for `cost`; of the present stage `share` is done."""
    rest = 0.0
    unknown = []
    for part in self._waiting.values():
      if part.cost is None:
        unknown.append(part.name)
      else:
        rest += part.cost * (1 - share if part.name == self._now else 1)
    text = f'time left: about {format_seconds(_rounded(rest * seconds / cost))}'
    return f'{text}, and what {" and ".join(unknown)} takes' if unknown else text


def _rounded(seconds: float) -> float:
  """Rounds to two digits or less: more would promise more than is known."""
  for step in (3600, 600, 60, 10):
    if seconds >= 10 * step:
      return round(seconds / step) * step
  return round(seconds / 5) * 5 or 5


def _say(text: str) -> None:
  # Above a bar that is being drawn.
  tqdm.tqdm.write(text, file=sys.stderr)
