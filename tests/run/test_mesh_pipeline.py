"""The stages on a mesh of eight fake devices, training over fsdp x tensor, rollouts over tensor, against one device."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {'distill.tasks.single': 4, 'distill.tasks.sequential': 6, 'distill.tasks.parallel': 6, 'distill.tasks.irrelevant': 4,
         'distill.tasks.multi_turn': 0, 'sft.rows': 4, 'sft.capacity': 512, 'sft.epochs': 1, 'rl.steps': 1, 'rl.prompts': 4,
         'rl.group': 4, 'rl.updates': 2, 'rl.rows': 4, 'rl.validation': 0, 'rl.max_tokens': 64, 'engine.lanes': 16,
         'rl.tasks.single': 8, 'rl.tasks.sequential': 4, 'rl.tasks.parallel': 4, 'rl.tasks.irrelevant': 4,
         'rl.tasks.multi_turn': 0}
MESH = {'mesh.fsdp': 4, 'mesh.tensor': 2, 'engine.tensor': 2}


def train(workdir: pathlib.Path, devices: int, stages: str, fields: dict) -> None:
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
  flags = [f'--config.{name}={value}' for name, value in (SMALL | fields).items()]
  done = subprocess.run([sys.executable, '-m', 'experiments.train', '--config=configs/nano.py', f'--workdir={workdir}',
                         f'--stages={stages}', *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-3000:]


def rows(workdir: pathlib.Path, stage: str) -> list[dict]:
  return [row for row in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines()) if row['stage'] == stage]


@pytest.mark.slow
def test_stages_on_eight_devices_give_what_one_gives(tmp_path):
  one, many = tmp_path / 'one', tmp_path / 'many'
  train(one, 1, 'distill,sft,rl', {})
  shutil.copytree(one / 'distill', many / 'distill')
  train(many, 8, 'sft,rl,export', MESH)
  losses = [[row['loss'] for row in rows(folder, 'sft')] for folder in (one, many)]
  assert len(losses[0]) > 2
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
  [single], [split] = rows(one, 'rl'), rows(many, 'rl')
  assert split['logp_gap_max'] < 1e-4
  for name in ('pg_loss', 'kl', 'entropy'):
    np.testing.assert_allclose(split[name], single[name], rtol=5e-2, atol=1e-4, err_msg=name)
  assert (many / 'export' / 'config.json').exists()
