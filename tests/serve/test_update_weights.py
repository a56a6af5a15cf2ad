"""POST /update_weights: what is taken, from whom, and what answers say afterwards."""

import dataclasses
import json
import threading
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models import decoder
from dcore_jax.models.hf_checkpoint import ModelFiles, load_params, save_checkpoint
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import check_weights, load_model
from tests.serve.servers import running
from tests.train import tiny_rl
from tests.waiting import until

KEY = 'a secret'


def post(url, body, key=KEY, path='/update_weights'):
  """-> (status, record)."""
  headers = {'Content-Type': 'application/json'}
  if key:
    headers['Authorization'] = f'Bearer {key}'
  request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
  try:
    with urllib.request.urlopen(request, timeout=300) as answer:
      return answer.status, json.load(answer)
  except urllib.error.HTTPError as error:
    return error.code, json.load(error)


def message(answer):
  return answer[0], answer[1]['error']['message']


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A directory with weights of a tiny model as 'first', others as 'next', and what is refused."""
  root = tmp_path_factory.mktemp('weights')
  tokenizer = tmp_path_factory.mktemp('tokenizer')
  tiny_rl.TOKENIZER.save_pretrained(str(tokenizer))
  files = ModelFiles(tokenizer)
  for name, seed in (('first', 0), ('next', 1)):
    save_checkpoint(root / name, tiny_rl.MODEL, tiny_rl.params(seed), files, dtype='float32')
  said = (root / 'next' / 'config.json').read_text()
  for name in ('broken', 'other', 'pickled'):
    (root / name).mkdir()
    (root / name / 'config.json').write_text(said)
  (root / 'broken' / 'model.safetensors').write_bytes(b'\x08' + bytes(7) + b'{"a": 1}')
  (root / 'pickled' / 'pytorch_model.bin').write_bytes(b'\x80\x04.')
  changed = dataclasses.replace(tiny_rl.MODEL, rope_theta=12345.0).to_hf()
  (root / 'other' / 'config.json').write_text(json.dumps(changed))
  (root / 'outside').symlink_to(ORGANISM)
  return root


@pytest.fixture(scope='module')
def server(weights):
  model = load_model(str(weights / 'first'), lanes=4, max_len=192, max_new=64, steps_per_call=4)
  limits = Limits(64, weights=weights)
  service = Service(Scheduler(model.engine, 32), model.tokenizer, 'tiny', limits, KEY)
  with running(service) as (url, _):
    yield url, service


def complete(url, prompt, **fields):
  status, answer = post(
    url,
    {'model': 'tiny', 'prompt': prompt, 'logprobs': 0, 'return_token_ids': True, **fields},
    path='/v1/completions',
  )
  assert status == 200, answer
  return answer['choices'][0]


@jax.jit
def all_logprobs(params, tokens_T, temperature):
  """The log-probabilities of all tokens behind each, by one forward pass."""
  T = len(tokens_T)
  hidden = decoder.hidden_states(
    params, tiny_rl.MODEL, tokens_T[None], jnp.arange(T)[None], jnp.full((1, T), T)
  )[0]
  return jax.nn.log_softmax(hidden @ decoder.head_matrix(params).T / temperature)


def check(choice, prompt, folders, temperature=1.0):
  """Each token has the log-probability of the version that it names."""
  tokens = [*prompt, *choice['token_ids']]
  versions = np.array(choice['weight_versions'])
  for version in set(versions.tolist()):
    params = load_params(folders[version])[1]
    padded = np.pad(tokens, (0, 192 - len(tokens)))
    table = np.asarray(all_logprobs(params, padded, temperature))
    own = np.flatnonzero(versions == version)
    want = table[len(prompt) + own - 1, np.array(choice['token_ids'])[own]]
    got = np.array(choice['logprobs']['token_logprobs'])[own]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_server_takes_up_a_checkpoint(server, weights):
  url, _ = server
  prompt = list(range(20, 60))
  before = complete(url, prompt, max_tokens=8, seed=1)
  check(before, prompt, {0: weights / 'first'})
  status, answer = post(url, {'path': 'next', 'version': 5})
  assert status == 200 and answer['version'] == 5
  with urllib.request.urlopen(url + '/health') as health:
    assert json.load(health) == {'status': 'ok', 'weights_version': 5}
  # The same prompt, whose keys and values the old weights have left in the cache.
  after = complete(url, prompt, max_tokens=8, seed=1)
  check(after, prompt, {5: weights / 'next'})
  # An absolute path below the directory is as good, and versions go on by themselves.
  assert post(url, {'path': str(weights / 'first')})[1]['version'] == 6
  assert complete(url, prompt, max_tokens=8, seed=1)['token_ids'] == before['token_ids']


def test_answers_under_way_go_on_under_the_new_weights(server, weights):
  url, service = server
  prompt = list(range(30, 90))
  choices = {}

  def ask(seed):
    choices[seed] = complete(url, prompt, max_tokens=60, seed=seed, temperature=1.5)

  post(url, {'path': 'first', 'version': 1})
  threads = [threading.Thread(target=ask, args=[seed]) for seed in range(12)]
  for thread in threads:
    thread.start()
  # Some of them run and some wait for a lane.
  until(lambda: service.scheduler.in_flight > 4 or len(choices) == 12)
  post(url, {'path': 'next', 'version': 2})
  for thread in threads:
    thread.join()
  for choice in choices.values():
    assert choice['weight_versions'] == sorted(choice['weight_versions'])
    check(choice, prompt, {1: weights / 'first', 2: weights / 'next'}, temperature=1.5)


@pytest.mark.parametrize(
  'body, status, words',
  [
    ({'path': '../x'}, 400, "there is no '../x' below the directory of weights"),
    ({'path': str(ORGANISM)}, 400, 'below the directory of weights'),
    ({'path': 'outside'}, 400, 'below the directory of weights'),
    ({'path': 'absent'}, 400, "there is no 'absent' below"),
    ({'path': 'a\0b'}, 400, 'below the directory of weights'),
    ({'path': 'next/config.json'}, 400, 'below the directory of weights'),
    ({'path': 'broken'}, 400, 'model.safetensors'),
    ({'path': 'other'}, 400, 'does not hold the model that is served'),
    ({'path': 'pickled'}, 400, 'is a pickle'),
    ({'path': 'next', 'version': -1}, 400, 'version'),
    ({'path': 'next', 'model': 'x'}, 400, 'model'),
    ({}, 400, 'path'),
  ],
  ids=str,
)
def test_what_is_no_checkpoint_of_this_model_changes_nothing(server, body, status, words):
  url, service = server
  version = service.scheduler.version
  answer = message(post(url, body))
  assert answer[0] == status and words in answer[1]
  assert service.scheduler.version == version and service.scheduler.failure is None


@pytest.mark.parametrize('key', ['', 'another'])
def test_the_key_is_asked_for(server, key):
  url, service = server
  version = service.scheduler.version
  assert message(post(url, {'path': 'next'}, key)) == (401, 'the API key is missing or wrong')
  assert service.scheduler.version == version


def test_a_server_takes_no_weights_unless_it_was_told_to(scripted, tmp_path):
  assert message(post(scripted(api_key=KEY).url, {'path': 'x'}))[0] == 403
  # Without a key nobody may, whatever the server was told.
  assert 'asks for a key' in message(post(scripted(weights=tmp_path).url, {'path': 'x'}))[1]


def test_one_update_at_a_time(scripted, tmp_path, monkeypatch):
  (tmp_path / 'next').mkdir()
  begun, go = threading.Event(), threading.Event()

  def slow(folder, engine):
    begun.set()
    assert go.wait(60)
    return folder.name

  monkeypatch.setattr('dcore_jax.serve.weights.load_beside', slow)
  server = scripted(api_key=KEY, weights=tmp_path)
  answers = []
  thread = threading.Thread(target=lambda: answers.append(post(server.url, {'path': 'next'})))
  thread.start()
  begun.wait(60)
  assert message(post(server.url, {'path': 'next'}))[0] == 409
  # Who is served meanwhile does not wait for the weights.
  done = post(server.url, {'model': 'm', 'prompt': 'a', 'max_tokens': 2}, path='/v1/completions')
  assert done[0] == 200
  go.set()
  thread.join()
  assert answers[0][0] == 200 and server.engine.exchanged == ['next']
  assert post(server.url, {'path': 'next'})[1]['version'] == 2


def test_flags():
  check_weights('', '')
  with pytest.raises(ValueError, match='set --api_key_env'):
    check_weights('.', '')
  with pytest.raises(ValueError, match='no directory'):
    check_weights('absent', KEY)
  check_weights('.', KEY)
