"""The pipeline: measure, distil, fine-tune, measure, DA-GRPO, measure, export, report.

Stages meet in files, so that each can be run, resumed and looked at alone:

    W/config.json                   what was asked for; another config needs another W
    W/evaluate_<stage>/             result.json, trajectories.jsonl
    W/distill/                      rows-*.jsonl and more (distill/stage.py), result.json
    W/sft/, W/<estimator>/          a Hugging Face directory in float32, result.json
    W/export/                       the final Hugging Face directory
    W/summary.json, W/report.html   what other programs, and people, read

A stage whose result.json is there is not run again.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections

from dcore_jax import distributed, sharding
from dcore_jax.claims import claim, hold
from dcore_jax.config import STAGES, ExecutionSection, RunConfig
from dcore_jax.data.records import rl_points
from dcore_jax.data.rows import section_sequences, training_rows
from dcore_jax.data.seed_sources import RL, config_seeds, training_tasks
from dcore_jax.data.seeds import DecisionPoint, decision_points
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.distill.stage import check_rows, run_distillation
from dcore_jax.distill.wording import load_wording
from dcore_jax.evaluate.held_out import evaluate
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.models import decoder
from dcore_jax.models.decoder import Execution
from dcore_jax.models.hf_checkpoint import ModelFiles, load_params, save_checkpoint
from dcore_jax.overrides import to_json
from dcore_jax.progress import progress, show_compiling, stage
from dcore_jax.report.collect import collect_summary, collect_traces, stage_folders
from dcore_jax.report.model_card import model_card
from dcore_jax.report.report import write_report
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.policy import load_policy, make_engine
from dcore_jax.run.config import read_config
from dcore_jax.run.export import generation_config
from dcore_jax.train import rl_options, sft_loop
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.rl_loop import run_rl
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.train.sources import Episodes, Questions, RolloutSource, encode_prompts, short_tasks
from dcore_jax.train.stage_run import StageRun
from dcore_jax.worlds.environment import World
from dcore_jax.worlds.registry import check_kinds, make_world
from dcore_jax.worlds.rollouts import act


class Pipeline:
  """One run in one work directory.

  Args:
    config: see `dcore_jax.config`; unknown fields are an error.
    workdir: where results are and go.

  Raises:
    ValueError: a config that does not hold, or a work directory with results of another one.
  """

  def __init__(self, config: ml_collections.ConfigDict | RunConfig, workdir: pathlib.Path):
    # The whole config is checked before anything is loaded or written: a misspelt field should not
    # come to light after an hour of distillation.
    self.config = read_config(config)
    check_fields(self.config)
    # Programs that are compiled before this line are not kept for later runs.
    distributed.keep_programs()
    self.workdir = workdir
    # The world and its tasks are checked first, because their errors need no model.
    self.world = make_world(self.config.world)
    check_tasks(self.config, self.world)
    self.mesh = distributed.training_mesh(self.config)
    self.policy = load_policy(self.config.model, seed=self.config.seed)
    self.execution = make_execution(self.config.execution)
    # One engine at most: keys and values of its lanes fill most of a device's memory.
    self._engine: Engine | None = None
    self._grouped = False
    # A run that another process is at work on keeps the record of how that one was started.
    with hold(workdir):
      claim(
        workdir / 'config.json',
        to_json(self.config),
        'holds results of a config that differs in',
        defaults=RunConfig(),
      )
    # Only the first host writes, and no other one may look into the folder before it has.
    distributed.wait_for_others('claim')

  @property
  def final(self) -> str:
    """The name of the last trained model: the estimator's."""
    return self.config.rl.estimator

  def run(self) -> dict[str, Any]:
    """Runs what is asked for and not there yet; returns the summary.

    Raises:
      ValueError: another process is at work in the work directory.
    """
    with hold(self.workdir):
      return self._run()

  def _run(self) -> dict[str, Any]:
    # Stages run in the order of `stage_folders`, whatever order the config names them in.
    steps: dict[str, Callable[[], dict[str, Any]]] = {
      'evaluate_base': lambda: self.evaluate('base'),
      'distill': self.distill,
      'sft': self.sft,
      'evaluate_sft': lambda: self.evaluate('sft'),
      'rl': self.rl,
      'evaluate_rl': lambda: self.evaluate(self.final),
      'export': self.export,
    }
    for name, folder in stage_folders(self.final).items():
      result = self.workdir / folder / 'result.json'
      # Also where this call does not export: the summary must not name an outdated model.
      if name == 'export':
        self._forget_outdated(result)
      if name in self.config.stages:
        self._run_stage(name, steps[name], result)
    # Also after a call with few stages: the summary says what is there, whichever call made it.
    summary = collect_summary(self.workdir, self.config, self.policy.config)
    write_json_atomic(self.workdir / 'summary.json', summary)
    if 'report' in self.config.stages and distributed.writes():
      with stage('report'):
        traces = collect_traces(self.workdir, self.final, self.config.report.traces)
        write_report(self.workdir, summary, read_metrics(self.workdir), traces)
    return summary

  def _run_stage(
    self, name: str, run_stage: Callable[[], dict[str, Any]], result: pathlib.Path
  ) -> None:
    """Runs a stage and writes its figures to `result`, unless they are there."""
    if result.exists():
      if name == 'distill':
        # `experiments.distill` may have made the rows, with a config of its own.
        check_rows(self.config, result.parent)
      return
    # The result is written last: its file says that the stage is complete.
    with stage(name) as timer:
      values = run_stage()
    # A stage that was resumed adds the time that its earlier processes took. Distillation, which
    # other programs run as well, keeps its own time in `seconds`.
    seconds = {'seconds': timer.seconds + values.get('seconds_before', 0.0)}
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(result, seconds | values)
    distributed.wait_for_others(name)

  def _forget_outdated(self, export: pathlib.Path) -> None:
    """Removes the result of an export that was made before the last stage was."""
    if export.exists() and read_json(export)['stage'] != self._last_trained():
      export.unlink(missing_ok=True)

  # --- models ---

  def params(self, name: str) -> Any:
    """Loads the parameters of a stage: 'base', or one that this work directory holds."""
    # Read anew at every call: training donates its parameters, and a copy that is kept beside them
    # would take memory from the engine.
    if name == 'base':
      return self.policy.load(self.mesh)
    path = self.workdir / name
    if not (path / 'config.json').exists():
      raise ValueError(f'stage {name!r} has no result in {str(self.workdir)!r}; run it first')
    shardings = None
    if self.mesh:
      specs = decoder.abstract_params(self.policy.config)
      shardings = sharding.shardings(specs, self.mesh)
    # Each device reads its own slices, so that a model need not fit on one device.
    _, params = load_params(path, shardings=shardings)
    return params

  def engine(self, params: Any, *, groups: bool = False) -> Engine:
    """Returns the run's one engine with the given weights.

    It computes in the dtype of computation and on its own mesh. An engine of another size is let
    go first: there may be no room for the caches of both.

    Args:
      params: the weights.
      groups: whether rollouts come in groups that share a prompt, see `make_engine`.
    """
    # Without fewer trunks than lanes, groups and single prompts have the same engine.
    if self._grouped != groups and self.config.engine.trunks:
      self._engine = None
    if self._engine is None:
      self._engine = make_engine(self.config, self.policy, params, self.mesh, groups=groups)
      self._grouped = groups
      # Once for all stages: later ones only change the weights.
      show_compiling(self._engine.prepare)
    else:
      self._engine.update(params)
    return self._engine

  # Stages hand their models on in float32: rounded to bfloat16, whose steps near 1 are 0.8 %, the
  # updates of a whole RL stage (learning rate 1e-6) could vanish.
  def _save(self, name: str, params: Any, dtype: str = 'float32', card: str | None = None) -> None:
    policy = self.policy
    save_checkpoint(
      self.workdir / name,
      policy.config,
      params,
      ModelFiles(
        tokenizer_dir=policy.tokenizer_dir,
        generation_config=generation_config(policy.path, policy.config, policy.tokenizer),
        card=card,
      ),
      dtype=dtype,
      overwrite=True,
    )

  def _last_trained(self) -> str:
    """The name of the model that the run would hand out now."""
    for name in (self.final, 'sft'):
      if (self.workdir / name / 'config.json').exists():
        return name
    return 'base'

  # --- stages ---

  def evaluate(self, name: str) -> dict[str, Any]:
    """Acts out held-out tasks of every kind, the same ones with every model."""
    engine = self.engine(self.params(name))
    tokenizer = self.policy.tokenizer

    def actor(world, tasks, sampling, told):
      return act(engine, tokenizer, world, tasks, sampling, told)

    # Evaluation does not know engines: an endpoint can act the same tasks out.
    return evaluate(self.config, self.workdir / f'evaluate_{name}', actor, name)

  def distill(self) -> dict[str, Any]:
    """Lets the base model write training rows (D-CORE, algorithm 1) into W/distill.

    Raises:
      ValueError: several hosts. Which subtask is asked next depends on when answers come, so that
        they would not stay in step.
    """
    if jax.process_count() > 1:
      raise ValueError(
        'distillation is the work of one host: run it there with --stages=distill, or against an '
        'endpoint, before the others join'
      )
    seeds = config_seeds(self.config)

    # A function, since a config that names an endpoint needs no engine here.
    def local(journal: pathlib.Path) -> LocalBackend:
      params = self.params('base')
      # Taken from the float32 weights, so that the journal's answers stay valid whatever dtype the
      # engine computes in.
      name = self.policy.name(params)
      engine = self.engine(params)
      return LocalBackend(engine, self.policy.tokenizer, journal=journal, model=name)

    folder = self.workdir / 'distill'
    with progress(total=len(seeds), description='distill') as bar:
      return run_distillation(self.config, folder, seeds, local, progress=bar.update)

  def sft(self) -> dict[str, Any]:
    """Fine-tunes the base model on the distilled rows, or on the files that the config names."""
    rows, unreadable = training_rows(self.config.sft, self.workdir)
    if self.mesh:
      # The engine's caches make room for activations; what it compiled is kept by jax.
      self._engine = None
    kept, sequences = section_sequences(self.policy.tokenizer, rows, self.config.sft)
    # Rows that were read and then not used are counted too, so that the result accounts for every
    # row.
    unreadable += len(rows) - len(kept)
    with Metrics(self.workdir) as metrics, jax.set_mesh(self.mesh):
      run = StageRun(
        metrics=metrics,
        checkpoints=self.workdir / 'checkpoints' / 'sft',
        seed=self.config.seed,
      )
      params, result = run_sft(
        self.params('base'),
        self.policy,
        sequences,
        self.config.sft,
        run,
        execution=self.execution,
      )
    self._save('sft', params)
    return result | {'unreadable': unreadable}

  def rl(self) -> dict[str, Any]:
    """Trains the fine-tuned model by (DA-)GRPO."""
    # The source is made before the weights are loaded: a file that cannot be read is then found at
    # once.
    source, dropped = rl_source(self.config, self.policy.tokenizer, self.world)
    # The rollouts of an episode's group share its first prompt alone.
    groups = not self.config.rl.episodes
    with Metrics(self.workdir) as metrics, jax.set_mesh(self.mesh):
      run = StageRun(
        metrics=metrics,
        checkpoints=self.workdir / 'checkpoints' / self.final,
        seed=rl_seed(self.config),
      )
      params, result = run_rl(
        self.params('sft'),
        self.policy,
        source,
        self.config.rl,
        run,
        make_engine=lambda params: self.engine(params, groups=groups),
        execution=self.execution,
      )
    self._save(self.final, params)
    return result | {'prompts_dropped': dropped}

  def export(self) -> dict[str, Any]:
    """Writes the last trained model as a Hugging Face directory, with a model card."""
    name = self._last_trained()
    summary = collect_summary(self.workdir, self.config, self.policy.config)
    card = model_card(to_json(self.config), self.policy.config, stage=name, summary=summary)
    # Read anew from the stage's float32 directory, and rounded once to the dtype of the export.
    self._save('export', self.params(name), self.config.export.dtype, card)
    return {'path': str(self.workdir / 'export'), 'stage': name}


