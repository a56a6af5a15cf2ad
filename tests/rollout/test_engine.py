"""The engine against transformers' generate, against full forward passes, and against itself under
other lanes and orders."""

import collections
import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.models import decoder
from dcore_jax.rollout import tile_programs
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from tests.rollout.tiny_model import CONFIG

STOP = 5
MAX_LEN = 128
PROGRAMS = (
  tile_programs.decode,
  tile_programs.read,
  tile_programs.draw,
  tile_programs.copy_row,
)


@functools.cache
def params(seed=1):
  return decoder.init_params(CONFIG, jax.random.key(seed))


SIZES = EngineSizes(lanes=8, max_len=MAX_LEN, steps_per_call=4)


def engine(stop_ids=(STOP,), decode=None, **changes):
  sizes = dataclasses.replace(SIZES, **changes)
  return Engine(params(), CONFIG, stop_ids=stop_ids, sizes=sizes, decode=decode)


def prompt(length, seed=0):
  return np.random.default_rng((length, seed)).integers(6, CONFIG.vocab_size, length)


def requests(count=14, lengths=(1, 3, 9, 30, 63, 64, 65, 90)):
  return [
    Request(prompt(lengths[i % len(lengths)], i), (0, i), 5 + 7 * i % 30) for i in range(count)
  ]


@jax.jit
def all_logprobs(tokens_T, temperature):
  T = len(tokens_T)
  hidden = decoder.hidden_states(
    params(), CONFIG, tokens_T[None], jnp.arange(T)[None], jnp.full((1, T), T)
  )[0]
  return jax.nn.log_softmax(hidden @ decoder.head_matrix(params()).T / temperature)


def reference_logprobs(context, completion, sampling):
  """Log-probabilities of the completion by one full forward pass."""
  tokens = np.concatenate([context, completion])
  padded = np.pad(tokens, (0, MAX_LEN - len(tokens)))  # causal rows do not see what follows
  table = np.asarray(all_logprobs(padded, sampling.temperature or 1.0))
  return table[np.arange(len(context), len(tokens)) - 1, completion]


def same(left, right):
  for a, b in zip(left, right, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert (a.finished, a.prompt_len) == (b.finished, b.prompt_len)


@pytest.mark.parametrize('sampling', [SamplingParams(0), SamplingParams(0.7, seed=4)], ids=str)
def test_log_probabilities_equal_a_full_forward_pass(sampling):
  made = requests()
  done = engine().generate(made, sampling)
  for request, completion in zip(made, done, strict=True):
    assert completion.tokens.dtype == np.int32 and completion.logprobs.dtype == np.float32
    assert completion.prompt_len == len(request.prompt)
    want = reference_logprobs(request.prompt, completion.tokens, sampling)
    np.testing.assert_allclose(completion.logprobs, want, atol=1e-5)
  assert any(completion.finished for completion in done) and not all(
    completion.finished for completion in done
  )


def test_greedy_tokens_equal_transformers(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from dcore_jax.models import hf_checkpoint

  hf_checkpoint.save_checkpoint(tmp_path / 'model', CONFIG, params(), dtype='float32')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'model', dtype=torch.float32
  ).eval()
  made = [Request(prompt(length), (0,), 20) for length in (2, 17, 80)]
  for request, completion in zip(made, engine().generate(made, SamplingParams(0)), strict=True):
    ids = torch.tensor(request.prompt)[None]
    want = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=20,
      eos_token_id=STOP,
      pad_token_id=0,
    )
    assert completion.tokens.tolist() == want[0, len(request.prompt) :].tolist()


def test_a_rollout_does_not_depend_on_lanes_order_or_neighbours():
  sampling = SamplingParams(1.0, seed=7)
  made = requests(10, lengths=(1, 3, 9, 30))
  want = engine().generate(made, sampling)
  same(engine(lanes=3, steps_per_call=7).generate(made[::-1], sampling), want[::-1])
  same(engine().generate(made[4:6], sampling), want[4:6])


def test_streams_are_told_apart_by_seed_and_key():
  made = [Request(prompt(9), (0, i)) for i in range(4)]
  first, second = (
    engine().generate(made, SamplingParams(2.0, max_tokens=16, seed=seed)) for seed in (0, 1)
  )
  assert len({completion.tokens.tobytes() for completion in first + second}) == 8


def test_stop_token_is_kept_and_limits_are_respected():
  made = [Request(prompt(20, i), (i,), 1 + i) for i in range(12)]
  for request, completion in zip(made, engine().generate(made, SamplingParams(1.5)), strict=True):
    assert completion.finished == (completion.tokens[-1] == STOP)
    assert STOP not in completion.tokens[:-1]
    assert completion.finished or len(completion.tokens) == request.max_tokens
  sampling = SamplingParams(max_tokens=30)
  full = engine(stop_ids=[36]).generate(
    [Request(prompt(118), (0,)), Request(prompt(127), (1,))], sampling
  )
  assert [len(completion.tokens) for completion in full] == [10, 1]
  want = reference_logprobs(prompt(118), full[0].tokens, sampling)
  np.testing.assert_allclose(full[0].logprobs, want, atol=1e-5)


