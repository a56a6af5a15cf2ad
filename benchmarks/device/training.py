"""The SFT step and offloading: the very programs of the plan, run on arrays of their shapes.

Every token of a row is trained, and every row is one causal sequence: that is what the plan counts.
Letters as in `plan/programs.py`.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import rows
from benchmarks.device.rows import Row
from benchmarks.device.setting import Setting
from dcore_jax import tokentree
from dcore_jax.learn.optimizer import TrainState
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.plan import compile_times, programs, roofline, topology
from dcore_jax.plan.programs import Program
from dcore_jax.plan.shapes import RunShapes, host_bytes
from dcore_jax.run.config import read_config

_GIB = 2**30


class Ran(NamedTuple):
  """SFT steps that were run.

  Attributes:
    run: what they hold, as shapes.
    program: the step as the plan has it.
    planned: bytes on each device, by the compiler.
    compile_seconds: of tracing and compiling.
    seconds: median of a step.
    losses: of the steps, in order.
    skipped: steps that a gradient without a number made skip.
    norm: of all parameters, after the steps.
  """

  run: RunShapes
  program: Program
  planned: int
  compile_seconds: float
  seconds: float
  losses: list[float]
  skipped: int
  norm: float


def sft(setting: Setting) -> Iterator[Row]:
  """Yields time, MFU and memory of an SFT step beside those of the plan."""
  done = _run(setting)
  yield from _rows('sft', setting, done)


def offload(setting: Setting) -> Iterator[Row]:
  """Yields what moments in host memory save and cost, and whether they change a result."""
  part = 'offload'
  if setting.machine.platform == 'cpu':
    yield rows.skipped(part, 'SFT step', 'a CPU has no memory apart from that of the host')
    return
  plain = _run(setting)
  moved = _run(setting, offload=('optimizer',))
  yield from _rows(part, setting, moved)
  saved = (plain.planned - moved.planned) / _GIB
  # Within what the two compilers do otherwise: temporaries of the moments on their way.
  held = host_bytes(moved.program.arguments) / _GIB
  yield rows.Row(part, 'memory of a device that it saves', saved, 'GiB', plan=held)
  yield rows.fact(part, 'seconds that it adds', moved.seconds - plain.seconds, 's')
  # The same operations in the same order: the losses may differ in their last bits alone.
  off = max(abs(a - b) for a, b in zip(plain.losses, moved.losses, strict=True))
  yield rows.within(rows.fact(part, 'difference of the losses', off, 'nats'), 1e-3)
  off = abs(moved.norm / plain.norm - 1)
  yield rows.within(rows.fact(part, "difference of the parameters' norm", off, 'rel'), 1e-5)


def _rows(part: str, setting: Setting, done: Ran) -> Iterator[Row]:
  machine = setting.machine
  sizes = setting.sizes
  bound = roofline.bound(done.program.work, machine.accelerator)
  tokens = 2 * sizes.row * machine.count
  row = rows.fact(
    part,
    f'{sizes.trained_name}, step of {tokens:,} tokens',
    done.seconds,
    's',
    bound_by=bound.by,
    mfu=done.program.work.model_flops / done.seconds / machine.flops,
    highest_mfu=bound.mfu,
    tokens_per_second=tokens / done.seconds,
  )
  # Other devices' parts travel meanwhile, which this bound leaves out.
  yield rows.against_bound(row, bound.seconds, setting.least('sft'))
  yield rows.fact(part, 'compiling the step', done.compile_seconds, 's')
  yield from memory_rows(part, done.planned)
  yield rows.claim(
    part,
    'every gradient is a number',
    not done.skipped and bool(np.isfinite(done.losses).all()),
    f'{done.skipped} steps were skipped, losses {done.losses}',
    losses=done.losses,
  )


def memory_rows(part: str, planned: float) -> Iterator[Row]:
  """Yields the most memory that a device had in use, where it is counted, beside the plan's."""
  most = 0
  for device in jax.local_devices():
    # A CPU counts nothing.
    most = max(most, (device.memory_stats() or {}).get('peak_bytes_in_use', 0))
  row = rows.Row(part, 'memory of a device, plan', planned / _GIB, 'GiB')
  if not most:
    yield row
    return
  row = rows.fact(part, 'memory of a device, at most', most / _GIB, 'GiB')
  yield rows.against_memory(row, planned / _GIB)


