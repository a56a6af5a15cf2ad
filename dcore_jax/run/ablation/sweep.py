"""All suites by name, and the one loop that runs any of them."""

import pathlib
from typing import Any

import ml_collections

from dcore_jax.config import RunConfig
from dcore_jax.files import write_json_atomic
from dcore_jax.run.ablation import (
  decomposition,
  families,
  runs,
  self_distillation,
  sizes,
  tables,
  thoughts,
  variance,
)
from dcore_jax.run.ablation.reinforcement import REINFORCEMENT, sft_point
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite
from dcore_jax.run.config import read_config

_SUITES: dict[str, Suite] = REINFORCEMENT | {
  'decomposition': decomposition.SUITE,
  'distill_size': sizes.SUITE,
  'families': families.SUITE,
  'variance': variance.SUITE,
  'composition': thoughts.COMPOSITION_SUITE,
  'behaviours': thoughts.BEHAVIOURS_SUITE,
  'self_distillation': self_distillation.SUITE,
}
SUITES = tuple(_SUITES)
# Repetitions of every setting, and SFT checkpoints; 0 where the jobs of a suite train their own.
SEEDS = {name: suite.seeds for name, suite in _SUITES.items()}
CHECKPOINTS = {name: suite.checkpoints for name, suite in _SUITES.items()}


def run_suite(
  suite: str,
  config: ml_collections.ConfigDict | RunConfig,
  workdir: pathlib.Path,
  *,
  seeds: int,
  checkpoints: int = 1,
  processes: int = 1,
  sft_run: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Runs what is not there yet; writes `workdir`/<suite>.json and its kin, and returns its content.

  Args:
    suite: one of SUITES.
    config: pipeline config; its stages are those of the suite.
    workdir: results, one folder a job and seed; a second call resumes.
    seeds: repetitions of each setting: of prompt orders and samples from each checkpoint, or of
      everything where a suite trains its own models.
    checkpoints: SFT checkpoints to start from, each from a seed of its own; for suites that have
      such.
    processes: jobs that run at a time.
    sft_run: work directory of a finished run to start from, in place of one checkpoint that is
      made in `workdir`/start.

  Raises:
    ValueError: an unknown suite, no seeds, no steps or nothing set aside to compare settings on,
      a start without an SFT checkpoint, or with another one than `workdir` began with.
  """
  # Checked as a config file is, before any setting is run.
  config = read_config(config)
  if suite not in _SUITES:
    raise ValueError(f'unknown suite {suite!r}; expected one of {SUITES}')
  for name, value in (('seeds', seeds), ('checkpoints', checkpoints), ('jobs', processes)):
    if value < 1:
      raise ValueError(f'{name} = {value}: at least one is needed')
  chosen = _SUITES[suite]
  starts: list[pathlib.Path | None] = [None]
  if chosen.checkpoints:
    # Without steps, or without prompts set aside, the table would have empty columns.
    for field, value in (('steps', config.rl.steps), ('validation', config.rl.validation)):
      if value < 1:
        raise ValueError(
          f'rl.{field} = {value}: settings are compared by what their steps do to prompts set aside'
        )
    starts = _starts(Job(suite, 'start', config, workdir), checkpoints, processes, sft_run)
  elif sft_run:
    # Such a suite compares ways to an SFT checkpoint, so that a finished one cannot be its start.
    raise ValueError(f'the suite {suite} starts from the base model, not from --sft_run')
  jobs = []
  # All settings at one seed before the next seed: a sweep that is stopped early can be compared.
  for seed in range(seeds):
    for checkpoint, start in enumerate(starts):
      for name in chosen.jobs:
        jobs.append(Job(suite, name, config, workdir, seed, checkpoint, start))
  done: dict[int, list[dict[str, Any]]] = {}
  content: dict[str, Any] = {}
  for number, records in runs.run_jobs(_work, jobs, processes):
    done[number] = records
    # In the order of the jobs, whichever process was faster.
    known = [record for job in range(len(jobs)) if job in done for record in done[job]]
    table = chosen.table(known)
    content = {'suite': suite} | ({'sft': sft_point(starts[0])} if starts[0] else {})
    content |= {'verdict': chosen.verdict(table), 'runs': known, 'table': table}
    # Written after every run: a notebook can look while the sweep goes on.
    write_json_atomic(workdir / f'{suite}.json', content)
  tables.write_pages(workdir, content, chosen.panels)
  return content


def _work(job: Job) -> list[dict[str, Any]]:
  # By the suite's name: functions made at run time do not travel to other processes.
  return _SUITES[job.suite].run(job)


def _starts(
  job: Job, checkpoints: int, processes: int, sft_run: pathlib.Path | None
) -> list[pathlib.Path]:
  """The work directories whose SFT checkpoints settings start from, made where none is given."""
  if sft_run:
    if checkpoints > 1:
      raise ValueError(f'--sft_run is one checkpoint, and {checkpoints} are asked for')
    starts = [sft_run]
  else:
    starts = []
    jobs = []
    for number in range(checkpoints):
      # The first one lies where sweeps with a single checkpoint have it.
      starts.append(job.workdir / (f'start{number}' if number else 'start'))
      jobs.append(
        Job(job.suite, 'start', job.config, job.workdir, checkpoint=number, start=starts[-1])
      )
    for _ in runs.run_jobs(runs.make_start, jobs, processes):
      pass
  for number, start in enumerate(starts):
    record = f'start{number}.json' if number else 'start.json'
    runs.check_start(start, job.workdir / record)
  return starts


def format_table(content: dict[str, Any]) -> str:
  """Returns a suite's table as lines of text, and its verdict."""
  suite = _SUITES[content['suite']]
  lines = suite.text(content) if suite.text else tables.format_rows(content, suite.panels)
  # Files of earlier programs have none.
  return f'{lines}\n{content["verdict"]}' if content.get('verdict') else lines
