"""The supervised loop: packed rows, the newest checkpoint, and a row of metrics for each step."""

import math
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from dcore_jax import sharding
from dcore_jax.config import SftSection
from dcore_jax.learn import lora, sft
from dcore_jax.learn.batches import Batches, BatchShape, batches
from dcore_jax.learn.optimizer import Schedule, init_state, make_optimizer
from dcore_jax.models.attention import tree_attention
from dcore_jax.models.decoder import Execution
from dcore_jax.overrides import check_ranges
from dcore_jax.progress import progress
from dcore_jax.rollout.policy import Policy
from dcore_jax.tokentree import TokenSequence, TokenTree
from dcore_jax.train import stopping
from dcore_jax.train.checkpoint import Checkpoints
from dcore_jax.train.skips import Skips
from dcore_jax.train.stage_run import StageRun

Params = Any


class _RowWriter:
  """Writes the row of each step when the next one is under way.

  The device is busy with that one then: the host's waiting costs nothing.

  Args:
    run: gets the rows; those behind `start` are cut off, whose steps are taken again.
    config: section `sft`.
    bar: shows the newest loss.
    start: the first step of this process.
    step_tokens: tokens that a step stands for.
    opened: when this process began to train, by the monotonic clock.

  Attributes:
    losses: of all steps, those of earlier processes as well; NaN where one is not finite.
  """

  def __init__(
    self,
    run: StageRun,
    config: SftSection,
    bar: Any,
    start: int,
    step_tokens: float,
    opened: float,
  ):
    self._run = run
    self._bar = bar
    self._start = start
    self._step_tokens = step_tokens
    self._opened = opened
    rows = run.metrics.rewind('sft', start)
    self._skips = Skips('sft', config.most_skipped, rows=rows)
    self.losses = [math.nan if row['loss'] is None else row['loss'] for row in rows]
    self._waiting: tuple[int, dict[str, jax.Array]] | None = None

  def submit(self, step: int, values: dict[str, jax.Array]) -> None:
    """Takes the numbers of a step, which is under way, and writes the row of the one before."""
    self.flush()
    self._waiting = (step, values)

  def flush(self) -> None:
    """Waits for the newest step, and writes its row."""
    if self._waiting:
      self._write(*self._waiting)
      self._waiting = None

  def _write(self, step: int, values: dict[str, jax.Array]) -> None:
    self.losses.append(float(values['loss']))
    seconds = time.monotonic() - self._opened
    self._run.metrics.write(
      'sft',
      step,
      loss=self.losses[-1],
      grad_norm=float(values['grad_norm']),
      skipped=int(values['skipped']),
      tokens_per_second=(step + 1 - self._start) * self._step_tokens / seconds,
    )
    self._bar.set_postfix(loss=f'{self.losses[-1]:.3f}')
    self._skips.see(step, {'skipped': int(values['skipped'])})


