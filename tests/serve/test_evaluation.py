"""A model measured on the engine, through the local backend, and at an endpoint: one model, the
same figures.
"""

import json

import pytest

from configs import nano
from dcore_jax.evaluate.held_out import evaluate, evaluate_backend
from dcore_jax.rollout.endpoint import EndpointLimits, OpenAIBackend
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.run.config import read_config
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import load_model
from dcore_jax.worlds.rollouts import act
from tests.serve.servers import engine_like, running


@pytest.fixture(scope='module')
def config():
  config = nano.get_config()
  config.evaluate.update(dict(tasks=2, temperature=0.0, max_tokens=64))
  return read_config(config)


@pytest.fixture(scope='module')
def organism():
  """With room for whole conversations: a server refuses what an engine would cut."""
  return load_model('', lanes=4, max_len=512, max_new=64, steps_per_call=8)


@pytest.fixture(scope='module')
def url(organism):
  service = Service(
    Scheduler(engine_like(organism.engine), 32), organism.tokenizer, 'organism', Limits(64)
  )
  with running(service) as (url, _):
    yield f'{url}/v1'


def tasks_of(folder):
  return [json.loads(line) for line in (folder / 'trajectories.jsonl').read_text().splitlines()]


def test_engine_backend_and_endpoint_give_the_same_figures(config, url, organism, tmp_path):
  tokenizer = organism.tokenizer
  engine = engine_like(organism.engine)
  figures = evaluate(
    config,
    tmp_path / 'engine',
    lambda world, tasks, sampling, told: act(engine, tokenizer, world, tasks, sampling, told),
    'organism',
  )
  assert (
    sum(figures['n'].values()) == 10
    and 0 < figures['unfinished']['parallel']
    and figures['accuracy']['single'] > 0.5
  )
  local = LocalBackend(engine_like(organism.engine), tokenizer, model='organism')
  remote = OpenAIBackend(
    url,
    'organism',
    limits=EndpointLimits(concurrency=4),
    journal=tmp_path / 'endpoint' / 'replies.jsonl',
  )
  for place, backend in (('local', local), ('endpoint', remote)):
    found = evaluate_backend(config, tmp_path / place, backend, tokenizer)
    assert {name: found[name] for name in figures} == figures and found['model'] == 'organism'
    assert tasks_of(tmp_path / place) == tasks_of(tmp_path / 'engine')
    assert found['usage']['requests'] == backend.usage.requests > 10


def test_what_an_endpoint_answered_is_not_asked_again(config, url, organism, tmp_path):
  first, again = (
    evaluate_backend(
      config,
      tmp_path,
      OpenAIBackend(
        base, 'organism', limits=EndpointLimits(retries=0), journal=tmp_path / 'replies.jsonl'
      ),
      organism.tokenizer,
    )
    for base in (url, 'http://127.0.0.1:9/v1')
  )
  assert (
    again['usage']['requests'] == 0 and again['usage']['from_journal'] == first['usage']['requests']
  )
  assert again['accuracy'] == first['accuracy']
