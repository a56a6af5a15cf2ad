"""Runs the stages of the method on a model: distil, fine-tune, reinforce, measure.

Each takes the fields of its config section as keyword options. Those that are not given are the
paper's (`dcore_jax.config`), or those of a `config` such as `configs.nano.get_config()`. Its other
sections (engine, execution, mesh, world) hold as well.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from dcore_jax import distributed
from dcore_jax.api.calls import as_policy, configured, refuse_two_sources
from dcore_jax.api.model import Model
from dcore_jax.claims import claim, hold
from dcore_jax.config import LoraSection, RunConfig
from dcore_jax.data.rows import given_rows, section_sequences, training_rows
from dcore_jax.data.seed_sources import config_seeds
from dcore_jax.data.seeds import DecisionPoint, Seed
from dcore_jax.distill.stage import run_distillation
from dcore_jax.evaluate.held_out import evaluate
from dcore_jax.files import read_rows
from dcore_jax.learn import lora
from dcore_jax.overrides import to_json
from dcore_jax.progress import progress, show_compiling
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.policy import base_dtype, make_engine
from dcore_jax.run.checks import check_fields
from dcore_jax.run.fleet import make_fleet
from dcore_jax.run.pipeline import make_execution
from dcore_jax.run.rl_source import rl_seed, rl_source
from dcore_jax.train.metrics import Metrics
from dcore_jax.train.rl_loop import run_rl
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.train.sinks import open_sinks
from dcore_jax.train.stage_run import StageRun
from dcore_jax.worlds.registry import make_world
from dcore_jax.worlds.rollouts import act

Folder = str | pathlib.Path


def distill_seeds(
  model: Model,
  seeds: Sequence[Seed] | None = None,
  *,
  config: ml_collections.ConfigDict | RunConfig | None = None,
  workdir: Folder | None = None,
  seed: int | None = None,
  **options: Any,
) -> list[dict[str, Any]]:
  """Lets the model write training rows for seeds it then passes on: D-CORE, algorithm 1.

  Args:
    model: decomposes the tasks and solves the subtasks.
    seeds: queries with reference calls, see `data.seeds`; by default those of the options `files`
      or `tasks`.
    config: what holds where no option says otherwise.
    workdir: keeps answers and rows in its folder `distill`, with figures in distill.json; a call
      that was interrupted goes on there. By default nothing is kept.
    seed: of everything that is drawn.
    **options: fields of section `distill`; the organism needs wording='organism', examples=0.

  Returns:
    Rows {id, conversations, ...}, which `sft` takes.

  Raises:
    ValueError: an unknown option, seeds both given and named by one, or no row that could be kept.
  """
  settings = configured('distill', options, config, seed)
  refuse_two_sources('seeds', seeds, options, ('files', 'tasks'))
  # The stages take a policy, which loads its weights anew for each use.
  policy = as_policy(model)
  mesh = distributed.training_mesh(settings)
  seeds = config_seeds(settings) if seeds is None else seeds

  # A function, since a config that names an endpoint needs no engine here.
  def local(journal: pathlib.Path) -> LocalBackend:
    params = policy.load(mesh)
    engine = make_engine(settings, policy, params, mesh)
    show_compiling(engine.prepare)
    return LocalBackend(engine, model.tokenizer, journal=journal, model=policy.name(params))

  # Answers are kept in a journal inside: a call that goes on asks no question twice.
  with _folder(workdir) as folder:
    with progress(total=len(seeds), description='distill') as bar:
      run_distillation(settings, folder / 'distill', seeds, local, progress=bar.update)
    # Shards are numbered with leading zeros: the rows come in the order of their seeds.
    rows = []
    for path in sorted((folder / 'distill').glob('rows-*.jsonl')):
      rows += read_rows(path)
  return rows


def sft(
  model: Model,
  rows: Sequence[dict[str, Any]] | None = None,
  /,
  *,
  config: ml_collections.ConfigDict | RunConfig | None = None,
  workdir: Folder | None = None,
  seed: int | None = None,
  **options: Any,
) -> Model:
  """Fine-tunes on rows; returns the trained model, in float32, and leaves the given one as it is.

  Args:
    model: where to start from.
    rows: as `distill_seeds` gives them, or in any schema of `data/row_schemas.py`; by default
      those of the option `files`.
    config: what holds where no option says otherwise.
    workdir: keeps checkpoints and metrics.jsonl; a call that was interrupted goes on there. By
      default nothing is kept.
    seed: of the order of the rows.
    **options: fields of section `sft`, such as learning_rate=1e-4, epochs=1. Its field `rows`,
      packed rows a step, is one of them: the training rows are given by position.

  Raises:
    ValueError: an unknown option, rows that cannot be trained on, rows both given and named by
      `files`, or a `workdir` that holds another fine-tuning.
  """
  settings = configured('sft', options, config, seed)
  section = settings.sft
  policy = as_policy(model)
  mesh = distributed.training_mesh(settings)
  refuse_two_sources('rows', rows, options, ('files',))
  with _folder(workdir) as folder:
    # Rows that are given pass the same system prompt, splitting and limits as those of files.
    if rows is None:
      rows, _ = training_rows(section, folder)
    else:
      rows, _ = given_rows(rows, section)
    params = policy.load(mesh, base_dtype(settings, mesh))
    # Claimed before training: a folder of another fine-tuning would be resumed from.
    _claim(folder, 'sft', settings, section, policy.name(params))
    # The model is what is asked for; the figures of the stage are in a workdir's metrics.jsonl.
    with Metrics(folder, open_sinks(settings, folder)) as metrics, jax.set_mesh(mesh):
      # The pipeline's folders, so that its tools find what is in a work directory.
      checkpoints = folder / 'checkpoints' / 'sft'
      run = StageRun(metrics, checkpoints, settings.seed, settings.lora)
      _, sequences = section_sequences(model.tokenizer, rows, section)
      execution = make_execution(settings.execution)
      params, _ = run_sft(params, policy, sequences, section, run, execution=execution)
      return model.with_params(lora.merge(params, jnp.float32))


def da_grpo(
  model: Model,
  points: Sequence[DecisionPoint] | None = None,
  *,
  config: ml_collections.ConfigDict | RunConfig | None = None,
  workdir: Folder | None = None,
  seed: int | None = None,
  **options: Any,
) -> Model:
  """Reinforces by DA-GRPO (D-CORE, eq. 6); returns the trained model, in float32.

  The given model is left as it is.

  Args:
    model: where to start from; the KL term is against it.
    points: decision points with reference answers; by default those of the options `files` or
      `tasks`, or with episodes=True whole tasks of the world.
    config: what holds where no option says otherwise.
    workdir: keeps checkpoints, rollouts and metrics.jsonl; a call that was interrupted goes on
      there. By default nothing is kept.
    seed: of everything that is drawn.
    **options: fields of section `rl`, such as steps=8, alpha=0.1, or estimator='grpo' for plain
      GRPO.

  Raises:
    ValueError: an unknown option, points both given and named by one, sizes that do not fit each
      other, or a `workdir` that holds another reinforcement.
  """
  settings = configured('rl', options, config, seed)
  section = settings.rl
  # Fields of `rl` that contradict each other are refused before a model is copied.
  check_fields(settings)
  refuse_two_sources('points', points, options, ('files', 'tasks', 'episodes'))
  policy = as_policy(model)
  mesh = distributed.training_mesh(settings)
  world = make_world(settings.world)
  source, _ = rl_source(settings, model.tokenizer, world, points)

  def engine(params: Any) -> Any:
    if section.fleet.endpoints:
      return make_fleet(settings, policy, params, folder)
    # The rollouts of an episode's group share its first prompt alone.
    made = make_engine(settings, policy, params, mesh, groups=not section.episodes)
    show_compiling(made.prepare)
    return made

  with _folder(workdir) as folder:
    # The loop makes its frozen reference from them before the first update.
    params = policy.load(mesh, base_dtype(settings, mesh))
    _claim(folder, 'rl', settings, section, policy.name(params))
    # The stage names logical axes only, and finds the mesh that splits them in the context.
    with Metrics(folder, open_sinks(settings, folder)) as metrics, jax.set_mesh(mesh):
      checkpoints = folder / 'checkpoints' / section.estimator
      # The pipeline's seed of this stage, so that both draw the same prompts and rollouts.
      run = StageRun(
        metrics,
        checkpoints,
        rl_seed(settings),
        settings.lora,
        held_out_seed=settings.seed,
      )
      params, _ = run_rl(
        params,
        policy,
        source,
        section,
        run,
        make_engine=engine,
        execution=make_execution(settings.execution),
      )
      return model.with_params(lora.merge(params, jnp.float32))


def evaluate_model(
  model: Model,
  *,
  config: ml_collections.ConfigDict | RunConfig | None = None,
  workdir: Folder | None = None,
  seed: int | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Acts out held-out tasks of every kind; returns accuracy, lazy reasoning and more, by kind.

  Args:
    model: what is measured.
    config: what holds where no option says otherwise.
    workdir: keeps every task as it went, in trajectories.jsonl. By default nothing is kept.
    seed: of tasks and sampling; models are compared at the same one.
    **options: fields of section `evaluate`, such as tasks=16, temperature=0.6.

  Raises:
    ValueError: an unknown option.
  """
  settings = configured('evaluate', options, config, seed)
  # By section `engine`, and not the engine that answers: the pipeline's stages have these figures.
  policy = as_policy(model)
  mesh = distributed.training_mesh(settings)
  engine = make_engine(settings, policy, policy.load(mesh), mesh)
  show_compiling(engine.prepare)

  def actor(world, tasks, sampling, told):
    return act(engine, model.tokenizer, world, tasks, sampling, told)

  with _folder(workdir) as folder:
    # The name is for the progress bar alone.
    return evaluate(settings, folder, actor, model.folder.name)


def _claim(folder: pathlib.Path, stage: str, settings: RunConfig, section: Any, name: str) -> None:
  """Ties checkpoints to the weights and options that they were made from."""
  # Checkpoints are resumed from: without this, a second call on the same folder would return the
  # first call's model whatever it was asked for.
  mine = {'model': name, 'seed': settings.seed, 'options': to_json(section)}
  mine['lora'] = to_json(settings.lora)
  complaint = f'holds the stage {stage} with other'
  defaults = {'options': type(section)(), 'lora': LoraSection()}
  claim(folder / f'{stage}.json', mine, complaint, defaults=defaults)


@contextlib.contextmanager
def _folder(workdir: Folder | None) -> Iterator[pathlib.Path]:
  """Yields the work directory of a call; without one, a folder that is removed at the end."""
  if workdir is not None:
    folder = pathlib.Path(workdir)
    # Two processes on one folder would overwrite each other's checkpoints.
    with hold(folder):
      yield folder
    return
  # Stages write checkpoints and journals in any case; without a folder they are thrown away.
  with tempfile.TemporaryDirectory(prefix='dcore_jax-') as folder:
    yield pathlib.Path(folder)
