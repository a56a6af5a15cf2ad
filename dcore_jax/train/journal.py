"""A journal of rollouts: what a killed step had sampled is read again instead of sampled again.

Updates are cheap beside rollouts. With every wave of rollouts on disk, a run that goes back to a
checkpoint some steps ago repeats only the updates, and samples only the wave that was under way
when it was killed. A wave is one stream of the engine, and is kept whole or not at all. Its
rollouts were decoded in shared tiles, and the last bits of a log-probability depend on the tile:
sampling part of a wave would give other bits than an undisturbed run. The hosts of a run share the
folder: a file has the rollouts of all of them, all read the same files, and the first host writes
them. A run may therefore go on with another number of hosts.
"""

import pathlib
import warnings
import zipfile
import zlib

import numpy as np

from dcore_jax import distributed
from dcore_jax.files import named_errors
from dcore_jax.rollout.divided import Made, columns, completions


class RolloutJournal:
  """The waves of one run in one folder, `<step>.<wave>.npz` each."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def wave(self, step: int, wave: int, fingerprint: int) -> 'JournaledWave':
    """Returns the file of a wave, which need not be there.

    A file counts only with the same `fingerprint`, which stands for weights, prompts and sampling
    rules.
    """
    return JournaledWave(self._folder / _name(step, wave), fingerprint)

  def forget_behind(self, step: int, wave: int) -> None:
    """Deletes the waves behind a wave.

    A fleet does not sample a wave twice alike. What was sampled behind it came from weights that
    another wave had led to.
    """
    if not distributed.writes():
      return
    for path in self._folder.glob('*.npz'):
      if path.name > _name(step, wave):
        path.unlink()

  def forget(self, before: int) -> None:
    """Deletes the waves of the steps before `before`."""
    if not distributed.writes():
      return
    # The step is the first part of a name; partial files end otherwise.
    for path in self._folder.glob('*.npz'):
      if int(path.name.split('.')[0]) < before:
        path.unlink()


def _name(step: int, wave: int) -> str:
  # Padded with zeros, so that names sort in the order of the steps.
  return f'{step:08d}.{wave:04d}.npz'


class JournaledWave:
  """The rollouts of one wave in a file."""

  def __init__(self, path: pathlib.Path, fingerprint: int):
    self._path = path
    self._fingerprint = fingerprint

  def write(self, made: Made) -> None:
    """Writes the rollouts, which all hosts have."""
    if not made:
      return  # no task fitted the engine
    if not distributed.writes():
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: a kill leaves a .partial file that nothing reads.
    beside = self._path.with_suffix('.partial')
    try:
      with named_errors(self._path), beside.open('wb') as file:
        np.savez(file, **columns(made), fingerprint=np.uint64(self._fingerprint))
      beside.replace(self._path)
    finally:
      # Of a full disk: the run ends, and its next process needs the space.
      beside.unlink(missing_ok=True)

  def read(self) -> Made | None:
    """Returns the rollouts; None without a file of this run that every host can read."""
    made = self._read()
    # Hosts that sampled would wait for those that do not.
    return made if distributed.everywhere(made is not None) else None

  def _read(self) -> Made | None:
    if not self._path.exists():
      return None
    try:
      # A zip archive has a checksum for every array, so that damage shows as an error.
      # No pickle: a file in a work directory is data.
      with np.load(self._path, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
      # Other weights, prompts or rules: the rollouts of another run.
      if stored['fingerprint'] != self._fingerprint:
        return None
      return completions(stored)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
      warnings.warn(
        f'the journal {self._path} cannot be read ({type(error).__name__}: {error}); '
        'its rollouts are sampled again',
        stacklevel=2,
      )
      return None
