"""Log-probabilities of prompts against full forward passes, alone and beside other rollouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models import decoder
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from tests.rollout import tiny_model

CONFIG = dataclasses.replace(tiny_model.CONFIG, max_position_embeddings=2048)
MAX_LEN = 1100


@functools.cache
def params():
  return decoder.init_params(CONFIG, jax.random.key(1))


def engine(**changes):
  sizes = EngineSizes(**{'lanes': 2, 'max_len': MAX_LEN, 'max_new': 64, **changes})
  return Engine(params(), CONFIG, stop_ids=[5], sizes=sizes)


def prompt(length, seed=0):
  return np.random.default_rng((length, seed)).integers(6, CONFIG.vocab_size, length)


def reference(tokens):
  """Log-probabilities [n - 1, V] by one full forward pass."""
  T = len(tokens)
  hidden = decoder.hidden_states(
    params(), CONFIG, jnp.asarray(tokens)[None], jnp.arange(T)[None], jnp.full((1, T), T)
  )[0]
  return np.asarray(jax.nn.log_softmax(hidden @ decoder.head_matrix(params()).T))[:-1]


RULE = SamplingParams(max_tokens=3)


def run(runner, requests, sampling=RULE):
  """(the prompt's scores, the completion) of each request."""
  handles = [runner.submit(request, sampling) for request in requests]
  scores = {}
  done = {}
  while runner.busy:
    for part in runner.step():
      if part.prompt is not None:
        assert part.handle not in scores  # they come once, and with the first progress
        scores[part.handle] = part.prompt
      if part.completion is not None:
        done[part.handle] = part.completion
  return [(scores.get(handle), done[handle]) for handle in handles]


# 600 and 1,099 tokens go through the model in pieces; the ladder ends at 1,100.
@pytest.mark.parametrize('length', [2, 64, 65, 600, 1099])
def test_scores_equal_a_full_forward_pass(length):
  tokens = prompt(length)
  [(scores, done)] = run(engine(), [Request(tokens, (0,), max_tokens=0, prompt_top=4)])
  assert len(done.tokens) == 0 and not done.finished and done.prompt_len == length
  want = reference(tokens)
  chosen = want[np.arange(length - 1), tokens[1:]]
  np.testing.assert_allclose(scores.logprobs, chosen, atol=1e-4)
  # Rounding may swap tokens that are as likely as each other.
  assert np.all(scores.ranks >= (want > chosen[:, None] + 1e-4).sum(1) + 1)
  assert np.all(scores.ranks <= (want > chosen[:, None] - 1e-4).sum(1))
  assert scores.top.token_BJ.shape == (length - 1, 4)
  np.testing.assert_allclose(scores.top.logprob_BJ, -np.sort(-want)[:, :4], atol=1e-4)


def test_a_prompt_of_one_token_has_no_scores():
  [(scores, _)] = run(engine(), [Request(prompt(1), (0,), max_tokens=0, prompt_top=0)])
  assert scores.logprobs.shape == (0,) and scores.top is None


def test_the_rule_of_sampling_does_not_change_the_scores_nor_they_what_is_sampled():
  tokens = prompt(30)
  rule = SamplingParams(temperature=0.3, top_k=2, max_tokens=20, seed=3)
  [(scores, done)] = run(engine(), [Request(tokens, (0,), prompt_top=0)], rule)
  chosen = reference(tokens)[np.arange(29), tokens[1:]]
  np.testing.assert_allclose(scores.logprobs, chosen, atol=1e-4)
  [(none, plain)] = run(engine(), [Request(tokens, (0,))], rule)
  assert none is None
  np.testing.assert_array_equal(done.tokens, plain.tokens)
  # The prompt goes through the model in other pieces, which add up in another order.
  np.testing.assert_allclose(done.logprobs, plain.logprobs, atol=1e-5)


def test_samples_of_a_prompt_share_its_scores_and_others_are_not_held_up():
  runner = engine()
  requests = [
    *[Request(prompt(20), (0, sample), prompt_top=1) for sample in range(3)],
    Request(prompt(9), (1,)),
    Request(prompt(40), (2,), max_tokens=0),
    Request(prompt(20), (3,), max_tokens=0, prompt_top=0),
  ]
  got = run(runner, requests)
  assert [scores is None for scores, _ in got] == [False, False, False, True, True, False]
  np.testing.assert_array_equal(got[0][0].logprobs, got[2][0].logprobs)
  np.testing.assert_allclose(got[5][0].logprobs, got[0][0].logprobs, atol=1e-5)
  # Once for all four samples.
  assert runner.stats.scored_tokens == 20
  assert [len(done.tokens) == 0 for _, done in got] == [False] * 4 + [True] * 2
  assert runner.free == 2


def test_what_waits_to_be_scored_can_be_cancelled():
  runner = engine()
  handle = runner.submit(Request(prompt(20), (0,), max_tokens=0, prompt_top=0), SamplingParams())
  runner.cancel(handle)
  assert not runner.busy and runner.step() == []


def test_too_many_alternatives_are_refused():
  with pytest.raises(ValueError, match='top=21'):
    engine().submit(Request(prompt(3), (0,), prompt_top=21), SamplingParams())
