"""Several hosts as processes on this one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from dcore_jax import distributed, gpu_memory
from dcore_jax.plan import fit
from dcore_jax.run.config import default_config, read_config

PROGRAM = pathlib.Path(__file__).parent / 'hosts_program.py'


def start(folder: pathlib.Path, hosts: str, devices: int) -> subprocess.Popen:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(PROGRAM.parents[2]),
  }
  return subprocess.Popen(
    [sys.executable, str(PROGRAM), str(folder), hosts],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def result(process: subprocess.Popen) -> dict:
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err[-3000:]
  # Every line is JSON: libraries write to stderr.
  return [json.loads(line) for line in out.splitlines()][-1]


def test_two_hosts_train_what_one_trains_and_go_back_together(tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  both = [start(tmp_path / 'two', f'127.0.0.1:{port},2,{index}', 4) for index in range(2)]
  one = result(start(tmp_path / 'one', '', 8))
  two = [result(process) for process in both]
  assert (
    one['processes'] == 1
    and [host['processes'] for host in two] == [2, 2]
    and two[0]['devices'] == 8
  )
  assert two[0]['losses'] == two[1]['losses']
  np.testing.assert_allclose(two[0]['losses'], one['losses'], rtol=1e-5)
  for host in (one, *two):
    assert (
      host['restored'] == 1
      and host['same']
      and {'1', '2.unreadable'} <= set(host['files'])
      and '2' not in host['files']
    )


@pytest.mark.parametrize(
  'hosts', ['somewhere', '10.0.0.1:1234,2', '10.0.0.1:1234,2,2', '10.0.0.1:1234,two,0']
)
def test_hosts_that_cannot_be_are_named(hosts):
  with pytest.raises(ValueError, match='ADDRESS:PORT,COUNT,INDEX'):
    distributed.join(hosts)


@pytest.mark.parametrize(
  ('told', 'variables', 'kept'),
  [
    (None, {}, '/home/someone/.cache/dcore_jax/programs-'),
    (None, {'XDG_CACHE_HOME': '/fast'}, '/fast/dcore_jax/programs-'),
    (None, {'XDG_CACHE_HOME': ''}, '/home/someone/.cache/dcore_jax/programs-'),
    (None, {'XDG_CACHE_HOME': '/fast', 'DCORE_CACHE': '/mine'}, '/mine/programs-'),
    (None, {'DCORE_CACHE': ''}, None),
    ('/elsewhere', {'DCORE_CACHE': '/mine'}, '/elsewhere'),
  ],
)
def test_where_compiled_programs_are_kept(monkeypatch, told, variables, kept):
  for name in ('DCORE_CACHE', 'XDG_CACHE_HOME', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('HOME', '/home/someone')
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  settings = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    jax.config.update('jax_compilation_cache_dir', told)
    distributed.keep_programs()
    got = jax.config.jax_compilation_cache_dir
    assert got == kept if kept is None else got.startswith(kept)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    # Only the project's own folder has all of them.
    assert (least == 0) == (kept is not None and kept.endswith('programs-'))
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def test_programs_of_other_processors_and_versions_have_other_folders(monkeypatch):
  def folder():
    return distributed.programs_folder(pathlib.Path('root'))

  here = folder()
  assert here == folder()
  monkeypatch.setattr(distributed, '_processor', lambda: 'a processor without AVX-512')
  assert folder() != here and folder().parent == here.parent
  monkeypatch.undo()
  monkeypatch.setattr(jax, '__version__', '99.0')
  assert '99.0' in folder().name


# Counts what comes from the folder of programs, and what is compiled and put there.
COUNTED = """
import collections, json, sys
import jax
from dcore_jax import distributed

distributed.keep_programs()
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition('/')[2]]))
{work}
print(json.dumps([counts['cache_hits'], counts['cache_misses']]))
"""
SMALL = 'jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(3.0))'
ENGINE = """
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.serve.server import load_model

engine = load_model('', lanes=2, max_len=64).engine
engine.prepare()
engine.generate([Request([1, 2, 3], (0,))], SamplingParams(max_tokens=4))
"""


@pytest.mark.parametrize(
  'work',
  [pytest.param(SMALL, id='small'), pytest.param(ENGINE, id='engine', marks=pytest.mark.slow)],
)
def test_a_second_process_compiles_nothing_anew(tmp_path, work):
  environment = os.environ | {'DCORE_CACHE': str(tmp_path), 'PYTHONPATH': str(PROGRAM.parents[1])}
  # The tests have set these for themselves.
  for name in [name for name in environment if name.startswith(('JAX_COMP', 'JAX_PERSISTENT'))]:
    del environment[name]

  def started():
    command = [sys.executable, '-c', COUNTED.format(work=work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

  folder = distributed.programs_folder(tmp_path)
  _, compiled = started()
  kept = sorted(path.name for path in folder.iterdir())
  assert compiled and len(kept) == compiled
  hits, misses = started()
  assert misses == 0 and hits >= compiled
  assert sorted(path.name for path in folder.iterdir()) == kept


def test_programs_take_the_memory_that_a_plan_counts_on(monkeypatch):
  name = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
  monkeypatch.delenv(name, raising=False)
  gpu_memory.take_memory()
  assert fit.HEAD_ROOM <= float(os.environ[name]) < 1
  # A person's own word stays.
  monkeypatch.setenv(name, '.5')
  gpu_memory.take_memory()
  assert os.environ[name] == '.5'


def test_one_device_has_a_mesh_where_host_memory_is_named():
  c = default_config()
  one = jax.devices()[:1]
  assert distributed.training_mesh(read_config(c), one) is None
  c.execution.offload = ('optimizer',)
  assert distributed.training_mesh(read_config(c), one).size == 1


@pytest.mark.parametrize(
  ('variables', 'expected'),
  [
    ({}, None),
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, []),
    ({'SLURM_STEP_TASKS_PER_NODE': '1'}, []),
    ({'SLURM_STEP_TASKS_PER_NODE': '8(x2),4'}, None),
    ({'SLURM_STEP_TASKS_PER_NODE': '12'}, None),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, []),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '8'}, None),
  ],
)
def test_a_process_alone_on_its_host_has_all_devices(variables, expected):
  assert distributed._all_devices(variables) == expected


def test_each_host_has_a_file_of_its_own(monkeypatch):
  path = pathlib.Path('W/replies.jsonl')
  assert distributed.own_file(path) == path
  monkeypatch.setattr(jax, 'process_index', lambda: 12)
  assert distributed.own_file(path) == pathlib.Path('W/replies.host12.jsonl')


def test_one_process_exchanges_with_itself():
  assert distributed.gather_bytes(b'\0\xff') == [b'\0\xff']
  assert distributed.gather_json({'a': [1, 'ü']}) == [{'a': [1, 'ü']}]
  assert distributed.of_first(7) == 7
