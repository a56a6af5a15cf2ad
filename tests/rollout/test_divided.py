"""Rollouts divided among hosts: nothing is lost on the way, and what is recalled is what was made.

`tests/train/test_hosts.py` has the hosts themselves.
"""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax import distributed
from dcore_jax.rollout import divided
from dcore_jax.rollout.requests import Completion, Request
from dcore_jax.rollout.sampling import SamplingParams

SAMPLING = SamplingParams(max_tokens=4)


def completion(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 50, rng.integers(0, 5)).astype(np.int32)
  numbers = rng.normal(size=(3, len(tokens))).astype(np.float32)
  return Completion(tokens, *numbers, bool(rng.integers(2)), None, int(rng.integers(1, 9)))


def assert_same(one, other):
  for name, value in vars(one).items():
    np.testing.assert_array_equal(getattr(other, name), value, strict=not np.isscalar(value))


class Engine:
  """Answers in the reverse order, by the key of the request."""

  lanes = 3
  max_len = 96

  def __init__(self):
    self.asked = []

  def stream(self, source, sampling):
    while arrivals := source(self.lanes):
      for tag, request in reversed(arrivals):
        self.asked.append(request.key_id)
        yield tag, completion(sum(request.key_id))


def requests(count):
  return [Request(np.array([1]), (7, number)) for number in range(count)]


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=20))
def test_completions_come_back_bit_for_bit(seeds):
  made = {(5, seed): completion(seed) for seed in seeds}
  back = divided.completions(divided.columns(made))
  assert back.keys() == made.keys()
  for key, value in made.items():
    assert_same(value, back[key])


@given(count=st.integers(0, 40), hosts=st.integers(1, 9))
def test_each_rollout_is_some_hosts(count, hosts):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'process_count', lambda: hosts)
    found = []
    for host in range(hosts):
      patch.setattr(jax, 'process_index', lambda host=host: host)
      share = distributed.share(count)
      assert count // hosts <= len(share) <= -(-count // hosts)
      found += share
  # In order, so that the rollouts of a prompt are side by side.
  assert found == list(range(count))


def test_what_is_recalled_is_what_was_recorded():
  engine = Engine()
  recorder = divided.Recorder(engine)
  first = recorder.generate(requests(8), SAMPLING)
  recalled = divided.Recalled(recorder.made, lanes=2, max_len=recorder.max_len)
  # In another order, and without the engine.
  again = recalled.generate(requests(8)[::-1], SAMPLING)
  assert len(engine.asked) == 8
  for one, other in zip(first, again[::-1], strict=True):
    assert_same(one, other)


def test_a_stream_that_is_left_early_is_not_recorded():
  recorder = divided.Recorder(Engine())
  waiting = list(enumerate(requests(3)))
  stream = recorder.stream(lambda free: [waiting.pop()] if waiting else [], SAMPLING)
  next(stream)
  stream.close()
  assert recorder.made == {}


def test_stop_strings_cannot_be_recorded():
  stops = SamplingParams(max_tokens=4, stop=('x',))
  for engine in (divided.Recorder(Engine()), divided.Recalled({}, lanes=1, max_len=9)):
    with pytest.raises(ValueError, match='stop strings'):
      engine.generate(requests(1), stops)


@pytest.mark.parametrize('count', [0, 1, 5])
def test_hosts_make_each_rollout_once(monkeypatch, count):
  """Three hosts, one after the other: each is given what the two others have sent."""
  sent = {}
  engines = [Engine() for _ in range(3)]

  def run(host, exchange):
    monkeypatch.setattr(jax, 'process_index', lambda: host)
    monkeypatch.setattr(distributed, 'gather_bytes', exchange)

    def work(engine, numbers):
      asked = [requests(count)[number] for number in numbers]
      return engine.generate(asked, SAMPLING)

    return divided.divide(engines[host], count, work)

  class Stopped(Exception):
    pass

  def send(data):
    sent[jax.process_index()] = data
    raise Stopped

  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  monkeypatch.setattr(divided, 'is_divided', lambda engine: True)
  for host in range(3):
    with pytest.raises(Stopped):
      run(host, send)
  asked = [key for engine in engines for key in engine.asked]
  assert sorted(asked) == [request.key_id for request in requests(count)]
  for engine in engines:
    engine.asked.clear()
  expected = [completion(7 + number) for number in range(count)]
  for host in range(3):
    found = run(host, lambda data: [sent[number] for number in range(3)])
    assert len(found) == count
    for one, other in zip(expected, found, strict=True):
      assert_same(one, other)
