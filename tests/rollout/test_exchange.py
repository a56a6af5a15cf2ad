"""New weights while rollouts are in flight: each token is what the weights of its time draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.models import decoder
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from tests.rollout.tiny_model import CONFIG

LENGTH = 96
SIZES = EngineSizes(lanes=6, max_len=LENGTH, max_new=24, trunks=1, steps_per_call=2)
RULE = SamplingParams(max_tokens=20, seed=2)


@functools.cache
def params(version):
  return decoder.init_params(CONFIG, jax.random.key(version))


@functools.cache
def shared_engine():
  """One for all examples, since programs are compiled with it; every example leaves it idle."""
  return Engine(params(0), CONFIG, stop_ids=[5], sizes=SIZES)


@jax.jit
def all_logprobs(weights, tokens_T):
  T = len(tokens_T)
  hidden = decoder.hidden_states(
    weights, CONFIG, tokens_T[None], jnp.arange(T)[None], jnp.full((1, T), T)
  )[0]
  return jax.nn.log_softmax(hidden @ decoder.head_matrix(weights).T)


def table(version, tokens):
  return np.asarray(all_logprobs(params(version), np.pad(tokens, (0, LENGTH - len(tokens)))))


def prompt(length, seed):
  # Prompts of one length begin alike, so that their rollouts share pages.
  tokens = np.random.default_rng(length).integers(6, CONFIG.vocab_size, length)
  tokens[-1] = 6 + seed
  return tokens


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
  lengths=st.lists(st.sampled_from([1, 9, 40, 64, 70]), min_size=1, max_size=9),
  exchanges=st.lists(st.integers(0, 4), min_size=1, max_size=4),
  cancelled=st.integers(0, 8),
)
def test_each_token_is_drawn_from_the_weights_of_its_time(lengths, exchanges, cancelled):
  engine = shared_engine()
  engine.update(params(0))
  version = 0
  prompts = {}
  for place, length in enumerate(lengths):
    # Of two rollouts in three the prompts are equal.
    tokens = prompt(length, seed=place // 3)
    top = 0 if place % 4 == 3 else None
    prompts[engine.submit(Request(tokens, (place,), prompt_top=top), RULE)] = tokens
  seen = {handle: [] for handle in prompts}
  scores = {}
  done = {}

  def step():
    for part in engine.step():
      seen[part.handle] += [(token, version) for token in part.tokens.tolist()]
      if part.prompt is not None:
        scores[part.handle] = part.prompt.logprobs, version
      if part.completion is not None:
        done[part.handle] = part.completion

  for steps in exchanges:
    for _ in range(steps):
      step()
    if cancelled in seen and cancelled not in done:
      engine.cancel(cancelled)
      del seen[cancelled], prompts[cancelled]
    version += 1
    engine.exchange(params(version % 3))
  while engine.busy:
    step()
  assert done.keys() == prompts.keys() and engine.free == SIZES.lanes
  for handle, completion in done.items():
    tokens = np.concatenate([prompts[handle], completion.tokens])
    first = len(prompts[handle])
    assert [token for token, _ in seen[handle]] == completion.tokens.tolist()
    want = [table(v % 3, tokens)[first + i - 1, token] for i, (token, v) in enumerate(seen[handle])]
    np.testing.assert_allclose(completion.full_logprobs, want, atol=1e-5)
    if handle in scores:
      logprobs, scored = scores[handle]
      own = np.arange(1, first)
      # The scores of a prompt are all of one policy, which may be an earlier one than that of the
      # step in which they are told.
      want = [table(v % 3, tokens)[own - 1, tokens[own]] for v in range(scored + 1)]
      assert any(np.allclose(logprobs, one, atol=1e-5) for one in want)


def test_the_same_weights_change_nothing():
  """Random numbers belong to a token's place: the same weights draw what they would have."""
  engine = shared_engine()
  engine.update(params(0))
  requests = [Request(prompt(40, seed=i // 3), (i,)) for i in range(9)]
  want = engine.generate(requests, RULE)
  handles = [engine.submit(request, RULE) for request in requests]
  done = {}
  while engine.busy:
    for part in engine.step():
      if part.completion is not None:
        done[part.handle] = part.completion
    engine.exchange(params(0))
  for handle, completion in zip(handles, want, strict=True):
    np.testing.assert_array_equal(done[handle].tokens, completion.tokens)
    np.testing.assert_allclose(done[handle].logprobs, completion.logprobs, atol=1e-5)


def test_weights_that_do_not_fit_leave_everything_as_it_was():
  engine = shared_engine()
  engine.update(params(0))
  handle = engine.submit(Request(prompt(9, 0), (0,)), RULE)
  engine.step()
  with pytest.raises(ValueError, match='do not fit'):
    engine.exchange({'embed': jnp.zeros((2, 2))})
  while engine.busy:
    parts = engine.step()
  assert [part.completion is not None for part in parts if part.handle == handle] == [True]
  assert engine.free == SIZES.lanes


def test_a_stream_is_of_one_policy():
  engine = shared_engine()
  waiting = [(0, Request(prompt(9, 0), (0,))), (1, Request(prompt(9, 1), (1,)))]

  def source(free):
    return [waiting.pop(0)] if waiting else []

  for _ in engine.stream(source, RULE):
    with pytest.raises(RuntimeError, match='two policies'):
      engine.exchange(params(0))
