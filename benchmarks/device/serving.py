"""Prefill and decode of the rollout engine: tokens a second, and the share of what is possible."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import rows, training
from benchmarks.device.rows import Row
from benchmarks.device.setting import Setting
from dcore_jax.plan import roofline
from dcore_jax.plan.shapes import RunShapes
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import engine_sizes
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.run.config import read_config

_PART = 'engine'


class Phase(NamedTuple):
  """A part of a round.

  Attributes:
    seconds: that it took.
    tokens: that it gave: of prompts, or drawn.
    passes: through the model.
    slots: of the cache, that were read.
  """

  seconds: float
  tokens: int
  passes: int
  slots: int


def measure(setting: Setting) -> Iterator[Row]:
  """Yields the rates of prefill and decode with all lanes in use, each with its own prompt."""
  sizes = setting.sizes
  c = sizes.config()
  c.model.init.update(sizes.served.to_hf())
  config = read_config(c)
  run = RunShapes(config, sizes.served, jax.devices())
  single = setting.machine.count == 1
  params = training.random_params(sizes.served, run.engine.weights(), single=single)
  engine = Engine(params, sizes.served, stop_ids=(), sizes=engine_sizes(config, groups=False))
  began = time.perf_counter()
  engine.prepare()
  yield rows.fact(_PART, 'compiling the engine', time.perf_counter() - began, 's')
  # The first round reads the programs into the device.
  rounds = [one_round(engine, setting, seed) for seed in range(1 + sizes.rounds)][1:]
  yield _prefill_row(setting, [prefill for prefill, _ in rounds])
  yield _decode_row(setting, run, [decode for _, decode in rounds])


def one_round(engine: Engine, setting: Setting, seed: int) -> tuple[Phase, Phase]:
  """Samples an answer in every lane -> (until all prompts are read, from then on)."""
  sizes = setting.sizes
  rng = np.random.default_rng(seed)
  sampling = SamplingParams(temperature=1.0, max_tokens=sizes.answer, seed=seed)
  for lane in range(engine.lanes):
    prompt = rng.integers(1, sizes.served.vocab_size, sizes.prompt).astype(np.int32)
    engine.submit(Request(prompt, (lane,)), sampling)
  before = _counts(engine)
  # The last token of a prompt is drawn from, and counts as decoded.
  wanted = before['prefill_tokens'] + engine.lanes * (sizes.prompt - 1)
  began = time.perf_counter()
  while engine.busy and engine.stats.prefill_tokens < wanted:
    engine.step()
  jax.block_until_ready(engine.params)
  read = time.perf_counter()
  middle = _counts(engine)
  while engine.busy:
    engine.step()
  ended = time.perf_counter()
  after = _counts(engine)
  return (
    _phase(before, middle, 'prefill_tokens', read - began),
    _phase(middle, after, 'decoded_tokens', ended - read),
  )


def _counts(engine: Engine) -> dict[str, int]:
  return vars(engine.stats).copy()


def _phase(before: dict[str, int], after: dict[str, int], tokens: str, seconds: float) -> Phase:
  return Phase(
    seconds=seconds,
    tokens=after[tokens] - before[tokens],
    passes=after['passes'] - before['passes'],
    slots=after['slots_read'] - before['slots_read'],
  )


def _median(phases: list[Phase]) -> Phase:
  return sorted(phases, key=lambda phase: phase.tokens / phase.seconds)[len(phases) // 2]


def _prefill_row(setting: Setting, phases: list[Phase]) -> Row:
  sizes = setting.sizes
  phase = _median(phases)
  machine = setting.machine
  work = roofline.forward(sizes.served, phase.tokens / sizes.prompt, sizes.prompt, 0)
  # All devices share the work; each reads its part of the weights.
  bound = roofline.bound(work * (1 / machine.count), machine.accelerator).seconds
  row = rows.fact(
    _PART,
    f'{sizes.served_name}, prefill of {sizes.lanes} x {sizes.prompt}',
    phase.tokens / phase.seconds,
    'tokens/s',
  )
  return rows.against_bound(row, phase.tokens / bound, setting.least('prefill'))


def _decode_row(setting: Setting, run: RunShapes, phases: list[Phase]) -> Row:
  sizes = setting.sizes
  phase = _median(phases)
  if not phase.passes:
    # Every answer had ended when the last prompt was read.
    return rows.failed(_PART, 'decode', 'no pass was left behind the prompts')
  machine = setting.machine
  dtype = jnp.dtype(run.dtype)
  # Each pass reads the weights once, of an embedding that is not the head a row a lane.
  table = 0 if sizes.served.tie_word_embeddings else sizes.served.vocab_size
  weights = (sizes.served.param_count - table * sizes.served.hidden_size) * dtype.itemsize
  read = phase.passes * weights + phase.slots * sizes.served.kv_bytes_per_token(dtype)
  # Every device has its part of the weights, and of the cache where it splits key heads.
  bound = read / machine.count / machine.memory_rate
  row = rows.fact(
    _PART,
    f'{sizes.served_name}, decode of {sizes.lanes} lanes behind {sizes.prompt}',
    phase.tokens / phase.seconds,
    'tokens/s',
    passes=phase.passes,
    bytes_per_pass=read / max(phase.passes, 1),
    seconds_per_pass=phase.seconds / max(phase.passes, 1),
  )
  return rows.against_bound(row, phase.tokens / bound, setting.least('decode'))
