"""Checks the shape of `summary.json`, which other programs read.

A stage that was not run is absent, and a number that could not be measured is None. Other fields
are allowed anywhere. The names of stages and kinds are not checked, because estimators and worlds
may be registered by other packages.
"""

from typing import Annotated, Any

import pydantic

from dcore_jax.statistics import TASKS, format_estimate

# Strict types: pydantic would otherwise read the text '0.5' and the flag true as numbers.
_Number = Annotated[float, pydantic.Field(strict=True, allow_inf_nan=False)]
_Share = Annotated[float, pydantic.Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
_Count = Annotated[int, pydantic.Field(strict=True, ge=0)]


class _Part(pydantic.BaseModel):
  """An object of the summary; other fields than its own are ignored."""

  model_config = pydantic.ConfigDict(extra='ignore', frozen=True)


class Estimate(_Part):
  """A mean of n units with its interval, see `statistics`."""

  mean: _Number | None
  n: _Number | None
  interval: tuple[_Number, _Number] | None = None
  unit: str = TASKS


class SuiteScore(_Part):
  """One figure of an evaluation suite, see `evaluate.suites.Score`."""

  category: str
  metric: str
  estimate: Estimate
  floor: _Number | None = None
  published: _Number | None = None


class SuiteFigures(_Part):
  """What a suite has measured, see `evaluate.suites.SuiteResult`."""

  version: str
  scores: list[SuiteScore]
  notes: list[str] = []


class Stage(_Part):
  """Figures of one model on held-out tasks, by kind of task and over all of them."""

  accuracy: dict[str, _Share | None]
  lazy_ratio: dict[str, _Share | None]
  n: dict[str, _Count | None]
  decomposition_rate: _Share | None
  reflections_per_response: _Number | None
  reasoning_tokens_mean: _Number | None
  suites: dict[str, SuiteFigures] = {}

  @pydantic.model_validator(mode='after')
  def _same_kinds(self) -> 'Stage':
    # A page shows the kinds side by side. A kind in one table alone is a slip of the program that
    # wrote the file.
    for name in ('accuracy', 'lazy_ratio'):
      lacking = sorted(self.n.keys() - getattr(self, name).keys())
      if lacking:
        raise ValueError(f'{name} lacks {", ".join(lacking)}, which n has')
    # Accuracies without their number of tasks have no interval.
    lacking = sorted(self.accuracy.keys() - self.n.keys())
    if lacking:
      raise ValueError(f'n lacks {", ".join(lacking)}, which accuracy has')
    return self


class Pair(_Part):
  """A paired difference of n units measured twice, see `statistics`."""

  difference: _Number | None
  standard_error: _Number | None
  n: _Number | None
  interval: tuple[_Number, _Number] | None = None
  unit: str = TASKS

  @pydantic.model_validator(mode='after')
  def _inside(self) -> 'Pair':
    # An interval without its value usually means that two scales were mixed, shares and per cent.
    if self.interval is not None and self.difference is not None:
      low, high = self.interval
      if not low <= self.difference <= high:
        raise ValueError(f'the interval {self.interval} does not hold {self.difference}')
    return self


class Change(_Part):
  """What changed from one stage to another, by kind of task."""

  # `from` is a word of Python, and cannot be a field's name.
  from_stage: str = pydantic.Field(alias='from')
  to_stage: str = pydantic.Field(alias='to')
  accuracy: dict[str, Pair]


class Distill(_Part):
  """Seeds asked about and rows kept, with why the others were dropped."""

  seeds: _Count | None
  kept: _Count | None
  success_rate: _Share | None
  dropped: dict[str, _Count | None]


class Curves(_Part):
  """Reinforcement learning: one value a step in each curve."""

  zero_variance_fraction: list[_Share | None]
  reward: list[_Number | None]
  entropy: list[_Number | None]

  @pydantic.model_validator(mode='after')
  def _same_length(self) -> 'Curves':
    lengths = {
      'zero_variance_fraction': len(self.zero_variance_fraction),
      'reward': len(self.reward),
      'entropy': len(self.entropy),
    }
    # Curves are drawn over one axis of steps.
    if len(set(lengths.values())) > 1:
      raise ValueError(f'the curves of rl differ in length: {lengths}')
    return self


class Summary(_Part):
  """The whole of `summary.json`."""

  stages: dict[str, Stage]
  changes: list[Change] = []
  distill: Distill | None = None
  rl: Curves | None = None
  export: str | None = None
  seconds: dict[str, _Number | None]
  compile_seconds: dict[str, _Number | None] = {}

  @pydantic.model_validator(mode='after')
  def _changes_are_of_stages(self) -> 'Summary':
    # The number goes into the error, since two changes may have the same stages.
    for number, change in enumerate(self.changes):
      # A change between stages that are not there could not be labelled.
      unknown = {change.from_stage, change.to_stage} - self.stages.keys()
      if unknown:
        raise ValueError(f'changes[{number}] is of {sorted(unknown)}, which are no stages')
    return self


def validate_summary(summary: Any) -> None:
  """Checks a summary against `Summary`.

  Raises:
    ValueError: names every place that is wrong, and what it should be.
  """
  try:
    Summary.model_validate(summary)
  except pydantic.ValidationError as error:
    problems = [_describe(problem) for problem in error.errors(include_url=False)]
    # pydantic's own message has a line for each problem and links to its documentation.
    raise ValueError('summary: ' + '; '.join(problems)) from None


def _describe(problem: Any) -> str:
  """Returns a pydantic error as 'stages.base.n.single = 12.5: Input should be ...'."""
  where = ''
  for step in problem['loc']:
    # Places in lists are numbers, fields are names.
    where += f'[{step}]' if isinstance(step, int) else f'.{step}'
  where = where.lstrip('.') or 'it'
  if problem['type'] == 'missing':
    return f'{where} is missing'
  if problem['type'] == 'value_error':  # one of our own, which says all
    return f'{where}: {problem["ctx"]["error"]}'
  return f'{where} = {problem["input"]!r:.80}: {problem["msg"]}'


def format_changes(summary: dict[str, Any]) -> str:
  """Returns lines for a terminal: what each stage has changed, and RL on its own prompts."""
  lines = []
  for change in summary['changes']:
    kinds = ', '.join(
      f'{kind} {format_estimate(pair, 1, 100)}' for kind, pair in change['accuracy'].items()
    )
    # Points are per cent of tasks: a difference of 0.05 is 5 points.
    lines.append(f'{change["from"]} -> {change["to"]}, points of held-out tasks right: {kinds}')
  validation = summary.get('rl', {}).get('validation') or {}
  for name, pair in (validation.get('difference') or {}).items():
    before, after = (validation[when][name] for when in ('before', 'after'))
    # Summaries of earlier programs count prompts as units.
    prompts = pair.get('prompts', pair['n'])
    change = format_estimate(pair)
    lines.append(f'{name} on {prompts} prompts set aside: {before:.3f} -> {after:.3f}, {change}')
  return '\n'.join(lines)
