"""A fleet of fake servers: each request has one answer, whatever becomes of the servers."""

import contextlib
import dataclasses
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.config import FleetSection
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import ModelFiles
from dcore_jax.rollout.fleet import Fleet
from dcore_jax.rollout.fleet_endpoint import Limits, read_answer, request_seed
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from tests.rollout.fake_fleet import LOGPROB, STOP, VOCAB, FakeServer, draw
from tests.waiting import until

CONFIG = DecoderConfig(
  vocab_size=VOCAB,
  hidden_size=8,
  intermediate_size=8,
  num_hidden_layers=1,
  num_attention_heads=1,
  num_key_value_heads=1,
  head_dim=8,
  max_position_embeddings=96,
)
LIMITS = Limits(max_len=64, max_new=10, vocab=VOCAB, stop_ids=frozenset([STOP]))
RULE = SamplingParams(max_tokens=9, seed=3)


def params(seed=0):
  return decoder.init_params(CONFIG, jax.random.key(seed))


@pytest.fixture
def made(tmp_path, monkeypatch):
  """A function that starts a fleet on fake servers: (fleet, servers)."""
  monkeypatch.setattr('dcore_jax.rollout.fleet_endpoint._FIRST_LOOK', 0.05)
  with contextlib.ExitStack() as stack:

    def start(count=2, servers=None, **section):
      servers = servers or [FakeServer(tmp_path / 'fleet') for _ in range(count)]
      for server in servers:
        stack.callback(server.close)
      fleet = Fleet(
        params(),
        CONFIG,
        dataclasses.replace(
          FleetSection(),
          endpoints=tuple(server.url for server in servers),
          **{'dtype': 'float32', 'hedge': 0.0, 'concurrency': 4} | section,
        ),
        limits=LIMITS,
        folder=tmp_path / 'fleet',
        files=ModelFiles(),
        api_key='k',
      )
      stack.callback(fleet.close)
      return fleet, servers

    yield start


