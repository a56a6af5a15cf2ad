"""Training on several hosts, as processes on this one: four devices, whichever host has them."""

import json
import signal

import numpy as np
import pytest

from tests import hosts

pytestmark = pytest.mark.slow
STEPS = 4


def launch(folder, count, loop, **options):
  """Starts the loop on so many hosts."""
  asked = json.dumps({'loop': loop, 'steps': STEPS} | options)
  return [
    hosts.start(['-m', 'tests.train.hosts_program', str(folder), asked, place], devices=4 // count)
    for place in hosts.places(count)
  ]


def train(folder, count, loop, **options):
  """What each host has trained, which must be the same."""
  first, *others = [hosts.result(host) for host in launch(folder, count, loop, **options)]
  assert all(other == first for other in others)
  return first


def interrupted(folder, count, loop, die):
  """Trains until a host kills itself; returns what the others have said."""
  processes = launch(folder, count, loop, die=die)
  said = [process.communicate(timeout=600)[1] for process in processes]
  # All have ended, each by a signal: its own, its watch's, or that of jax, which ends a process
  # whose coordinator has gone.
  assert {process.returncode for process in processes} <= {-signal.SIGKILL, -signal.SIGABRT}
  del said[die[0]]
  for text in said:
    assert f'host {die[0]} of 0..{count - 1}' in text and 'has died' in text, text[-3000:]


def assert_close(found, expected):
  """All numbers of all steps to 1e-5."""
  assert len(found['rows']) == len(expected['rows'])
  for row, other in zip(found['rows'], expected['rows'], strict=True):
    assert row.keys() == other.keys()
    for name, value in other.items():
      # What is compared is how far two ways to compute a number are apart: 1e-6, and not its value.
      if isinstance(value, float) and 'gap' not in name:
        np.testing.assert_allclose(row[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
      elif not isinstance(value, float):
        assert row[name] == value, name


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """What one process trains, by loop."""
  made = {}

  def get(loop):
    if loop not in made:
      made[loop] = train(tmp_path_factory.mktemp(loop), 1, loop)
    return made[loop]

  return get


@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('loop', ['sft', 'rl'])
def test_hosts_train_what_one_process_trains(one, tmp_path, loop, count):
  assert_close(train(tmp_path, count, loop), one(loop))


@pytest.mark.parametrize(
  ('loop', 'moment'), [('sft', ['save', 2]), ('rl', ['save', 2]), ('rl', ['sample', 2])]
)
def test_a_lost_host_is_named_and_a_restart_goes_on_bit_for_bit(tmp_path, loop, moment):
  whole = train(tmp_path / 'whole', 2, loop)
  interrupted(tmp_path / 'cut', 2, loop, die=[1, *moment])
  assert train(tmp_path / 'cut', 2, loop) == whole


def test_the_first_host_is_named_as_well(tmp_path):
  interrupted(tmp_path, 2, 'sft', die=[0, 'save', 1])


@pytest.mark.parametrize('loop', ['sft', 'rl'])
def test_a_run_goes_on_with_another_number_of_hosts(one, tmp_path, loop):
  interrupted(tmp_path, 2, loop, die=[1, 'save', 1])
  interrupted(tmp_path, 4, loop, die=[3, 'save', 1])
  assert_close(train(tmp_path, 1, loop), one(loop))
