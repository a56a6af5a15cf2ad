"""Kill the process, start it again: the numbers of a reinforcement run do not tell that it happened.

Runs as a program too (`python tests/run/test_resume.py FOLDER STEPS`): the process that is killed.
"""
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import numpy as np
import pytest

from dcore_jax.chat.messages import Message
from dcore_jax.distill.seeds import DecisionPoint
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.engine import Engine
from dcore_jax.run import grpo_loop
from dcore_jax.run.defaults import default_config
from dcore_jax.run.metrics import Metrics, read_metrics
from dcore_jax.run.rollout_batch import Questions, encode_prompts
from dcore_jax.worlds.toolworld.tokenizer import build_tokenizer
from dcore_jax.worlds.toolworld.vocabulary import sample_texts

ROOT = pathlib.Path(__file__).parents[2]
RATES = ('seconds', 'tokens_per_second', 'tflops', 'mfu')


def train(folder: pathlib.Path, steps: int, make_engine=None, **changes):
  """Trains to `steps` steps -> (parameters, what run_rl tells)."""
  tokenizer = build_tokenizer(sample_texts(), 640)
  model = DecoderConfig(vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=16, rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=256)
  points = [DecisionPoint(str(i), 'single', (Message('user', f'find the order of Karo {i}'),), f"[find_order(customer='K{i}')]")
            for i in range(8)]
  config = default_config().rl
  config.update(dict(steps=steps, prompts=2, group=4, wave=1, updates=2, learning_rate=1e-2, alpha=0.4, max_tokens=12, capacity=128,
                     rows=2, checkpoint_every=2, validation=0) | changes)
  engine = lambda params: Engine(params, model, stop_ids=[tokenizer.eos_token_id], lanes=8, max_len=96)
  source = Questions(tokenizer, encode_prompts(tokenizer, points, 64)[0], config.reward)
  with Metrics(folder) as metrics:
    return grpo_loop.run_rl(decoder.init_params(model, jax.random.key(0)), model, tokenizer, source, config, metrics,
                            folder / 'checkpoints', make_engine=make_engine or engine, seed=1)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(parameters, rows) of four steps at one go."""
  folder = tmp_path_factory.mktemp('whole')
  return train(folder, 4)[0], timeless(folder)


def timeless(folder):
  return [{k: v for k, v in row.items() if not k.startswith(RATES)} for row in read_metrics(folder, 'rl')]


def same(params, folder, whole):
  jax.tree.map(np.testing.assert_array_equal, params, whole[0])
  assert timeless(folder) == whole[1]


def kill_when(folder: pathlib.Path, reached, delay: float = 0.0) -> None:
  """Starts the program on `folder` and kills it `delay` seconds after `reached()` first holds."""
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  process = subprocess.Popen([sys.executable, __file__, str(folder), '4'], env=environment, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 300
  while not reached():
    if process.poll() is not None or time.monotonic() > deadline:
      process.kill()
      raise AssertionError(f'the program ended by itself: {process.communicate()[1][-2000:]}')
    time.sleep(0.002)
  time.sleep(delay)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def test_two_steps_a_kill_and_two_more_are_four_steps(whole, tmp_path):
  """Killed as the first wave of the third step is on disk: that wave is read, the second one sampled."""
  first_wave = tmp_path / 'checkpoints' / 'rollouts' / '00000002.0000.npz'
  kill_when(tmp_path, first_wave.exists)
  params, result = train(tmp_path, 4)
  assert result['resumed_at'] in (0, 2)  # the checkpoint of step 2 was being written; usually it was complete
  same(params, tmp_path, whole)


@pytest.mark.slow
def test_kills_at_random_moments(whole, tmp_path):
  """Three processes are killed, each up to 0.3 s after its predecessor's traces have changed; a fourth one goes to the end."""
  rng = np.random.default_rng(int(time.time()))
  for _ in range(3):
    before = set(tmp_path.rglob('*'))
    delay = rng.uniform(0, 0.3)
    print(f'killed {delay:.4f} s after the first new file')
    kill_when(tmp_path, lambda before=before: set((tmp_path / 'checkpoints').rglob('*')) - before, delay)
  same(train(tmp_path, 4)[0], tmp_path, whole)


def test_steps_since_the_checkpoint_are_not_sampled_again(whole, tmp_path):
  """Of steps 2 and 3, whose updates are lost with the newest checkpoint, the journal holds all rollouts."""
  train(tmp_path, 4)
  shutil.rmtree(tmp_path / 'checkpoints' / 'state' / '4')

  class Idle(Engine):
    def stream(self, source, sampling):
      raise AssertionError('sampled again')

  made = []

  def idle(params):
    made.append(Idle(params, DecoderConfig(vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                           num_attention_heads=2, num_key_value_heads=1, head_dim=16, rope_theta=1e4,
                                           tie_word_embeddings=True, max_position_embeddings=256), stop_ids=[0], lanes=8, max_len=96))
    return made[0]

  params, result = train(tmp_path, 4, idle)
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
def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(whole, tmp_path, kind):
  train(tmp_path, 4)
  files = sorted((f for f in (tmp_path / 'checkpoints' / 'state' / '4').rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
  for file in files if kind == 'every' else files[-1:]:
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
  with pytest.warns(UserWarning, match='going back to step 2'):
    params, result = train(tmp_path, 4)
  assert result['resumed_at'] == 2
  same(params, tmp_path, whole)


if __name__ == '__main__':
  warnings.simplefilter('ignore')
  train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
