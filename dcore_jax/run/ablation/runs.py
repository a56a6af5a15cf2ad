"""The runs of a sweep: where they lie, what they start from, and how several go on side by side."""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dcore_jax.claims import claim
from dcore_jax.config import RunConfig
from dcore_jax.overrides import overlay
from dcore_jax.progress import progress, stage
from dcore_jax.run.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Job:
  """What one process runs: one setting, or several that share stages, at one seed.

  Attributes:
    suite: name of the suite.
    name: of the setting, or of the settings that share stages.
    config: the sweep's config.
    workdir: the sweep's folder.
    seed: number of the repetition.
    checkpoint: number of the SFT checkpoint that it starts from; always 0 where a suite trains its
      own.
    start: work directory of that checkpoint, where the suite has one.
  """

  suite: str
  name: str
  config: RunConfig
  workdir: pathlib.Path
  seed: int = 0
  checkpoint: int = 0
  start: pathlib.Path | None = None

  @property
  def title(self) -> str:
    """What the terminal calls it."""
    of = f', checkpoint {self.checkpoint}' if self.checkpoint else ''
    return f'{self.name}, seed {self.seed}{of}'

  @property
  def folder(self) -> pathlib.Path:
    """Where its results go."""
    # Runs of the first checkpoint lie where sweeps with a single one have them.
    of = f'checkpoint{self.checkpoint}_' if self.checkpoint else ''
    return self.workdir / self.name / f'{of}seed{self.seed}'

  @property
  def identity(self) -> dict[str, int]:
    """What runs of several settings are paired by."""
    return {'seed': self.seed, 'checkpoint': self.checkpoint}


def run_jobs(
  work: Callable[[Job], Any], jobs: Sequence[Job], processes: int = 1
) -> Iterator[tuple[int, Any]]:
  """Yields (number of a job, what `work` made of it) as jobs are done.

  Args:
    work: a function of a module, which other processes can import.
    jobs: what to do, in this order.
    processes: how many at a time. More than one: each has a process and, where the system allows
      it, a core of its own.

  Raises:
    Exception: what the first job that failed has raised; jobs that have not begun are not begun.
  """
  with progress(total=len(jobs), description='sweep', unit='run') as bar:
    for number, result in _worked(work, jobs, processes):
      bar.update(1)
      yield number, result


def _worked(
  work: Callable[[Job], Any], jobs: Sequence[Job], processes: int
) -> Iterator[tuple[int, Any]]:
  if processes == 1 or len(jobs) < 2:
    for number, job in enumerate(jobs):
      with stage(job.title):
        result = work(job)
      yield number, result
    return
  # Started anew: a fork would copy the threads and locks of jax in any state.
  context = multiprocessing.get_context('spawn')
  places = context.Queue()
  for place in range(processes):
    places.put(place)
  pool = concurrent.futures.ProcessPoolExecutor(
    processes, mp_context=context, initializer=_take_core, initargs=(places,)
  )
  try:
    waiting = {pool.submit(work, job): number for number, job in enumerate(jobs)}
    for done in concurrent.futures.as_completed(waiting):
      yield waiting[done], done.result()
  finally:
    pool.shutdown(cancel_futures=True)


def _take_core(places: Any) -> None:
  """Ties this process to a core before jax counts the cores that it may use."""
  place = places.get()
  # macOS has no such call; its processes then share the cores.
  if hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[place % len(cores)]})


def run_stages(config: RunConfig, folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
  """Runs a pipeline with these changes of its config in `folder`; returns its summary."""
  return Pipeline(overlay(config, changes), folder).run()


def reseeded(config: RunConfig, seed: int) -> RunConfig:
  """The config of another repetition of everything, tasks, rows and training."""
  return overlay(config, {'seed': config.seed + seed})


def start_seed(config: RunConfig, checkpoint: int) -> RunConfig:
  """The config of an SFT checkpoint, and of what starts from it."""
  return reseeded(config, checkpoint)


def make_start(job: Job) -> pathlib.Path:
  """Makes the SFT checkpoint `job.checkpoint`, unless it is there; returns its work directory."""
  # The SFT model is measured once here, for the point from which all settings start.
  config = start_seed(job.config, job.checkpoint)
  run_stages(config, job.start, stages=('distill', 'sft', 'evaluate_sft'))
  return job.start


def check_start(start: pathlib.Path, record: pathlib.Path) -> None:
  """Checks that a sweep goes on from the weights that it began with.

  Args:
    start: work directory of the SFT checkpoint.
    record: file of the sweep that says which weights these were.

  Raises:
    ValueError: no checkpoint, or another one.
  """
  model = start / 'sft'
  if not (model / 'config.json').exists():
    raise ValueError(f'{str(start)!r} holds no SFT checkpoint')
  # The weights and not the path: a start that was trained anew in its place is another one.
  digest = hashlib.sha256()
  # Checkpoints of more than 5 GB lie in several files.
  for part in sorted(model.glob('model*.safetensors')):
    with part.open('rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  complaint = f'holds runs that started from other weights than {str(model)!r}, by their'
  claim(record, {'sha256': digest.hexdigest()}, complaint)


def copy_model(model: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes a model directory the SFT stage of the work directory `folder`, unless it has one."""
  copy_folder(model, folder / 'sft')


def copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a folder, unless the target is there."""
  if target.exists():
    return
  # Copied beside its place and renamed: a half copied folder must not look like a whole one.
  partial = target.with_name(f'{target.name}.tmp')
  shutil.copytree(source, partial, dirs_exist_ok=True)
  partial.rename(target)


def model_figures(evaluated: Mapping[str, Any]) -> dict[str, float]:
  """What a table says of a model that was measured on held-out tasks.

  `accuracy` is the mean over the kinds of tasks.
  """
  accuracy = evaluated['accuracy']
  figures = {'accuracy': sum(accuracy.values()) / len(accuracy)}
  for kind, value in accuracy.items():
    figures[f'accuracy_{kind}'] = value
  return figures


def record(job: Job, setting: str, evaluated: dict[str, Any]) -> dict[str, Any]:
  """Returns what the suite's file says of one model."""
  return {'setting': setting, **job.identity, 'figures': model_figures(evaluated)}
