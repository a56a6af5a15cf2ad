"""A journal of rollouts: what a killed step had sampled is read again instead of sampled again.

Updates are cheap beside rollouts. With every wave of rollouts on disk, a run that goes back to a
checkpoint some steps ago repeats only the updates, and samples only the wave that was under way
when it was killed. A wave is one stream of the engine, and is kept whole or not at all. Its
rollouts were decoded in shared tiles, and the last bits of a log-probability depend on the tile:
sampling part of a wave would give other bits than an undisturbed run. The hosts of a run share the
folder: all sample the same rollouts and read the same files, and the first host writes them.
"""

import pathlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dcore_jax import distributed
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Completion, Request, RequestSource, Tag
from dcore_jax.rollout.sampling import SamplingParams


class RolloutJournal:
  """The waves of one run in one folder, `<step>.<wave>.npz` each."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def engine(self, engine: Engine, step: int, wave: int, fingerprint: int) -> 'JournaledEngine':
    """Returns an engine for one wave.

    It reads the file of an earlier process, or samples and writes the file.

    A file counts only with the same `fingerprint`, which stands for weights, prompts and sampling
    rules.
    """
    # Padded with zeros, so that names sort in the order of the steps.
    return JournaledEngine(engine, self._folder / f'{step:08d}.{wave:04d}.npz', fingerprint)

  def forget(self, before: int) -> None:
    """Deletes the waves of the steps before `before`."""
    if not distributed.writes():
      return
    # The step is the first part of a name; partial files end otherwise.
    for path in self._folder.glob('*.npz'):
      if int(path.name.split('.')[0]) < before:
        path.unlink()


class JournaledEngine:
  """An engine for one stream, for those who only sample: it has `generate`, `stream`, `max_len`."""

  def __init__(self, engine: Engine, path: pathlib.Path, fingerprint: int):
    self._engine = engine
    self._path = path
    self._fingerprint = fingerprint
    # Read by those who render prompts, to refuse what does not fit.
    self.max_len = engine.max_len

  def generate(
    self,
    requests: Sequence[Request],
    sampling: SamplingParams,
    progress: Callable[[int], None] | None = None,
  ) -> list[Completion]:
    """Does what `Engine.generate` does, which is a loop over `stream` and can run on this one's."""
    # Called unbound: it needs nothing of an engine but `stream`.
    return Engine.generate(self, requests, sampling, progress)

  def stream(
    self, source: RequestSource, sampling: SamplingParams
  ) -> Iterator[tuple[Tag, Completion]]:
    """Does what `Engine.stream` does, from the file if it is there.

    Raises:
      ValueError: stop strings, for which the file has no place.
    """
    if sampling.stop:
      raise ValueError(f'rollouts with stop strings {sampling.stop} cannot be journaled')
    # Read whole before the first rollout is handed out: a damaged file means sampling all of them.
    held = self._read()
    if held is not None:
      # All lanes are free: nothing is sampled, and the source gives as much as it has.
      arrivals = source(self._engine.lanes)
      while arrivals:
        for tag, request in arrivals:
          # By the id of the random stream, which does not depend on the order of requests.
          yield tag, held[request.key_id]
        arrivals = source(self._engine.lanes)
      return
    keys: dict[Any, tuple[int, ...]] = {}
    made: dict[tuple[int, ...], Completion] = {}

    # Completions come without their key; remember it by the tag of the request.
    def noted(free: int) -> Sequence[tuple[Tag, Request]]:
      arrivals = source(free)
      # Tags are the caller's, and may be used again when a rollout has ended.
      keys.update({tag: request.key_id for tag, request in arrivals})
      return arrivals

    for tag, completion in self._engine.stream(noted, sampling):
      made[keys.pop(tag)] = completion
      yield tag, completion
    # Only a stream that came to its end is written.
    self._write(made)

  def _write(self, made: dict[tuple[int, ...], Completion]) -> None:
    """Writes the completions by key_id: per-token columns end to end, and one entry each."""
    if not made:
      return  # no task fitted the engine
    # Every host has sampled the same; one file is enough.
    if not distributed.writes():
      return
    # In the order of finishing; the key ids go along.
    completions = list(made.values())
    columns = {
      'tokens': np.concatenate([c.tokens for c in completions]),
      'logprobs': np.concatenate([c.logprobs for c in completions]),
      'full_logprobs': np.concatenate([c.full_logprobs for c in completions]),
      'entropies': np.concatenate([c.entropies for c in completions]),
      'lengths': np.array([len(c.tokens) for c in completions]),
      'key_ids': np.array(list(made), np.int64),
      'finished': np.array([c.finished for c in completions]),
      'prompt_len': np.array([c.prompt_len for c in completions]),
      'fingerprint': np.uint64(self._fingerprint),
    }
    self._path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: a kill leaves a .partial file that nothing reads.
    beside = self._path.with_suffix('.partial')
    with beside.open('wb') as file:
      np.savez(file, **columns)
    beside.replace(self._path)

  def _read(self) -> dict[tuple[int, ...], Completion] | None:
    """Returns the file's completions by key_id; None without a readable file of this run."""
    if not self._path.exists():
      return None
    try:
      # A zip archive has a checksum for every array, so that damage shows as an error.
      # No pickle: a file in a work directory is data.
      with np.load(self._path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
      # Other weights, prompts or rules: the rollouts of another run.
      if columns['fingerprint'] != self._fingerprint:
        return None
      return _completions(columns)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
      warnings.warn(
        f'the journal {self._path} cannot be read ({type(error).__name__}: {error}); '
        'its rollouts are sampled again',
        stacklevel=2,
      )
      return None


def _completions(columns: dict[str, np.ndarray]) -> dict[tuple[int, ...], Completion]:
  """The inverse of `JournaledEngine._write`."""
  # The last end is that of the whole column, where `split` needs no cut.
  ends = np.cumsum(columns['lengths'])[:-1]
  tokens = np.split(columns['tokens'], ends)
  logprobs = np.split(columns['logprobs'], ends)
  full_logprobs = np.split(columns['full_logprobs'], ends)
  entropies = np.split(columns['entropies'], ends)
  completions = {}
  for index, key_id in enumerate(columns['key_ids'].tolist()):
    completions[tuple(key_id)] = Completion(
      tokens=tokens[index],
      logprobs=logprobs[index],
      full_logprobs=full_logprobs[index],
      entropies=entropies[index],
      finished=bool(columns['finished'][index]),
      stop=None,
      prompt_len=int(columns['prompt_len'][index]),
    )
  return completions
