"""The reinforcement loop on a tiny model: what is computed, what is not, how often it is compiled, and that nothing waits."""

import copy
import dataclasses
import json
import re
import threading
import types

import jax
import numpy as np
import pytest

from dcore_jax.chat.template import render_prompt
from dcore_jax.evaluate.rollouts import Exchange
from dcore_jax.learn.optimizer import init_state
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Completion
from dcore_jax.tokentree import RowBatch
from dcore_jax.train import grpo_loop
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.rollout_batch import Questions, encode_prompts
from tests.train.tiny_rl import (
  MODEL,
  TOKENIZER,
  make_engine,
  params,
  points,
  questions,
  rl_config,
  timeless,
  train,
)


def one_step(rewards_PG, **changes):
  """(state after, numbers) of the updates, by default one, on sampled rollouts whose rewards are replaced."""
  config, start = rl_config(**{'updates': 1} | changes), params()
  engine = make_engine(start)
  loop = grpo_loop.GrpoLoop(MODEL, TOKENIZER, engine, questions(config), range(8), config, seed=1)
  state = init_state(params(), loop.tx)
  batch = loop.source.judge(loop.chosen(0), loop.rollouts(0))
  batch.total_PG[:] = rewards_PG
  state, update = loop.update(state, grpo_loop.Reference(start, Execution()), batch)
  return state, update.numbers(engine)


def test_long_prompts_are_dropped_and_counted():
  lengths = [
    len(TOKENIZER(render_prompt(TOKENIZER, list(p.messages)))['input_ids']) for p in points()
  ]
  kept, dropped = encode_prompts(TOKENIZER, points(), min(lengths) - 1)
  assert (len(kept), dropped) == (0, 8)
  assert encode_prompts(TOKENIZER, points(), max(lengths))[1] == 0


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
  with Metrics(
    tmp_path / 'whole'
  ) as metrics:  # of a process that was killed before its first checkpoint
    metrics.write('rl', 0, reward=9.0)
  adaptive = dict(alpha_measure='entropy', alpha_target=9.0)
  whole, ran = train(tmp_path / 'whole', rl_config(**adaptive))
  train(tmp_path / 'parts', rl_config(steps=1, **adaptive))
  parts, result = train(tmp_path / 'parts', rl_config(**adaptive))
  assert result['resumed_at'] == 1 and result['seconds_before'] > 0
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  assert ran['validation'] == result['validation'] and ran['validation']['before']['reward'] != 0
  assert timeless(tmp_path / 'whole') == timeless(tmp_path / 'parts')
  rows = read_metrics(tmp_path / 'whole', 'validation')
  assert [row['step'] for row in rows] == [0, 1, 2]
  by_prompt, change = ran['validation']['by_prompt'], ran['validation']['difference']['reward']
  gained = np.subtract(by_prompt['after']['reward'], by_prompt['before']['reward'])
  assert change == {
    'difference': pytest.approx(gained.mean()),
    'n': 2,
    'standard_error': pytest.approx(abs(gained[0] - gained[1]) / 2),
  }
  assert change['difference'] == pytest.approx(
    ran['validation']['after']['reward'] - ran['validation']['before']['reward']
  )
  assert rows[-1]['reward_difference'] == change['difference']
  assert rows[-1]['reward_difference_error'] == change['standard_error']
  best = max(
    read_metrics(tmp_path / 'whole', 'validation'), key=lambda row: (row['reward'], row['step'])
  )
  assert ran['best_step'] == result['best_step'] == best['step'] + 1
  alphas = [row['alpha'] for row in read_metrics(tmp_path / 'parts', 'rl')]
  assert alphas[0] == 0.4 and alphas == sorted(set(alphas))  # its entropy is below the target


def test_checkpoints_of_other_prompts_or_another_reference_are_refused(tmp_path):
  train(tmp_path, rl_config(steps=1))
  with pytest.raises(ValueError, match='were made from other prompts'):
    train(tmp_path, rl_config(), count=7)
  with pytest.raises(ValueError, match='were made from other reference'):
    train(tmp_path, rl_config(), seed=5)