@pytest.mark.parametrize('lanes', [4, 8])
def test_a_group_is_prefilled_once(lanes):
  made = [
    Request(prompt(40, group), (group, i), 3 + 5 * i % 11) for group in range(3) for i in range(6)
  ]
  runner = engine(lanes=lanes)
  done = runner.generate(made, SamplingParams())
  # But for the last token of a prompt, which is drawn from.
  assert runner.stats.prefill_tokens == 3 * 39
  assert runner.stats.reused_tokens == 15 * 39
  for request, completion in zip(made, done, strict=True):
    want = reference_logprobs(request.prompt, completion.tokens, SamplingParams())
    np.testing.assert_allclose(completion.logprobs, want, atol=1e-5)


def test_episodes_of_several_steps():
  """Each finished step makes the next available: prompt, answer and tokens of an environment."""
  episodes = 5
  ready = collections.deque(
    ((episode, 0), Request(prompt(10, episode), (episode, 0), 6)) for episode in range(episodes)
  )
  history = {}
  asked = []

  def source(free):
    asked.append(free)
    return [ready.popleft() for _ in range(min(free, len(ready)))]

  runner = engine(lanes=4)
  contexts = {(episode, 0): prompt(10, episode) for episode in range(episodes)}
  for (episode, turn), completion in runner.stream(source, SamplingParams(seed=2)):
    history[episode, turn] = completion
    if turn < 2:
      context = np.concatenate([contexts[episode, turn], completion.tokens, prompt(4, episode)])
      contexts[episode, turn + 1] = context
      ready.append(((episode, turn + 1), Request(context, (episode, turn + 1), 6)))
  assert sorted(history) == [(episode, turn) for episode in range(episodes) for turn in range(3)]
  assert all(0 < free <= 4 for free in asked)
  for tag, completion in history.items():
    want = reference_logprobs(contexts[tag], completion.tokens, SamplingParams())
    np.testing.assert_allclose(completion.logprobs, want, atol=1e-5)


def test_new_weights_rules_and_numbers_of_alternatives_compile_nothing():
  # Without stop tokens the lengths are those asked for.
  runner = engine(max_len=72, stop_ids=[])
  made = requests(20, lengths=(1, 9, 30, 63))
  runner.prepare()
  compiled = runner.stats.compilations
  first = runner.generate(made, SamplingParams())
  cached = [function._cache_size() for function in PROGRAMS]
  runner.update(params(2))
  told = []
  runner.prepare(lambda *programs: told.append(programs))
  assert not told
  second = runner.generate(made, SamplingParams())
  assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(first, second, strict=True))
  runner.update(params())
  same(runner.generate(made, SamplingParams()), first)
  runner.generate(made, SamplingParams(0.5, seed=9))  # another temperature is not another program
  listed = [dataclasses.replace(request, top=3) for request in made]
  same(runner.generate(listed, SamplingParams()), first)
  assert runner.stats.compilations == compiled
  # Nor is there a second form of the same trace.
  assert [function._cache_size() for function in PROGRAMS] == cached


MIXED = [
  SamplingParams(0),
  SamplingParams(0.7),
  SamplingParams(1.3, seed=2),
  SamplingParams(1.0, 0.9, 7),
  SamplingParams(1.2, min_p=0.1),
  SamplingParams(1.0, stop=('a', 'bc')),
]


def run_mixed(runner, seed):
  """Groups and single prompts of many lengths; each rollout has its own rule, some alternatives."""
  rng = np.random.default_rng(seed)
  for number, count in enumerate((1, 4, 1, 3, 1, 4, 1)):
    start = prompt(int(rng.integers(1, 45)), number)
    for sample in range(count):
      request = Request(
        start,
        (seed, number, sample),
        int(rng.integers(1, 20)),
        top=int(rng.choice([0, 0, 0, 3, 20])),
      )
      runner.submit(request, MIXED[rng.integers(len(MIXED))])
  while runner.busy:
    runner.step()