# --- what a config says ---


def check_fields(config: RunConfig) -> None:
  """Checks what fields mean together.

  Raises:
    ValueError: a stage that there is not, or options that mean nothing or exclude each other.
  """
  unknown = [name for name in config.stages if name not in STAGES]
  if unknown:
    raise ValueError(f'unknown stages {unknown}; expected some of {STAGES}')
  if 'distill' in config.stages:
    load_wording(config.distill.wording)
  sft_loop.check_section(config.sft)
  rl_options.check_section(config.rl)
  if config.rl.episodes:
    defaults = RunConfig().rl
    # An option that episodes never read would be ignored without a word.
    _check_unset('files', config.rl.files, defaults.files)
    _check_unset('reward', config.rl.reward, defaults.reward)


def check_tasks(config: RunConfig, world: World) -> None:
  """Checks the numbers of tasks of the stages that will draw tasks of the world.

  Raises:
    ValueError: a kind that the world lacks, or one without a number.
  """
  for stage_name, section in (('distill', config.distill), ('rl', config.rl)):
    # Files take the place of the world's tasks, whose numbers then mean nothing.
    if stage_name in config.stages and not section.files:
      check_kinds(f'{stage_name}.tasks', section.tasks, world)


def _check_unset(field: str, value: Any, default: Any) -> None:
  if value != default:
    raise ValueError(
      f'rl.episodes acts out tasks of the world and rewards the state they leave; rl.{field} = '
      f'{value!r} is for single prompts: set one of them'
    )


