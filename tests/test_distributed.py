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

from dcore_jax import distributed

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
  return json.loads(out.splitlines()[-1])


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
  ('backend', 'asked', 'kept'),
  [
    ('tpu', None, '/home/someone/.cache/dcore_jax'),
    ('cpu', None, None),
    ('gpu', '/elsewhere', '/elsewhere'),
    ('cpu', '/elsewhere', '/elsewhere'),
  ],
)
def test_compiled_programs_are_kept_where_they_are_worth_it(monkeypatch, backend, asked, kept):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setenv('HOME', '/home/someone')
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update('jax_compilation_cache_dir', asked)
    distributed.keep_programs()
    assert jax.config.jax_compilation_cache_dir == kept
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
