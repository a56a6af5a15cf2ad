"""Kill the process, start it again: the numbers of a reinforcement run do not tell that it
happened.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.sizes import EngineSizes
from tests.train import tiny_rl

ROOT = pathlib.Path(__file__).parents[2]


def train(folder, steps, **options):
  """As the program does."""
  return tiny_rl.train(
    folder, tiny_rl.rl_config(steps=steps, checkpoint_every=2, validation=0), **options
  )


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(parameters, rows) of four steps at one go."""
  folder = tmp_path_factory.mktemp('whole')
  return train(folder, 4)[0], tiny_rl.timeless(folder)


def same(params, folder, whole):
  jax.tree.map(np.testing.assert_array_equal, params, whole[0])
  assert tiny_rl.timeless(folder) == whole[1]


def start(folder: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-m', 'tests.train.tiny_rl', str(folder), '4'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_until(reached, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 300
  while not reached():
    if process.poll() is not None or time.monotonic() > deadline:
      process.kill()
      raise AssertionError(f'the program ended by itself: {process.communicate()[1][-2000:]}')
    time.sleep(0.002)


def kill(process: subprocess.Popen) -> int:
  """-> its exit status: -SIGKILL, or 0 where it had come to its end."""
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return process.returncode


def kill_when(folder: pathlib.Path, reached) -> None:
  """Starts the program on `folder` and kills it when `reached()` first holds."""
  process = start(folder)
  wait_until(reached, process)
  assert kill(process) == -signal.SIGKILL


def test_two_steps_a_kill_and_two_more_are_four_steps(whole, tmp_path):
  """Killed as the first wave of the third step is on disk: that wave is read, the second one
  sampled.
  """
  first_wave = tmp_path / 'checkpoints' / 'rollouts' / '00000002.0000.npz'
  kill_when(tmp_path, first_wave.exists)
  params, result = train(tmp_path, 4)
  assert result['resumed_at'] in (
    0,
    2,
  )  # the checkpoint of step 2 was being written; usually it was complete
  same(params, tmp_path, whole)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written(whole, tmp_path):
  state = tmp_path / 'checkpoints' / 'state'
  kill_when(tmp_path, lambda: any('tmp' in path.name for path in state.glob('*')))
  params, result = train(tmp_path, 4)
  assert result['resumed_at'] in (0, 2)  # the write may have ended between the look and the kill
  same(params, tmp_path, whole)


@pytest.mark.slow
def test_kills_at_random_moments(whole, tmp_path):
  """Three processes are killed, each within the time that a run takes from its first file on; a
  fourth one goes to the end.
  """

  def traces(folder):
    return set((folder / 'checkpoints').rglob('*'))

  process = start(tmp_path / 'timed')
  wait_until(lambda: traces(tmp_path / 'timed'), process)
  began = time.monotonic()
  assert process.communicate() and process.returncode == 0
  took = time.monotonic() - began
  rng = np.random.default_rng(int(time.time()))
  for _ in range(3):
    before = traces(tmp_path)
    delay = rng.uniform(0, took)
    process = start(tmp_path)
    wait_until(
      lambda before=before: (
        traces(tmp_path) != before or (tmp_path / 'checkpoints' / 'state' / '4').exists()
      ),
      process,
    )
    time.sleep(delay)
    print(f'{delay:.4f} of {took:.4f} s after the first new file: {kill(process)}')
    assert process.returncode in (0, -signal.SIGKILL)
  same(train(tmp_path, 4)[0], tmp_path, whole)


def test_steps_since_the_checkpoint_are_not_sampled_again(whole, tmp_path):
  """Of steps 2 and 3, whose updates are lost with the newest checkpoint, the journal holds all
  rollouts.
  """
  train(tmp_path, 4)
  shutil.rmtree(tmp_path / 'checkpoints' / 'state' / '4')

  class Idle(Engine):
    def stream(self, source, sampling):
      raise AssertionError('sampled again')

  def idle(params):
    return Idle(
      params,
      tiny_rl.MODEL,
      stop_ids=[tiny_rl.TOKENIZER.eos_token_id],
      sizes=EngineSizes(lanes=8, max_len=96),
    )

  params, result = train(tmp_path, 4, engine=idle)
  assert result['resumed_at'] == 2
  same(params, tmp_path, whole)


def test_a_journal_of_other_weights_or_a_damaged_one_is_not_used(whole, tmp_path):
  train(tmp_path, 2)
  journal = tmp_path / 'checkpoints' / 'rollouts'
  waves = sorted(journal.glob('*.npz'))
  assert len(waves) == 4
  shutil.copy(waves[0], journal / '00000002.0000.npz')
  (journal / '00000002.0001.npz').write_bytes(waves[1].read_bytes()[:-100])
  with pytest.warns(UserWarning, match='00000002.0001.npz cannot be read'):
    same(train(tmp_path, 4)[0], tmp_path, whole)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('kind', ['largest', 'every'])
def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
  whole, tmp_path, kind
):
  train(tmp_path, 4)
  files = sorted(
    (f for f in (tmp_path / 'checkpoints' / 'state' / '4').rglob('*') if f.is_file()),
    key=lambda f: f.stat().st_size,
  )
  for file in files if kind == 'every' else files[-1:]:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.warns(UserWarning, match='going back to step 2'):
    params, result = train(tmp_path, 4)
  assert result['resumed_at'] == 2
  same(params, tmp_path, whole)