def test_zero_variance_groups_move_da_grpo_and_not_grpo(tmp_path):
  """An untrained model gets every reward wrong alike: GRPO's gradient vanishes, DA-GRPO's does not (paper, theorem 3.1)."""
  rows = {}
  for name, options in (('grpo', dict(estimator='grpo')), ('da_grpo', dict(estimator='da_grpo'))):
    train(tmp_path / name, rl_config(steps=1, updates=1, validation=0, **options))
    (rows[name],) = read_metrics(tmp_path / name, 'rl')
  assert rows['grpo']['zero_variance_fraction'] == rows['grpo']['all_wrong_fraction'] == 1
  assert (
    rows['grpo']['grad_norm'] < 1e-6 < 1e-3 < rows['da_grpo']['grad_norm']
  )  # what is left is rounding in the KL term
  np.testing.assert_allclose(
    rows['da_grpo']['psi_grad_norm'], rows['da_grpo']['grad_norm'], rtol=1e-4
  )
  # Float32 and the same weights: engine and trainer must agree on what was sampled.
  assert rows['da_grpo']['logp_gap_max'] < 1e-4


MIXED = np.float32([[4, 1, 1, -2], [1, 1, 1, 1]])


@pytest.mark.parametrize(('estimator', 'updates'), [('da_grpo', 1), ('da_grpo', 2), ('grpo', 1)])
def test_an_exact_engine_spares_the_score_pass(monkeypatch, estimator, updates):
  """All but the first group, for the measure; the updates have what the whole pass gives them, entropies of psi included."""
  batches, kept = [], grpo_loop.GrpoLoop._batch
  monkeypatch.setattr(
    grpo_loop.GrpoLoop,
    '_batch',
    lambda self, tree: batches.append(kept(self, tree)) or kept(self, tree),
  )
  options = dict(estimator=estimator, updates=updates)
  _, spared = one_step(MIXED, **options)
  assert spared['logp_gap_max'] < 1e-5 and spared['scored_fraction'] < 0.7
  monkeypatch.setattr(grpo_loop, '_EXACT', -1.0)
  _, numbers = one_step(MIXED, **options)
  assert numbers['scored_fraction'] == 1
  half = len(batches) // 2
  assert half >= updates and any(batch.extras['advantage'].any() for batch in batches[half:])
  for sparing, full in zip(batches[:half], batches[half:], strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), sparing, full)
  for name in ('loss', 'entropy', 'kl', 'grad_norm'):
    np.testing.assert_allclose(spared[name], numbers[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['full_logprobs', 'entropies'])
def test_an_engine_that_is_not_exact_is_found_out(monkeypatch, name):
  judge = type(questions(rl_config())).judge

  def judged(self, chosen, rollouts):  # one token of the first group is a little off
    getattr(rollouts[0].exchanges[0].completion, name)[0] += 2e-4
    return judge(self, chosen, rollouts)

  assert one_step(MIXED)[1]['scored_fraction'] < 1
  monkeypatch.setattr(type(questions(rl_config())), 'judge', judged)
  assert one_step(MIXED)[1]['scored_fraction'] == 1


def test_the_norm_of_psi_is_measured_on_the_micro_batches_that_have_any():
  """The others are left out, and the norm is divided by the loss tokens of the whole mini-batch all the same."""
  config = rl_config(updates=1)
  loop = grpo_loop.GrpoLoop(
    MODEL, TOKENIZER, make_engine(params()), questions(config), range(8), config, seed=1
  )
  weight = np.ones((4, 8), np.float32)
  weight[1, 4:] = 0
  psi = np.zeros((4, 8), np.float32)
  psi[1, 2] = psi[3, 0] = 0.1
  loop._batch = lambda tree: RowBatch(*[None] * 6, weight, {'psi': psi})
  loop._psi_norm = lambda params, batch: batch.weight.sum()
  shown = loop._psi(
    None,
    [types.SimpleNamespace(extras={'psi': psi * 0}), types.SimpleNamespace(extras={'psi': psi})],
  )
  assert shown == (4 + 8, pytest.approx(12 / 28), 1)
  assert loop._psi(None, [types.SimpleNamespace(extras={'psi': psi * 0})]) == (0, 1, 0)


def test_the_share_of_psi_is_of_the_update_that_it_is_in():
  """The first mini-batch has reward variance and no psi; in the second there is nothing else, but for rounding in the KL term."""
  _, numbers = one_step(MIXED, updates=2)
  assert 0 < numbers['psi_grad_norm'] < numbers['grad_norm'] and numbers[
    'psi_grad_share'
  ] == pytest.approx(1, rel=0.05)
  assert one_step(np.float32([[4, 1, 1, -2], [1, 2, 3, 4]]), updates=2)[1]['psi_grad_share'] == 0


def test_alpha_follows_what_was_measured_and_nothing_else():
  config = rl_config(alpha_measure='psi_share', alpha_target=0.5)
  loop = grpo_loop.GrpoLoop(
    MODEL, TOKENIZER, make_engine(params()), questions(config), range(8), config, seed=1
  )
  for share in (0.0, np.nan):  # no psi, a skipped update
    loop.adapt_alpha({'psi_grad_share': share, 'entropy': 1.0})
    assert loop.alpha == config.alpha
  loop.adapt_alpha({'psi_grad_share': 0.1, 'entropy': 1.0})
  assert loop.alpha > config.alpha


def test_every_program_is_compiled_once_though_lengths_vary(tmp_path, monkeypatch, caplog):
  lengths, update = [], grpo_loop.GrpoLoop.update

  def cut_short(self, state, reference, batch):  # a random model hardly ever stops
    rng = np.random.default_rng(len(lengths))
    for rollout in batch.rollouts:
      (prompt, whole), size = rollout.exchanges[0], rng.integers(1, 13)
      arrays = (
        each[:size] for each in (whole.tokens, whole.logprobs, whole.full_logprobs, whole.entropies)
      )
      rollout.exchanges[0] = Exchange(prompt, Completion(*arrays, True, None, whole.prompt_len))
    lengths.append(sum(len(rollout.exchanges[0].completion.tokens) for rollout in batch.rollouts))
    return update(self, state, reference, batch)

  monkeypatch.setattr(grpo_loop.GrpoLoop, 'update', cut_short)

  def seen(x):
    return x + 1

  with jax.log_compiles():
    jax.jit(seen)(1.0)  # what follows would hold of any log in which compilations have another form
    train(tmp_path, rl_config(steps=4, validation=0, checkpoint_every=4))
  assert len(set(lengths)) > 2
  compiled = re.findall(r'Finished XLA compilation of jit\((\w+)\)', caplog.text)
  assert compiled.count('seen') == 1
  # Not even once where another test has already compiled them.
  assert (
    max(
      compiled.count(name) for name in ('score_pass', 'grpo_step', 'psi_norm', 'turn', 'tree_sum')
    )
    <= 1
  )


def test_the_next_rollouts_do_not_wait_for_the_numbers_of_a_step(tmp_path, monkeypatch):
  """The row of a step is held back until the next rollouts have begun: a loop that waited for it first would not go on."""
  begun = threading.Event()
  numbers, rollouts = grpo_loop.Update.numbers, grpo_loop.GrpoLoop.rollouts

  def held_back(self, engine):
    assert begun.wait(timeout=60), 'the next rollouts wait for the numbers of the step before'
    return numbers(self, engine)

  def noted(self, step, turn):
    if step == 1:
      begun.set()
    return rollouts(self, step, turn)

  monkeypatch.setattr(grpo_loop.Update, 'numbers', held_back)
  monkeypatch.setattr(grpo_loop.GrpoLoop, 'rollouts', noted)
  train(tmp_path, rl_config(steps=2, validation=0, checkpoint_every=2))
  assert [row['step'] for row in read_metrics(tmp_path, 'rl')] == [0, 1]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(prompts=7), 'too few'),
    (dict(validation=9), 'rl.validation = 9'),
    (dict(updates=3), 'does not divide'),
    (dict(estimator='nope'), 'nope'),
    (dict(reward='nope'), 'nope'),
    (dict(wave=0), 'rl.wave'),
    (dict(objective='nope'), 'nope'),
    (dict(alpha_measure='nope'), 'nope'),
    (dict(estimator='grpo', psi_words=('wait',)), 'psi_words'),
    (dict(updates=0), 'rl.updates = 0'),
    (dict(group=0), 'rl.group = 0'),
    (dict(checkpoint_every=0), 'rl.checkpoint_every = 0'),
    (dict(dynamic_rounds=-1), 'rl.dynamic_rounds = -1'),
    (dict(zero_test='nope'), 'nope'),
    (dict(psi_when_wrong='nope'), 'nope'),
    (dict(alpha=-1.0), 'alpha = -1.0'),
    (dict(uniform_share=2.0), 'uniform_share'),
    (dict(overlong_buffer=13), 'buffer = 13'),
  ],
)
def test_configs_that_cannot_work(tmp_path, changes, message):
  """Before anything is sampled."""

  class Idle:
    def __init__(self, engine):
      self.params, self.max_len, self.max_new = engine.params, engine.max_len, engine.max_new

  with pytest.raises((ValueError, KeyError), match=message):
    train(tmp_path, rl_config(**changes), engine=lambda params: Idle(make_engine(params)))
  assert not list((tmp_path / 'checkpoints').rglob('[0-9]*'))


