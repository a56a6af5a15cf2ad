"""The stages on a mesh of eight fake devices against one device.

Training is split over fsdp x tensor, rollouts over tensor.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
  'distill.tasks.single': 4,
  'distill.tasks.sequential': 6,
  'distill.tasks.parallel': 6,
  'distill.tasks.irrelevant': 4,
  'distill.tasks.multi_turn': 0,
  'sft.rows': 4,
  'sft.capacity': 512,
  'sft.epochs': 1,
  'rl.steps': 1,
  'rl.prompts': 4,
  'rl.group': 4,
  'rl.updates': 2,
  'rl.rows': 4,
  'rl.validation': 0,
  'rl.max_tokens': 64,
  'engine.lanes': 16,
  'rl.tasks.single': 8,
  'rl.tasks.sequential': 4,
  'rl.tasks.parallel': 4,
  'rl.tasks.irrelevant': 4,
  'rl.tasks.multi_turn': 0,
}
MESH = {'mesh.fsdp': 4, 'mesh.tensor': 2, 'engine.tensor': 2}


def command(module: str, devices: int, *flags: str) -> subprocess.Popen:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  return subprocess.Popen(
    [sys.executable, '-m', f'experiments.{module}', *flags],
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def on_hosts(count: int, module: str, devices: int, *flags: str) -> None:
  """The same command on each of `count` hosts, which share `devices` devices; all must end well."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  hosts = [
    [f'--hosts=127.0.0.1:{port},{count},{index}'] if count > 1 else [] for index in range(count)
  ]
  for process in [command(module, devices // count, *flags, *host) for host in hosts]:
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-3000:]


def train(workdir: pathlib.Path, devices: int, stages: str, fields: dict, hosts: int = 1) -> None:
  flags = [f'--config.{name}={value}' for name, value in (SMALL | fields).items()]
  on_hosts(
    hosts,
    'train',
    devices,
    '--config=configs/nano.py',
    f'--workdir={workdir}',
    f'--stages={stages}',
    *flags,
  )


def rows(workdir: pathlib.Path, stage: str) -> list[dict]:
  return [
    row
    for row in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    if row['stage'] == stage
  ]


@pytest.mark.slow
def test_stages_on_eight_devices_give_what_one_gives(tmp_path):
  one = tmp_path / 'one'
  many = tmp_path / 'many'
  train(one, 1, 'distill,sft,rl', {})
  shutil.copytree(one / 'distill', many / 'distill')
  train(many, 8, 'sft,rl,export', MESH)
  expected = [row['loss'] for row in rows(one, 'sft')]
  assert len(expected) > 2
  np.testing.assert_allclose([row['loss'] for row in rows(many, 'sft')], expected, rtol=1e-3)
  [single] = rows(one, 'rl')
  [split] = rows(many, 'rl')
  assert split['logp_gap_max'] < 1e-4
  for name in ('pg_loss', 'kl', 'entropy'):
    np.testing.assert_allclose(split[name], single[name], rtol=5e-2, atol=1e-4, err_msg=name)
  assert (many / 'export' / 'config.json').exists()


@pytest.mark.slow
def test_stages_on_two_hosts_give_what_one_gives(tmp_path):
  one = tmp_path / 'one'
  two = tmp_path / 'two'
  train(one, 8, 'distill,sft,rl,export', MESH)
  shutil.copytree(one / 'distill', two / 'distill')
  train(two, 8, 'sft,rl,export', MESH, hosts=2)
  for stage, name in (('sft', 'loss'), ('rl', 'reward'), ('rl', 'pg_loss'), ('rl', 'kl')):
    np.testing.assert_allclose(
      [row[name] for row in rows(two, stage)],
      [row[name] for row in rows(one, stage)],
      rtol=1e-4,
      atol=1e-6,
      err_msg=name,
    )
  on_hosts(
    2,
    'export',
    8,
    f'--checkpoint={two / "checkpoints/da_grpo"}',
    f'--out={tmp_path / "again"}',
    '--dtype=bfloat16',
  )
  tensors = [
    (folder / 'model.safetensors').read_bytes() for folder in (two / 'export', tmp_path / 'again')
  ]
  assert tensors[0] == tensors[1]
