"""The (DA-)GRPO loop: rollouts, rewards, updates, checkpoints, and what is written down of them.

Rollouts need the weights of the update before, and advantages the rewards, so that those phases
follow each other on the device. What a person reads of a step needs nothing to wait: updates are
dispatched, the engine takes the new weights, the next rollouts are under way, and a thread writes
the step's row as soon as the device has its numbers. Rollouts are journaled wave by wave
(`train.journal`), and checkpoints are written while the next step runs.
"""

import concurrent.futures
import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dcore_jax.config import RlSection
from dcore_jax.learn.optimizer import init_state
from dcore_jax.models.attention import tree_attention
from dcore_jax.models.decoder import Execution
from dcore_jax.progress import progress
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import Policy
from dcore_jax.statistics import paired_difference
from dcore_jax.train.checkpoint import STATE, Checkpoints
from dcore_jax.train.checksum import tree_sum
from dcore_jax.train.journal import RolloutJournal
from dcore_jax.train.learner import Learner, Reference, Update
from dcore_jax.train.prompt_order import PromptOrder, set_aside, training_order
from dcore_jax.train.rl_options import check_options
from dcore_jax.train.rollout_batch import RolloutBatch, rollout_metrics
from dcore_jax.train.sampler import SampledStep, Sampler
from dcore_jax.train.sources import RolloutSource
from dcore_jax.train.stage_run import StageRun
from dcore_jax.train.throughput import matmul_rate

Params = Any


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

  def measure(self, sampler: Sampler, held_out: Sequence[int]) -> None:
    """Measures the engine's present policy as the one after the newest step."""
    self.after, self.prompts_after = sampler.measured(held_out)

  def differences(
    self, tasks: Sequence[str], reward_bounds: tuple[float, float]
  ) -> dict[str, dict[str, Any]] | None:
    """Returns `paired_difference` of each of the prompt means; None without held-out prompts.

    Args:
      tasks: the task of each held-out prompt. Tasks are the units, because what makes one step of a
        task hard makes the others hard, too.
      reward_bounds: the least and the largest reward.
    """
    if not self.prompts_after:
      return None
    # The number of reflections has no largest value, and so no bounds.
    bounds = {'reward': reward_bounds, 'right_fraction': (0.0, 1.0)}
    result = {}
    for name, before in self.prompts_before.items():
      result[name] = paired_difference(
        before, self.prompts_after[name], clusters=tasks, bounds=bounds.get(name)
      ) | {'prompts': len(before)}
    return result


class _Times(NamedTuple):
  """When a step's phases ended, by the monotonic clock."""

  began: float
  sampled: float
  judged: float


def _step_row(
  batch: RolloutBatch, update: Update, engine: Engine, peak: float, times: _Times
) -> dict[str, float]:
  """Returns the row of a step; waits until the device is done with the step.

  `peak` is the operations a second that MFU refers to.
  """
  row = rollout_metrics(batch) | update.numbers(engine)
  seconds = update.ended - times.began
  tokens = 0
  for rollout in batch.rollouts:
    # Sampled tokens alone count: prompts are read, and not written, by the policy.
    tokens += sum(len(completion.tokens) for _, completion in rollout.exchanges)
  return row | {
    'seconds_rollout': times.sampled - times.began,
    'seconds_rewards': times.judged - times.sampled,
    'seconds': seconds,
    'tokens_per_second': tokens / seconds,
    'tflops': update.flops / seconds / 1e12,
    'mfu': update.flops / seconds / peak,
  }


class _RowWriter:
  """Writes rows of steps on a thread of its own, and shows the newest on the progress bar."""

  def __init__(self, run: StageRun, engine: Engine, bar: Any, peak: float):
    self._run = run
    self._engine = engine
    self._bar = bar
    self._peak = peak
    # One thread, so that rows come in the order of their steps.
    self._thread = concurrent.futures.ThreadPoolExecutor(1)

  def submit(
    self, step: int, sampled: SampledStep, update: Update, times: _Times
  ) -> concurrent.futures.Future:
    """Starts to write the row of a step; the result is (when the step ended, its row)."""
    return self._thread.submit(self._write, step, sampled, update, times)

  def _write(
    self, step: int, sampled: SampledStep, update: Update, times: _Times
  ) -> tuple[float, dict[str, float]]:
    row = _step_row(sampled.batch, update, self._engine, self._peak, times) | sampled.asked
    self._run.metrics.write('rl', step, **row)
    reward = f'{row["reward"]:.2f}'
    self._bar.set_postfix(reward=reward, zero=f'{row["zero_variance_fraction"]:.2f}')
    self._bar.update(1)
    return update.ended, row

  def __enter__(self) -> '_RowWriter':
    return self

  def __exit__(self, *_) -> None:
    # Waits for the last row, which a run must not end without.
    self._thread.shutdown()


