"""What a sampler can get wrong that a trainer then learns; each is a defect seen elsewhere."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dcore_jax import tokentree
from dcore_jax.learn import grpo
from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from tests.rollout import tiny_model

PAD = 0
STOPS = (5, 9)
SIZES = EngineSizes(lanes=16, max_len=128, max_new=64, steps_per_call=8)
CONFIG = dataclasses.replace(tiny_model.CONFIG, vocab_size=31, max_position_embeddings=256)


@functools.cache
def params():
  return decoder.init_params(CONFIG, jax.random.key(1))


@functools.cache
def engine(rope_theta=1000.0):
  config = dataclasses.replace(CONFIG, rope_theta=rope_theta)
  return Engine(params(), config, stop_ids=STOPS, sizes=SIZES)


def groups(count=3, size=8, step=0):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 31, length) for length in (20, 37, 70)[:count]]
  return [
    Request(prompt, (step, p, g), 50) for p, prompt in enumerate(prompts) for g in range(size)
  ]


@pytest.mark.parametrize(
  'rule',
  [dict(), dict(temperature=0.7), dict(top_p=0.8, top_k=20), dict(temperature=1.3, min_p=0.02)],
  ids=str,
)
def test_f_g_log_probabilities_and_entropies_equal_the_trainers_for_every_token(rule):
  """(f) A sampled pad id is a token like any other, (c) the stop token is there; (g) under
  truncation the reported log-probability is that of the truncated, renormalised policy, and the
  trainer's is reported beside it."""
  sampling = SamplingParams(**rule, seed=3)
  made = groups()
  done = engine().generate(made, sampling)
  sampled = np.concatenate([completion.tokens for completion in done])
  assert (sampled == PAD).any() and np.isin(sampled, STOPS).any()
  sequences = []
  for request, completion in zip(made, done, strict=True):
    tokens = np.concatenate([request.prompt, completion.tokens]).astype(np.int32)
    weights = (np.arange(len(tokens)) >= len(request.prompt)).astype(np.float32)
    sequences.append(tokentree.TokenSequence(tokens, weights, shared=len(request.prompt)))
  tree = tokentree.pack(sequences, 2048, 1, PAD)
  score = grpo.make_score_pass(CONFIG, temperature=sampling.temperature)
  sampled = tree.gather(tree.weight > 0)
  for scores_RT, name in zip(
    grpo.score_rows(score, params(), tree, 1, 2048), ('full_logprobs', 'entropies'), strict=True
  ):
    for completion, scores, kept in zip(done, tree.gather(scores_RT), sampled, strict=True):
      np.testing.assert_allclose(getattr(completion, name), scores[kept], atol=1e-5)
  if sampling.mode == 'full':
    assert all(np.array_equal(completion.logprobs, completion.full_logprobs) for completion in done)
  else:
    assert any((completion.logprobs > completion.full_logprobs + 1e-3).any() for completion in done)


def test_a_rope_theta_reaches_decoding(tmp_path):
  """Greedy tokens equal transformers' under another base too, prefilled alone or as a group."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  for theta in (1000.0, 5e6):
    runner = engine(theta)
    hf_checkpoint.save_checkpoint(tmp_path / str(theta), runner.config, params(), dtype='float32')
    model = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / str(theta), dtype=torch.float32
    ).eval()
    made = groups(size=3)
    for request, completion in zip(made, runner.generate(made, SamplingParams(0)), strict=True):
      ids = torch.tensor(request.prompt)[None]
      want = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=50,
        eos_token_id=list(STOPS),
        pad_token_id=PAD,
      )
      assert completion.tokens.tolist() == want[0, len(request.prompt) :].tolist()


def test_b_the_noise_of_two_steps_differs_and_that_of_one_does_not():
  sampling = SamplingParams(seed=1)
  first, second, again = (engine().generate(groups(step=step), sampling) for step in (0, 1, 0))
  assert [a.tokens.tolist() for a in first] == [a.tokens.tolist() for a in again]
  assert (
    np.mean([a.tokens.tolist() == b.tokens.tolist() for a, b in zip(first, second, strict=True)])
    < 0.2
  )


def test_c_the_stop_token_is_kept_with_its_log_probability():
  done = engine().generate(groups(), SamplingParams())
  ended = [completion for completion in done if completion.finished]
  assert ended and all(completion.tokens[-1] in STOPS for completion in ended)
  assert {int(completion.tokens[-1]) for completion in ended} == set(STOPS)
  assert all(
    len(completion.tokens)
    == len(completion.logprobs)
    == len(completion.full_logprobs)
    == len(completion.entropies)
    for completion in done
  )


def test_d_temperature_alone_samples():
  done = engine().generate(groups(count=1), SamplingParams(temperature=1.0))
  assert len({completion.tokens.tobytes() for completion in done}) == 8


def test_j_each_prompt_of_a_group_is_prefilled_once():
  before = engine().stats.prefill_tokens
  engine().generate(groups(), SamplingParams())
  # But for the last token of each, which is drawn from.
  assert engine().stats.prefill_tokens - before == 19 + 36 + 69


def test_i_an_engine_stops_at_its_own_tokens():
  """Two of the same shapes in turn: nothing of the first is compiled into the second."""
  other = Engine(params(), CONFIG, stop_ids=(7,), sizes=SIZES)
  for runner, stops in ((engine(), STOPS), (other, (7,)), (engine(), STOPS)):
    done = [
      completion.tokens
      for completion in runner.generate(groups(), SamplingParams())
      if completion.finished
    ]
    assert done and all(
      tokens[-1] in stops and not np.isin(tokens[:-1], stops).any() for tokens in done
    )
