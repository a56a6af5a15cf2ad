"""How a server starts: it says that it is ready when nothing has to be compiled any more."""

import collections
import dataclasses
import json
import threading
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import openai
import pytest

from dcore_jax.models import decoder
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler, Stopped
from dcore_jax.serve.server import Server, process_seconds
from tests.serve.servers import ScriptedEngine, running
from tests.waiting import until


def read(url):
  try:
    with urllib.request.urlopen(url) as answer:
      return answer.status, answer.headers, answer.read().decode()
  except urllib.error.HTTPError as error:
    return error.code, error.headers, error.read().decode()


@pytest.fixture
def starting(tokenizer):
  """(URL, engine, service, uvicorn server) whose engine still compiles."""
  engine = ScriptedEngine([*tokenizer('find the order')['input_ids'], tokenizer.eos_token_id])
  engine.compiled.clear()
  service = Service(Scheduler(engine, 2), tokenizer, 'm', Limits(64))
  with running(service, ready=False) as (url, server):
    until(lambda: service.scheduler.programs == (1, 2))
    yield url, engine, service, server
    engine.compiled.set()


def test_health_tells_how_far_the_start_is(starting):
  url, engine, service, _ = starting
  status, headers, body = read(f'{url}/health')
  assert status == 503 and headers['retry-after'] == '1'
  assert json.loads(body) == {
    'status': 'starting',
    'programs': {'ready': 1, 'total': 2},
    'share': 0.5,
  }
  assert 'dcore_engine_ready 0.0' in read(f'{url}/metrics')[2]
  engine.compiled.set()
  until(lambda: service.scheduler.ready)
  assert read(f'{url}/health')[::2] == (200, '{"status":"ok","weights_version":0}')
  assert 'dcore_engine_ready 1.0' in read(f'{url}/metrics')[2]


def test_requests_wait_for_the_start(starting):
  url, engine, service, _ = starting
  answers = []

  def ask():
    with openai.OpenAI(base_url=f'{url}/v1', api_key='k', max_retries=0) as client:
      answers.append(client.completions.create(model='m', prompt='find', max_tokens=8))

  client = threading.Thread(target=ask)
  client.start()
  until(lambda: service.scheduler.in_flight == 1)
  # What needs no engine is answered at once.
  assert read(f'{url}/v1/models')[0] == 200
  assert not answers and not engine.prompts
  engine.compiled.set()
  client.join()
  assert answers[0].choices[0].text == 'find the order'


def test_the_address_is_announced_once_and_when_all_is_compiled(tokenizer):
  engine = ScriptedEngine([7])
  engine.compiled.clear()
  service = Service(Scheduler(engine, 2), tokenizer, 'm', Limits(64))
  told = []
  server = Server(service, '127.0.0.1', 0, 1.0, told.append)
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  until(lambda: server.started and service.scheduler.programs == (1, 2))
  time.sleep(0.3)  # three looks of the server
  assert not told
  engine.compiled.set()
  until(lambda: told)
  time.sleep(0.3)
  assert len(told) == 1 and told[0].startswith('http://127.0.0.1:')
  server.should_exit = True
  thread.join()


def test_a_server_that_is_ended_while_it_starts_compiles_no_further(starting):
  _, engine, service, server = starting
  service.draining = True
  until(lambda: server.should_exit)
  until(lambda: not service.scheduler._thread.is_alive())
  assert not engine.compiled.is_set() and not service.scheduler.ready
  assert service.scheduler.failure is None
  with pytest.raises(Stopped):
    service.scheduler.submit([], None, None)


def test_an_engine_that_cannot_be_compiled_ends_the_server(tokenizer):
  engine = ScriptedEngine([7])
  engine.broken = MemoryError('no room for the cache')
  service = Service(Scheduler(engine, 2), tokenizer, 'm', Limits(64))
  with running(service, ready=False) as (_, server):
    until(lambda: server.should_exit)
  assert service.scheduler.failure is engine.broken and not service.scheduler.ready
  told = []
  service.scheduler.wait_until_ready(lambda *programs: told.append(programs))
  assert told == [(1, 2)]


def test_seconds_of_a_process_go_on():
  first = process_seconds()
  time.sleep(0.05)
  assert 0 < first < process_seconds()


# `prepare` compiles `draw` for hidden states that are not tied to a device, as those of a pass are.
# These are cut and put together by programs of jax's own, one for each length.
def test_nothing_is_compiled_for_requests_behind_prepare(model):
  # Of its own size, so that no other test has compiled for it.
  config = dataclasses.replace(model, head_dim=24)
  params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
  engine = Engine(
    params, config, stop_ids=[1], sizes=EngineSizes(lanes=4, max_len=250, steps_per_call=4)
  )
  engine.prepare()
  compiled = collections.Counter()

  def count(name, *_, **what):
    if name == '/jax/core/compile/backend_compile_duration':
      compiled[what.get('fun_name')] += 1

  jax.monitoring.register_event_duration_secs_listener(count)
  for number in range(2):
    asked = []
    for place, length in enumerate((1, 3, 60, 130, 200, 40)):
      prompt = np.arange(2, 2 + length)
      # Also scored, greedy, truncated; more than there are lanes, and some that begin alike.
      asked.append(Request(prompt, (place,), prompt_top=[None, 2][place % 2], top=place % 2))
    rule = SamplingParams(max_tokens=20, temperature=number, top_k=5 * number, seed=number)
    engine.generate(asked, rule)
  assert not compiled