def run_rl(
  params: Params,
  policy: Policy,
  source: RolloutSource,
  config: RlSection,
  run: StageRun,
  *,
  make_engine: Callable[[Params], Engine],
  execution: Execution,
) -> tuple[Params, dict[str, Any]]:
  """Trains by (DA-)GRPO; resumes from the newest checkpoint.

  Args:
    params: the weights to start from; donated. The KL term is against a frozen copy of them.
    policy: the model and tokenizer of these weights.
    source: what is asked, and how answers are judged.
    config: section `rl`; `dcore_jax.config` says what each field means.
    run: its metrics get a row a step as stage 'rl', and a row a checkpoint as 'validation'. The
      journal of rollouts lies among its checkpoints. Its seed is of prompt order and sampling.
    make_engine: builds the rollout engine for given weights.
    execution: how the training passes run.

  Returns:
    (parameters, result). The result has `prompts`; `validation`: `rollout_metrics` before and after
    on prompts that are not trained on, with the same random streams, `paired_difference` over their
    tasks, and the `prompt_means` behind it; `best_step`: the checkpoint with the highest reward
    there, which is kept beside the newest two; `attention`; and of earlier processes `resumed_at`
    and `seconds_before`.

  Raises:
    ValueError: options or sizes that do not fit each other, or checkpoints made from other prompts
      or from another model.
  """
  held_out = set_aside(source.labels, config.validation, run.seed)
  tasks = [source.labels[item].task for item in held_out]
  items = training_order(source.kinds, held_out)
  prompts = source.fingerprint
  if held_out:
    # What was measured before must be compared on the same prompts, and they must not have been
    # trained on.
    prompts = zlib.crc32(repr((prompts, held_out)).encode())
  # Arrays that an update or a checkpoint returns are tied to their devices. Tying these from the
  # start saves compiling every program a second time.
  params = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), params)
  order = PromptOrder(items=items, prompts=config.prompts, seed=run.seed)
  engine = make_engine(params)
  # After the engine is made, whose limits are among what is checked.
  check_options(config, engine, source)
  journal = RolloutJournal(run.checkpoints / 'rollouts')
  sampler = Sampler(engine, source, order, config, journal)
  learner = Learner(policy, engine, source, config, execution)
  # Made before the first update, which donates `params`: the copy costs memory only if it is read.
  reference = Reference(params, execution) if config.kl_coefficient else None
  # The sum over the bits is what a checkpoint stores of the reference, whose weights it leaves out.
  position = Position(prompts=prompts, reference=int(tree_sum(params)), alpha=config.alpha)
  state = init_state(params, learner.programs.tx, offload='optimizer' in execution.offload)
  with (
    Checkpoints(run.checkpoints / STATE) as saved,
    progress(total=config.steps, description=config.estimator) as bar,
  ):
    # A run without a checkpoint begins here.
    start = 0
    opened = time.monotonic()
    found = saved.restore(state)
    if found:
      state, stored, start = found
      position = position.resumed(stored, str(run.checkpoints))
      learner.alpha = position.alpha
      # The engine was made with the weights that the stage starts from.
      engine.update(state.params)
      bar.initial = start
      bar.n = start
    # A resumed run has measured this before its first step, and reads it from the checkpoint.
    elif held_out:
      position.measure(sampler, held_out)
      position.before = position.after
      position.prompts_before = position.prompts_after
    # What the processes before this one took; time between them does not count.
    seconds_before = position.seconds
    peak = matmul_rate(execution.dtype(params).name)
    # Rows that a killed process wrote after its last checkpoint are written again.
    run.metrics.rewind('rl', start)
    run.metrics.rewind('validation', start)
    with _RowWriter(run, engine, bar, peak) as writer:
      waiting = None
      ended = time.monotonic()
      for step in range(start, config.steps):
        sampled = sampler.step(step)
        judged = time.monotonic()
        if waiting:
          # Alpha of this step follows from the numbers of the one before, also in a resumed run.
          # That row is long done, because these rollouts needed the weights of its step.
          ended, row = waiting.result()
          learner.adapt_alpha(row)
        # Dispatches and returns: the device works on while the next rollouts are asked for.
        state, update = learner.update(state, reference, sampled.batch)
        # A step is timed from the end of the one before: what overlaps counts once.
        times = _Times(began=ended, sampled=judged - sampled.judging, judged=judged)
        waiting = writer.submit(step, sampled, update, times)
        # The last step always has a checkpoint, which the export reads.
        if (step + 1) % config.checkpoint_every and step + 1 < config.steps:
          continue
        # The row must be on disk before the checkpoint that stands for its step.
        ended, row = waiting.result()
        waiting = None
        learner.adapt_alpha(row)
        if held_out:
          position.measure(sampler, held_out)
          change = position.differences(tasks, source.reward_bounds)
          _write_validation(run, step, position, change['reward'])
        position.seconds = seconds_before + time.monotonic() - opened
        position.alpha = learner.alpha
        # Checkpoints keep the best step by this number; without held-out prompts no step is the
        # best.
        score = position.after['reward'] if position.after else None
        # A checkpoint is named by the next step, with which a resumed run goes on.
        saved.save(step + 1, state, dataclasses.asdict(position), score=score)
        _forget_rollouts(journal, saved)
        ended = time.monotonic()
  return state.params, {
    'prompts': len(items),
    'resumed_at': start,
    'seconds_before': seconds_before,
    'best_step': saved.best_step,
    'attention': tree_attention.resolve(execution.attention),
    'validation': {
      'before': position.before,
      'after': position.after,
      'difference': position.differences(tasks, source.reward_bounds),
      'by_prompt': {
        'tasks': tasks,
        'before': position.prompts_before,
        'after': position.prompts_after,
      },
    },
  }


def _write_validation(run: StageRun, step: int, position: Position, change: dict[str, Any]) -> None:
  """Writes the row of a checkpoint; `change` is the paired difference of its reward."""
  # One task alone has no interval.
  low, high = change['interval'] or (None, None)
  run.metrics.write(
    'validation',
    step,
    **position.after,
    reward_difference=change['difference'],
    reward_difference_error=change['standard_error'],
    reward_difference_low=low,
    reward_difference_high=high,
  )


def _forget_rollouts(journal: RolloutJournal, saved: Checkpoints) -> None:
  """Deletes the rollouts that no resumed run can need.

  A damaged newest checkpoint makes a run fall back to the one before, whose rollouts stay.
  """
  steps = saved.all_steps()
  journal.forget(steps[-2] if len(steps) > 1 else 0)
