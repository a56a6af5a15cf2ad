"""Self-distillation: all subtasks of all seeds together against one at a time, and what it takes.

    python -m benchmarks.distill                    # about 12 minutes on 2 cores
    python -m benchmarks.distill --cases=loop --seeds=30

The organism distils tasks of ToolWorld (one JSON line a case).
    loop        completed tokens a second: all seeds in flight on 64 lanes, against one seed and one
                subtask at a time on an engine of a single lane, which is the fastest for that;
                interleaved rounds on the same seeds
    larger      the same two ways with the organism's conversations at the cost of a model of 25
                million parameters: each request runs on it for as many tokens as the organism's
                answer has. The organism's weights fit into a CPU's caches, where a lane by itself
                has no need of company; those of any model in earnest do not
    rows        tokens that a whole run draws for each token that goes through the model behind a
                prompt: wrong guesses make them fewer, rollouts that agree make them more
    host        seconds of the host's own work (rendering, parsing, verifying, composing) in a run,
                by answering all of it from a journal, against the run itself
"""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.measure import line, say
from configs import nano
from dcore_jax.data.seed_sources import DISTILL, training_seeds
from dcore_jax.data.seeds import Seed
from dcore_jax.distill.algorithm import by_length, distill, summarise
from dcore_jax.distill.solve import Distiller
from dcore_jax.distill.stage import since
from dcore_jax.models import decoder
from dcore_jax.rollout.backends import ChatSource, Reply
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.policy import Policy, load_policy
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

CASES = ('loop', 'larger', 'rows', 'host')
_CASES = flags.DEFINE_list('cases', list(CASES), f'Which of {", ".join(CASES)} to run.')
_SEEDS = flags.DEFINE_integer(
  'seeds',
  240,
  'Of the loop, and half as many for the larger model; other cases take those of nano.',
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 3, 'Interleaved rounds; medians are printed. One for the larger model.'
)
LARGER = dict(
  hidden_size=512,
  intermediate_size=1536,
  num_hidden_layers=8,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=64,
)


def backend(policy: Policy, lanes: int, journal: pathlib.Path | None = None) -> LocalBackend:
  """The backend of an engine with so many lanes."""
  config = nano.get_config().engine
  engine = Engine(
    policy.load(None),
    policy.config,
    stop_ids=policy.stop_ids,
    sizes=EngineSizes(lanes=lanes, max_len=config.max_len, steps_per_call=config.steps_per_call),
  )
  return LocalBackend(engine, policy.tokenizer, journal=journal, model='organism')


class Acted(LocalBackend):
  """Gives the answers of a journal, each when its engine has drawn as many tokens as the answer
  has.
  """

  def stream(self, source: ChatSource, sampling: SamplingParams) -> Iterator[tuple[Any, Reply]]:
    """Answers requests as they finish on the engine, with the texts of the journal."""

    def requests(free: int) -> list[tuple[Any, Request]]:
      result = []
      for tag, request in source(free):
        reply = self._journal.find(self._body(request, sampling))
        result.append(
          ((tag, reply), Request(self._encode(request), request.key_id, reply.completion_tokens))
        )
      return result

    for (tag, reply), _ in self.engine.stream(requests, sampling):
      yield tag, reply


def run(
  seeds: list[Seed], ours: LocalBackend, *, at_once: bool = True, seed: int = 0
) -> tuple[dict, float]:
  """(summary, seconds) of distilling the seeds together, or each when the one before it is done."""
  config = nano.get_config().distill
  sampling = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=seed)
  distiller = Distiller(exact_refusals=True)
  began = time.perf_counter()
  groups = [[seeds[n] for n in by_length(seeds)]] if at_once else [[one] for one in seeds]
  outcomes = [
    outcome for group in groups for _, outcome in distill(group, ours, sampling, distiller)
  ]
  return summarise(outcomes), time.perf_counter() - began


def some(seeds: list[Seed], count: int) -> list[Seed]:
  """A random choice of so many seeds, the same in every call."""
  return [seeds[i] for i in np.random.default_rng(0).permutation(len(seeds))[:count]]


