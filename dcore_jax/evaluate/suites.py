"""What every evaluation suite does, and the suites by name.

A suite is a set of tasks with a verdict on each answer: BFCL, tau2-bench, GSM8K. It meets its model
at an OpenAI-compatible address, whoever serves there, and works in three steps:

    suite.prepare()                  is all there that it needs? makes what it can make itself
    suite.answer(served, folder)     asks the model; goes on where an earlier call was interrupted
    suite.score(folder)              judges what was answered; needs no model

A suite registers itself under a name and takes its own options as keyword arguments:

    @register_suite('gsm8k')
    class Gsm8k(Suite):
      def __init__(self, settings: SuiteSettings, shots: int = 0): ...

FOLDER/result.json           what `score` returned, see `SuiteResult.to_json`
FOLDER/scores.csv            its figures, one a line
FOLDER/trajectories.jsonl    every task as it went, in the form of `held_out`
"""

import abc
import csv
import dataclasses
import inspect
import io
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dcore_jax.files import replace_text, write_json_atomic
from dcore_jax.statistics import estimate_share

RESULT_FILE = 'result.json'
SCORES_FILE = 'scores.csv'
TRAJECTORIES_FILE = 'trajectories.jsonl'

# Filled by `register_suite`.
SUITES: dict[str, type['Suite']] = {}

_COLUMNS = ('suite', 'category', 'metric', 'value', 'low', 'high', 'n', 'floor', 'published')


@dataclasses.dataclass(frozen=True)
class Served:
  """The model under test, at an OpenAI-compatible address.

  Attributes:
    base_url: with '/v1' at its end.
    model: its name there.
    key: what a client must send; '' where none is asked for.
    tokenizer: a Hugging Face directory with its tokenizer and config, for harnesses that render
      prompts or count tokens themselves; None if there is none.
  """

  base_url: str
  model: str
  key: str = ''
  tokenizer: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class SuiteSettings:
  """What is set for all suites of an evaluation.

  Attributes:
    limit: takes the first so many tasks of each category; 0 takes all.
    temperature: of sampling; 0 takes the likeliest token.
    max_tokens: of a response.
    seed: of sampling.
    concurrency: requests under way at once.
    timeout: seconds that a request may take.
    data: the folder of third-party data, see docs/guides/evaluation.md.
  """

  limit: int = 0
  temperature: float = 0.6
  max_tokens: int = 4096
  seed: int = 0
  concurrency: int = 8
  timeout: float = 600.0
  data: pathlib.Path = pathlib.Path('../shared/data')


@dataclasses.dataclass(frozen=True)
class Score:
  """One figure of a suite.

  Attributes:
    category: of tasks; 'overall' is the suite's one figure.
    metric: what it is, e.g. 'accuracy' or 'pass^1'.
    estimate: see `statistics`; its unit is a task.
    floor: what an agent that does nothing gets, where that is known.
    published: what others have published for the model, where that is known.
  """

  category: str
  metric: str
  estimate: Mapping[str, Any]
  floor: float | None = None
  published: float | None = None

  def to_json(self) -> dict[str, Any]:
    """Returns the figure as JSON."""
    return dataclasses.asdict(self) | {'estimate': dict(self.estimate)}


@dataclasses.dataclass(frozen=True)
class SuiteResult:
  """What a suite has measured.

  Attributes:
    suite: its name.
    version: of tasks and checker, e.g. 'bfcl-eval 2025.6.16'.
    scores: the figures.
    notes: sentences for whoever reads the figures, e.g. that they are of the first 10 tasks.
    left_out: tasks without a verdict, {'id', 'reason'}. They are not in the figures.
  """

  suite: str
  version: str
  scores: Sequence[Score]
  notes: Sequence[str] = ()
  left_out: Sequence[Mapping[str, Any]] = ()

  def to_json(self) -> dict[str, Any]:
    """Returns the result as JSON."""
    return {
      'suite': self.suite,
      'version': self.version,
      'scores': [score.to_json() for score in self.scores],
      'notes': list(self.notes),
      'left_out': [dict(entry) for entry in self.left_out],
    }


