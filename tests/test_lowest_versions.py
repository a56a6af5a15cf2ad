"""The constraints that `make test-lowest` installs with."""

import pathlib
import tomllib

import pytest

from tests.lowest_versions import lowest

PYPROJECT = pathlib.Path(__file__).parents[1] / 'pyproject.toml'


def test_every_requirement_has_a_lowest_version():
  constraints = lowest(tomllib.loads(PYPROJECT.read_text())['project'])
  names = [constraint.partition('==')[0] for constraint in constraints]
  assert {'jax', 'transformers', 'orbax-checkpoint', 'pytest', 'starlette'} <= set(names)
  assert all(version for _, _, version in (each.partition('==') for each in constraints))


def test_a_requirement_without_a_bound_is_named():
  extras = {'test': [], 'serve': [], 'evaluate': []}
  project = {'dependencies': ['numpy'], 'optional-dependencies': extras}
  with pytest.raises(ValueError, match="'numpy' has no lower bound"):
    lowest(project)
  project['dependencies'] = ['jax[tpu]>=0.10.2', "torch==2.13.0; python_version < '3.12'"]
  assert lowest(project) == ['jax==0.10.2', "torch==2.13.0; python_version < '3.12'"]
