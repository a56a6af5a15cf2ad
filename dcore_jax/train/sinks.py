"""Sends a run's numbers to programs that show them: trackio, and Weights & Biases.

Both are optional packages with the same functions (`init`, `log`, `finish`). What is kept of a run
is `metrics.jsonl`: a sink that fails is left out for the rest of the stage, and the run goes on.
"""

import importlib
import importlib.util
import pathlib
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax import distributed
from dcore_jax.config import RunConfig
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.overrides import to_json

SINKS = ('trackio', 'wandb')
NAMES_FILE = 'sinks.json'


def check_sinks(names: Sequence[str]) -> None:
  """Checks what `report.sinks` names.

  Raises:
    ValueError: a sink that there is not, or one whose package is not installed.
  """
  for name in names:
    if name not in SINKS:
      raise ValueError(f'report.sinks: unknown sink {name!r}; expected some of {SINKS}')
    # Looked for and not imported, which takes seconds and may ask a person for a key.
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"report.sinks names {name!r}, which is not installed: pip install 'dcore_jax[{name}]'"
      )


class Sink:
  """One of the packages, with a run under way.

  Args:
    name: of the package.
    config: of the run; its `report.project` names the project.
    workdir: the run's folder, whose name the run gets.
    run_id: tells this run from others, also when it goes on in another process.
  """

  def __init__(self, name: str, config: RunConfig, workdir: pathlib.Path, run_id: str):
    self._name = name
    self._package = importlib.import_module(name)
    self._stages: set[str] = set()
    self._failed = False
    options: dict[str, Any] = {
      'project': config.report.project,
      'name': f'{workdir.resolve().name}-{run_id}',
      'config': to_json(config),
      # The same run goes on where a killed one ended.
      'resume': 'allow',
    }
    if name == 'wandb':
      options |= {'id': run_id, 'dir': str(workdir)}
    self._try('init', **options)

  def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
    """Sends a row; numbers that are not known are left out."""
    known = {f'{stage}/{name}': value for name, value in values.items() if value is not None}
    # Stages count their steps anew, and the packages' own step may never fall.
    known[f'{stage}/step'] = step
    if self._name == 'wandb' and stage not in self._stages:
      self._stages.add(stage)
      self._try('define_metric', f'{stage}/*', step_metric=f'{stage}/step')
    self._try('log', known)

  def close(self) -> None:
    """Ends the run there."""
    self._try('finish')

  def _try(self, function: str, *arguments: Any, **options: Any) -> None:
    if self._failed:
      return
    try:
      getattr(self._package, function)(*arguments, **options)
    # Whatever another program raises, be it of the network or of its own: it is no reason to end a
    # training run.
    except Exception as error:  # noqa: BLE001
      self._failed = True
      warnings.warn(
        f'{self._name}.{function} failed, and gets no more numbers of this stage: '
        f'{type(error).__name__}: {error}',
        stacklevel=2,
      )


def open_sinks(config: RunConfig, workdir: str | pathlib.Path) -> list[Sink]:
  """Opens what `report.sinks` names; on other hosts than the first, nothing.

  The folder keeps the name of the run there, so that it goes on also where the folder has moved.

  Raises:
    ValueError: see `check_sinks`.
  """
  check_sinks(config.report.sinks)
  if not config.report.sinks or not distributed.writes():
    return []
  workdir = pathlib.Path(workdir)
  kept = workdir / NAMES_FILE
  if not kept.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(kept, {'id': uuid.uuid4().hex[:8]})
  run_id = str(read_json(kept)['id'])
  return [Sink(name, config, workdir, run_id) for name in config.report.sinks]