def test_options_of_the_loss_reach_the_step(tmp_path):
  """The loop brings what each option reads; the engine is exact, so that importance weights are 1."""
  options = dict(
    objective='gspo',
    aggregation='sequence',
    importance_cap=2.0,
    uniform_kl=0.1,
    psi_words=('o',),
    kl_coefficient=0.0,
  )
  train(tmp_path, rl_config(steps=1, validation=0, **options))
  (row,) = read_metrics(tmp_path, 'rl')
  np.testing.assert_allclose(row['importance'], 1, atol=1e-4)
  assert row['uniform_kl'] > 0 and row['psi_grad_norm'] > 0 and 'kl' not in row


def test_kl_cov_holds_nothing_back_in_the_first_update():
  """It is made on the policy that old log-probabilities are of: a penalty on the distance to it would act on rounding alone."""
  config = rl_config(objective='kl_cov', cov_share=0.5, updates=2)
  loop = grpo_loop.GrpoLoop(
    MODEL, TOKENIZER, make_engine(params()), questions(config), range(8), config, seed=1
  )
  batch = loop.source.judge(loop.chosen(0), loop.rollouts(0))
  batch.total_PG[:] = MIXED[[0, 0]]
  state, update = loop.update(
    init_state(params(), loop.tx), grpo_loop.Reference(params(), Execution()), batch
  )
  assert [float(values['clip_share']) for values in update.values] == [
    0,
    pytest.approx(0.5, abs=0.05),
  ]
  assert update.numbers(loop.engine)['skipped'] == 0 and int(state.step) == 2


