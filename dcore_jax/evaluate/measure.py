"""Computes the figures of a model from its trajectories through the tasks of a world."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcore_jax.evaluate.behaviour.labels import behaviour_counts
from dcore_jax.evaluate.behaviour.lazy_reasoning import count_reflections, is_lazy, lazy_ratio
from dcore_jax.statistics import estimate_mean, estimate_share
from dcore_jax.worlds.rollouts import Trajectory


def measure(trajectories: Mapping[str, Sequence[Trajectory]]) -> dict[str, Any]:
  """Computes the figures of one stage by kind of task, in the shape of `summary.json`.

  Lazy reasoning is counted per response, with the verdict of the whole episode, over right and
  wrong responses. `accuracy_by_subtasks` and `decomposition_rate` cover the kinds whose requests
  have several subtasks (ToolWorld's sequential and parallel). The rate is the share of those
  requests whose first response announces a decomposition. A figure is None if no task has a
  response. `intervals` holds an estimate of each figure under the same name (`statistics`).

  Args:
    trajectories: kind -> at least one finished task.
  """
  by_subtasks = {}
  first_reasonings = []
  for kind, group in trajectories.items():
    # Single calls have nothing to split, and would lower the rate.
    if all(_has_subtasks(trajectory) for trajectory in group):
      by_subtasks[kind] = _by_subtasks(group)
      for trajectory in group:
        # A plan is made in the first response. Later ones carry it out.
        first_reasonings += trajectory.reasonings[:1]
  reasonings = []
  reasoning_tokens = []
  # Reflections and tokens are pooled over all kinds, so that a stage has one number of each.
  for group in trajectories.values():
    for trajectory in group:
      reasonings += trajectory.reasonings
      reasoning_tokens += trajectory.reasoning_tokens
  # Counted once, so that the rate and its interval are of the same flags.
  decompositions = behaviour_counts(first_reasonings)['decomposition']
  behaviours = behaviour_counts(reasonings)
  unfinished = {}
  for kind, group in trajectories.items():
    unfinished[kind] = sum(trajectory.unfinished for trajectory in group)
  return {
    'accuracy': {kind: _accuracy(group) for kind, group in trajectories.items()},
    'lazy_ratio': {kind: _lazy_ratio(group) for kind, group in trajectories.items()},
    'n': {kind: len(group) for kind, group in trajectories.items()},
    'failures': {kind: _failures(group) for kind, group in trajectories.items()},
    'unfinished': unfinished,
    'accuracy_by_subtasks': by_subtasks,
    'decomposition_rate': _mean(decompositions > 0),
    'reflections_per_response': _mean([count_reflections(text) for text in reasonings]),
    'reasoning_tokens_mean': _mean(reasoning_tokens),
    'behaviours': {name: _mean(counts) for name, counts in behaviours.items()},
    'intervals': _intervals(trajectories, decompositions > 0),
  }


def _intervals(
  trajectories: Mapping[str, Sequence[Trajectory]], decomposed: np.ndarray
) -> dict[str, Any]:
  """Estimates the figures; None without a response. `decomposed` is bool, one a task."""
  accuracy = {}
  lazy = {}
  # Units are tasks: the responses of one task are not independent, and would narrow an interval.
  reflections: list[int] = []
  tokens: list[int] = []
  tasks: list[str] = []  # of each response
  for kind, group in trajectories.items():
    accuracy[kind] = estimate_share(_accuracy(group), len(group))
    flags = []
    owners = []
    for number, trajectory in enumerate(group):
      wrong = not trajectory.outcome.correct
      for text, length in zip(trajectory.reasonings, trajectory.reasoning_tokens, strict=True):
        flags.append(is_lazy(text, length, wrong))
        reflections.append(count_reflections(text))
        tokens.append(length)
        # An estimate needs names that differ. Kind and place are enough for that.
        owners.append(f'{kind}-{number}')
    # Tasks have several responses, so that this is a mean over clusters and no share of tasks.
    lazy[kind] = _estimate(flags, owners, bounds=(0.0, 1.0))
    tasks += owners
  return {
    'accuracy': accuracy,
    'lazy_ratio': lazy,
    # A request has one first response, so that this is a share of tasks.
    'decomposition_rate': estimate_share(float(decomposed.mean()), len(decomposed))
    if len(decomposed)
    else None,
    'reflections_per_response': _estimate(reflections, tasks),
    'reasoning_tokens_mean': _estimate(tokens, tasks),
  }


def _estimate(
  values: Sequence[float], tasks: Sequence[str], bounds: tuple[float, float] | None = None
) -> dict[str, Any] | None:
  return estimate_mean(values, clusters=tasks, bounds=bounds) if values else None


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
  """Computes the mean; None without values, because JSON has no NaN."""
  return float(np.mean(values)) if len(values) else None


def _accuracy(group: Sequence[Trajectory]) -> float:
  return float(np.mean([trajectory.outcome.correct for trajectory in group]))


def _failures(group: Sequence[Trajectory]) -> dict[str, int]:
  """Counts tasks by reason, the most frequent first."""
  reasons = [trajectory.outcome.reason for trajectory in group]
  return dict(collections.Counter(reason for reason in reasons if reason).most_common())


def _lazy_ratio(group: Sequence[Trajectory]) -> float | None:
  reasonings = []
  tokens = []
  wrong = []
  for trajectory in group:
    reasonings += trajectory.reasonings
    tokens += trajectory.reasoning_tokens
    # The whole episode's verdict stands for each of its responses, as in the paper's multi-turn
    # ratio.
    wrong += [not trajectory.outcome.correct] * len(trajectory.texts)
  return lazy_ratio(reasonings, tokens, wrong)['ratio'] if reasonings else None


def _has_subtasks(trajectory: Trajectory) -> bool:
  """Says whether the task is one request that takes several calls."""
  return len(trajectory.task.turns) == 1 and trajectory.task.steps > 1


def _by_subtasks(group: Sequence[Trajectory]) -> dict[str, dict[str, float]]:
  """Computes accuracy and number of tasks by their number of reference calls."""
  # More subtasks are harder: one mean over all numbers would hide where a model fails.
  by_steps = collections.defaultdict(list)
  for trajectory in group:
    by_steps[trajectory.task.steps].append(trajectory)
  return {
    str(steps): {'accuracy': _accuracy(by_steps[steps]), 'n': len(by_steps[steps])}
    for steps in sorted(by_steps)
  }
