"""A whole DA-GRPO step, from sampling to update, with the objects of the training loop.

All prompts and responses have their greatest lengths, as the plan assumes.
"""

import time
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.device import rows, training
from benchmarks.device.rows import Row
from benchmarks.device.setting import Setting
from benchmarks.random_prompts import Numbers, Words, prompts
from dcore_jax.learn import optimizer
from dcore_jax.models import decoder
from dcore_jax.plan import capacity, programs, roofline
from dcore_jax.plan.shapes import RunShapes
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import ORGANISM, Policy, engine_sizes
from dcore_jax.run.config import read_config
from dcore_jax.train.learner import Learner
from dcore_jax.train.other_policies import Reference
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.sampler import Sampler

_PART = 'grpo'
# The plan's programs of each phase that is timed. The norm of psi's gradient is dispatched with the
# updates, and waited for with them.
_PHASES = {
  'rollouts': ('prefill', 'decode'),
  'old log-probabilities': ('old log-probabilities',),
  'reference log-probabilities': ('reference log-probabilities',),
  'update': ('gradient of psi', 'DA-GRPO update'),
}
_LEAST = {'update': 'update', 'rollouts': 'decode'}


class Steps:
  """DA-GRPO steps of a random model; `run` makes one and returns the seconds of its phases."""

  def __init__(self, setting: Setting):
    self.config = read_config(setting.sizes.config())
    self.run_shapes = RunShapes(self.config, setting.sizes.trained, jax.devices())
    rl = self.config.rl
    run = self.run_shapes
    # As in a run, one device has no mesh.
    self._mesh = run.mesh if run.mesh.size > 1 else None
    rng = np.random.default_rng(0)
    tokens_PT = rng.integers(1, run.model.vocab_size, (4 * rl.prompts, rl.max_prompt_tokens))
    source = Numbers(prompts(tokens_PT.astype(np.int32)))
    policy = Policy(
      config=run.model, load=None, tokenizer=Words(), tokenizer_dir=ORGANISM, path=None
    )
    self._order = PromptOrder(items=range(len(tokens_PT)), prompts=rl.prompts, seed=0)
    with jax.set_mesh(self._mesh):
      single = self._mesh is None
      params = training.random_params(run.model, run.parameters(), single=single)
      weights = decoder.cast(params, run.dtype)
      if not single:
        places = jax.tree.map(lambda shape: shape.sharding, run.engine.weights())
        weights = jax.device_put(weights, places)
      # Nothing stops a response before its greatest length.
      self.engine = Engine(
        weights,
        run.model,
        stop_ids=(),
        sizes=engine_sizes(self.config, groups=True),
      )
      began = time.perf_counter()
      self.engine.prepare()
      self.prepare_seconds = time.perf_counter() - began
      self._reference = Reference(params, run.execution)
      self._source = source
      self._sampler = Sampler(self.engine, source, self._order, rl)
      self._learner = Learner(policy, self.engine, source, rl, run.execution)
      self._state = optimizer.init_state(params, self._learner.programs.tx)
      self.engine.update(self._state.params)

  def run(self, number: int) -> dict[str, float]:
    """Makes step `number`; returns seconds by phase, and the metrics of the update."""
    with jax.set_mesh(self._mesh):
      began = time.perf_counter()
      batch = self._source.judge(self._order.chosen(number), self._sampler.rollouts(number))
      sampled = time.perf_counter()
      self._state, under_way = self._learner.update(self._state, self._reference, batch)
      numbers = under_way.numbers(self.engine)
      ended = time.perf_counter()
    return {
      'rollouts': sampled - began,
      'old log-probabilities': numbers['seconds_score'],
      'reference log-probabilities': numbers['seconds_reference'],
      'update': numbers['seconds_update'],
      'whole': ended - began,
      'skipped': numbers['skipped'],
      'loss': numbers['loss'],
    }


def bounds(run: RunShapes, accelerator: roofline.Accelerator) -> dict[str, float]:
  """Returns the least seconds of each phase of a step, and of the whole one.

  Nothing is compiled, so that what devices send each other is not counted.
  """
  seconds = {}
  for program in programs.of_run(run):
    least = roofline.bound(program.work, accelerator).seconds
    seconds[program.name] = program.calls * least
  found = {phase: sum(seconds[name] for name in names) for phase, names in _PHASES.items()}
  return found | {'whole': sum(found.values())}


def measure(setting: Setting) -> Iterator[Row]:
  """Yields seconds of a DA-GRPO step and of its phases, beside those of the plan."""
  sizes = setting.sizes
  steps = Steps(setting)
  yield rows.fact(_PART, 'compiling the engine', steps.prepare_seconds, 's')
  began = time.perf_counter()
  steps.run(1)
  yield rows.fact(_PART, 'the first step, which compiles', time.perf_counter() - began, 's')
  done = [steps.run(number) for number in range(2, 2 + min(3, sizes.rounds))]
  least = bounds(steps.run_shapes, setting.machine.accelerator)
  for phase, bound in least.items():
    seconds = float(np.median([step[phase] for step in done]))
    row = rows.fact(_PART, f'{sizes.trained_name}, {_case(phase, setting)}', seconds, 's')
    if not seconds:
      continue
    expected = 'rl step' if phase == 'whole' else _LEAST.get(phase)
    # Where the engine's numbers are exact, the pass of the old policy is spared.
    yield rows.against_bound(row, bound, setting.least(expected) if expected else None)
  yield from training.memory_rows(_PART, _planned(steps))
  yield rows.claim(
    _PART,
    'every gradient is a number',
    not any(step['skipped'] for step in done),
    f'updates were skipped: {[step["skipped"] for step in done]}',
    losses=[step['loss'] for step in done],
  )


def _case(phase: str, setting: Setting) -> str:
  sizes = setting.sizes
  if phase != 'whole':
    return phase
  return f'step of {sizes.prompts} x {sizes.group} of {sizes.prompt} + {sizes.answer}'


def _planned(steps: Steps) -> float:
  """Returns the bytes of an update on each device, as the plan estimates them uncompiled."""
  run = steps.run_shapes
  choices = capacity.compare(
    run.config, run.model, run.mesh.devices.flatten().tolist(), 0, next(iter(roofline.ACCELERATORS))
  )
  [own] = [choice for choice in choices if choice.capacity == run.config.rl.capacity]
  return own.total
