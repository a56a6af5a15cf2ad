"""Requests that come and go: submit, step, cancel, trunks that conversations keep, stop strings."""

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
from tests.rollout.tiny_model import CONFIG

LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789_'


@functools.cache
def params():
  return decoder.init_params(CONFIG, jax.random.key(1))


def text(tokens):
  return ''.join(LETTERS[token] for token in tokens)


SIZES = EngineSizes(lanes=8, max_len=128, max_new=64, steps_per_call=4)


def engine(stop_ids=(5,), decode=text, **changes):
  sizes = dataclasses.replace(SIZES, **changes)
  return Engine(params(), CONFIG, stop_ids=stop_ids, sizes=sizes, decode=decode)


def prompt(length, seed=0):
  return np.random.default_rng((length, seed)).integers(6, CONFIG.vocab_size, length)


@jax.jit
def all_logprobs(tokens_T):
  T = len(tokens_T)
  hidden = decoder.hidden_states(
    params(), CONFIG, tokens_T[None], jnp.arange(T)[None], jnp.full((1, T), T)
  )[0]
  return jax.nn.log_softmax(hidden @ decoder.head_matrix(params()).T)


def exact(context, completion):
  """The reported log-probabilities are those of one full forward pass over what stood before."""
  tokens = np.concatenate([context, completion.tokens])
  table = np.asarray(all_logprobs(np.pad(tokens, (0, 128 - len(tokens)))))
  want = table[np.arange(len(context), len(tokens)) - 1, completion.tokens]
  np.testing.assert_allclose(completion.logprobs, want, atol=1e-5)
  assert completion.prompt_len == len(context)


def finish(runner, *handles):
  """Steps until these have ended -> their completions and all tokens that the steps reported."""
  done = {}
  seen = {handle: [] for handle in handles}
  for _ in range(100):
    if len(done) == len(handles):
      break
    for part in runner.step():
      seen.setdefault(part.handle, []).extend(part.tokens.tolist())
      if part.completion is not None:
        done[part.handle] = part.completion
  return [done[handle] for handle in handles], [seen[handle] for handle in handles]


def test_steps_report_what_they_draw():
  runner = engine()
  sampling = SamplingParams(max_tokens=18, seed=3)
  made = [Request(prompt(9, i), (i,)) for i in range(20)]
  assert runner.free == 8 and not runner.busy
  handles = [runner.submit(request, sampling) for request in made]
  assert runner.free == 0 and runner.busy
  done, seen = finish(runner, *handles)
  assert not runner.busy and runner.free == 8
  for completion, tokens, want in zip(done, seen, runner.generate(made, sampling), strict=True):
    assert completion.tokens.tolist() == tokens == want.tokens.tolist()
    np.testing.assert_array_equal(completion.full_logprobs, completion.logprobs)
  assert runner.step() == []


def test_cancel_frees_lanes_whatever_they_do():
  runner = engine(lanes=2, stop_ids=[])
  sampling = SamplingParams(max_tokens=20)
  handles = [runner.submit(Request(prompt(9, i), (i,)), sampling) for i in range(3)]
  runner.step()
  runner.cancel(handles[2])  # waits
  runner.cancel(handles[0])  # runs
  assert runner.free == 1
  finish(runner, handles[1])
  assert runner.free == 2 and not runner.busy
  with pytest.raises(ValueError, match='no rollout'):
    runner.cancel(handles[1])


def test_a_conversation_keeps_its_trunk():
  """A prompt replays the answer without its reasoning: only what is new in it is prefilled."""
  runner = engine()
  sampling = SamplingParams(max_tokens=12, seed=2)
  separate = engine()
  context = prompt(50)
  for turn in range(3):
    request = Request(context, (turn,))
    [completion], _ = finish(runner, runner.submit(request, sampling))
    [want] = separate.generate([request], sampling)
    assert completion.tokens.tolist() == want.tokens.tolist()
    exact(context, completion)
    context = np.concatenate([context, completion.tokens[-3:], prompt(5, turn)])
  # But for the last token of each prompt, which is drawn from. In each turn 3 tokens of the answer
  # and 5 new ones follow.
  assert runner.stats.prefill_tokens == 49 + 2 * (3 + 5 - 1)
  assert separate.stats.reused_tokens == 0


def test_prompts_with_a_long_prefix_in_common_share_its_computation():
  runner = engine()
  head = prompt(48)
  made = [Request(np.concatenate([head, [6 + i], prompt(3 + i, i)]), (i,), 8) for i in range(6)] + [
    Request(head, (9,), 8)
  ]
  for request, completion in zip(made, runner.generate(made, SamplingParams()), strict=True):
    exact(request.prompt, completion)
  # But for the last token of each prompt, which is drawn from. The second to the last one wait for
  # the first one's prefix.
  assert runner.stats.prefill_tokens == 48 + sum(3 + i for i in range(6))


def test_few_trunks_serve_many_prompts_and_long_prompts_go_in_pieces():
  runner = engine(trunks=2, max_new=24)
  made = [
    Request(prompt(70 + group, group), (group, i), 40) for group in range(4) for i in range(3)
  ]
  for request, completion in zip(made, runner.generate(made, SamplingParams()), strict=True):
    exact(request.prompt, completion)
    assert len(completion.tokens) <= 24
  assert runner.stats.prefill_tokens == sum(69 + group for group in range(4))


