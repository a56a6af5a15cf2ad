"""What a run measures of a model: its world's tasks, the prompts that RL sets aside, suites."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from dcore_jax import distributed
from dcore_jax.config import RunConfig
from dcore_jax.evaluate.held_out import evaluate
from dcore_jax.evaluate.measure import measure
from dcore_jax.evaluate.suites import RESULT_FILE, Served, Suite, write_result
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.rollout.divided import Recorder, divide, is_divided
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import Policy
from dcore_jax.run.needed import PROMPTS, WORLD
from dcore_jax.run.rl_source import rl_seed, run_source
from dcore_jax.run.suites import read_options, run_prepared, serve_engine, with_published
from dcore_jax.train import held_out_prompts
from dcore_jax.train.journal import RolloutJournal
from dcore_jax.train.sampler import MEASURED
from dcore_jax.worlds.environment import World
from dcore_jax.worlds.rollouts import act, stream_names


class StageEvaluation:
  """Measures models on what `evaluate.suites` names, the same tasks with every model.

  Args:
    config: the run's config.
    policy: the base model, whose tokenizer all stages have.
    suites: those that the config names, prepared.
    world: in which RL acts, some of whose prompts are measured.
    workdir: of the run; the figures of a stage go to its folder `evaluate_<stage>`.
  """

  def __init__(
    self,
    config: RunConfig,
    policy: Policy,
    suites: Sequence[Suite],
    world: World,
    workdir: pathlib.Path,
  ):
    self._config = config
    self._policy = policy
    self._suites = suites
    self._world = world
    self._workdir = workdir

  def identity(self, params: Any) -> str:
    """Names weights, as they are before an engine takes them: suites tell models apart by it."""
    # Without a suite nobody asks, and the name is a sum over all weights.
    return self._policy.name(params) if self._suites else ''

  def measure(self, name: str, engine: Engine, identity: str) -> dict[str, Any]:
    """Returns the figures of a model.

    Args:
      name: of its stage.
      engine: has its weights.
      identity: names the weights.

    Raises:
      ValueError: one engine over several hosts and a suite, or a suite that failed; the others keep
        their results.
    """
    folder = self._workdir / f'evaluate_{name}'
    named = self._config.evaluate.suites
    if named == (WORLD,):
      return self._measure_world(engine, folder, name)
    if self._suites and jax.process_count() > 1 and not is_divided(engine):
      raise ValueError(
        'suites are the work of the first host, which serves its engine to them: they need one on '
        'each host (engine.apart)'
      )
    figures = measure({})
    # Kept apart until all suites have a result: a stage that is begun again goes on with them.
    kept = folder / 'world.json'
    if distributed.of_first(kept.exists()):
      figures = read_json(kept)
    elif WORLD in named:
      figures = self._measure_world(engine, folder, name)
      write_json_atomic(kept, figures)
    suites = {}
    if PROMPTS in named:
      suites[PROMPTS] = self._measure_prompts(engine, folder / 'suites' / PROMPTS)
    # The other hosts wait, and write no result.
    if self._suites and distributed.writes():
      suites |= self._run_suites(engine, folder / 'suites', identity)
    return figures | {'suites': suites}

  def _measure_world(self, engine: Engine, folder: pathlib.Path, name: str) -> dict[str, Any]:
    tokenizer = self._policy.tokenizer

    def actor(world, tasks, sampling, told):
      names = stream_names(tasks)

      def act_some(some, numbers):
        # Tasks that are acted out again from what other hosts have sampled are counted once.
        counted = None if isinstance(some, Recorder) else told
        chosen = [tasks[number] for number in numbers]
        keys = [names[number] for number in numbers]
        return act(some, tokenizer, world, chosen, sampling, counted, keys=keys)

      return divide(engine, len(tasks), act_some)

    # Evaluation does not know engines: an endpoint can act the same tasks out.
    return evaluate(self._config, folder, actor, name)

  def _measure_prompts(self, engine: Engine, folder: pathlib.Path) -> dict[str, Any]:
    """Returns the figures of the prompts that RL sets aside, unless `folder` holds them."""
    result = folder / RESULT_FILE
    if not distributed.of_first(result.exists()):
      source, _ = run_source(self._config, self._policy.tokenizer, self._world, self._workdir)
      found = held_out_prompts.measure_prompts(
        engine,
        source,
        self._config.rl,
        RolloutJournal(self._workdir / 'checkpoints' / MEASURED),
        seed=rl_seed(self._config),
        held_out_seed=self._config.seed,
      )
      if distributed.writes():
        write_result(folder, *found)
      distributed.wait_for_others('prompts')
    return read_json(result)

  def _run_suites(self, engine: Engine, folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Runs suites through a server on the engine; returns their results by name."""
    tokenizer_dir = self._policy.tokenizer_dir

    @contextlib.contextmanager
    def source() -> Iterator[Served]:
      with serve_engine(engine, self._policy.tokenizer, tokenizer_dir, name) as url:
        yield Served(url, name, tokenizer=tokenizer_dir)

    options = read_options(self._config.evaluate.suite_options)
    summary = run_prepared(self._suites, source, name, options, folder)
    if summary['failed']:
      reasons = [f'{suite}: {reason}' for suite, reason in summary['failed'].items()]
      raise ValueError(f'suites that failed: {"; ".join(reasons)}')
    return with_published(summary['suites'], self._config.evaluate.published)
