"""The pipeline: measure, distil, fine-tune, measure, DA-GRPO, measure, export, report. Stages meet in files.

    W/config.json                   what was asked for; another config needs another W
    W/evaluate_<stage>/             result.json, trajectories.jsonl
    W/distill/                      rows-*.jsonl and more (distill/stage.py), result.json
    W/sft/, W/<estimator>/          a Hugging Face directory in float32, result.json
    W/export/                       the final Hugging Face directory
    W/summary.json, W/report.html   what other programs, and people, read
A stage whose result.json is there is not run again.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from dcore_jax import distributed, sharding
from dcore_jax.data.records import rl_points
from dcore_jax.data.rows import training_rows
from dcore_jax.data.seed_sources import RL, config_seeds, toolworld_seeds, toolworld_tasks
from dcore_jax.data.seeds import decision_points
from dcore_jax.distill.stage import check_rows, run_distillation
from dcore_jax.evaluate.held_out import evaluate
from dcore_jax.evaluate.rollouts import act
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.models import decoder
from dcore_jax.models.decoder import Execution
from dcore_jax.models.hf_checkpoint import load_params, save_checkpoint
from dcore_jax.progress import progress, stage
from dcore_jax.report.model_card import model_card
from dcore_jax.report.report import write_report
from dcore_jax.rollout.backends import LocalBackend
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import load_policy, make_engine
from dcore_jax.run.config import check_config, to_json
from dcore_jax.run.defaults import STAGES, default_config
from dcore_jax.run.export import generation_config
from dcore_jax.statistics import paired_difference
from dcore_jax.train.grpo_loop import run_rl
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.rollout_batch import Episodes, Questions, Source, encode_prompts, short_tasks
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.worlds.toolworld.world import ToolWorld


class Pipeline:
  """One run in one work directory.

  Args:
    config: see `run.defaults`; unknown fields are an error.
    workdir: where results are and go.

  Raises:
    ValueError: a config that does not hold, or a work directory with results of another one.
  """

  def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
    self.config = check_config(config, default_config())
    unknown = [name for name in self.config.stages if name not in STAGES]
    if unknown:
      raise ValueError(f'unknown stages {unknown}; expected some of {STAGES}')
    for field in ('files', 'reward'):
      if self.config.rl.episodes and self.config.rl[field] != default_config().rl[field]:
        raise ValueError(
          f'rl.episodes acts out tasks of the world and rewards the state they leave; rl.{field} = '
          f'{self.config.rl[field]!r} is for single prompts: set one of them'
        )
    distributed.keep_programs()
    self.workdir = workdir
    self.world = ToolWorld(self.config.world.max_subtasks)
    self.mesh = distributed.training_mesh(self.config)
    self.policy = load_policy(self.config.model, seed=self.config.seed)
    self.execution = Execution(**self.config.execution)
    self._engine: Engine | None = None
    self._grouped = False
    self._claim()

  def _claim(self) -> None:
    """Writes the config beside the results, or checks that it made them; `stages` and `report` may differ."""
    mine, path = json.loads(json.dumps(to_json(self.config))), self.workdir / 'config.json'
    if path.exists():
      theirs = read_json(path)
      different = [
        k for k in mine if k not in ('stages', 'report', 'name') and mine[k] != theirs.get(k)
      ]
      if different:
        raise ValueError(
          f'{str(self.workdir)!r} holds results of a config that differs in {", ".join(different)}; '
          'name another --workdir'
        )
    self.workdir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, mine)
    distributed.wait_for_others('claim')

  @property
  def final(self) -> str:
    """The name of the last trained stage: the estimator's."""
    return self.config.rl.estimator

  def run(self) -> dict[str, Any]:
    """Runs what is asked for and not there yet -> the summary."""
    steps: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
      'evaluate_base': ('evaluate_base', lambda: self.evaluate('base')),
      'distill': ('distill', self.distill),
      'sft': ('sft', self.sft),
      'evaluate_sft': ('evaluate_sft', lambda: self.evaluate('sft')),
      'rl': (self.final, self.rl),
      'evaluate_rl': (f'evaluate_{self.final}', lambda: self.evaluate(self.final)),
      'export': ('export_result', self.export),
    }
    for name, (folder, run_stage) in steps.items():
      result = self.workdir / folder / 'result.json'
      if (
        name == 'export' and result.exists() and read_json(result)['stage'] != self._last_trained()
      ):
        result.unlink(missing_ok=True)  # made before the last stage was
      if name not in self.config.stages:
        continue
      if result.exists():
        if name == 'distill':  # `experiments.distill` may have made it, with a config of its own
          check_rows(self.config, result.parent)
        continue
      with stage(name) as timer:
        values = run_stage()
      result.parent.mkdir(parents=True, exist_ok=True)
      # Distillation, which other programs run as well, keeps its own time.
      write_json_atomic(
        result, {'seconds': timer.seconds + values.get('seconds_before', 0.0)} | values
      )
      distributed.wait_for_others(name)
    summary = self.summary()
    write_json_atomic(self.workdir / 'summary.json', summary)
    if 'report' in self.config.stages and distributed.writes():
      with stage('report'):
        write_report(self.workdir, summary, read_metrics(self.workdir), self.traces())
    return summary

  # --- models ---

  def params(self, name: str) -> Any:
    """Parameters of a stage: 'base', or one that this work directory holds."""
    if name == 'base':
      return self.policy.load(self.mesh)
    path = self.workdir / name
    if not (path / 'config.json').exists():
      raise ValueError(f'stage {name!r} has no result in {str(self.workdir)!r}; run it first')
    specs = decoder.abstract_params(self.policy.config)
    return load_params(path, shardings=sharding.shardings(specs, self.mesh) if self.mesh else None)[
      1
    ]

  def engine(self, params: Any, *, groups: bool = False) -> Engine:
    """The run's one engine with the given weights, in the dtype of computation and on its own mesh; `groups` as in `make_engine`.
    One of another size makes room first."""
    if self._engine is not None and self._grouped != groups and self.config.engine.trunks:
      self._engine = None
    if self._engine is None:
      self._engine, self._grouped = (
        make_engine(self.config, self.policy, params, self.mesh, groups=groups),
        groups,
      )
    else:
      self._engine.update(params)
    return self._engine

  def _save(self, name: str, params: Any, dtype: str = 'float32', card: str | None = None) -> None:
    policy = self.policy
    ends = generation_config(self.config.model, policy.config, policy.tokenizer)
    save_checkpoint(
      self.workdir / name,
      policy.config,
      params,
      tokenizer_dir=policy.tokenizer_dir,
      dtype=dtype,
      overwrite=True,
      generation_config=ends,
      card=card,
    )

  # --- stages ---

  def evaluate(self, name: str) -> dict[str, Any]:
    """Held-out tasks of every kind, the same ones at each stage."""
    engine = self.engine(self.params(name))
    actor = lambda world, tasks, sampling, told: act(
      engine, self.policy.tokenizer, world, tasks, sampling, told
    )
    return evaluate(self.config, self.workdir / f'evaluate_{name}', actor, name)

  def distill(self) -> dict[str, Any]:
    """Algorithm 1 with the base model -> W/distill/.

    Raises:
      ValueError: several hosts. Which subtask is asked next depends on when answers come, so that they would not stay in step.
    """
    if jax.process_count() > 1:
      raise ValueError(
        'distillation is the work of one host: run it there with --stages=distill, or against an endpoint, before '
        'the others join'
      )
    seeds = config_seeds(self.config)

    def local(journal):
      params = self.params('base')
      return LocalBackend(
        self.engine(params), self.policy.tokenizer, journal=journal, model=self.policy.name(params)
      )

    with progress(total=len(seeds), description='distill') as bar:
      return run_distillation(
        self.config, self.workdir / 'distill', seeds, local, progress=bar.update
      )

  def sft(self) -> dict[str, Any]:
    """Fine-tunes the base model on the distilled rows, or on the files the config names."""
    c = self.config.sft
    rows, unreadable = training_rows(c, self.workdir)
    if self.mesh:
      self._engine = None  # its caches make room for activations; what it compiled is kept by jax
    with Metrics(self.workdir) as metrics, jax.set_mesh(self.mesh):
      params, result = run_sft(
        self.params('base'),
        self.policy.config,
        self.policy.tokenizer,
        rows,
        c,
        metrics,
        self.workdir / 'checkpoints' / 'sft',
        execution=self.execution,
        seed=self.config.seed,
      )
    self._save('sft', params)
    return result | {'unreadable': unreadable}

  def _source(self) -> tuple[Source, int]:
    """(what reinforcement learning asks, prompts dropped for their length)."""
    c, tokenizer = self.config.rl, self.policy.tokenizer
    if c.episodes:
      tasks, dropped = short_tasks(
        tokenizer, self.world, toolworld_tasks(self.config, c.tasks, RL), c.max_prompt_tokens
      )
      return Episodes(tokenizer, self.world, tasks), dropped
    points = (
      rl_points(c.files)
      if c.files
      else [
        point
        for seed in toolworld_seeds(self.config, c.tasks, RL)
        for point in decision_points(seed)
      ]
    )
    prompts, dropped = encode_prompts(tokenizer, points, c.max_prompt_tokens)
    return Questions(tokenizer, prompts, c.reward), dropped

  def rl(self) -> dict[str, Any]:
    """(DA-)GRPO from the fine-tuned model."""
    source, dropped = self._source()
    # The rollouts of an episode's group share its first prompt alone.
    engine = lambda params: self.engine(params, groups=not self.config.rl.episodes)
    with Metrics(self.workdir) as metrics, jax.set_mesh(self.mesh):
      params, result = run_rl(
        self.params('sft'),
        self.policy.config,
        self.policy.tokenizer,
        source,
        self.config.rl,
        metrics,
        self.workdir / 'checkpoints' / self.final,
        make_engine=engine,
        execution=self.execution,
        seed=self.config.seed + 1000 * self.config.rl.seed,
      )
    self._save(self.final, params)
    return result | {'prompts_dropped': dropped}

  def _last_trained(self) -> str:
    return next(
      (name for name in (self.final, 'sft') if (self.workdir / name / 'config.json').exists()),
      'base',
    )

  def export(self) -> dict[str, Any]:
    """The last trained model as a Hugging Face directory, with a card that says how it came about."""
    name = self._last_trained()
    card = model_card(to_json(self.config), self.policy.config, stage=name, summary=self.summary())
    self._save('export', self.params(name), self.config.export.dtype, card)
    return {'path': str(self.workdir / 'export'), 'stage': name}

  # --- results ---

  def _result(self, folder: str) -> dict[str, Any] | None:
    path = self.workdir / folder / 'result.json'
    return read_json(path) if path.exists() else None

  def summary(self) -> dict[str, Any]:
    """Everything the stages have left, in the shape of `report.summary`."""
    names = ('base', 'sft', self.final)
    found = {name: self._result(f'evaluate_{name}') for name in names}
    parameters = self.policy.config.param_count
    summary: dict[str, Any] = {
      'run': {
        'config': self.config.name,
        'seed': self.config.seed,
        'model': f'{self.policy.config.to_hf()["model_type"]}, {parameters / 1e6:.2f} M parameters',
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'jax': jax.__version__,
      },
      'stages': {name: result for name, result in found.items() if result},
    }
    acted = [(name, records) for name in summary['stages'] if (records := self._trajectories(name))]
    summary['changes'] = [_change(*pair) for pair in zip(acted, acted[1:])]
    stages = {
      'distill': 'distill',
      'sft': 'sft',
      'rl': self.final,
      'export': 'export_result',
      'evaluate_base': 'evaluate_base',
      'evaluate_sft': 'evaluate_sft',
      'evaluate_rl': f'evaluate_{self.final}',
    }
    results = {name: self._result(folder) for name, folder in stages.items()}
    summary['seconds'] = {name: results[name]['seconds'] for name in STAGES if results.get(name)}
    for name in ('distill', 'sft'):
      if results[name]:
        summary[name] = {k: v for k, v in results[name].items() if k != 'seconds'}
    if results['rl']:
      rows = read_metrics(self.workdir, 'rl')
      curves = (
        'zero_variance_fraction',
        'all_right_fraction',
        'all_wrong_fraction',
        'reward',
        'entropy',
        'reflections',
        'grad_norm',
        'psi_grad_norm',
        'kl',
        'response_tokens',
        'logp_gap_mean',
      )
      summary['rl'] = {
        name: [row.get(name) for row in rows] for name in curves if any(name in row for row in rows)
      }
      summary['rl'] |= {k: v for k, v in results['rl'].items() if k != 'seconds'}
    summary['export'] = results['export']['path'] if results['export'] else None
    return summary

  def _trajectories(self, name: str) -> list[dict[str, Any]]:
    """The records that `evaluate` has written of a stage; [] where there are none."""
    path = self.workdir / f'evaluate_{name}' / 'trajectories.jsonl'
    return (
      [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
      if path.exists()
      else []
    )

  def traces(self) -> list[dict[str, Any]]:
    """Tasks side by side over the stages: those that the base model got lazily wrong and the last one right come first."""
    found = {name: self._trajectories(name) for name in ('base', 'sft', self.final)}
    names = [name for name, records in found.items() if records]
    if not names:
      return []
    by_task = list(zip(*(found[name] for name in names)))
    several = [
      group for group in by_task if group[0]['kind'] in ('sequential', 'parallel', 'irrelevant')
    ]
    several.sort(
      key=lambda group: (group[-1]['correct'] - group[0]['correct']) + group[0]['lazy'] * 0.5,
      reverse=True,
    )
    chosen, kinds = [], set()
    for group in several:  # one of each kind before a second one
      if group[0]['kind'] not in kinds and len(chosen) < self.config.report.traces:
        kinds.add(group[0]['kind'])
        chosen.append(group)
    chosen += [group for group in several if group not in chosen][
      : self.config.report.traces - len(chosen)
    ]
    return [
      {
        'query': group[0]['query'],
        'kind': group[0]['kind'],
        'columns': [
          {'stage': name, 'messages': t['messages'], 'correct': t['correct'], 'lazy': t['lazy']}
          for name, t in zip(names, group)
        ],
      }
      for group in chosen
    ]


def _change(
  before: tuple[str, list[dict[str, Any]]], after: tuple[str, list[dict[str, Any]]]
) -> dict[str, Any]:
  """How the accuracy of two stages, (name, trajectories), differs by kind: each evaluates the same tasks with the same random
  streams."""
  right: dict[str, list[tuple[bool, bool]]] = {}
  for first, second in zip(before[1], after[1], strict=True):
    right.setdefault(first['kind'], []).append((first['correct'], second['correct']))
  accuracy = {kind: paired_difference(*zip(*pairs)) for kind, pairs in right.items()}
  return {'from': before[0], 'to': after[0], 'accuracy': accuracy}
