"""The organism behind a server for the whole session, and servers on a scripted engine for what is
hard to time.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import transformers

from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import load_model
from tests.serve.servers import ScriptedEngine, engine_like, running


@pytest.fixture(scope='session')
def tokenizer():
  return transformers.AutoTokenizer.from_pretrained(str(ORGANISM))


@pytest.fixture(scope='session')
def organism():
  """Small enough to be quick."""
  model = load_model('', lanes=4, max_len=192, max_new=64, steps_per_call=8)
  return dataclasses.replace(model, engine=engine_like(model.engine))


@pytest.fixture(scope='session')
def served(organism):
  """(URL, service) of the organism with its own template, whose prompts hold the tools as text."""
  service = Service(Scheduler(organism.engine, 32), organism.tokenizer, 'organism', Limits(64))
  with running(service) as (url, _):
    yield url, service


@pytest.fixture
def scripted(tokenizer):
  """A function that starts a server on a scripted engine: (URL, engine, service, its uvicorn)."""
  with contextlib.ExitStack() as stack:

    def start(
      text='find the order',
      *,
      max_waiting=2,
      drain_seconds=30.0,
      api_key='',
      lanes=2,
      max_len=256,
      max_new=64,
      **limits,
    ):
      engine = ScriptedEngine(
        [*tokenizer(text)['input_ids'], tokenizer.eos_token_id], lanes, max_len, max_new
      )
      service = Service(
        Scheduler(engine, max_waiting), tokenizer, 'm', Limits(max_new, **limits), api_key
      )
      url, server = stack.enter_context(running(service, drain_seconds))
      return SimpleNamespace(url=url, engine=engine, service=service, server=server)

    yield start