def run_sft(
  params: Params,
  policy: Policy,
  sequences: Sequence[TokenSequence],
  config: SftSection,
  run: StageRun,
  *,
  execution: Execution,
) -> tuple[Params, dict[str, Any]]:
  """Fine-tunes on token sequences; resumes from the newest checkpoint.

  Args:
    params: where to start from; donated, but for a base that adapters stand beside.
    policy: their model and tokenizer.
    sequences: what is trained on, see `data.rows.encode_rows`.
    config: section `sft`; `dcore_jax.config` says what each field means.
    run: its metrics get a row a step as stage 'sft'. Its seed is of the row order, and of adapters.
    execution: how the training passes run.

  Returns:
    (parameters, result). Under LoRA the former have adapters attached. The result has `rows`
    (sequences given), `dropped` (those longer than a packed row), `dedup` and `occupancy` of the
    packed rows, `attention`, `steps`, `first_loss` and `last_loss` (means over a tenth of the
    steps; None where none is finite), `resumed_at` and `seconds_before` of earlier processes.

  Raises:
    ValueError: a row longer than the model has positions, checkpoints made from other rows, an
      option that means nothing, or more than `most_skipped` steps in a row without a gradient.
  """
  # Before anything is packed or compiled.
  _check_positions(sequences, config.capacity, policy.config.max_position_embeddings)
  check_section(config)
  # Packed before the optimizer is made: the schedule needs the number of steps.
  data = _make_batches(sequences, policy, config, run.seed)
  tx = _optimizer(config, steps=len(data))
  step_fn = sft.make_sft_step(policy.config, tx, execution)
  trained, frozen = lora.split(params, policy.config, run.lora, run.seed)
  state = init_state(trained, tx, offload='optimizer' in execution.offload)
  tree = data.tree
  # Rows and not options: a resumed run must go on with the very same batches.
  fingerprint = _fingerprint(tree)
  with (
    Checkpoints(run.checkpoints) as saved,
    progress(total=len(data), description='sft') as bar,
    stopping.in_steps(),
  ):
    # A fresh run starts at 0, and has spent nothing before.
    start = 0
    seconds_before = 0.0
    opened = time.monotonic()
    # Restored into the shapes and shardings of `state`.
    found = saved.restore(state)
    if found:
      state, extra, start = found
      # The row order is drawn from the rows, so that other rows would be skipped or repeated.
      if extra['rows'] != fingerprint:
        raise ValueError(f'the checkpoints in {str(run.checkpoints)!r} were made from other rows')
      seconds_before = extra['seconds']
      # Both, since tqdm computes its rate from `initial`.
      bar.initial = start
      bar.n = start
    # Tokens of the unmerged sequences that a step stands for: what a rate is compared by.
    step_tokens = sum(map(len, tree.paths)) / tree.rows * config.rows
    rows = _RowWriter(run, config, bar, start, step_tokens, opened)
    # The first batch is that of the step to go on with; earlier ones are not made.
    for step, batch in enumerate(data.prefetched(start), start):
      state, values = step_fn(state, sharding.place_batch(batch), frozen)
      rows.submit(step, values)
      stopped = stopping.asked()
      if (step + 1) % config.checkpoint_every == 0 or step + 1 == len(data) or stopped:
        # A checkpoint must not be newer than the metrics, or a kill would leave a gap between them.
        rows.flush()
        seconds = seconds_before + time.monotonic() - opened
        saved.save(step + 1, state, {'seconds': seconds, 'rows': fingerprint})
      bar.update(1)
      if stopped:
        # On the way out the checkpoint is waited for.
        stopping.stop()
  # A tenth of the steps smooths single batches, and shows the trend.
  losses = rows.losses
  tenth = max(1, len(losses) // 10)
  return lora.attach(frozen, state.params), {
    'rows': len(sequences),
    'dropped': len(tree.dropped),
    'dedup': tree.dedup,
    'occupancy': tree.live / tree.tokens.size,
    'attention': tree_attention.resolve(execution.attention),
    'steps': len(losses),
    'first_loss': _finite_mean(losses[:tenth]),
    'last_loss': _finite_mean(losses[-tenth:]),
    'resumed_at': start,
    'seconds_before': seconds_before,
  }


def check_section(config: SftSection) -> None:
  """Checks what section `sft` says by itself, before anything is loaded.

  Raises:
    ValueError: a number outside its range, an unknown optimizer, or a rate that it does not have.
  """
  check_ranges(config, SftSection, 'sft.')
  try:
    _optimizer(config, steps=1)
  except ValueError as error:
    raise ValueError(f'section sft: {error}') from error


def _make_batches(
  sequences: Sequence[TokenSequence],
  policy: Policy,
  config: SftSection,
  seed: int,
) -> Batches:
  """Packs the sequences; this host gets its part of each batch."""
  shape = BatchShape(
    # Rows of all hosts together; each host packs all and keeps its part.
    rows=config.rows,
    accumulate=config.accumulate,
    shards=sharding.shards(),
    host=jax.process_index(),
    hosts=jax.process_count(),
  )
  return batches(
    sequences,
    shape,
    capacity=config.capacity,
    epochs=config.epochs,
    seed=seed,
    # Padding sees only itself and has no weight: any token will do where a tokenizer has none.
    pad_id=policy.tokenizer.pad_token_id or 0,
  )


def _optimizer(config: SftSection, steps: int) -> optax.GradientTransformation:
  """Returns the section's optimizer, whose learning rate falls along a cosine over all steps."""
  return make_optimizer(
    config.optimizer,
    config.learning_rate,
    Schedule('cosine', warmup=config.warmup, floor=config.floor, total_steps=steps),
    weight_decay=config.weight_decay,
    clip=config.clip,
    adam_learning_rate=config.adam_learning_rate or None,
  )


def _check_positions(sequences: Sequence[TokenSequence], capacity: int, positions: int) -> None:
  """ValueError where a sequence that is not dropped has more tokens than the model positions."""
  lengths = [len(sequence.tokens) for sequence in sequences]
  # Sequences above the capacity are dropped, so that they need no positions.
  longest = max((length for length in lengths if length <= capacity), default=0)
  if longest > positions:
    raise ValueError(
      f'a row of {longest} tokens does not fit the {positions} positions of the model; '
      'a lower sft.capacity drops it'
    )


def _fingerprint(tree: TokenTree) -> int:
  """Tells whether a checkpoint was made from the same packed rows."""
  # Tokens and weights: the same text with other loss masks is other data.
  return zlib.crc32(tree.weight.tobytes(), zlib.crc32(tree.tokens.tobytes()))


def _finite_mean(losses: Sequence[float]) -> float | None:
  """Returns the mean of the finite losses; None without any, since a skipped step may have none."""
  finite = [loss for loss in losses if math.isfinite(loss)]
  return float(np.mean(finite)) if finite else None