def make_execution(section: ExecutionSection) -> Execution:
  """Returns how training passes run, from the config's section `execution`."""
  return Execution(
    attention=section.attention,
    compute=section.compute,
    remat=section.remat,
    unroll=section.unroll,
    offload=section.offload,
  )


def rl_seed(config: RunConfig) -> int:
  """Returns the seed of prompt order and sampling: a sweep repeats a run with other `rl.seed`s."""
  # 1000 keeps the repetitions of one run apart from runs with the next seeds.
  return config.seed + 1000 * config.rl.seed


def rl_source(
  config: RunConfig,
  tokenizer: Any,
  world: World,
  points: Sequence[DecisionPoint] | None = None,
) -> tuple[RolloutSource, int]:
  """Returns what reinforcement learning asks, and how many prompts were dropped for their length.

  Args:
    config: the whole config; its sections `rl` and `world`, and its `seed`.
    tokenizer: renders and counts the prompts.
    world: where episodes are acted out.
    points: decision points to ask, instead of those that the config names.
  """
  section = config.rl
  # Too long prompts are dropped and counted now: they would end the step that draws them.
  if section.episodes:
    tasks = training_tasks(config, section.tasks, RL)
    short, dropped = short_tasks(tokenizer, world, tasks, section.max_prompt_tokens)
    return Episodes(tokenizer, world, short), dropped
  if points is None:
    if section.files:
      points = rl_points(section.files, unreadable=section.unreadable)
    else:
      points = _world_points(config)
  prompts, dropped = encode_prompts(tokenizer, points, section.max_prompt_tokens)
  return Questions(tokenizer, prompts, section.reward), dropped


def _world_points(config: RunConfig) -> list[DecisionPoint]:
  world = make_world(config.world)
  points = []
  for task in training_tasks(config, config.rl.tasks, RL):
    for seed in task_seeds(world, task):
      # A turn of a dialogue is a seed of another kind than the dialogue.
      for point in decision_points(seed):
        points.append(dataclasses.replace(point, task=task.id, task_kind=task.kind))
  return points