def requests(count=24):
  made = []
  for i in range(count):
    made.append(Request(np.arange(6, 10 + i // 4), (7, i // 4, i)))
  return made


def check(asked, completions, version=1):
  """Each request has what a fake draws for its prompt and its own seed."""
  assert len(asked) == len(completions)
  seeds = set()
  for request, completion in zip(asked, completions, strict=True):
    seed = request_seed(RULE, request)
    seeds.add(seed)
    want = draw(request.prompt.tolist(), seed, 9)
    assert completion.tokens.tolist() == want
    assert completion.finished == (want[-1] == STOP)
    np.testing.assert_array_equal(completion.logprobs, np.full(len(want), LOGPROB, np.float32))
    assert completion.versions.tolist() == [version] * len(want)
    assert completion.prompt_len == len(request.prompt) and np.isnan(completion.entropies).all()
  assert len(seeds) == len(asked)


def test_every_request_is_answered_by_the_published_weights(made):
  fleet, servers = made()
  fleet.publish(1)
  asked = requests()
  check(asked, fleet.serving(1).generate(asked, RULE))
  # Both have worked, and all rollouts of an item have gone to one server as far as it had room.
  assert all(server.asked and server.taken == [1] for server in servers)
  assert fleet.counts.answered == len(asked) and not fleet.counts.failed
  for server in servers:
    jax.tree.map(np.testing.assert_array_equal, server.last_params, params())


def test_a_request_waits_for_weights_that_are_new_enough(made, tmp_path):
  fleet, servers = made()
  fleet.publish(1)
  until(lambda: fleet.alive == 2)
  waiting = requests(4)
  done = []
  thread = threading.Thread(target=lambda: done.extend(fleet.serving(3).generate(waiting, RULE)))
  thread.start()
  # Older weights may still answer what is not so particular.
  check(waiting, fleet.serving(1).generate(waiting, RULE))
  assert not done and all(version == 1 for server in servers for *_, version in server.asked)
  fleet.update(params(1))
  fleet.publish(3)
  thread.join()
  check(waiting, done, version=3)
  jax.tree.map(np.testing.assert_array_equal, servers[0].last_params, params(1))
  fleet.publish(4)
  until(lambda: all(4 in server.taken for server in servers))
  assert sorted(path.name for path in (tmp_path / 'fleet').iterdir()) == ['v00000003', 'v00000004']


def test_a_killed_server_is_replaced_and_comes_back(made, tmp_path):
  fleet, servers = made()
  fleet.publish(1)
  until(lambda: fleet.alive == 2)
  for server in servers:
    server.gate.clear()
  asked = requests()
  stream = fleet.serving(1).stream(_source(asked), RULE)
  done = {}
  thread = threading.Thread(target=lambda: done.update(stream))
  thread.start()
  until(lambda: all(len(server.asked) == 4 for server in servers))
  servers[0].answer = lambda body: (500, b'')
  servers[0].close()
  servers[1].gate.set()
  thread.join()
  check(asked, [done[i] for i in range(len(asked))])
  assert fleet.counts.gone == 1 and fleet.alive == 1
  back = FakeServer(tmp_path / 'fleet', port=servers[0].port)
  try:
    until(lambda: fleet.alive == 2)
    check(asked, fleet.serving(1).generate(asked, RULE))
    # It had the weights before it was asked for the first time.
    assert back.asked and {version for *_, version in back.asked} == {1}
  finally:
    back.close()


def test_what_a_slow_server_owes_is_asked_of_another_one(made):
  fleet, servers = made(hedge=1.0)
  fleet.publish(1)
  until(lambda: fleet.alive == 2)
  servers[0].gate.clear()
  asked = requests()
  check(asked, fleet.serving(1).generate(asked, RULE))
  assert fleet.counts.hedged == len(servers[0].asked) == 4 and not fleet.counts.failed
  assert servers[0].answers == 0
  # Its places are free again, although it has never answered.
  servers[0].gate.set()
  check(asked, fleet.serving(1).generate(asked, RULE))


def test_a_server_that_was_started_anew_behind_our_back_is_found_out(made):
  fleet, servers = made()
  fleet.publish(2)
  until(lambda: fleet.alive == 2)
  servers[0].version = 0  # as it starts
  asked = requests()
  check(asked, fleet.serving(2).generate(asked, RULE), version=2)
  assert 1 <= fleet.counts.stale <= 4
  until(lambda: servers[0].taken == [2, 2])


def test_a_server_that_does_not_tell_versions_has_what_it_was_given(made, tmp_path):
  silent = FakeServer(tmp_path / 'fleet', tells_versions=False)
  fleet, _ = made(servers=[silent])
  fleet.publish(6)
  asked = requests(3)
  check(asked, fleet.serving(6).generate(asked, RULE), version=6)


def test_a_busy_server_is_asked_again(made):
  fleet, (server,) = made(count=1)
  fleet.publish(1)
  honest = server.answer

  def answer(body):
    if server.answers % 3 == 1:
      return 429, {'error': {'message': 'no room'}}
    return honest(body)

  server.answer = answer
  asked = requests(6)
  check(asked, fleet.serving(1).generate(asked, RULE))
  assert not fleet.counts.failed


def test_a_server_that_is_not_ours_is_restarted_with_the_weights(made, tmp_path):
  other = FakeServer(None, tells_versions=False)
  program = 'import sys; open(sys.argv[1], "w").write(" ".join(sys.argv[2:]))'
  said = tmp_path / 'said'
  command = f"{sys.executable} -c '{program}' {said} {{version}} {{path}} {{endpoint}}"
  fleet, _ = made(servers=[other], restart=command)
  fleet.publish(3)
  asked = requests(5)
  check(asked, fleet.serving(3).generate(asked, RULE), version=3)
  folder = tmp_path / 'fleet' / 'v00000003'
  assert said.read_text() == f'3 {folder} {other.url}' and (folder / 'config.json').exists()


@pytest.mark.parametrize(
  'section, words',
  [
    ({'restart': f'{sys.executable} -c "raise SystemExit(3)"'}, 'restart ended with status 3'),
    ({'restart': '/absent/program'}, 'FileNotFoundError'),
    ({'model': 'other'}, r"has no model 'other', but \['m'\]"),
  ],
  ids=str,
)
def test_why_no_server_can_be_asked_is_said(made, section, words):
  fleet, _ = made(count=1, patience=0.5, **section)
  fleet.publish(1)
  with pytest.raises(ConnectionError, match=f'no server of rl.fleet .*{words}'):
    fleet.serving(1).generate(requests(2), RULE)


def lying(change):
  def answer(body, honest):
    status, record = honest(body)
    change(record['choices'][0], record)
    return status, record

  return answer


LIES = {
  'no ids': (lying(lambda choice, _: choice.pop('token_ids')), 'return_token_ids'),
  'another prompt': (
    lying(lambda choice, _: choice.update(prompt_token_ids=[1])),
    'another prompt',
  ),
  'html': (lambda body, honest: (200, b'<html>'), 'something else'),
  'no choices': (lying(lambda _, record: record.update(choices=[])), 'something else'),
  'ids': (lying(lambda choice, _: choice.update(token_ids=[VOCAB])), 'vocabulary'),
  'too many': (lying(lambda choice, _: choice.update(token_ids=[6] * 10)), '10 tokens of 9'),
  'aborted': (lying(lambda choice, _: choice.update(finish_reason='abort')), "'abort'"),
  'refused': (lambda body, honest: (400, {'error': {'message': 'too long'}}), 'too long'),
  'locked out': (lambda body, honest: (401, {'error': {'message': 'no key'}}), 'no key'),
}


@pytest.mark.parametrize('name', LIES)
def test_what_cannot_have_been_sampled_is_not_taken(made, name):
  lie, words = LIES[name]
  fleet, servers = made()
  fleet.publish(1)
  until(lambda: fleet.alive == 2)
  honest = servers[0].answer
  servers[0].answer = lambda body: lie(body, honest)
  asked = requests()
  check(asked, fleet.serving(1).generate(asked, RULE))
  assert fleet.counts.failed >= 1 and words in fleet.reasons[servers[0].url]


def test_a_request_that_no_server_answers_ends_the_stream(made):
  fleet, servers = made()
  fleet.publish(1)
  for server in servers:
    server.answer = lambda body: (400, {'error': {'message': 'too long'}})
  with pytest.raises(ConnectionError, match='failed 16 times, at last at .*too long'):
    fleet.serving(1).generate(requests(1), RULE)


def test_a_fleet_that_is_closed_ends_its_streams(made):
  fleet, servers = made()
  fleet.publish(1)
  for server in servers:
    server.gate.clear()
  failed = []

  def run():
    with pytest.raises(ConnectionError, match='closed') as error:
      fleet.serving(1).generate(requests(), RULE)
    failed.append(error)

  thread = threading.Thread(target=run)
  thread.start()
  until(lambda: all(server.asked for server in servers))
  fleet.close()
  thread.join()
  assert failed


def test_weights_that_cannot_be_written_end_the_stream(made, tmp_path):
  fleet, _ = made()
  (tmp_path / 'fleet').write_text('a file')
  fleet.publish(1)
  with pytest.raises(OSError, match='fleet'):
    fleet.serving(1).generate(requests(1), RULE)


def answer_of(**changes):
  choice = {
    'token_ids': [6, 7, STOP],
    'prompt_token_ids': [6, 8],
    'weight_versions': [2, 2, 3],
    'finish_reason': 'stop',
    'logprobs': SimpleNamespace(token_logprobs=[-0.5, -0.25, 0.0]),
  }
  return SimpleNamespace(choices=[SimpleNamespace(**choice | changes)])


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
  name=st.sampled_from(['token_ids', 'weight_versions', 'finish_reason', 'prompt_token_ids']),
  value=JSON | st.lists(JSON | st.integers(0, VOCAB), max_size=5),
  logprobs=st.none() | st.lists(JSON, max_size=5),
)
def test_an_answer_is_taken_whole_or_refused(name, value, logprobs):
  changes = {name: value}
  if logprobs is not None:
    changes['logprobs'] = SimpleNamespace(token_logprobs=logprobs)
  try:
    completion = read_answer(answer_of(**changes), [6, 8], 9, LIMITS, 1)
  except (ValueError, TypeError, AttributeError, IndexError):
    return
  count = len(completion.tokens)
  assert 1 <= count <= 9
  assert len(completion.logprobs) == len(completion.versions) == len(completion.entropies) == count
  assert (completion.tokens >= 0).all() and (completion.tokens < VOCAB).all()
  assert np.isfinite(completion.logprobs).all() and (completion.logprobs <= 1e-3).all()


def test_an_answer_is_read_token_by_token():
  completion = read_answer(answer_of(), [6, 8], 9, LIMITS, 1)
  assert completion.tokens.tolist() == [6, 7, STOP] and completion.finished
  assert completion.versions.tolist() == [2, 2, 3]
  np.testing.assert_array_equal(completion.full_logprobs, np.float32([-0.5, -0.25, 0.0]))


def _source(asked):
  waiting = list(enumerate(asked))

  def source(free):
    taken = waiting[:free]
    del waiting[:free]
    return taken

  return source
