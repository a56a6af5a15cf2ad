"""Where a reinforcement run stands: what its checkpoints hold beside the train state.

Each checkpoint comes with a measurement of the policy on the prompts that are not trained on.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from dcore_jax.learn.optimizer import TrainState
from dcore_jax.statistics import paired_difference
from dcore_jax.train.checkpoint import Checkpoints
from dcore_jax.train.checksum import tree_sum
from dcore_jax.train.journal import RolloutJournal
from dcore_jax.train.live import StepView
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.stage_run import StageRun


class HeldOut(NamedTuple):
  """Prompts that are measured and not trained on.

  Attributes:
    items: their numbers in the source; none where nothing is measured.
    tasks: the task of each. Tasks are the units of a comparison, because what makes one step of a
      task hard makes the others hard, too.
    reward_bounds: the least and the largest reward.
  """

  items: Sequence[int]
  tasks: list[str]
  reward_bounds: tuple[float, float]


@dataclasses.dataclass
class Position:
  """What a checkpoint holds beside the train state. Field names are the file's.

  Attributes:
    prompts: fingerprint of the source, and of which items are held out.
    reference: sum over the bits of the reference policy. It is what the stage starts from, which
      stays where it is, and is not stored again.
    alpha: weight of the entropy, which may have been adapted.
    seconds: the time that the run has taken, all processes together.
    before: `rollout_metrics` of the held-out prompts before the first step; None without any.
    after: the same at the newest checkpoint.
    prompts_before: `prompt_means` behind them.
    prompts_after: the same at the newest checkpoint.
  """

  prompts: int
  reference: int
  alpha: float
  seconds: float = 0.0
  before: dict[str, float] | None = None
  after: dict[str, float] | None = None
  prompts_before: dict[str, list[float]] | None = None
  prompts_after: dict[str, list[float]] | None = None

  @classmethod
  def first(cls, prompts: int, params: Any, alpha: float) -> 'Position':
    """Returns the position of a run that begins from these parameters."""
    return cls(prompts=prompts, reference=int(tree_sum(params)), alpha=alpha)

  def resumed(self, stored: dict[str, Any], folder: str) -> 'Position':
    """Returns the stored position if it belongs to the same prompts and reference as this one.

    Raises:
      ValueError: it belongs to others.
    """
    position = Position(**stored)
    different = []
    # Prompts that are held out now may have been trained on by the run that was stored.
    if position.prompts != self.prompts:
      different.append('prompts')
    # The KL term against another reference policy would be another objective.
    if position.reference != self.reference:
      different.append('reference')
    if different:
      raise ValueError(
        f'the checkpoints in {folder!r} were made from other {" and ".join(different)}'
      )
    return position

  def differences(self, held_out: HeldOut) -> dict[str, dict[str, Any]] | None:
    """Returns `paired_difference` of each of the prompt means; None without held-out prompts."""
    if not self.prompts_after:
      return None
    # The number of reflections has no largest value, and so no bounds.
    bounds = {'reward': held_out.reward_bounds, 'right_fraction': (0.0, 1.0)}
    result = {}
    for name, before in self.prompts_before.items():
      result[name] = paired_difference(
        before, self.prompts_after[name], clusters=held_out.tasks, bounds=bounds.get(name)
      ) | {'prompts': len(before)}
    return result


class RlCheckpoints:
  """Keeps the position of a run, and saves it with the train state.

  Args:
    saved: the checkpoints' files.
    run: its metrics get a row 'validation' with each checkpoint that is measured.
    position: of a run that begins.
    held_out: what is measured.
    sampler: measures the engine's present policy.
    journal: the rollouts of the steps since a checkpoint.
    view: shows how far a measurement is.
  """

  def __init__(
    self,
    saved: Checkpoints,
    run: StageRun,
    position: Position,
    held_out: HeldOut,
    sampler: Sampler,
    journal: RolloutJournal,
    view: StepView,
  ):
    self._saved = saved
    self._run = run
    self._position = position
    self._held_out = held_out
    self._sampler = sampler
    self._journal = journal
    self._view = view
    self._opened = time.monotonic()
    # What the processes before this one took; time between them does not count.
    self._seconds_before = 0.0

  @property
  def alpha(self) -> float:
    """Weight of the entropy at the newest checkpoint."""
    return self._position.alpha

  def restore(self, state: TrainState) -> tuple[TrainState, int]:
    """Returns the newest stored state, and the step to go on with.

    Without a checkpoint, these are the given state and 0.

    Raises:
      ValueError: the checkpoint is of other prompts, or of another reference policy.
    """
    found = self._saved.restore(state)
    if not found:
      return state, 0
    state, stored, start = found
    self._position = self._position.resumed(stored, str(self._run.checkpoints))
    self._seconds_before = self._position.seconds
    return state, start

  def measure_start(self) -> None:
    """Measures the policy before the first step, which a resumed run reads from its checkpoint."""
    if self._held_out.items:
      self._measure()
      self._position.before = self._position.after
      self._position.prompts_before = self._position.prompts_after

  def save(self, step: int, state: TrainState, alpha: float, *, measure: bool) -> None:
    """Saves the run as it stands behind a step.

    Args:
      step: its number.
      state: parameters and moments.
      alpha: weight of the entropy, for the next step.
      measure: whether the policy is measured before.
    """
    position = self._position
    if self._held_out.items and measure:
      self._measure()
      self._write_row(step, position.differences(self._held_out)['reward'])
    position.seconds = self._seconds_before + time.monotonic() - self._opened
    position.alpha = alpha
    # Checkpoints keep the best step by this number; without held-out prompts no step is the best.
    score = position.after['reward'] if position.after and measure else None
    # A checkpoint is named by the next step, with which a resumed run goes on.
    self._saved.save(step + 1, state, dataclasses.asdict(position), score=score)
    # No resumed run can need older rollouts. A damaged newest checkpoint makes a run fall back to
    # the one before, whose rollouts stay.
    steps = self._saved.all_steps()
    self._journal.forget(steps[-2] if len(steps) > 1 else 0)

  def result(self) -> dict[str, Any]:
    """Returns what a stage's result says of its checkpoints.

    `seconds_before`: what earlier processes took. `best_step`: the checkpoint with the highest
    reward on held-out prompts, which is kept beside the newest two. `validation`: what was measured
    on these prompts, with the same random streams before and after: `rollout_metrics`,
    `paired_difference` over their tasks, and the `prompt_means` behind it.
    """
    position = self._position
    return {
      'seconds_before': self._seconds_before,
      'best_step': self._saved.best_step,
      'validation': {
        'before': position.before,
        'after': position.after,
        'difference': position.differences(self._held_out),
        'by_prompt': {
          'tasks': self._held_out.tasks,
          'before': position.prompts_before,
          'after': position.prompts_after,
        },
      },
    }

  def _measure(self) -> None:
    position = self._position
    items = self._held_out.items
    with self._view.beside('held-out prompts', self._sampler.answers(items)) as told:
      position.after, position.prompts_after = self._sampler.measured(items, told)

  def _write_row(self, step: int, change: dict[str, Any]) -> None:
    """Writes the row of a checkpoint; `change` is the paired difference of its reward."""
    # One task alone has no interval.
    low, high = change['interval'] or (None, None)
    self._run.metrics.write(
      'validation',
      step,
      **self._position.after,
      reward_difference=change['difference'],
      reward_difference_error=change['standard_error'],
      reward_difference_low=low,
      reward_difference_high=high,
    )
