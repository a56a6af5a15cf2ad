"""The names of the package: few, documented, and free until they are used."""

import inspect
import subprocess
import sys

import pytest

import dcore_jax
from dcore_jax.models.config import DecoderConfig
from dcore_jax.run.config import default_config

LIGHT = """
import sys, time
import dcore_jax
assert 'jax' not in sys.modules and 'numpy' not in sys.modules
assert 'load' in dir(dcore_jax)
print(time.process_time())
"""


def test_the_package_is_imported_in_no_time():
  done = subprocess.run([sys.executable, '-c', LIGHT], capture_output=True, text=True, check=True)
  assert float(done.stdout) < 1.5


def test_every_name_is_a_documented_function():
  assert len(dcore_jax.__all__) == 12
  for name in dcore_jax.__all__:
    function = getattr(dcore_jax, name)
    assert inspect.isfunction(function) and len(inspect.getdoc(function).splitlines()) > 5, name


def test_other_names_are_refused():
  with pytest.raises(AttributeError, match="no attribute 'lode'"):
    dcore_jax.lode  # noqa: B018


def test_a_run_is_planned(model: DecoderConfig):
  config = default_config()
  config.model.init.update(model.to_hf())
  config.sft.update(dict(capacity=64, rows=2))
  config.engine.max_len = 128  # the tiny model has 256 positions
  [step] = dcore_jax.plan_run(config, 'cpu:1', ('SFT step',))
  assert step.fits and step.peak > 3 * 4 * model.param_count
