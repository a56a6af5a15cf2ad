"""A journal of rollouts: what a killed step had sampled is read again instead of sampled again.

Updates are cheap beside rollouts. With every wave of rollouts on disk, a run that goes back to a checkpoint some steps ago
repeats their updates only, and of the step it was killed in only the wave under way is sampled anew. A wave is one stream of
the engine, whole: its rollouts shared tiles, and the last bits of a log-probability depend on the tile, so that sampling part
of a wave would give other bits than the run that was not killed. Hosts of one run share the folder: all sample the same and
read the same files, the first one writes them.
"""

import pathlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dcore_jax import distributed
from dcore_jax.rollout.engine import Completion, Engine, Request, Source, Tag
from dcore_jax.rollout.sampling import SamplingParams

_PER_TOKEN = ('tokens', 'logprobs', 'full_logprobs', 'entropies')


class Journal:
  """The waves of one run in one folder, `<step>.<wave>.npz` each."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def engine(self, engine: Engine, step: int, wave: int, fingerprint: int) -> 'JournaledEngine':
    """What samples a wave: the engine, whose completions are written down, or the file of an earlier process.

    A file counts only where it bears the same `fingerprint`: of weights, prompts and sampling rules.
    """
    return JournaledEngine(engine, self._folder / f'{step:08d}.{wave:04d}.npz', fingerprint)

  def forget(self, before: int) -> None:
    """Deletes the waves of the steps before `before`."""
    for path in self._folder.glob('*.npz') if distributed.writes() else ():
      if int(path.name.split('.')[0]) < before:
        path.unlink()


class JournaledEngine:
  """An engine for one stream, as `Engine` seen by those who only sample: `generate`, `stream`, `max_len`."""

  def __init__(self, engine: Engine, path: pathlib.Path, fingerprint: int):
    self._engine, self._path, self._fingerprint = engine, path, fingerprint
    self.max_len = engine.max_len

  def generate(
    self,
    requests: Sequence[Request],
    sampling: SamplingParams,
    progress: Callable[[int], None] | None = None,
  ) -> list[Completion]:
    """As `Engine.generate`, which is a loop over `stream`."""
    return Engine.generate(self, requests, sampling, progress)

  def stream(self, source: Source, sampling: SamplingParams) -> Iterator[tuple[Tag, Completion]]:
    """As `Engine.stream`. Stop strings are refused: the file has no place for them."""
    if sampling.stop:
      raise ValueError(f'rollouts with stop strings {sampling.stop} cannot be journaled')
    held = self._read()
    if held is not None:
      while arrivals := source(self._engine.lanes):
        for tag, request in arrivals:
          yield tag, held[request.key_id]
      return
    keys: dict[Any, tuple[int, ...]] = {}
    made: dict[tuple[int, ...], Completion] = {}

    def noted(free: int) -> Sequence[tuple[Tag, Request]]:
      arrivals = source(free)
      keys.update({tag: request.key_id for tag, request in arrivals})
      return arrivals

    for tag, completion in self._engine.stream(noted, sampling):
      made[keys.pop(tag)] = completion
      yield tag, completion
    self._write(made)

  def _write(self, made: dict[tuple[int, ...], Completion]) -> None:
    if not made:
      return  # no task fitted the engine
    if not distributed.writes():
      return
    completions = list(made.values())
    columns = {name: np.concatenate([getattr(c, name) for c in completions]) for name in _PER_TOKEN}
    columns |= {
      'lengths': np.array([len(c.tokens) for c in completions]),
      'key_ids': np.array(list(made), np.int64),
      'finished': np.array([c.finished for c in completions]),
      'prompt_len': np.array([c.prompt_len for c in completions]),
      'fingerprint': np.uint64(self._fingerprint),
    }
    self._path.parent.mkdir(parents=True, exist_ok=True)
    beside = self._path.with_suffix('.partial')
    with beside.open('wb') as file:
      np.savez(file, **columns)
    beside.replace(self._path)

  def _read(self) -> dict[tuple[int, ...], Completion] | None:
    """What the file holds by key_id; None where there is none, or one of another run or a damaged one."""
    if not self._path.exists():
      return None
    try:
      with np.load(
        self._path, allow_pickle=False
      ) as file:  # a zip archive: every array has a checksum
        columns = {name: file[name] for name in file.files}
      if columns['fingerprint'] != self._fingerprint:
        return None
      ends = np.cumsum(columns['lengths'])[:-1]
      rows = zip(
        columns['key_ids'].tolist(),
        *(np.split(columns[name], ends) for name in _PER_TOKEN),
        columns['finished'].tolist(),
        columns['prompt_len'].tolist(),
        strict=True,
      )
      return {
        tuple(key): Completion(*arrays, finished, None, prompt_len)
        for key, *arrays, finished, prompt_len in rows
      }
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
      warnings.warn(
        f'the journal {self._path} cannot be read ({type(error).__name__}: {error}); its rollouts are sampled again',
        stacklevel=2,
      )
      return None
