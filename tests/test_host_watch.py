"""Hosts that are lost: the watches of the others name them, and end their hosts."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from dcore_jax import host_watch
from tests.hosts import ROOT

# A host without jax. Each line of stdin is what it does next; it says what it has done.
HOST = """
import os, pathlib, signal, sys, time
from dcore_jax import host_watch

index, count, patience, folder = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
place = pathlib.Path(folder) / 'port'
server = None
if index == 0:
  server = host_watch.listen('127.0.0.1')
  place.with_suffix('.new').write_text(str(server.getsockname()[1]))
  place.with_suffix('.new').rename(place)
while not place.exists():
  time.sleep(0.01)
host_watch.start(index, count, address=('127.0.0.1', int(place.read_text())), token='secret',
                 patience=patience, server=server)
print(host_watch._Started.process.pid, flush=True)
for line in sys.stdin:
  word, _, rest = line.strip().partition(' ')
  if word == 'fail':
    host_watch.end(rest, 7)
  if word == 'done':
    host_watch.done()
    break
"""


class Host:
  def __init__(self, index, count, patience, folder):
    self.process = subprocess.Popen(
      [sys.executable, '-c', HOST, str(index), str(count), str(patience), str(folder)],
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )

  def ready(self):
    self.watch = int(self.process.stdout.readline())

  def tell(self, line):
    self.process.stdin.write(line + '\n')
    self.process.stdin.flush()

  def end(self):
    """Waits for its end -> (exit status, what it and its watch have said)."""
    # Until both have closed it; their stdin stays open, since a host waits for more.
    said = self.process.stderr.read()
    return self.process.wait(timeout=60), said


@pytest.fixture
def hosts(tmp_path):
  started = []

  def start(count, patience=60):
    started.extend(Host(index, count, patience, tmp_path) for index in range(count))
    for host in started:
      host.ready()
    return started

  yield start
  for host in started:
    host.process.kill()
    # One that a test has stopped would stay for ever.
    for number in (signal.SIGCONT, signal.SIGKILL):
      try:
        os.kill(host.watch, number)
      except ProcessLookupError:
        pass


@pytest.mark.parametrize('victim', [0, 1])
def test_a_host_that_is_killed_is_named_by_all_others(hosts, victim):
  others = hosts(3)
  lost = others.pop(victim)
  lost.process.kill()
  for other in others:
    status, said = other.end()
    assert status == -signal.SIGKILL
    assert f'host {victim} of 0..2' in said and 'has died' in said
    assert f'process {lost.process.pid}' in said


def test_a_machine_that_is_silent_is_named(hosts):
  first, second, third = hosts(3, patience=2)
  # Nothing is closed when a machine loses its power.
  os.kill(second.process.pid, signal.SIGSTOP)
  os.kill(second.watch, signal.SIGSTOP)
  for host in (first, third):
    status, said = host.end()
    assert status == -signal.SIGKILL
    assert 'host 1 of 0..2' in said and 'has not been heard of for 2 s' in said


def test_a_host_that_fails_says_why_everywhere(hosts):
  first, second = hosts(2)
  second.tell('fail error: no space left')
  status, said = second.end()
  assert status == 7 and said.count('error: no space left') == 1
  status, said = first.end()
  assert status == -signal.SIGKILL and 'host 1' in said
  assert 'has ended: error: no space left' in said


def test_a_mistake_of_all_is_said_by_each(hosts):
  both = hosts(2)
  for host in both:
    host.tell('fail error: no such field')
  for host in both:
    assert host.end() == (7, 'error: no such field\n')


def test_an_error_that_another_host_has_caused_is_not_a_hosts_own(hosts):
  first, second = hosts(2)
  second.process.kill()
  first.tell('fail error: connection reset by peer')
  status, said = first.end()
  assert status == -signal.SIGKILL and 'host 1' in said and 'has died' in said
  assert 'connection reset' not in said


def test_hosts_that_are_done_end_as_they_like(hosts):
  three = hosts(3)
  for host in three:
    host.tell('done')
  for host in three:
    assert host.end() == (0, '')


def test_a_stranger_is_not_listened_to(hosts, tmp_path):
  first, second = hosts(2)
  port = int((tmp_path / 'port').read_text())
  for said in (b'{"index": 1, "token": "guess", "lost": 1}\n', b'[1]\n', b'\xff\n'):
    with socket.create_connection(('127.0.0.1', port)) as stranger:
      stranger.sendall(said)
      stranger.settimeout(60)
      # The line is closed, and nobody is lost.
      if said.startswith(b'{'):
        assert stranger.recv(1) == b''
  for host in (first, second):
    host.tell('done')
  for host in (first, second):
    assert host.end() == (0, '')


def test_a_process_by_itself_has_no_watch_and_is_not_ended(capfd):
  host_watch.done()
  host_watch.end('error: nothing', 1)
  assert capfd.readouterr() == ('', '')
