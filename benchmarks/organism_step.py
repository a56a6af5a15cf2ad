"""Reinforcement steps on the packaged organism, for the cases of `benchmarks.grpo_step`."""

import time

import jax
import ml_collections
import numpy as np

from benchmarks.measure import say
from dcore_jax.data.seeds import DecisionPoint, decision_points
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.learn import optimizer
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import load_policy
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.train.learner import Learner
from dcore_jax.train.other_policies import Reference
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.rollout_batch import RolloutBatch
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.sources import Questions, encode_prompts
from dcore_jax.worlds.toolworld.tasks import KINDS
from dcore_jax.worlds.toolworld.world import ToolWorld


class OrganismStep:
  """Our steps on the packaged organism, with the geometry of configs/nano.py.

  A call makes steps until one compiles nothing, and returns the seconds of that one: other lengths
  may need other programs, which are compiled once in a run.

  Attributes:
    policy, params: the organism.
    engine: samples with its present weights.
    source: judges responses.
    prompts: what is asked.
    order: the prompts of each step.
    phases: seconds of each phase, and tokens of a response, of the steps that counted.
  """

  def __init__(self, c: ml_collections.ConfigDict):
    self.policy = load_policy(c.model, seed=0)
    self.prompts, _ = encode_prompts(
      self.policy.tokenizer, organism_points(), c.rl.max_prompt_tokens
    )
    self.params = self.policy.load(None)
    self.phases: list[dict[str, float]] = []
    self.order = PromptOrder(items=range(len(self.prompts)), prompts=c.rl.prompts, seed=0)
    self.engine = Engine(
      self.params,
      self.policy.config,
      stop_ids=self.policy.stop_ids,
      sizes=EngineSizes(
        lanes=c.engine.lanes,
        max_len=c.engine.max_len,
        steps_per_call=c.engine.steps_per_call,
      ),
    )
    self.source = Questions(self.policy.tokenizer, self.prompts, c.rl.reward)
    self._sampler = Sampler(self.engine, self.source, self.order, c.rl)
    self._learner = Learner(self.policy, self.engine, self.source, c.rl, Execution())
    copied = jax.tree.map(lambda leaf: leaf.copy(), self.params)
    self._state = optimizer.init_state(copied, self._learner.programs.tx)
    self._reference = Reference(self.params, Execution())
    self.engine.update(self._state.params)

  def __call__(self) -> float:
    """Makes steps until one compiles nothing; returns its seconds."""
    while True:
      compiled = self.engine.stats.compilations
      measured = self._step(len(self.phases))
      new = self.engine.stats.compilations - compiled
      if not new:
        self.phases.append(measured)
        return measured['seconds']
      say(f'a step that compiled {new} programs: {measured["seconds"]:.2f} s')

  def sampled(self, number: int) -> RolloutBatch:
    """Samples and judges the rollouts of a step."""
    return self.source.judge(self.order.chosen(number), self._sampler.rollouts(number))

  def _step(self, number: int) -> dict[str, float]:
    began = time.perf_counter()
    batch = self.sampled(number)
    measured = {'rollout': time.perf_counter() - began}
    self._state, under_way = self._learner.update(self._state, self._reference, batch)
    numbers = under_way.numbers(self.engine)
    for name in ('score', 'reference', 'update'):
      measured[name] = numbers[f'seconds_{name}']
    measured['seconds'] = time.perf_counter() - began
    lengths = [len(completion.tokens) for r in batch.rollouts for _, completion in r.exchanges]
    measured['response_tokens'] = float(np.mean(lengths))
    return measured


def organism_points() -> list[DecisionPoint]:
  """The decision points of 16 training tasks of each kind of ToolWorld."""
  world = ToolWorld()
  points = []
  for kind in KINDS:
    for task in world.tasks(kind, 16, seed=5, split='train'):
      for seed in task_seeds(world, task):
        points += decision_points(seed)
  return points