class Suite(abc.ABC):
  """A set of tasks with a verdict on each answer.

  Args:
    settings: what is set for all suites. A subclass takes its own options behind it.

  Raises:
    ValueError: an option whose value means nothing.
  """

  name = ''  # set by `register_suite`

  def __init__(self, settings: SuiteSettings):
    self.settings = settings

  @abc.abstractmethod
  def prepare(self) -> None:
    """Makes environments and checks data before a model is loaded.

    Raises:
      ValueError: names all that is missing, with the command that gets it.
    """

  @abc.abstractmethod
  def answer(self, served: Served, folder: pathlib.Path, told: Callable[[int, int], None]) -> None:
    """Asks the model for every answer that `folder` does not hold yet.

    Args:
      served: the model.
      folder: the suite's own; what is in it belongs to the same model and settings.
      told: takes the number of finished tasks, and of all, whenever it changes.

    Raises:
      ConnectionError: the model stays away. Nothing that was answered is lost.
    """

  @abc.abstractmethod
  def score(self, folder: pathlib.Path) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Judges the answers in `folder`; returns the figures and the trajectories behind them.

    Raises:
      ValueError: there are no answers.
    """


def register_suite(name: str) -> Callable[[type[Suite]], type[Suite]]:
  """A decorator that enters a suite's class under a name.

  Raises:
    ValueError: another class has the name.
  """

  def enter(suite: type[Suite]) -> type[Suite]:
    # A module that is imported twice registers the same class again, which is no error.
    known = SUITES.setdefault(name, suite)
    if known is not suite:
      raise ValueError(f'the suite {name!r} is already {known.__module__}.{known.__qualname__}')
    suite.name = name
    return suite

  return enter


def make_suite(name: str, settings: SuiteSettings, options: Mapping[str, Any]) -> Suite:
  """Returns the suite of a name.

  Args:
    name: a name of SUITES.
    settings: what is set for all suites.
    options: its own keyword arguments.

  Raises:
    ValueError: an unknown name, or an option that the suite does not take or whose value is wrong.
  """
  if name not in SUITES:
    raise ValueError(f'unknown suite {name!r}; expected some of {sorted(SUITES)}')
  suite = SUITES[name]
  try:
    # Binding first tells a wrong option from a TypeError that the suite itself raises.
    inspect.signature(suite).bind(settings, **options)
  except TypeError as error:
    raise ValueError(f'options of suite {name!r}: {error}') from error
  return suite(settings, **options)


def accuracy(
  category: str,
  verdicts: Sequence[bool],
  *,
  floor: float | None = None,
  published: float | None = None,
) -> Score:
  """Returns the share of right tasks of a category.

  Args:
    category: see `Score`.
    verdicts: at least one, of tasks that are independent.
    floor, published: see `Score`.
  """
  share = sum(verdicts) / len(verdicts)
  estimate = estimate_share(share, len(verdicts))
  return Score(category, 'accuracy', estimate, floor, published)


def write_result(
  folder: pathlib.Path, result: SuiteResult, trajectories: Sequence[Mapping[str, Any]]
) -> None:
  """Writes the files of a suite that has been scored; result.json comes last."""
  lines = [json.dumps(trajectory) + '\n' for trajectory in trajectories]
  replace_text(folder / TRAJECTORIES_FILE, ''.join(lines))
  table = io.StringIO()
  writer = csv.DictWriter(table, _COLUMNS, lineterminator='\n')
  writer.writeheader()
  for score in result.scores:
    low, high = score.estimate['interval'] or (None, None)
    writer.writerow(
      {
        'suite': result.suite,
        'category': score.category,
        'metric': score.metric,
        'value': score.estimate['mean'],
        'low': low,
        'high': high,
        'n': score.estimate['n'],
        'floor': score.floor,
        'published': score.published,
      }
    )
  replace_text(folder / SCORES_FILE, table.getvalue())
  write_json_atomic(folder / RESULT_FILE, result.to_json())
