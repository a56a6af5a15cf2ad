"""The launch files of docs/launch: they are sound, and say what the programs understand."""

import os
import pathlib
import shutil
import subprocess

import pytest
import yaml

from tests import hosts
from tests.test_documents import flags_of

LAUNCH = hosts.ROOT / 'docs' / 'launch'
SLURM = LAUNCH / 'slurm.sh'
JOBS = sorted(LAUNCH.glob('*.yaml'))


def test_every_file_is_looked_at():
  assert sorted(LAUNCH.iterdir()) == sorted([SLURM, *JOBS]) and len(JOBS) == 2


def test_the_script_is_clean():
  if not shutil.which('shellcheck'):
    pytest.skip('shellcheck is not installed')
  done = subprocess.run(['shellcheck', SLURM], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ('statuses', 'expected', 'requeued'),
  [
    ([0], 0, False),
    ([1], 1, False),
    # Lost twice, and well in the end.
    ([137, 134, 0], 0, False),
    ([137, 137, 137, 0], 137, False),
    # Its time is up, at once and after a loss.
    ([143], 0, True),
    ([137, 143], 0, True),
  ],
)
def test_what_the_script_makes_of_the_end_of_a_run(tmp_path, statuses, expected, requeued):
  commands = tmp_path / 'bin'
  commands.mkdir()
  left = tmp_path / 'left'
  left.write_text('\n'.join(map(str, statuses)) + '\n')
  srun = f'echo "$*" >> {tmp_path}/srun\nstatus=$(head -n 1 {left})\nsed -i 1d {left}\nexit $status'
  for name, lines in (('srun', srun), ('scontrol', f'echo "$*" > {tmp_path}/scontrol')):
    (commands / name).write_text(f'#!/bin/bash\n{lines}\n')
    (commands / name).chmod(0o755)
  done = subprocess.run(
    ['bash', SLURM, '--config=nano', '--workdir=a b'],
    env={
      'PATH': f'{commands}:{os.environ["PATH"]}',
      'SLURM_JOB_ID': '77',
      'SLURM_JOB_NODELIST': 'n[1-4]',
    },
    check=False,
    capture_output=True,
  )
  assert done.returncode == expected, done.stderr
  ran = (tmp_path / 'srun').read_text().splitlines()
  assert len(ran) == min(len(statuses), 3)
  assert set(ran) == {
    '--kill-on-bad-exit=0 --label dcore train --hosts=auto --config=nano --workdir=a b'
  }
  assert (tmp_path / 'scontrol').exists() == requeued
  if requeued:
    assert (tmp_path / 'scontrol').read_text() == 'requeue 77\n'


@pytest.mark.parametrize('path', JOBS, ids=lambda path: path.stem)
def test_a_job_is_whole(path):
  service, job = yaml.safe_load_all(path.read_text())
  assert (service['kind'], job['kind']) == ('Service', 'Job')
  spec = job['spec']
  pod = spec['template']['spec']
  # Each pod has a number and, by service and subdomain, a name.
  assert spec['completionMode'] == 'Indexed' and spec['completions'] == spec['parallelism']
  assert service['spec']['clusterIP'] == 'None' and pod['subdomain'] == service['metadata']['name']
  assert service['spec']['selector'].items() <= spec['template']['metadata']['labels'].items()
  assert pod['restartPolicy'] == 'Never'
  [container] = pod['containers']
  stage, *flags = container['args']
  given = dict(flag.removeprefix('--').split('=', 1) for flag in flags)
  assert stage == 'train' and given.keys() <= flags_of('train')
  assert (hosts.ROOT / 'configs' / f'{given["config"]}.py').exists()
  assert container['image'].startswith('dcore_jax:')
  mounts = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
  assert mounts.keys() == {volume['name'] for volume in pod['volumes']}
  assert pathlib.PurePath(given['workdir']).is_relative_to(mounts['runs'])
  if given['hosts'] != 'auto':
    name, count, index = given['hosts'].split(',')
    first = f'{job["metadata"]["name"]}-0.{pod["subdomain"]}'
    assert (name.split(':')[0], int(count)) == (first, spec['completions'])
    assert index == '$(JOB_COMPLETION_INDEX)'


JOINED = """
import json
from dcore_jax import distributed
distributed.join('auto')
import jax
print(json.dumps([jax.process_index(), jax.process_count(), jax.local_device_count()]))
"""


def test_auto_finds_the_hosts_of_slurm(monkeypatch):
  for name, value in {
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': '127.0.0.1',
    'SLURM_NTASKS': '2',
    'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
    'SLURM_LOCALID': '0',
    'JAX_COORDINATOR_PORT': str(hosts.free_port()),
  }.items():
    monkeypatch.setenv(name, value)
  processes = []
  for index in range(2):
    monkeypatch.setenv('SLURM_PROCID', str(index))
    processes.append(hosts.start(['-c', JOINED], devices=2))
  found = [hosts.result(process) for process in processes]
  assert found == [[0, 2, 2], [1, 2, 2]]
