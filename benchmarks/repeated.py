"""What it saves to train rollouts that agree once: cases of `benchmarks.grpo_step`.

Seconds are of CPU time, which other work on the machine changes less than the clock's.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.measure import line, say
from benchmarks.organism_step import OrganismStep
from benchmarks.peers import Peer
from configs import nano
from dcore_jax.learn import grpo, objectives, optimizer
from dcore_jax.models.decoder import Execution
from dcore_jax.tokentree import TokenTree
from dcore_jax.train.learner import Learner
from dcore_jax.train.other_policies import Reference
from dcore_jax.train.rollout_batch import RolloutBatch

# Rollouts of a group of 8 that differ. In the last steps of configs/nano.py 2.5 to 3.6 do.
DISTINCT = (3, 8)
# About the default, and what holds a group of the packing case. 16,384 would hold a prompt and two
# responses to the token, and in trl's trie each branch takes one more.
CAPACITIES = (16_640, 41_088)


def with_repeats(batch: RolloutBatch, distinct: int) -> RolloutBatch:
  """The batch with each group's first `distinct` rollouts in place of the others."""
  P, G = batch.total_PG.shape
  order = np.sort(np.arange(G) % distinct)
  rollouts = []
  for p in range(P):
    group = batch.of(p, p + 1)
    rollouts += [group[place] for place in order]
  return RolloutBatch(
    kinds=batch.kinds,
    rollouts=rollouts,
    total_PG=batch.total_PG[:, order],
    format_PG=batch.format_PG[:, order],
    correctness_PG=batch.correctness_PG[:, order],
    right_PG=batch.right_PG[:, order],
  )


def cpu_seconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
  """Median CPU seconds of each function over interleaved rounds, after one that is not measured."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for number in range(rounds + 1):
    for name, run in runs.items():
      began = time.process_time()
      run()
      if number:
        seconds[name].append(time.process_time() - began)
        say(f'round {number}: {name} {seconds[name][-1]:.2f} CPU s')
  return {name: float(np.median(values)) for name, values in seconds.items()}


class Updates:
  """The updates of one rollout batch by a learner of its own; a call returns their metrics."""

  def __init__(self, step: OrganismStep, section: Any, batch: RolloutBatch):
    self._step = step
    self._batch = batch
    self.learner = Learner(step.policy, step.engine, step.source, section, Execution())
    copied = jax.tree.map(lambda leaf: leaf.copy(), step.params)
    self._state = optimizer.init_state(copied, self.learner.programs.tx)
    self._reference = Reference(step.params, Execution())

  def __call__(self) -> dict[str, float]:
    self._state, under_way = self.learner.update(self._state, self._reference, self._batch)
    return under_way.numbers(self._step.engine)

  @property
  def used_rows(self) -> int:
    """Rows of all mini-batches that hold anything."""
    minis = self.learner.packer.mini_batches(self._batch)
    return sum(int(mini.tree.weight.any(axis=1).sum()) for mini in minis)


def updates(rounds: int) -> None:
  """The updates of a step of configs/nano.py, the pass of the reference included."""
  section = nano.get_config().rl
  # PPO again under a name that does not declare that it merges: our own form of before.
  objectives.register_objective('ppo_single')(objectives.ppo_loss)
  single = copy.deepcopy(section)
  single.objective = 'ppo_single'
  step = OrganismStep(nano.get_config())
  sampled = step.sampled(0)
  for distinct in DISTINCT:
    case = f'updates of a step, organism, {distinct} of 8 rollouts differ'
    batch = with_repeats(sampled, distinct)
    runs = {
      'merged': Updates(step, section, batch),
      'single': Updates(step, single, batch),
    }
    # Both start from the same weights, so that their first metrics must agree.
    first = {name: run() for name, run in runs.items()}
    for name in ('loss', 'kl', 'clip_share', 'policy_entropy', 'grad_norm'):
      if not np.isclose(first['merged'][name], first['single'][name], rtol=1e-4, atol=1e-5):
        raise AssertionError(f'{case}: {name} differs, {first}')
    seconds = cpu_seconds(runs, rounds)
    lengths = [len(done.tokens) for each in batch.rollouts for _, done in each.exchanges]
    line(
      case,
      'the same without merging',
      seconds['merged'],
      seconds['single'],
      'CPU s',
      wanted=2 if distinct < 8 else 1,
      rows=runs['merged'].used_rows,
      peer_rows=runs['single'].used_rows,
      dedup=first['merged']['dedup'],
      peer_dedup=first['single']['dedup'],
      response_tokens=float(np.mean(lengths)),
    )


def large_groups(distinct: int) -> list[grpo.Response]:
  """8 groups of the published size: prompts of 8,192 tokens, 8 responses of 4,096 random ones."""
  rng = np.random.default_rng(0)
  responses = []
  for _ in range(8):
    prompt = rng.integers(0, 150_000, 8192).astype(np.int32)
    texts = rng.integers(0, 150_000, (distinct, 4096)).astype(np.int32)
    values = rng.normal(size=4096).astype(np.float32)
    for place in range(8):
      responses.append(
        grpo.Response(
          prompt,
          texts[place % distinct],
          behaviour_logp=values,
          old_logp=values,
          entropy=values,
          advantage=values,
        )
      )
  return responses


def packed(responses: Sequence[grpo.Response], capacity: int) -> TokenTree:
  """All that the host does from responses to the batch of a step; returns the tree."""
  tree = grpo.pack_responses(responses, capacity, merge=True)
  tree = grpo.lay_values(tree, responses, objectives.PolicyLoss().extras)
  tree.batch(accumulate=tree.rows)
  return tree


def packing(rounds: int, python: str) -> None:
  """Packs groups on the host, by us and by trl's AsyncGRPO packer in the environment `python`."""
  for distinct in DISTINCT:
    responses = large_groups(distinct)
    for capacity in CAPACITIES:
      case = f'packing 8 x (8,192 + 8 x 4,096), {distinct} of 8 differ, rows of {capacity}'
      tree = packed(responses, capacity)
      ours: list[float] = []
      answers: list[dict[str, float]] = []
      with contextlib.ExitStack() as stack:
        peer = None
        if python:
          job = dict(
            capacity=capacity,
            prompts=[response.prompt.tolist() for response in responses],
            responses=[response.tokens.tolist() for response in responses],
            group=8,
          )
          peer = stack.enter_context(Peer(python, 'trl_packer_worker.py', job))
        for _ in range(rounds):
          began = time.process_time()
          packed(responses, capacity)
          ours.append(time.process_time() - began)
          if peer:
            answers.append(peer('pack'))
      theirs = None
      peer_facts = {}
      if answers:
        theirs = float(np.median([answer.pop('seconds') for answer in answers]))
        peer_facts = {f'peer_{name}': value for name, value in answers[-1].items()}
      line(
        case,
        'trl AsyncGRPO packer' if python else 'none: name its environment by --trl_python',
        float(np.median(ours)),
        theirs,
        'CPU s',
        wanted=20,
        tokens=tree.live,
        rows=tree.rows,
        dedup=tree.dedup,
        **peer_facts,
      )
