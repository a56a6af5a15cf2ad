"""The supervised loop: packed rows, the newest checkpoint, and each step's numbers fetched when the next one is under way."""

import math
import pathlib
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from dcore_jax import sharding
from dcore_jax.data.rows import encode_rows
from dcore_jax.learn import sft
from dcore_jax.learn.optimizer import init_state, make_optimizer
from dcore_jax.models import tree_attention
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.progress import progress
from dcore_jax.train.checkpoint import Checkpoints
from dcore_jax.train.metrics import Metrics

Params = Any


def run_sft(
  params: Params,
  model: DecoderConfig,
  tokenizer: Any,
  rows: Sequence[dict[str, Any]],
  config: ml_collections.ConfigDict,
  metrics: Metrics,
  checkpoints: pathlib.Path,
  *,
  execution: Execution = Execution(),
  seed: int,
) -> tuple[Params, dict[str, Any]]:
  """Fine-tunes on the rows -> (parameters, {'rows', 'dropped', 'dedup', 'occupancy', 'attention', 'first_loss', 'last_loss',
  'steps', 'resumed_at', 'seconds_before'}); resumes from the newest checkpoint.

  Args:
    params: where to start from; donated.
    model, tokenizer: what they belong to.
    rows: {id, conversations}; `loss_mask` says what of each is trained.
    config: section `sft`: loss_mask, overlong, epochs, rows, accumulate, capacity, optimizer, learning_rate,
      adam_learning_rate, warmup, floor, weight_decay, clip, checkpoint_every.
    metrics: written as stage 'sft', a row a step.
    checkpoints: folder for parameters, optimizer and position.
    execution: how the passes run.
    seed: of the row order.
  """
  sequences = encode_rows(
    tokenizer, rows, loss_mask=config.loss_mask, capacity=config.capacity, overlong=config.overlong
  )
  longest = max((len(s.tokens) for s in sequences if len(s.tokens) <= config.capacity), default=0)
  if longest > model.max_position_embeddings:
    raise ValueError(
      f'a row of {longest} tokens does not fit the {model.max_position_embeddings} positions of the model; '
      'a lower sft.capacity drops it'
    )
  if config.checkpoint_every < 1:
    raise ValueError(f'sft.checkpoint_every = {config.checkpoint_every} must be at least 1')
  data = sft.batches(
    sequences,
    capacity=config.capacity,
    rows=config.rows,
    epochs=config.epochs,
    seed=seed,
    accumulate=config.accumulate,
    pad_id=tokenizer.pad_token_id or 0,
    shards=sharding.shards(),
    host=jax.process_index(),
    hosts=jax.process_count(),
  )
  tx = make_optimizer(
    config.optimizer,
    config.learning_rate,
    'cosine',
    warmup=config.warmup,
    floor=config.floor,
    total_steps=len(data),
    weight_decay=config.weight_decay,
    clip=config.clip,
    adam_learning_rate=config.adam_learning_rate or None,
  )
  step_fn = sft.make_sft_step(model, tx, execution)
  state = init_state(params, tx, offload='optimizer' in execution.offload)
  tree = data.tree
  fingerprint = zlib.crc32(tree.weight.tobytes(), zlib.crc32(tree.tokens.tobytes()))
  flat = (
    sum(map(len, tree.paths)) / tree.rows * config.rows
  )  # tokens of the unmerged rows that a step stands for
  with Checkpoints(checkpoints) as saved, progress(total=len(data), description='sft') as bar:
    start, spent, opened = 0, 0.0, time.monotonic()
    found = saved.restore(state)
    if found:
      state, extra, start = found
      if extra['rows'] != fingerprint:
        raise ValueError(f'the checkpoints in {str(checkpoints)!r} were made from other rows')
      spent = extra['seconds']
      bar.initial = bar.n = start
    losses = [
      math.nan if row['loss'] is None else row['loss'] for row in metrics.rewind('sft', start)
    ]

    def log(step: int, values: dict[str, jax.Array]) -> None:
      losses.append(float(values['loss']))
      metrics.write(
        'sft',
        step,
        loss=losses[-1],
        grad_norm=float(values['grad_norm']),
        skipped=int(values['skipped']),
        tokens_per_second=(step + 1 - start) * flat / (time.monotonic() - opened),
      )
      bar.set_postfix(loss=f'{losses[-1]:.3f}')

    waiting = None
    for step, batch in enumerate(data.prefetched(start), start):
      state, values = step_fn(state, sharding.place_batch(batch))
      if waiting:  # fetched only now, so that the device is already busy with the next step
        log(*waiting)
      waiting = step, values
      if (step + 1) % config.checkpoint_every == 0 or step + 1 == len(data):
        log(*waiting)
        waiting = None
        saved.save(
          step + 1, state, {'seconds': spent + time.monotonic() - opened, 'rows': fingerprint}
        )
      bar.update(1)
  tenth = max(1, len(losses) // 10)
  mean = lambda part: (
    float(np.mean(finite)) if (finite := [loss for loss in part if math.isfinite(loss)]) else None
  )  # or skipped
  return state.params, {
    'rows': len(rows),
    'dropped': len(tree.dropped),
    'dedup': tree.dedup,
    'occupancy': tree.live / tree.tokens.size,
    'attention': tree_attention.resolve(execution.attention),
    'steps': len(losses),
    'first_loss': mean(losses[:tenth]),
    'last_loss': mean(losses[-tenth:]),
    'resumed_at': start,
    'seconds_before': spent,
  }
