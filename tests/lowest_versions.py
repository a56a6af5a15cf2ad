"""Prints the lowest versions that a pyproject.toml allows, as constraints for pip.

    python tests/lowest_versions.py pyproject.toml > lowest.txt
    PIP_CONSTRAINT=lowest.txt pip install .

Of the dependencies of dependencies pip takes the newest, as it always does.
"""

import re
import sys
import tomllib

# Extras whose packages are compilers or notebooks, which the tests do without.
_EXTRAS = ('test', 'serve', 'evaluate')
_REQUIREMENT = re.compile(
  r'(?P<name>[\w.-]+)(\[[\w,-]+\])?(>=|==)(?P<version>[\w.]+)(?P<marker> *;.*)?'
)


def lowest(project: dict) -> list[str]:
  """Returns 'name==version' of each requirement of a `project` table and of the tests' extras.

  Raises:
    ValueError: a requirement that names no lowest version.
  """
  requirements = list(project['dependencies'])
  for extra in _EXTRAS:
    requirements += project['optional-dependencies'][extra]
  constraints = []
  for requirement in requirements:
    found = _REQUIREMENT.fullmatch(requirement)
    if not found:
      raise ValueError(f'{requirement!r} has no lower bound')
    constraints.append(f'{found["name"]}=={found["version"]}{found["marker"] or ""}')
  return constraints


if __name__ == '__main__':
  with open(sys.argv[1], 'rb') as file:
    print('\n'.join(lowest(tomllib.load(file)['project'])))