def compare(
  case: str, seeds: list[Seed], many: LocalBackend, one: LocalBackend, rounds: int, draws: int
) -> None:
  """Rounds of all seeds together and of one at a time, with `draws` different random seeds."""
  ways = (('together', many, True), ('one at a time', one, False))
  rates: dict[str, list[float]] = {name: [] for name, _, _ in ways}
  for _, ours, _ in ways:
    ours.engine.prepare()
  compiled = many.engine.stats.compilations + one.engine.stats.compilations
  for number in range(rounds):
    for name, ours, at_once in ways:
      summary, seconds = run(seeds, ours, at_once=at_once, seed=number % draws)
      say(f'{name}: {summary["completion_tokens"]} tokens of {len(seeds)} seeds in {seconds:.2f} s')
      rates[name].append(summary['completion_tokens'] / seconds)
  together, alone = (float(np.median(rates[name])) for name in rates)
  line(
    case,
    'one seed, one subtask at a time',
    together,
    alone,
    'completed tokens/s',
    wanted=5.0,
    better='more',
    seeds=len(seeds),
    tokens_per_row=many.engine.stats.tokens_per_row,
    compilations=many.engine.stats.compilations + one.engine.stats.compilations - compiled,
  )


def loop(policy: Policy, seeds: list[Seed]) -> None:
  """Times all seeds together against one at a time, on the organism."""
  many = backend(policy, nano.get_config().engine.lanes)
  one = backend(policy, 1)
  compare('all seeds together', some(seeds, _SEEDS.value), many, one, _ROUNDS.value, _ROUNDS.value)


def larger(policy: Policy, seeds: list[Seed]) -> None:
  """Times the same at the cost of a model of 25 million parameters."""
  chosen = some(seeds, _SEEDS.value // 2)
  lanes = nano.get_config().engine.lanes
  with tempfile.TemporaryDirectory() as folder:
    journal = pathlib.Path(folder) / 'replies.jsonl'
    organism = backend(policy, lanes, journal)
    run(chosen, organism)
    config = dataclasses.replace(policy.config, **LARGER)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))

    def acted(lanes):
      return Acted(
        Engine(
          params,
          config,
          stop_ids=(),
          sizes=EngineSizes(
            lanes=lanes,
            max_len=organism.engine.max_len,
            steps_per_call=organism.engine.sizes.steps_per_call,
          ),
        ),
        policy.tokenizer,
        journal=journal,
        model=organism.model,
      )

    compare(
      'all seeds together, at the cost of 25 million parameters',
      chosen,
      acted(lanes),
      acted(1),
      1,
      1,
    )


def rows(policy: Policy, seeds: list[Seed]) -> None:
  """Prints the tokens drawn for each token that went through the model."""
  ours = backend(policy, nano.get_config().engine.lanes)
  ours.engine.prepare()
  before = dataclasses.replace(ours.engine.stats)
  summary, seconds = run(seeds, ours, seed=1)
  spent = since(before, ours.engine.stats)
  facts = {name: value for name, value in vars(spent).items() if name != 'decoded_tokens'}
  facts |= {
    name: summary[name]
    for name in ('success_rate', 'success_rate_all', 'decomposition_rate', 'kept')
  }
  line(
    'tokens drawn for each that goes through the model',
    'one for each',
    spent.tokens_per_row,
    1.0,
    'tokens',
    better='more',
    seeds=len(seeds),
    seconds=seconds,
    tokens_per_second=spent.decoded_tokens / seconds,
    **facts,
  )


def host(policy: Policy, seeds: list[Seed]) -> None:
  """Times the host's own work: a run that is answered from a journal."""
  with tempfile.TemporaryDirectory() as folder:
    ours = backend(policy, nano.get_config().engine.lanes, pathlib.Path(folder) / 'replies.jsonl')
    _, whole = run(seeds, ours)
    summary, again = run(seeds, ours)
    if ours.usage.from_journal != summary['calls']:
      raise AssertionError(
        f'{ours.usage.from_journal} of {summary["calls"]} replies came from the journal'
      )
  line(
    'host work of a run',
    'the run',
    again,
    whole,
    'seconds',
    seeds=len(seeds),
    calls=summary['calls'],
  )


def main(_) -> None:
  """Runs the cases that are asked for."""
  unknown = set(_CASES.value) - set(CASES)
  if unknown:
    raise app.UsageError(f'unknown cases {sorted(unknown)}')
  config = nano.get_config()
  policy = load_policy(config.model, seed=0)
  seeds = training_seeds(config, config.distill.tasks, DISTILL)
  for name, case in (('loop', loop), ('larger', larger), ('rows', rows), ('host', host)):
    if name in _CASES.value:
      case(policy, seeds)


if __name__ == '__main__':
  app.run(main)
