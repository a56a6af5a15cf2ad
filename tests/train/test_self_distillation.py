"""The policy as its own teacher: advantages and gradient against plain computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcore_jax.learn import advantages
from dcore_jax.learn.optimizer import init_state
from dcore_jax.models import decoder
from dcore_jax.train import learner as learner_module
from dcore_jax.train.metrics import read_metrics
from dcore_jax.train.rl_options import check_options, check_section
from dcore_jax.train.sources import Questions, encode_prompts
from tests.train.tiny_rl import (
  MODEL,
  TOKENIZER,
  make_engine,
  make_learner,
  make_sampler,
  params,
  points,
  rl_config,
  train_on,
)


def taught_config(**changes):
  return rl_config(**{'estimator': 'self_distillation', 'kl_coefficient': 0.0} | changes)


def taught_questions(config):
  prompts, _ = encode_prompts(TOKENIZER, points(), 96, config.teacher)
  return Questions(TOKENIZER, prompts, config.reward)


def plain_logp(weights, prompt, tokens):
  """One sequence through the decoder, and a softmax over the vocabulary."""
  ids = np.concatenate([prompt, tokens])[None]
  position = np.arange(ids.shape[1], dtype=np.int32)[None]
  end = np.full_like(position, ids.shape[1])
  hidden_1TD = decoder.hidden_states(weights, MODEL, jnp.asarray(ids), position, end)
  logp_TV = jax.nn.log_softmax(hidden_1TD[0] @ decoder.head_matrix(weights).T)
  return logp_TV[len(prompt) - 1 + np.arange(len(tokens)), tokens]


def test_advantages_and_gradient_are_those_of_a_plain_computation(monkeypatch):
  config = taught_config(updates=1)
  source = taught_questions(config)
  engine = make_engine(params())
  batch = make_sampler(engine, source, config).step(0).batch
  seen = []
  lay_values = learner_module.grpo.lay_values

  def spy(tree, responses, *rest):
    seen.extend(responses)
    return lay_values(tree, responses, *rest)

  monkeypatch.setattr(learner_module.grpo, 'lay_values', spy)
  learner = make_learner(engine, source, config)
  state = init_state(params(), learner.programs.tx)
  _, update = learner.update(state, None, batch)
  weights = params()
  assert len(seen) == 8
  gaps = []
  for response in seen:
    text = TOKENIZER.decode(response.teacher_prompt)
    assert 'reference answer: [find_order(customer=' in text
    assert len(response.teacher_prompt) > len(response.prompt)
    teacher = plain_logp(weights, response.teacher_prompt, response.tokens)
    student = plain_logp(weights, response.prompt, response.tokens)
    np.testing.assert_allclose(response.teacher_logp, teacher, atol=1e-5)
    np.testing.assert_allclose(response.advantage, teacher - student, atol=2e-5)
    gaps.append(np.asarray(teacher - student))
  assert np.abs(np.concatenate(gaps)).max() > 1e-3  # the reference does change what is likely

  def loss(weights):
    total = 0.0
    for response, gap in zip(seen, gaps, strict=True):
      total -= jnp.sum(gap * plain_logp(weights, response.prompt, response.tokens))
    return total / sum(map(len, gaps))

  squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss)(weights))]
  row = update.numbers(engine)
  np.testing.assert_allclose(row['grad_norm'], jnp.sqrt(sum(squares)), rtol=1e-3)
  np.testing.assert_allclose(row['teacher_kl'], -np.concatenate(gaps).mean(), atol=1e-5)


def test_the_loop_trains_towards_its_teacher(tmp_path):
  config = taught_config(steps=3)
  trained, result = train_on(tmp_path, taught_questions(config), config)
  rows = read_metrics(tmp_path, 'rl')
  assert len(rows) == 3 and all(np.isfinite(row['teacher_kl']) for row in rows)
  assert all(row['grad_norm'] > 0 and not row['skipped'] for row in rows)
  assert 'psi_grad_norm' not in rows[0]
  before = params()
  assert any(
    np.abs(a - b).max() > 0
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True)
  )
  assert result['validation']['after']


def test_the_gap_is_bounded_and_rewards_are_not_read():
  estimator = advantages.make_estimator('self_distillation', {})
  gap_PGT = np.array([[[0.5, -30.0, 7.0], [20.0, 1.0, 3.0]]], np.float32)
  mask_PGT = np.array([[[1, 1, 0], [1, 1, 1]]], np.float32)
  expected = [[[0.5, -10, 0], [10, 1, 3]]]
  for rewards in ([[1.0, 1.0]], [[-3.0, 4.0]]):
    np.testing.assert_array_equal(estimator(np.array(rewards), gap_PGT, mask_PGT), expected)
  assert advantages.uses_teacher('self_distillation') and not advantages.uses_teacher('grpo')
  assert not advantages.uses_entropy('self_distillation')


@pytest.mark.parametrize(
  ('changes', 'named'),
  [({'teacher': 'no answer'}, 'shows no {reference}'), ({'episodes': True}, 'rl.episodes')],
)
def test_what_cannot_teach(changes, named):
  with pytest.raises(ValueError, match=named):
    check_section(taught_config(**changes))


def test_prompts_with_long_references_are_dropped():
  config = taught_config()
  longest = taught_questions(config).longest_teacher_prompt
  kept, dropped = encode_prompts(TOKENIZER, points(), longest - 1, config.teacher)
  assert dropped and len(kept) + dropped == 8
  assert encode_prompts(TOKENIZER, points(), longest - 1)[1] == 0


def test_a_row_must_hold_the_teachers_sequence():
  config = taught_config()
  source = taught_questions(config)
  assert source.longest_teacher_prompt > source.longest_prompt
  config.capacity = source.longest_prompt + config.max_tokens
  with pytest.raises(ValueError, match="does not hold a teacher's prompt"):
    check_options(config, make_engine(params()), source)
