"""Names of accelerators that are not there; what compiles for them is tested beside the kernels (models/)."""
import importlib.util

import jax
import pytest

from dcore_jax import topology


@pytest.mark.parametrize('name', ['h800:8', 'a100', 'a100:2x4', 'a100:12', 'a100:0', 'v5p', 'cpu', ''])
def test_unknown_accelerators_are_named(name):
  with pytest.raises(ValueError, match=f"unknown accelerators '{name}'"):
    topology.target(name)


@pytest.mark.parametrize('name,package', [('a100:8', 'jax-cuda12-plugin'), ('v5p:2x2x2', 'libtpu')])
def test_a_missing_compiler_is_named(name, package, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=f'needs the package {package}: pip install'):
    topology.target(name)


def test_the_processor_as_a_target_has_as_many_devices_as_jax_began_with():
  count = jax.device_count()
  devices, memory = topology.target(f'cpu:{count}')
  assert devices == jax.devices() and 1 << 20 < memory
  with pytest.raises(ValueError, match=f'cpu:{count + 1}: jax has begun with {count} CPU devices'):
    topology.target(f'cpu:{count + 1}')