def test_weights_change_only_when_nothing_is_in_flight_and_trunks_go_with_them():
  runner = engine()
  handle = runner.submit(Request(prompt(9), (0,), 40), SamplingParams())
  runner.step()
  with pytest.raises(RuntimeError, match='two policies'):
    runner.update(params())
  with pytest.raises(RuntimeError, match='one stream'):
    runner.generate([], SamplingParams())
  runner.cancel(handle)
  runner.update(params())
  finish(runner, runner.submit(Request(prompt(9), (0,), 2), SamplingParams()))
  assert runner.stats.prefill_tokens == 8 + 8


def test_stop_strings_end_with_the_token_that_completes_them():
  made = [Request(prompt(9, i), (i,)) for i in range(8)]
  free = engine(stop_ids=[]).generate(made, SamplingParams(2.0, max_tokens=40))
  written = [text(completion.tokens) for completion in free]
  stops = (written[0][5:8], written[1][9:11], written[2][0])
  done = engine(stop_ids=[]).generate(made, SamplingParams(2.0, max_tokens=40, stop=stops))
  for whole, full, completion in zip(written, free, done, strict=True):
    ends = {stop: whole.index(stop) + len(stop) for stop in stops if stop in whole}
    end = min(ends.values(), default=40)
    assert text(completion.tokens) == whole[:end] and not completion.finished
    assert (
      (completion.stop in ends and ends[completion.stop] == end)
      if ends
      else completion.stop is None
    )
    # Which rows a pass has depends on who else draws; products of other shapes round otherwise.
    np.testing.assert_allclose(completion.logprobs, full.logprobs[:end], atol=1e-5)
  with pytest.raises(ValueError, match='decode'):
    engine(decode=None).submit(made[0], SamplingParams(stop=('a',)))


def test_lanes_with_different_rules_sample_side_by_side():
  rules = [
    SamplingParams(0),
    SamplingParams(0.7, seed=1),
    SamplingParams(top_p=0.8),
    SamplingParams(top_k=3, min_p=0.1),
  ]
  runner = engine()
  made = [Request(prompt(9, i), (i,), 12) for i in range(4)]
  done, _ = finish(
    runner, *(runner.submit(request, rule) for request, rule in zip(made, rules, strict=True))
  )
  for request, rule, completion in zip(made, rules, done, strict=True):
    [want] = runner.generate([request], rule)
    assert completion.tokens.tolist() == want.tokens.tolist()
    np.testing.assert_allclose(completion.logprobs, want.logprobs, atol=1e-5)
    np.testing.assert_allclose(completion.full_logprobs, want.full_logprobs, atol=1e-5)


def test_alternatives_come_where_they_are_asked_for():
  """Beside lanes that ask for none; as a full forward pass has them, and draws do not change."""
  runner = engine()
  rules = [
    SamplingParams(max_tokens=9, seed=2),
    SamplingParams(0, max_tokens=9),
    SamplingParams(0.8, 1, 3, max_tokens=9),
    SamplingParams(max_tokens=40, seed=3, stop=('k', 'm', 'z', '7')),
  ]
  made = [
    (Request(prompt(9, number), (number,), top=top), rule)
    for number, (rule, top) in enumerate((rule, top) for rule in rules for top in (5, 20, 0))
  ]
  handles = {runner.submit(request, rule): (request, rule) for request, rule in made}
  seen = {handle: [] for handle in handles}
  done = {}
  while len(done) < len(handles):
    for part in runner.step():
      seen[part.handle].append(part.top)
      if part.completion is not None:
        done[part.handle] = part.completion
  for handle, (request, rule) in handles.items():
    completion = done[handle]
    [alone] = runner.generate([Request(request.prompt, request.key_id)], rule)
    np.testing.assert_array_equal(completion.tokens, alone.tokens)
    if not request.top:
      assert seen[handle] == [None] * len(seen[handle])
      continue
    token_TK = np.concatenate([top.token_BJ for top in seen[handle]])
    logprob_TK = np.concatenate([top.logprob_BJ for top in seen[handle]])
    tokens = np.concatenate([request.prompt, completion.tokens])
    table = np.asarray(all_logprobs(np.pad(tokens, (0, 128 - len(tokens)))))[
      len(request.prompt) - 1 : len(tokens) - 1
    ]
    table = table / (rule.temperature or 1)
    order_TK = np.argsort(-table, axis=1)[:, : request.top]
    kept = (
      table
      if not rule.top_k
      else np.where(table >= np.sort(table, axis=1)[:, [-rule.top_k]], table, -np.inf)
    )
    kept = kept - np.log(np.exp(kept).sum(axis=1, keepdims=True))
    want_TK = np.take_along_axis(kept, order_TK, axis=1)
    assert token_TK.shape == (len(completion.tokens), request.top)
    np.testing.assert_allclose(logprob_TK, want_TK, atol=1e-5)
    np.testing.assert_array_equal(token_TK[want_TK > -np.inf], order_TK[want_TK > -np.inf])
  with pytest.raises(ValueError, match='top=21 alternatives; there may be 20'):
    runner.submit(Request(prompt(3), (0,), top=21), SamplingParams())