def test_the_prepared_programs_serve_whatever_comes():
  # A model that no other test has, so that what is counted is compiled here.
  config = dataclasses.replace(CONFIG, intermediate_size=40)
  weights = decoder.init_params(config, jax.random.key(1))
  told = []

  def made(**changes):
    return Engine(
      weights,
      config,
      stop_ids=[STOP],
      sizes=EngineSizes(**{'max_len': 76, 'lanes': 8, 'steps_per_call': 4, **changes}),
      decode=lambda ids: ''.join(map(chr, np.array(ids) + 90)),
    )

  runner = made()
  runner.prepare(lambda ready, total: told.append((ready, total)))
  # Tiles of 1 and of 8 texts, two lengths of prompts, draws behind them, copies.
  assert runner.stats.compilations == 6
  assert told[0] == (0, 6) and told[-1] == (6, 6)
  for seed in range(3):
    run_mixed(runner, seed)
  # Other engines of the same sizes compile nothing.
  other = made(guesses=0)
  run_mixed(other, 3)
  assert runner.stats.compilations == 6 and other.stats.compilations == 0


def test_update_lets_the_old_weights_go_before_it_takes_the_new_ones():
  runner = engine()
  new = params(2)
  old = weakref.ref(runner.params['embed'])
  there = []

  class Late:
    shape = new['embed'].shape
    dtype = new['embed'].dtype
    ndim = new['embed'].ndim

    def __jax_array__(self):
      there.append(old() is not None)
      return new['embed']

  runner.update({**new, 'embed': Late()})
  assert there and not any(there)


def test_update_refuses_what_does_not_fit():
  runner = engine()
  with pytest.raises(ValueError, match='do not fit'):
    runner.update({**params(), 'final_norm': jnp.ones(7)})
  waiting = [[(0, Request(prompt(3), (0,), 9))]]
  rollouts = runner.stream(lambda free: waiting.pop() if waiting else [], SamplingParams())
  next(rollouts)
  with pytest.raises(RuntimeError, match='during a stream'):
    runner.update(params())
  with pytest.raises(RuntimeError, match='one stream'):
    runner.generate(requests(1), SamplingParams())
  rollouts.close()
  runner.update(params())
  assert len(runner.generate(requests(2), SamplingParams())) == 2


def test_stats_and_progress():
  runner = engine(lanes=4)
  told = []
  made = requests(10, lengths=(2, 3, 9, 30))
  done = runner.generate(made, SamplingParams(), progress=told.append)
  tokens = sum(len(completion.tokens) for completion in done)
  assert sum(told) == tokens == runner.stats.decoded_tokens
  assert len(told) == 10
  # Each prompt's last token is drawn from.
  stats = runner.stats
  read = sum(len(request.prompt) - 1 for request in made)
  assert stats.prefill_tokens + stats.reused_tokens == read
  wrong = stats.guessed_tokens - stats.right_guesses
  # Every other row behind a prompt gave a token.
  assert stats.rows - stats.prefill_tokens == tokens + wrong
  assert 0.3 < stats.tokens_per_row <= 1
  assert engine().generate([], SamplingParams()) == []


def test_short_prompts_share_a_pass():
  runner = engine(lanes=8, guesses=0)
  done = runner.generate(requests(7, lengths=(9,)), SamplingParams())
  # All prompts are read in one pass, which draws a token for each; so does every pass after it.
  longest = max(len(completion.tokens) for completion in done)
  assert runner.stats.passes == longest


@pytest.mark.parametrize(
  'request_, message',
  [
    (Request(np.zeros(0, np.int32), (0,)), 'at least one token'),
    (Request(np.zeros((2, 2), np.int32), (0,)), 'row'),
    (Request(np.zeros(3), (0,)), 'float64'),
    (Request(prompt(128), (0,)), '128 tokens.*max_len=128'),
    (Request(np.array([37]), (0,)), 'vocabulary of 37'),
    (Request(np.array([-1]), (0,)), 'vocabulary'),
    (Request(prompt(3), (0,), -1), 'max_tokens=-1'),
    (Request(prompt(3), (-1,)), 'key_id'),
  ],
)
def test_bad_requests_are_refused(request_, message):
  runner = engine()
  with pytest.raises(ValueError, match=message):
    runner.generate([request_], SamplingParams())
  assert len(runner.generate(requests(1), SamplingParams())) == 1


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'lanes': 0}, 'lanes'),
    ({'guesses': -1}, 'guesses'),
    ({'max_len': 1}, 'max_len'),
    ({'max_len': 513}, 'positions'),
    ({'stop_ids': [37]}, 'stop_ids'),
    ({'steps_per_call': 0}, 'steps_per_call'),
  ],
)
def test_bad_sizes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    engine(**changes)


def test_a_source_that_returns_too_much_is_refused():
  with pytest.raises(ValueError, match='9 requests for 8'):
    list(engine().stream(lambda free: list(enumerate(requests(9))), SamplingParams()))


def test_weights_that_are_not_a_number_are_noticed():
  weights = {**params(), 'final_norm': jnp.full(32, jnp.nan)}
  broken = Engine(weights, CONFIG, stop_ids=[], sizes=SIZES)
  with pytest.raises(FloatingPointError):
    broken.generate(requests(1), SamplingParams())
