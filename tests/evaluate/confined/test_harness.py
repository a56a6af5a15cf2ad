"""What a process cannot do any more once it is confined as a harness."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
TRIES = """
import os, pathlib, socket, subprocess
from dcore_jax.evaluate.confined.harness import confine_harness
server = socket.create_server(('127.0.0.1', 0))
url = f'http://127.0.0.1:{server.getsockname()[1]}/v1'
FOLDER = os.getcwd()
CONFINE
os.chdir('/')


def write(path):
  with open(path, 'w') as file:
    file.write('x')


tries = {
  'program': lambda: subprocess.run(['true']),
  'shell': lambda: os.system('true'),
  'fork': os.fork,
  'inside': lambda: write(FOLDER + '/inside'),
  'outside': lambda: write(FOLDER + '/../outside'),
  'remove': lambda: os.remove(FOLDER + '/kept'),
  'server': lambda: socket.create_connection(server.getsockname()),
  'other': lambda: socket.create_connection(('localhost', 9)),
  'numbers': lambda: socket.socket().connect(('127.0.0.1', 9)),
  'memory': lambda: bytearray(8 << 30),
}
for name, attempt in tries.items():
  try:
    attempt()
    print(name, 'done')
  except (PermissionError, MemoryError) as error:
    print(name, type(error).__name__)
"""


@pytest.mark.parametrize(
  'confine,allowed',
  [
    ('confine_harness(memory=4 << 30)', set()),
    ('confine_harness(memory=4 << 30, writable=FOLDER)', {'inside'}),
    ('confine_harness(memory=4 << 30, addresses=[url])', {'server'}),
  ],
)
def test_a_harness_can_do_what_it_was_left_and_nothing_else(tmp_path, confine, allowed):
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'kept').write_text('x')
  done = subprocess.run(
    [sys.executable, '-c', TRIES.replace('CONFINE', confine)],
    capture_output=True,
    text=True,
    cwd=folder,
    env={'PYTHONPATH': str(ROOT)},
  )
  found = dict(line.split() for line in done.stdout.splitlines())
  refused = dict.fromkeys(found, 'PermissionError') | {'memory': 'MemoryError'}
  assert len(found) == 10, done.stderr
  assert found == refused | dict.fromkeys(allowed, 'done')
  assert (folder / 'inside').exists() == ('inside' in allowed)
  assert not (tmp_path / 'outside').exists() and (folder / 'kept').exists()