def test_uniform_kl_acts_on_groups_and_not_on_rollouts_at_their_mean():
  """The second and third rollout of the first group have advantage 0, and its rewards differ."""
  mixed = np.float32([[4, 1, 1, -2], [4, 0, 2, -2]])
  assert one_step(mixed, estimator='grpo', uniform_kl=0.1)[1]['uniform_kl'] == 0
  assert one_step(MIXED, estimator='grpo', uniform_kl=0.1)[1]['uniform_kl'] > 0


def test_dynamic_sampling_asks_on_until_groups_differ():
  """Rounds of two groups: none with variance, one, one; then the batch is full. With one round less the first group fills it."""
  for rounds, expected in ((3, [3, 5]), (1, [0, 3])):
    config = rl_config(dynamic_rounds=rounds)
    loop = grpo_loop.GrpoLoop(
      MODEL, TOKENIZER, make_engine(params()), questions(config), range(8), config, seed=1
    )
    judge, made = loop.source.judge, []

    def judged(chosen, rollouts):
      batch = judge(chosen, rollouts)
      batch.total_PG[:] = 1
      if made:
        batch.total_PG[1, 0] = 0
      made.extend(
        tuple(rollout.exchanges[0].completion.tokens.tolist() for rollout in batch.of(p, p + 1))
        for p in range(2)
      )
      return batch

    loop.source.judge = judged
    batch, _, asked = loop.batch(0)
    taken = [
      tuple(rollout.exchanges[0].completion.tokens.tolist() for rollout in batch.of(p, p + 1))
      for p in range(2)
    ]
    assert taken == [made[number] for number in expected] and len(made) == max(expected) + 1
    assert [row.min() for row in batch.total_PG] == [int(number == 0) for number in expected]
    again = grpo_loop.GrpoLoop(
      MODEL, TOKENIZER, make_engine(params()), questions(config), range(8), config, seed=1
    )
    assert again.chosen(0, 1) == loop.chosen(0, 1)
    # All eight items before any of them a second time.
    turns = [index for turn in range(4) for index in loop.chosen(0, turn)]
    assert sorted(turns) == list(range(8)) and len(set(loop.chosen(0, 4))) == 2
    assert asked == {
      'asked_groups': len(made),
      'asked_zero_variance': pytest.approx(
        1 - sum(2 < n and n % 2 for n in range(len(made))) / len(made)
      ),
    }


def test_dynamic_sampling_and_length_penalties_go_with_psi(tmp_path):
  options = dict(
    dynamic_rounds=1,
    uniform_share=0.5,
    overlong_buffer=8,
    psi_when_wrong='punish',
    alpha_measure='psi_share',
  )
  train(tmp_path, rl_config(steps=2, validation=0, **options))
  rows = read_metrics(tmp_path, 'rl')
  assert all(
    row['asked_groups'] in (2, 4) and row['skipped'] == 0 and row['psi_grad_norm'] >= 0
    for row in rows
  )
  train(tmp_path / 'whole', rl_config(steps=3, validation=0, **options))
  train(tmp_path, rl_config(steps=3, validation=0, **options))  # goes on from the second step
  assert timeless(tmp_path) == timeless(tmp_path / 'whole')


