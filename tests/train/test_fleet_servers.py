"""Reinforcement on two of our servers, one slow and one killed: tokens, numbers, versions."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models import decoder
from dcore_jax.models.hf_checkpoint import ModelFiles, load_params, save_checkpoint
from dcore_jax.rollout import fleet as fleet_module
from dcore_jax.rollout.fleet import Fleet
from dcore_jax.rollout.fleet_endpoint import Limits
from dcore_jax.rollout.policy import find_stop_ids
from dcore_jax.train.metrics import read_metrics
from dcore_jax.train.prompt_order import PromptOrder
from tests.train import tiny_rl

ROOT = pathlib.Path(__file__).parents[2]
KEY = 'a key of this test'


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """The directory of the weights that servers are started with: others than the run's."""
  folder = tmp_path_factory.mktemp('model')
  tokenizer = folder / 'tokenizer'
  tiny_rl.TOKENIZER.save_pretrained(str(tokenizer))
  save_checkpoint(
    folder / 'model', tiny_rl.MODEL, tiny_rl.params(9), ModelFiles(tokenizer), dtype='float32'
  )
  return folder / 'model'


class Server:
  """A process; `url` is known once it is ready."""

  def __init__(self, model, weights, seconds=0.0, port=0):
    weights.mkdir(exist_ok=True)
    self.process = subprocess.Popen(
      [sys.executable, '-m', 'tests.train.fleet_server', model, str(port), weights, str(seconds)],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'FLEET_KEY': KEY},
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )

  @property
  def url(self):
    if not hasattr(self, '_url'):
      self._url = self.process.stdout.readline().strip()
      assert self._url, f'the server ended: {self.process.poll()}'
    return self._url

  @property
  def port(self):
    return int(self.url.rpartition(':')[2].partition('/')[0])

  def kill(self):
    self.process.send_signal(signal.SIGKILL)
    self.process.wait()


@pytest.fixture
def start(model):
  """A function that starts a server."""
  servers = []

  def one(weights, **options):
    servers.append(Server(model, weights, **options))
    return servers[-1]

  yield one
  for server in servers:
    server.kill()


def train(folder, model, urls, steps, **section):
  config = tiny_rl.rl_config(
    steps=steps, checkpoint_every=steps, validation=0, importance_cap=2.0, max_tokens=24
  )
  config.fleet.update({'endpoints': urls, 'dtype': 'float32', 'patience': 120.0} | section)

  def make(params):
    stop_ids = find_stop_ids(tiny_rl.MODEL, tiny_rl.TOKENIZER, model)
    return Fleet(
      params,
      tiny_rl.MODEL,
      config.fleet,
      limits=Limits(max_len=96, max_new=96, vocab=640, stop_ids=frozenset(stop_ids)),
      folder=folder / 'fleet',
      files=ModelFiles(),
      api_key=KEY,
    )

  return tiny_rl.train(folder, config, engine=make), config


@jax.jit
def all_logprobs(params, tokens_T):
  T = len(tokens_T)
  hidden = decoder.hidden_states(
    params, tiny_rl.MODEL, tokens_T[None], jnp.arange(T)[None], jnp.full((1, T), T)
  )[0]
  return jax.nn.log_softmax(hidden @ decoder.head_matrix(params).T)


def rollouts(folder, config):
  """(prompt, tokens, log-probabilities, versions) of all rollouts in the journal."""
  source = tiny_rl.questions(config)
  order = PromptOrder(items=range(8), prompts=config.prompts, seed=1)
  for path in sorted((folder / 'checkpoints' / 'rollouts').glob('*.npz')):
    with np.load(path) as file:
      ends = np.cumsum(file['lengths'])[:-1]
      parts = [np.split(file[name], ends) for name in ('tokens', 'logprobs', 'versions')]
      for (step, place, _), *values in zip(file['key_ids'].tolist(), *parts, strict=True):
        # Without held-out prompts the items are all of them, in order of kind: one kind.
        item = order.chosen(step)[place]
        yield source._prompts[item].tokens, *values


def check_versions(folder, config):
  """Each token has the log-probability of the published weights that it names."""
  weights = {}
  mixed = 0
  for prompt, tokens, logprobs, versions in rollouts(folder, config):
    text = np.concatenate([prompt, tokens])
    for version in sorted(set(versions.tolist())):
      if version not in weights:
        weights[version] = load_params(folder / 'fleet' / f'v{version:08d}')[1]
      table = np.asarray(all_logprobs(weights[version], np.pad(text, (0, 96 - len(text)))))
      own = np.flatnonzero(versions == version)
      want = table[len(prompt) + own - 1, tokens[own]]
      np.testing.assert_allclose(logprobs[own], want, atol=1e-4)
    mixed += len(set(versions.tolist())) > 1
  return mixed


@pytest.mark.slow
def test_without_staleness_servers_and_trainer_are_one_policy(model, start, tmp_path):
  server = start(tmp_path / 'fleet')
  train(tmp_path, model, [server.url], 3, staleness=0)
  rows = read_metrics(tmp_path, 'rl')
  assert [row['staleness_max'] for row in rows] == [0, 0, 0]
  # Exact ids and numbers over HTTP: what the trainer computes of them is what was drawn.
  assert max(row['logp_gap_max'] for row in rows) < 1e-4
  assert all(abs(row['importance'] - 1) < 1e-4 for row in rows)


@pytest.mark.slow
def test_one_server_is_slow_and_one_is_killed(model, start, tmp_path, monkeypatch):
  monkeypatch.setattr(fleet_module, '_KEPT', 100)
  fast = start(tmp_path / 'fleet')
  slow = start(tmp_path / 'fleet', seconds=0.2)
  urls = [fast.url, slow.url]
  steps = 8
  revived = []

  def kill_and_start_again():
    # In the middle of a step's rollouts, which are written when all are there.
    while len(read_metrics(tmp_path, 'rl')) < 2:
      time.sleep(0.02)
    fast.kill()
    while len(read_metrics(tmp_path, 'rl')) < 4:
      time.sleep(0.02)
    revived.append(start(tmp_path / 'fleet', port=fast.port))

  killer = threading.Thread(target=kill_and_start_again)
  killer.start()
  (params, _), config = train(tmp_path, model, urls, steps)
  killer.join()
  rows = read_metrics(tmp_path, 'rl')
  assert [row['step'] for row in rows] == list(range(steps))
  assert max(row['staleness_max'] for row in rows) <= 1
  assert sum(row['fleet_gone'] for row in rows) >= 1
  # Each rollout once, and none of those weights that servers were started with.
  assert sum(1 for _ in rollouts(tmp_path, config)) == steps * 8
  check_versions(tmp_path, config)
  # The journal alone gives the same run again.
  again = tmp_path / 'again'
  shutil.copytree(tmp_path / 'checkpoints' / 'rollouts', again / 'checkpoints' / 'rollouts')
  (repeated, _), _ = train(again, model, ['http://127.0.0.1:9/v1'], steps)
  jax.tree.map(np.testing.assert_array_equal, params, repeated)
  for row, other in zip(rows, read_metrics(again, 'rl'), strict=True):
    assert row['staleness'] == other['staleness'] and row['reward'] == other['reward']
