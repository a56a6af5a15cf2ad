"""All programs under one name."""

import json
import pathlib
import subprocess
import sys

from dcore_jax import cli

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


def dcore(*words, folder=None):
  return subprocess.run(
    [sys.executable, '-m', 'dcore_jax.cli', *words],
    capture_output=True,
    text=True,
    check=False,
    cwd=folder,
  )


def test_every_program_is_listed_with_a_sentence():
  files = {path.stem for path in EXPERIMENTS.glob('*.py')} - {'__init__'}
  assert set(cli.programs()) == files
  found = dcore()
  assert found.returncode == 0
  for name in files:
    assert f'  {name.replace("_", "-")} ' in found.stdout
    assert len(cli.summary(name)) > 10
  assert dcore('--help').stdout == found.stdout


def test_a_program_that_there_is_not():
  found = dcore('trian')
  assert found.returncode == 1
  assert found.stderr == "error: no program 'trian'; did you mean train?\n"


def test_a_program_takes_its_flags_and_finds_configs_from_anywhere(tmp_path):
  found = dcore('show-rows', '--config=nano', '--workdir=nowhere', folder=tmp_path)
  assert found.returncode == 1
  # What is missing is the run, and not the config.
  assert found.stderr.startswith('error: no rows to train on')


def test_the_doctor_finds_what_is_there(tmp_path):
  found = dcore('doctor', f'--workdir={tmp_path}')
  told = json.loads(found.stdout)
  assert told['devices'][0]['platform'] == 'cpu'
  assert told['disk']['writable'] and told['memory']['free'] > 0
  assert found.returncode == bool(told['problems'])
  assert 'nothing is in the way' in found.stderr or 'problem: ' in found.stderr
