"""Environments for the releases of bfcl-eval, each with a Python of its own.

The package pins what fits neither this project nor another release of itself. It is installed
without what it asks for, and with the few packages that asking a server and judging need.

    python -m dcore_jax.evaluate.bfcl.environment [FOLDER]     makes both, by default in .suites
"""

import dataclasses
import os
import pathlib
import sys

from dcore_jax.evaluate.environments import install, python_of

DEFAULT_FOLDER = '.suites'
# The parsers of Java and JavaScript changed what they return with later releases.
_NEEDS = (
  'httpx',
  'filelock',
  'jinja2',
  'mpmath==1.3.0',
  'numpy',
  'openai',
  'overrides',
  'pandas',
  'python-dotenv',
  'rank_bm25',
  'requests',
  'tabulate',
  'tenacity',
  'tqdm',
  'transformers',
  'tree_sitter==0.21.3',
  'tree-sitter-java==0.21.0',
  'tree-sitter-javascript==0.21.4',
  'typer',
)


@dataclasses.dataclass(frozen=True)
class Release:
  """A release of bfcl-eval.

  Attributes:
    version: on PyPI.
    folder: of its environment, in `DEFAULT_FOLDER`.
    prefix: begins the names of its files of tasks, results and scores.
  """

  version: str
  folder: str
  prefix: str

  @property
  def title(self) -> str:
    """Its name with the version."""
    return f'bfcl-eval {self.version}'


# The one that scores the published outputs of D-CORE-14B as they were published.
V3 = Release('2025.6.16', 'bfcl-2025', 'BFCL_v3')
V4 = Release('2026.3.23', 'bfcl-2026', 'BFCL_v4')


@dataclasses.dataclass(frozen=True)
class Environment:
  """A virtual environment that holds, or is to hold, a release.

  Attributes:
    release: see `Release`.
    folder: of the environment.
  """

  release: Release
  folder: pathlib.Path

  @property
  def python(self) -> pathlib.Path:
    """The interpreter."""
    return python_of(self.folder)

  def package(self) -> pathlib.Path:
    """Returns the folder of the package.

    Raises:
      ValueError: the release is not there.
    """
    for found in self.folder.glob('lib/python*/site-packages/bfcl_eval'):
      if (found.parent / f'bfcl_eval-{self.release.version}.dist-info').is_dir():
        return found
    raise ValueError(f'no {self.release.title} in {self.folder}: `make bfcl` installs it')

  def is_complete(self) -> bool:
    """Whether the release is there; it is the last thing that is installed."""
    try:
      self.package()
    except ValueError:
      return False
    return self.python.exists()

  def make(self) -> None:
    """Installs what is missing.

    Raises:
      ValueError: an installation failed.
    """
    if self.is_complete():
      return
    pinned = f'bfcl-eval=={self.release.version}'
    install(self.folder, self.release.title, 'make bfcl', _NEEDS, ('--no-deps', pinned))


def find_environment(release: Release, folder: str) -> Environment:
  """Returns the environment in a folder; '' takes the default one."""
  place = folder or os.path.join(DEFAULT_FOLDER, release.folder)
  return Environment(release, pathlib.Path(place).absolute())


def main(folder: str) -> None:
  """Makes the environments of both releases."""
  for release in (V3, V4):
    environment = find_environment(release, os.path.join(folder, release.folder))
    try:
      environment.make()
    except ValueError as error:
      sys.exit(str(error))
    print(f'{release.title} in {environment.folder}')


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_FOLDER)
