"""The (DA-)GRPO loop: rollouts, rewards, updates, checkpoints, and what is written down of them.

Rollouts need the weights of the update before, and advantages the rewards, so that those phases
follow each other on the device. What a person reads of a step needs nothing to wait: updates are
dispatched, the engine takes the new weights, the next rollouts are under way, and a thread writes
the step's row as soon as the device has its numbers. Rollouts are journaled wave by wave
(`train.journal`), and checkpoints are written while the next step runs.
"""

import concurrent.futures
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dcore_jax.config import RlSection
from dcore_jax.learn import lora
from dcore_jax.learn.optimizer import init_state
from dcore_jax.models.attention import tree_attention
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.fleet import Fleet
from dcore_jax.rollout.policy import Policy
from dcore_jax.train import stopping
from dcore_jax.train.checkpoint import STATE, Checkpoints
from dcore_jax.train.fleet_sampler import make_sampler
from dcore_jax.train.journal import RolloutJournal
from dcore_jax.train.learner import Learner, Update
from dcore_jax.train.live import StepView, step_view
from dcore_jax.train.other_policies import Reference
from dcore_jax.train.prompt_order import PromptOrder, set_aside, training_order
from dcore_jax.train.rl_checkpoints import HeldOut, Position, RlCheckpoints
from dcore_jax.train.rl_options import check_options
from dcore_jax.train.rollout_batch import RolloutBatch, rollout_metrics
from dcore_jax.train.sampler import MEASURED, SampledStep
from dcore_jax.train.skips import Skips
from dcore_jax.train.sources import RolloutSource
from dcore_jax.train.stage_run import StageRun
from dcore_jax.train.throughput import matmul_rate

Params = Any


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
  """Writes rows of steps on a thread of its own, one at a time, and shows the newest to a person.

  Args:
    run: gets the rows.
    engine: has the weights of a step when the step is over.
    learner: adapts alpha to the numbers of each step.
    view: what a person sees.
    peak: operations a second that MFU refers to.
    skips: counts updates that were not made, and ends a run of too many.
  """

  def __init__(
    self,
    run: StageRun,
    engine: Engine | Fleet,
    learner: Learner,
    view: StepView,
    peak: float,
    skips: Skips,
  ):
    self._run = run
    self._engine = engine
    self._learner = learner
    self._view = view
    self._peak = peak
    self._skips = skips
    # One thread, so that rows come in the order of their steps.
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._waiting: concurrent.futures.Future | None = None
    self._ended = 0.0

  def submit(self, step: int, sampled: SampledStep, update: Update, judged: float) -> None:
    """Starts to write the row of a step, whose rollouts had been judged at that time."""
    # A step is timed from the end of the one before: what overlaps counts once.
    times = _Times(began=self._ended, sampled=judged - sampled.judging, judged=judged)
    self._waiting = self._thread.submit(self._write, step, sampled, update, times)

  def wait(self) -> None:
    """Waits for the row that is being written, if any; alpha of the next step follows from it."""
    if self._waiting:
      self._ended, row = self._waiting.result()
      self._waiting = None
      self._learner.adapt_alpha(row)

  def restart_clock(self) -> None:
    """Leaves the time since the last row to no step."""
    self._ended = time.monotonic()

  def _write(
    self, step: int, sampled: SampledStep, update: Update, times: _Times
  ) -> tuple[float, dict[str, float]]:
    """Returns when the step ended, and its row."""
    row = _step_row(sampled.batch, update, self._engine, self._peak, times) | sampled.asked
    self._run.metrics.write('rl', step, **row)
    self._view.see(step, row)
    # Behind the row, which says what the gradients were.
    self._skips.see(step, row)
    return update.ended, row

  def __enter__(self) -> '_RowWriter':
    self.restart_clock()
    return self

  def __exit__(self, *_) -> None:
    # Waits for the last row, which a run must not end without.
    self._thread.shutdown()


class _Prompts(NamedTuple):
  """The prompts of a source, divided.

  Attributes:
    order: draws those of each step.
    held_out: are measured and not trained on.
    fingerprint: of all this; a run does not go on with another one.
  """

  order: PromptOrder
  held_out: HeldOut
  fingerprint: int


def _divide(source: RolloutSource, config: RlSection, run: StageRun) -> _Prompts:
  """Sets prompts aside to be measured; the others are trained on."""
  aside_seed = run.seed if run.held_out_seed is None else run.held_out_seed
  held_out = set_aside(source.labels, config.validation, aside_seed)
  fingerprint = source.fingerprint
  if held_out:
    # What was measured before must be compared on the same prompts, and they must not have been
    # trained on.
    fingerprint = zlib.crc32(repr((fingerprint, held_out)).encode())
  return _Prompts(
    order=PromptOrder(
      items=training_order(source.kinds, held_out), prompts=config.prompts, seed=run.seed
    ),
    held_out=HeldOut(
      items=held_out,
      tasks=[source.labels[item].task for item in held_out],
      reward_bounds=source.reward_bounds,
    ),
    fingerprint=fingerprint,
  )


