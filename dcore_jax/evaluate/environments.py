"""Virtual environments of harnesses, whose pins fit neither this project nor each other."""

import pathlib
import subprocess
import sys
from collections.abc import Sequence

# What pip says of a connection. Its last line is of a package that it could not find then.
_AWAY = (
  'NewConnectionError',
  'Failed to establish a new connection',
  'Name or service not known',
  'Temporary failure in name resolution',
  'Network is unreachable',
  'ProxyError',
  'Read timed out',
)


def python_of(folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of an environment's Python."""
  return folder.absolute() / 'bin' / 'python'


def install(folder: pathlib.Path, title: str, command: str, *steps: Sequence[str]) -> None:
  """Makes an environment where there is none, and installs into it.

  Args:
    folder: of the environment.
    title: of the harness.
    command: makes the same environment, for a person.
    steps: arguments of `pip install`, one call each.

  Raises:
    ValueError: it cannot be made; says why in one line.
  """
  python = python_of(folder)
  calls: list[list[str]] = []
  if not python.exists():
    calls.append([sys.executable, '-m', 'venv', str(folder)])
  pip = [str(python), '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
  for call in [*calls, *([*pip, *step] for step in steps)]:
    done = subprocess.run(call, capture_output=True, encoding='utf-8', check=False)
    if done.returncode:
      said = f'{done.stdout}\n{done.stderr}'
      if any(words in said for words in _AWAY):
        reason = 'the package index cannot be reached'
      else:
        reason = (said.strip().splitlines() or ['no message'])[-1]
      raise ValueError(
        f'no environment for {title} in {folder}: {reason} (`{command}` tries again)'
      )
