"""All suites by name, and the one loop that runs any of them."""

import dataclasses
import pathlib
from collections.abc import Sequence
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
  settings: Sequence[str] = (),
  starts: int | pathlib.Path = 1,
  processes: int = 1,
) -> dict[str, Any]:
  """Runs what is not there yet; writes `workdir`/<suite>.json and its kin, and returns its content.

  Args:
    suite: one of SUITES.
    config: pipeline config; its stages are those of the suite.
    workdir: results, one folder a job and seed; a second call resumes.
    seeds: repetitions of each setting: of prompt orders and samples from each checkpoint, or of
      everything where a suite trains its own models.
    settings: the jobs of the suite that are run, by name; none: all.
    starts: for suites that start from SFT checkpoints: how many are made, each from a seed of its
      own, or the work directory of a finished run whose checkpoint is the only one.
    processes: jobs that run at a time.

  Raises:
    ValueError: an unknown suite or setting, no seeds, no steps or nothing set aside to compare
      settings on, a start without an SFT checkpoint, or with another one than `workdir` began with.
  """
  # Checked as a config file is, before any setting is run.
  config = read_config(config)
  if suite not in _SUITES:
    raise ValueError(f'unknown suite {suite!r}; expected one of {SUITES}')
  chosen = _SUITES[suite]
  given = isinstance(starts, pathlib.Path)
  _check_counts(seeds=seeds, checkpoints=1 if given else starts, jobs=processes)
  for name in settings:
    if name not in chosen.jobs:
      raise ValueError(f'the suite {suite} has no setting {name!r}; it has {chosen.jobs}')
  folders: list[pathlib.Path | None] = [None]
  if chosen.checkpoints:
    _check_compared(config)
    folders = _starts(Job(suite, 'start', config, workdir), starts, processes)
  elif given:
    # Such a suite compares ways to an SFT checkpoint, so that a finished one cannot be its start.
    raise ValueError(f'the suite {suite} starts from the base model, not from --sft_run')
  jobs = []
  # All settings at one seed before the next seed: a sweep that is stopped early can be compared.
  for seed in range(seeds):
    for checkpoint, start in enumerate(folders):
      for name in chosen.jobs:
        if settings and name not in settings:
          continue
        jobs.append(Job(suite, name, config, workdir, seed, checkpoint, start))
  done: dict[int, list[dict[str, Any]]] = {}
  content: dict[str, Any] = {}
  for number, records in runs.run_jobs(_work, jobs, processes):
    done[number] = records
    # In the order of the jobs, whichever process was faster.
    known = [record for job in range(len(jobs)) if job in done for record in done[job]]
    table = chosen.table(known)
    content = {'suite': suite} | ({'sft': sft_point(folders[0])} if folders[0] else {})
    content |= {'verdict': chosen.verdict(table), 'runs': known, 'table': table}
    # Written after every run: a notebook can look while the sweep goes on.
    write_json_atomic(workdir / f'{suite}.json', content)
  tables.write_pages(workdir, content, chosen.panels)
  return content


def _check_counts(**counts: int) -> None:
  for name, value in counts.items():
    if value < 1:
      raise ValueError(f'{name} = {value}: at least one is needed')


def _check_compared(config: RunConfig) -> None:
  """Settings are compared by what their steps do to prompts set aside: checks that both exist."""
  # Without them the table would have empty columns.
  for field, value in (('steps', config.rl.steps), ('validation', config.rl.validation)):
    if value < 1:
      raise ValueError(
        f'rl.{field} = {value}: settings are compared by what their steps do to prompts set aside'
      )


def _work(job: Job) -> list[dict[str, Any]]:
  # By the suite's name: functions made at run time do not travel to other processes.
  return _SUITES[job.suite].run(job)


def _starts(job: Job, starts: int | pathlib.Path, processes: int) -> list[pathlib.Path]:
  """The work directories whose SFT checkpoints settings start from, made where none is given."""
  if isinstance(starts, pathlib.Path):
    folders = [starts]
  else:
    folders = []
    jobs = []
    for number in range(starts):
      # The first one lies where sweeps with a single checkpoint have it.
      folders.append(job.workdir / (f'start{number}' if number else 'start'))
      jobs.append(dataclasses.replace(job, checkpoint=number, start=folders[-1]))
    for _ in runs.run_jobs(runs.make_start, jobs, processes):
      pass
  for number, start in enumerate(folders):
    record = f'start{number}.json' if number else 'start.json'
    runs.check_start(start, job.workdir / record)
  return folders


def format_table(content: dict[str, Any]) -> str:
  """Returns a suite's table as lines of text, and its verdict."""
  suite = _SUITES[content['suite']]
  lines = suite.text(content) if suite.text else tables.format_rows(content, suite.panels)
  # Files of earlier programs have none.
  return f'{lines}\n{content["verdict"]}' if content.get('verdict') else lines