def run_rl(
  params: Params,
  policy: Policy,
  source: RolloutSource,
  config: RlSection,
  run: StageRun,
  *,
  make_engine: Callable[[Params], Engine | Fleet],
  execution: Execution,
) -> tuple[Params, dict[str, Any]]:
  """Trains by (DA-)GRPO; resumes from the newest checkpoint.

  Args:
    params: the weights to start from; donated. The KL term is against a frozen copy of them. Under
      LoRA they are the base and the reference themselves, and nothing is donated or copied.
    policy: the model and tokenizer of these weights.
    source: what is asked, and how answers are judged.
    config: section `rl`; `dcore_jax.config` says what each field means.
    run: its metrics get a row a step as stage 'rl', and a row a checkpoint as 'validation'. The
      journal of rollouts lies among its checkpoints. Its seed is of prompt order, sampling and
      adapters.
    make_engine: builds the rollout engine for given weights, or the fleet that stands for it.
    execution: how the training passes run.

  Returns:
    (parameters, result). The parameters have adapters attached, see `learn.lora`. The result has
    `prompts`, `attention`, `resumed_at`, and what `RlCheckpoints.result` says.

  Raises:
    ValueError: options or sizes that do not fit each other, checkpoints made from other prompts or
      from another model, or more than `rl.most_skipped` steps in a row without a finite gradient.
  """
  prompts = _divide(source, config, run)
  # Arrays that an update or a checkpoint returns are tied to their devices. Tying these from the
  # start saves compiling every program a second time.
  params = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), params)
  trained, frozen = lora.split(params, policy.config, run.lora, run.seed)
  # An engine of plain weights takes merged ones with every update; new adapters add nothing yet.
  unmerged = frozen is not None and run.lora.rollouts == 'unmerged'
  engine = make_engine(lora.attach(frozen, trained) if unmerged else params)
  # After the engine is made, whose limits are among what is checked.
  check_options(config, engine, source)
  journal = RolloutJournal(run.checkpoints / 'rollouts')
  measured = RolloutJournal(run.checkpoints.parent / MEASURED)
  sampler = make_sampler(engine, source, prompts.order, config, journal, measured)
  learner = Learner(policy, engine, source, config, execution, frozen=frozen)
  # Before the first update, which donates `params`.
  reference = _make_reference(params, config, execution, frozen)
  position = Position.first(prompts.fingerprint, params, config.alpha)
  state = init_state(trained, learner.programs.tx, offload='optimizer' in execution.offload)
  with (
    Checkpoints(run.checkpoints / STATE) as saved,
    step_view(config.steps, config.estimator) as view,
    stopping.in_steps(),
    sampler,
  ):
    checkpoints = RlCheckpoints(saved, run, position, prompts.held_out, sampler, journal, view)
    state, start = checkpoints.restore(state)
    if start:
      learner.alpha = checkpoints.alpha
      # The engine was made with the weights that the stage starts from.
      engine.update(lora.attach(frozen, state.params))
      view.resume(start)
    else:
      checkpoints.measure_start()
    peak = matmul_rate(execution.dtype(params).name)
    skips = _rewind(run, config, start)
    with _RowWriter(run, engine, learner, view, peak, skips) as writer:
      for step in range(start, config.steps):
        sampled = sampler.step(step)
        judged = time.monotonic()
        # Alpha of this step follows from the numbers of the one before, also in a resumed run. That
        # row is long done, because these rollouts needed the weights of its step.
        writer.wait()
        # By the number of the step, so that a resumed run measures the same ones.
        cosine = bool(config.cosine_every) and step % config.cosine_every == 0
        # Dispatches and returns: the device works on while the next rollouts are asked for.
        state, update = learner.update(state, reference, sampled.batch, cosine=cosine)
        writer.submit(step, sampled, update, judged)
        # The last step always has a checkpoint, which the export reads.
        due = not (step + 1) % config.checkpoint_every or step + 1 == config.steps
        stopped = stopping.asked()
        if due or stopped:
          # The row must be on disk before the checkpoint that stands for its step.
          writer.wait()
          # A run that is told to end measures nothing first. The next checkpoint that is due has
          # the same rows as without the end.
          checkpoints.save(step, state, learner.alpha, measure=due)
          if stopped:
            stopping.stop()
          writer.restart_clock()
  return lora.attach(frozen, state.params), {
    'prompts': len(prompts.order.items),
    'resumed_at': start,
    'attention': tree_attention.resolve(execution.attention),
    **checkpoints.result(),
  }


def _make_reference(
  params: Params, config: RlSection, execution: Execution, frozen: lora.Frozen | None
) -> Reference | None:
  """Returns the policy of the KL term; None without one, since its copy would cost memory."""
  if not config.kl_coefficient:
    return None
  return Reference(params, execution, copied=frozen is None)


def _rewind(run: StageRun, config: RlSection, start: int) -> Skips:
  """Cuts off the rows behind the step to go on with; returns who counts skips from there on."""
  # Rows that a killed process wrote after its last checkpoint are written again.
  rows = run.metrics.rewind('rl', start)
  run.metrics.rewind('validation', start)
  return Skips('rl', config.most_skipped, updates=config.updates, rows=rows)
