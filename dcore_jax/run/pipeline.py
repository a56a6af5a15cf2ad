"""The pipeline: measure, distil, fine-tune, measure, DA-GRPO, measure, export, report.

Stages meet in files, so that each can be run, resumed and looked at alone:

    W/config.json                   what was asked for; another config needs another W
    W/evaluate_<stage>/             result.json, trajectories.jsonl, suites/<suite>/
    W/recipe/                       seeds and prompts of a recipe (data/recipe.py)
    W/distill/                      rows-*.jsonl and more (distill/stage.py), result.json
    W/sft/, W/<estimator>/          a Hugging Face directory in float32, result.json; under LoRA
                                    with the stage's adapters merged into it
    W/export/                       the final Hugging Face directory
    W/summary.json, W/report.html   what other programs, and people, read

A stage whose result.json is there is not run again.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from dcore_jax import distributed
from dcore_jax.claims import claim, hold
from dcore_jax.config import ExecutionSection, RunConfig
from dcore_jax.data import recipe
from dcore_jax.data.rows import section_sequences, training_rows
from dcore_jax.data.seed_sources import config_seeds
from dcore_jax.distill.stage import check_rows, run_distillation
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.models.decoder import Execution
from dcore_jax.overrides import to_json
from dcore_jax.progress import progress, stage, watching
from dcore_jax.report.collect import collect_summary, collect_traces, stage_folders
from dcore_jax.report.model_card import model_card
from dcore_jax.report.report import write_report
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.fleet import Fleet
from dcore_jax.rollout.policy import load_policy
from dcore_jax.run import memory
from dcore_jax.run.checks import check_fields, check_tasks
from dcore_jax.run.compile_clock import compiling
from dcore_jax.run.config import read_config
from dcore_jax.run.evaluation import StageEvaluation
from dcore_jax.run.fleet import make_fleet
from dcore_jax.run.forecast import Forecast, describe, find_parts
from dcore_jax.run.needed import find_needed
from dcore_jax.run.pins import FIELD
from dcore_jax.run.rl_source import rl_seed, run_source
from dcore_jax.run.stage_models import StageModels
from dcore_jax.train import held_out_prompts
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.rl_loop import run_rl
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.train.sinks import open_sinks
from dcore_jax.train.sources import RolloutSource
from dcore_jax.train.stage_run import StageRun
from dcore_jax.worlds.registry import make_world


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
    asked = self.config
    self.config, commits, suites = find_needed(asked, workdir)
    self.mesh = distributed.training_mesh(self.config)
    self.policy = load_policy(self.config.model, seed=self.config.seed)
    self.models = StageModels(self.config, self.policy, self.mesh, workdir)
    self._evaluation = StageEvaluation(self.config, self.policy, suites, self.world, workdir)
    self._execution = make_execution(self.config.execution)
    # A run that another process is at work on keeps the record of how that one was started.
    with hold(workdir):
      claim(
        workdir / 'config.json',
        # As it was asked for: a commit is no part of what a person may not change.
        to_json(asked) | {FIELD: commits},
        'holds results of a config that differs in',
        free=(FIELD,),
        defaults=RunConfig(),
      )
    # Only the first host writes, and no other one may look into the folder before it has.
    distributed.wait_for_others('claim')

  @property
  def final(self) -> str:
    """The name of the last trained model: the estimator's."""
    return self.config.rl.estimator

  def run(self, *, announce: bool = False) -> dict[str, Any]:
    """Runs what is asked for and not there yet; returns the summary.

    Args:
      announce: says on stderr what will be done, and how long it takes.

    Raises:
      ValueError: another process is at work in the work directory.
    """
    with hold(self.workdir):
      return self._run(self._announced() if announce and distributed.writes() else Forecast(()))

  def _run(self, forecast: Forecast) -> dict[str, Any]:
    self._prepare_recipe()
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
        forecast.begin(name)
        with watching(forecast.see):
          self._run_stage(name, steps[name], result)
        forecast.end(name)
    # Also after a call with few stages: the summary says what is there, whichever call made it.
    summary = collect_summary(self.workdir, self.config, self.policy.config)
    write_json_atomic(self.workdir / 'summary.json', summary)
    if 'report' in self.config.stages and distributed.writes():
      with stage('report'):
        traces = collect_traces(self.workdir, self.final, self.config.report.traces)
        write_report(self.workdir, summary, read_metrics(self.workdir), traces)
    return summary

  def _announced(self) -> Forecast:
    """Says what will be done; returns who says how long it takes."""
    done = []
    waiting = []
    for name, folder in stage_folders(self.final).items():
      if name in self.config.stages:
        ended = (self.workdir / folder / 'result.json').exists()
        (done if ended else waiting).append(name)
    if 'report' in self.config.stages:
      waiting.append('report')
    parts = find_parts(self.config, len(self.world.kinds), self.workdir, waiting)
    model = f'{self.policy.words}, on {jax.device_count()} x {jax.devices()[0].device_kind}'
    print(describe(model, self.workdir, parts, done), file=sys.stderr, flush=True)
    return Forecast(parts)

  def _prepare_recipe(self) -> None:
    """Gathers the data of the config's recipe, where it has one, and says what became of it."""
    if not any(sources for _, _, sources in recipe.parts(self.config)):
      return
    with stage('recipe'):
      report = recipe.prepare(self.config, self.workdir / recipe.FOLDER)
    distributed.wait_for_others('recipe')
    print(recipe.format_report(report), file=sys.stderr)

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
    with stage(name) as timer, memory.explained(name), compiling() as compiled:
      values = run_stage()
    # A stage that was resumed adds the time that its earlier processes took. Distillation, which
    # other programs run as well, keeps its own time in `seconds`.
    seconds = {'seconds': timer.seconds + values.get('seconds_before', 0.0)}
    # Of this process: one that goes on takes most programs from the cache.
    seconds['compile_seconds'] = compiled.seconds
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(result, seconds | values)
    distributed.wait_for_others(name)

  def _last_trained(self) -> str:
    """The name of the model that the run would hand out now."""
    return next((name for name in (self.final, 'sft') if self.models.has(name)), 'base')

  def _forget_outdated(self, export: pathlib.Path) -> None:
    """Removes the result of an export that was made before the last stage was."""
    if export.exists() and read_json(export)['stage'] != self._last_trained():
      export.unlink(missing_ok=True)

  # --- stages ---

  def evaluate(self, name: str) -> dict[str, Any]:
    """Measures a model on what `evaluate.suites` names; raises what `StageEvaluation` does."""
    params = self.models.params(name)
    identity = self._evaluation.identity(params)
    return self._evaluation.measure(name, self.models.engine(params), identity)

  def distill(self) -> dict[str, Any]:
    """Lets the base model write training rows (D-CORE, algorithm 1) into W/distill.

    Several hosts divide the seeds among them.

    Raises:
      ValueError: one engine over several hosts. Which subtask is asked next depends on when answers
        come, so that the hosts would not stay in step.
    """
    local = self.config.distill.backend == 'local'
    if jax.process_count() > 1 and local and not self.config.engine.apart:
      raise ValueError(
        'distillation needs an engine on each host (engine.apart) or an endpoint '
        "(distill.backend = 'openai')"
      )
    if self.config.recipe.seeds:
      seeds = recipe.read_part(self.workdir / recipe.FOLDER, 'seeds')
    else:
      seeds = config_seeds(self.config)
    folder = self.workdir / 'distill'
    with progress(total=len(seeds), description='distill') as bar:
      return run_distillation(self.config, folder, seeds, self.models.backend, progress=bar.update)

  def _rl_source(self) -> tuple[RolloutSource, int]:
    """Returns what RL asks, and how many prompts were dropped for their length."""
    return run_source(self.config, self.policy.tokenizer, self.world, self.workdir)

  def _metrics(self) -> Metrics:
    return Metrics(self.workdir, open_sinks(self.config, self.workdir))

  def sft(self) -> dict[str, Any]:
    """Fine-tunes the base model on the distilled rows, or on the files that the config names."""
    rows, unreadable = training_rows(self.config.sft, self.workdir)
    self.models.let_engine_go()
    found = len(rows)
    if self.config.sft.hold_out:
      source, _ = self._rl_source()
      rows = held_out_prompts.without_held_out(rows, source, self.config.rl, seed=self.config.seed)
    held_out = found - len(rows)
    kept, sequences = section_sequences(self.policy.tokenizer, rows, self.config.sft)
    # Rows that were read and then not used are counted too, so that the result accounts for every
    # row.
    unreadable += len(rows) - len(kept)
    with self._metrics() as metrics, jax.set_mesh(self.mesh):
      run = StageRun(
        metrics=metrics,
        checkpoints=self.workdir / 'checkpoints' / 'sft',
        seed=self.config.seed,
        lora=self.config.lora,
      )
      params, result = run_sft(
        self.models.params('base'),
        self.policy,
        sequences,
        self.config.sft,
        run,
        execution=self._execution,
      )
    self.models.save('sft', params)
    return result | {'unreadable': unreadable, 'held_out': held_out}

  def rl(self) -> dict[str, Any]:
    """Trains the fine-tuned model by (DA-)GRPO."""
    # The source is made before the weights are loaded: a file that cannot be read is then found at
    # once.
    source, dropped = self._rl_source()
    # The rollouts of an episode's group share its first prompt alone.
    groups = not self.config.rl.episodes

    def rollouts(params: Any) -> Engine | Fleet:
      if not self.config.rl.fleet.endpoints:
        return self.models.engine(params, groups=groups)
      self.models.let_engine_go()
      return make_fleet(self.config, self.policy, params, self.workdir)

    with self._metrics() as metrics, jax.set_mesh(self.mesh):
      run = StageRun(
        metrics=metrics,
        checkpoints=self.workdir / 'checkpoints' / self.final,
        seed=rl_seed(self.config),
        lora=self.config.lora,
        held_out_seed=self.config.seed,
      )
      params, result = run_rl(
        self.models.params('sft'),
        self.policy,
        source,
        self.config.rl,
        run,
        make_engine=rollouts,
        execution=self._execution,
      )
    self.models.save(self.final, params)
    return result | {'prompts_dropped': dropped}

  def export(self) -> dict[str, Any]:
    """Writes the last trained model as a Hugging Face directory, with a model card."""
    name = self._last_trained()
    summary = collect_summary(self.workdir, self.config, self.policy.config)
    card = model_card(to_json(self.config), self.policy.config, stage=name, summary=summary)
    self.models.let_engine_go()
    # Read anew from the stage's float32 directory, and rounded once to the dtype of the export.
    params = self.models.params(name, jnp.float32)
    self.models.save('export', params, self.config.export.dtype, card)
    return {'path': str(self.workdir / 'export'), 'stage': name}


# --- what a config says ---


def make_execution(section: ExecutionSection) -> Execution:
  """Returns how training passes run, from the config's section `execution`."""
  return Execution(
    attention=section.attention,
    compute=section.compute,
    remat=section.remat,
    unroll=section.unroll,
    offload=section.offload,
  )