def test_a_reference_that_the_reward_cannot_read_is_an_error_before_anything_is_sampled():
  config = rl_config(reward='paper')
  questions(config)
  bad = encode_prompts(
    TOKENIZER, [dataclasses.replace(points(2)[1], reference='[Note: not a call]')], 64
  )[0]
  with pytest.raises(ValueError, match=r'row 0: the reference .* cannot be read'):
    Questions(TOKENIZER, bad, 'paper')


def test_a_tokenizer_without_a_token_for_padding_will_do():
  config, bare = rl_config(), copy.deepcopy(TOKENIZER)
  bare.pad_token = None
  packed = []
  for tokenizer in (TOKENIZER, bare):
    loop = grpo_loop.GrpoLoop(
      MODEL, tokenizer, make_engine(params()), questions(config), range(8), config, seed=1
    )
    packed.append(loop._pack(loop.rollouts(0)))
  assert bare.pad_token_id is None and (packed[1].tokens >= 0).all()
  jax.tree.map(np.testing.assert_array_equal, packed[0].weight, packed[1].weight)


def test_mfu_refers_to_the_dtype_of_computation(tmp_path, monkeypatch):
  def rate(dtype):
    raise InterruptedError(dtype)  # all that is wanted to know

  monkeypatch.setattr(grpo_loop, 'matmul_rate', rate)
  for compute, dtype in (('auto', 'float32'), ('bfloat16', 'bfloat16')):
    with pytest.raises(InterruptedError, match=dtype), Metrics(tmp_path) as metrics:
      config = rl_config(validation=0, kl_coefficient=0.0)
      grpo_loop.run_rl(
        params(),
        MODEL,
        TOKENIZER,
        questions(config),
        config,
        metrics,
        tmp_path / compute,
        make_engine=make_engine,
        execution=Execution(compute=compute),
        seed=1,
      )


def test_sizes_that_do_not_fit_are_an_error_at_once():
  config = rl_config(capacity=20)
  with pytest.raises(ValueError, match='rl.capacity = 20 does not hold a rollout of'):
    grpo_loop.GrpoLoop(
      MODEL, TOKENIZER, make_engine(params()), questions(config), range(8), config, seed=1
    )
  config, source = rl_config(), questions(rl_config())
  source.longest_prompt = 96
  with pytest.raises(ValueError, match='leaves no room in engine.max_len = 96'):
    grpo_loop.GrpoLoop(MODEL, TOKENIZER, make_engine(params()), source, range(8), config, seed=1)
  with pytest.raises(ValueError, match='target = 0'):
    config = rl_config(alpha_measure='entropy', alpha_target=0.0)
    grpo_loop.GrpoLoop(
      MODEL, TOKENIZER, make_engine(params()), questions(config), range(8), config, seed=1
    )


def test_long_responses_lose_reward():
  plain, shaped = rl_config(), rl_config(overlong_buffer=8, overlong_penalty=2.0)
  batches = [
    grpo_loop.GrpoLoop(
      MODEL, TOKENIZER, make_engine(params()), questions(c), range(8), c, seed=1
    ).batch(0)[0]
    for c in (plain, shaped)
  ]
  lengths = np.array(
    [len(rollout.exchanges[0].completion.tokens) for rollout in batches[0].rollouts]
  )
  penalty = -2 * np.clip((lengths - 4) / 8, 0, 1)
  np.testing.assert_allclose(
    batches[1].total_PG - batches[0].total_PG, penalty.reshape(2, 4), atol=1e-6
  )
  assert penalty.min() == -2


def test_metrics_rows_are_plain_json(tmp_path):
  train(tmp_path, rl_config(steps=1, validation=0))
  row = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert {
    'reward',
    'reward_format',
    'reward_correctness',
    'zero_variance_fraction',
    'all_right_fraction',
    'all_wrong_fraction',
    'entropy',
    'reflections',
    'reflections_lazy_words',
    'response_tokens',
    'clip_share',
    'kl',
    'logp_gap_mean',
    'logp_gap_max',
    'grad_norm',
    'psi_grad_norm',
    'tokens_per_second',
    'tflops',
    'mfu',
    'dedup',
  } <= row.keys()
  phases = ('rollout', 'rewards', 'score', 'reference', 'update', 'engine_update')
  assert 0 < sum(row[f'seconds_{phase}'] for phase in phases) <= row['seconds'] * 1.01