def _run(setting: Setting, offload: tuple[str, ...] = ()) -> Ran:
  c = setting.sizes.config()
  c.execution.offload = offload
  run = RunShapes(read_config(c), setting.sizes.trained, jax.devices())
  program = programs.sft_step(run)
  held = host_bytes(program.arguments)
  compiled, took = compile_times.measured(program.name, lambda: program.lower().compile())
  with jax.set_mesh(run.mesh):
    state = _state(run, program.arguments['train state'])
    batch = _batch(run, program.arguments['batch'])
    seconds = []
    values = []
    # The first step also reads the program into the device.
    for _ in range(1 + setting.sizes.rounds):
      began = time.perf_counter()
      state, metrics = compiled(state, batch, run.frozen)
      values.append(jax.block_until_ready(metrics))
      seconds.append(time.perf_counter() - began)
    norm = jax.jit(_norm)(state.params)
  return Ran(
    run=run,
    program=program,
    planned=topology.footprint(compiled, held).peak + sum(program.beside.values()),
    compile_seconds=took.seconds,
    seconds=float(np.median(seconds[1:])),
    losses=[float(value['loss']) for value in values],
    skipped=int(sum(value['skipped'] for value in values)),
    norm=float(norm),
  )


def _norm(params: Any) -> jax.Array:
  return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)))


def random_params(
  model: DecoderConfig, shapes: decoder.Params, *, single: bool = False
) -> decoder.Params:
  """Draws parameters in the dtype and the shards of their shapes.

  With `single` they are on the one device without a mesh, as a run of one device has them.
  """
  places = None if single else jax.tree.map(lambda shape: shape.sharding, shapes)
  dtype = shapes['embed'].dtype
  # Compiled with the dtype of its result, so that no whole copy in float32 is made.
  draw = functools.partial(decoder.init_params, model, dtype=dtype)
  return jax.jit(draw, out_shardings=places)(jax.random.key(0))


def _state(run: RunShapes, shapes: TrainState) -> TrainState:
  # Adam's moments and counters begin at zero.
  return dataclasses.replace(
    shapes,
    params=random_params(run.model, run.parameters()),
    opt_state=_zeros(shapes.opt_state),
    step=_zeros(shapes.step),
  )


def _zeros(shapes: Any) -> Any:
  places = jax.tree.map(lambda shape: shape.sharding, shapes)

  def make() -> Any:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

  return jax.jit(make, out_shardings=places)()


def _batch(run: RunShapes, shapes: tokentree.RowBatch) -> tokentree.RowBatch:
  """Makes full rows, each of them a causal sequence of which every token is trained."""
  A, R, T = shapes.tokens.shape
  M = shapes.target.shape[1]
  rng = np.random.default_rng(0)

  def drawn(*shape: int) -> np.ndarray:
    return rng.integers(0, run.model.vocab_size, shape).astype(np.int32)

  def row(values_T: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values_T.astype(np.int32), (A, R, T))

  # Within a device's own rows each token predicts a target.
  own = np.tile(np.arange(M // run.shards, dtype=np.int32), run.shards)
  batch = tokentree.RowBatch(
    tokens=drawn(A, R, T),
    position=row(np.arange(T)),
    end=row(np.full(T, T)),
    parent=np.broadcast_to(own, (A, M)),
    slot=np.broadcast_to(np.arange(M, dtype=np.int32), (A, M)),
    target=drawn(A, M),
    weight=np.ones((A, M), np.float32),
    extras={},
  )
  return jax.tree.map(lambda array, shape: jax.device_put(array, shape.sharding), batch, shapes)
