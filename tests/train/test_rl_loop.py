"""The reinforcement loop on a tiny model: what is computed, what is not, how often it is compiled,
and that nothing waits.
"""

import copy
import dataclasses
import json
import re
import sys
import threading

import jax
import numpy as np
import pytest

from dcore_jax.chat.template import render_prompt
from dcore_jax.learn import advantages
from dcore_jax.learn.controls import group_signs
from dcore_jax.learn.optimizer import init_state
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.tokentree import RowBatch
from dcore_jax.train import learner as learner_module
from dcore_jax.train import rl_loop
from dcore_jax.train.learner import Learner, Update
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.other_policies import Reference
from dcore_jax.train.psi_measure import only_psi
from dcore_jax.train.rl_options import (
  alpha_measure,
  check_options,
  check_section,
  next_alpha,
)
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.sources import Questions, encode_prompts
from dcore_jax.worlds.rollouts import Exchange
from tests.train.tiny_rl import (
  POLICY,
  TOKENIZER,
  make_engine,
  make_learner,
  make_sampler,
  params,
  points,
  questions,
  rl_config,
  timeless,
  train,
)


def one_step(rewards_PG, batches=None, *, cosine=False, **changes):
  """(state after, numbers) of the updates, by default one, on rollouts whose rewards are replaced.

  Batches of the optimizer steps are added to the list `batches`.
  """
  config = rl_config(**{'updates': 1} | changes)
  start = params()
  engine = make_engine(start)
  source = questions(config)
  learner = make_learner(engine, source, config)
  state = init_state(params(), learner.programs.tx)
  batch = make_sampler(engine, source, config).step(0).batch
  batch.total_PG[:] = rewards_PG
  if batches is not None:
    compiled = learner.programs.step

    def step(state, data, *rest):
      batches.append(data)
      return compiled(state, data, *rest)

    learner.programs = learner.programs._replace(step=step)
  state, update = learner.update(state, Reference(start, Execution()), batch, cosine=cosine)
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
  by_prompt = ran['validation']['by_prompt']
  change = ran['validation']['difference']['reward']
  gained = np.subtract(by_prompt['after']['reward'], by_prompt['before']['reward'])
  # Each of the two prompts is a task of its own. Where both change alike there is no error, and an
  # interval none the less.
  error = abs(gained[0] - gained[1]) / 2 or None
  assert change['standard_error'] == (error and pytest.approx(error))
  assert (change['n'], change['unit'], change['prompts']) == (2, 'tasks', 2)
  assert len(set(by_prompt['tasks'])) == 2
  low, high = change['interval']
  assert low < change['difference'] < high
  assert change['difference'] == pytest.approx(
    ran['validation']['after']['reward'] - ran['validation']['before']['reward']
  )
  assert rows[-1]['reward_difference'] == change['difference']
  assert rows[-1]['reward_difference_error'] == change['standard_error']
  assert (rows[-1]['reward_difference_low'], rows[-1]['reward_difference_high']) == (low, high)
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
  # They may have been trained on what would now be held out.
  with pytest.raises(ValueError, match='were made from other prompts'):
    train(tmp_path, rl_config(validation=3))
  with pytest.raises(ValueError, match='were made from other reference'):
    train(tmp_path, rl_config(), seed=5)


def test_zero_variance_groups_move_da_grpo_and_not_grpo(tmp_path):
  """An untrained model gets every reward wrong alike.

  GRPO's gradient vanishes, DA-GRPO's does not (paper, theorem 3.1).
  """
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
  """All but the first group, for the measure; the updates have what the whole pass gives them,
  entropies of psi included.
  """
  sparing_batches = []
  full_batches = []
  options = dict(estimator=estimator, updates=updates)
  _, spared = one_step(MIXED, sparing_batches, **options)
  assert spared['logp_gap_max'] < 1e-5 and spared['scored_fraction'] < 0.7
  monkeypatch.setattr(learner_module, '_EXACT', -1.0)
  _, numbers = one_step(MIXED, full_batches, **options)
  assert numbers['scored_fraction'] == 1
  assert len(full_batches) == updates
  assert any(batch.extras['advantage_up'].any() for batch in full_batches)
  for sparing, full in zip(sparing_batches, full_batches, strict=True):
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


def test_what_a_cache_in_int8_costs_is_among_the_metrics(monkeypatch):
  """And the old policy is then the trainer's, not the engine's."""

  def rounding_engine(params):
    sizes = EngineSizes(lanes=8, max_len=96, cache_dtype='int8')
    return Engine(params, POLICY.config, stop_ids=[TOKENIZER.eos_token_id], sizes=sizes)

  monkeypatch.setattr(sys.modules[__name__], 'make_engine', rounding_engine)
  numbers = one_step(MIXED)[1]
  assert 1e-5 < numbers['logp_gap_mean'] < numbers['logp_gap_max'] < 0.1
  assert numbers['scored_fraction'] == 1


def test_the_norm_of_psi_is_measured_on_the_micro_batches_that_have_any():
  """The others are left out; the share refers the norm to the loss tokens of the whole batch."""
  weight = np.ones((4, 8), np.float32)
  weight[1, 4:] = 0
  psi = np.zeros((4, 8), np.float32)
  psi[1, 2] = psi[3, 0] = 0.1
  rows = dict.fromkeys(('tokens', 'position', 'end', 'parent', 'slot', 'target'))
  batch, share = only_psi(RowBatch(**rows, weight=weight, extras={'psi': psi}))
  assert batch.weight.sum(axis=1).tolist() == [0, 4, 0, 8] and share == pytest.approx(12 / 28)


def test_the_share_of_psi_is_of_the_update_that_it_is_in():
  """The first mini-batch has reward variance and no psi; in the second there is nothing else, but
  for rounding in the KL term.
  """
  _, numbers = one_step(MIXED, updates=2)
  assert 0 < numbers['psi_grad_norm'] < numbers['grad_norm'] and numbers[
    'psi_grad_share'
  ] == pytest.approx(1, rel=0.05)
  assert one_step(np.float32([[4, 1, 1, -2], [1, 2, 3, 4]]), updates=2)[1]['psi_grad_share'] == 0


def test_alpha_follows_what_was_measured_and_nothing_else():
  config = rl_config(alpha_measure='norm_share', alpha_target=0.5)
  learner = make_learner(make_engine(params()), questions(config), config)
  for share in (0.0, np.nan):  # no psi, a skipped update
    learner.adapt_alpha({'psi_grad_share': share, 'entropy': 1.0})
    assert learner.alpha == config.alpha
  learner.adapt_alpha({'psi_grad_share': 0.1, 'entropy': 1.0})
  assert learner.alpha > config.alpha


@pytest.mark.parametrize(
  ('measure', 'row', 'grows'),
  [
    ('reflections', {'reflections': 0.2}, True),
    ('reflections', {'reflections': 3.0}, False),
    ('uniform_share', {'zero_variance_fraction': 0.9}, False),
    # Those that dynamic sampling has left out count, too.
    ('uniform_share', {'zero_variance_fraction': 0.9, 'asked_zero_variance': 0.1}, True),
  ],
)
def test_alpha_holds_what_the_config_names(measure, row, grows):
  section = rl_config(alpha_measure=measure, alpha_target=0.5)
  check_section(section)
  alpha = next_alpha(section, 0.4, alpha_measure(section, row))
  assert (alpha > 0.4) == grows and alpha != 0.4


def test_the_placebo_moves_as_far_as_psi():
  """The update is its gradient alone; its signs are those of the step."""
  uniform = np.float32([[1, 1, 1, 1]] * 2)
  options = dict(kl_coefficient=0.0, validation=0)
  norms = []
  for estimator in ('da_grpo', 'psi_placebo'):
    _, numbers = one_step(uniform, estimator=estimator, **options)
    norms.append(numbers['psi_grad_norm'])
    np.testing.assert_allclose(numbers['psi_grad_norm'], numbers['grad_norm'], rtol=1e-4)
  # Of two groups, so that their signs may make the sum another; each is psi's in size.
  assert min(norms) > 0.1 * max(norms)
  config = rl_config()
  batch = make_sampler(make_engine(params()), questions(config), config).step(2).batch
  np.testing.assert_array_equal(batch.signs_P, group_signs(1, 2, range(2)))


def test_the_angle_between_psi_and_grpo_is_measured_where_both_are():
  for rewards, updates, known in ((MIXED, 1, True), (MIXED, 2, False)):
    _, numbers = one_step(rewards, updates=updates, cosine=True)
    assert np.isfinite(numbers['psi_cosine']) == known
  assert 'psi_cosine' not in one_step(MIXED)[1]


def test_every_program_is_compiled_once_though_lengths_vary(tmp_path, monkeypatch, caplog):
  lengths = []
  update = Learner.update

  def cut_short(self, state, reference, batch, **options):  # a random model hardly ever stops
    rng = np.random.default_rng(len(lengths))
    for rollout in batch.rollouts:
      (prompt, whole) = rollout.exchanges[0]
      size = rng.integers(1, 13)
      cut = dataclasses.replace(
        whole,
        tokens=whole.tokens[:size],
        logprobs=whole.logprobs[:size],
        full_logprobs=whole.full_logprobs[:size],
        entropies=whole.entropies[:size],
        finished=True,
      )
      rollout.exchanges[0] = Exchange(prompt, cut)
    lengths.append(sum(len(rollout.exchanges[0].completion.tokens) for rollout in batch.rollouts))
    return update(self, state, reference, batch, **options)

  monkeypatch.setattr(Learner, 'update', cut_short)

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
  """The row of a step is held back until the next rollouts have begun: a loop that waited for it
  first would not go on.
  """
  begun = threading.Event()
  numbers = Update.numbers
  rollouts = Sampler.rollouts

  def held_back(self, engine):
    assert begun.wait(timeout=60), 'the next rollouts wait for the numbers of the step before'
    return numbers(self, engine)

  def noted(self, step, turn):
    if step == 1:
      begun.set()
    return rollouts(self, step, turn)

  monkeypatch.setattr(Update, 'numbers', held_back)
  monkeypatch.setattr(Sampler, 'rollouts', noted)
  train(tmp_path, rl_config(steps=2, validation=0, checkpoint_every=2))
  assert [row['step'] for row in read_metrics(tmp_path, 'rl')] == [0, 1]


def test_a_clip_of_0_trains(tmp_path):
  """It once scaled every gradient to nothing."""
  trained, _ = train(tmp_path, rl_config(steps=1, validation=0, clip=0.0))
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, params())
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_options_of_the_loss_reach_the_step(tmp_path):
  """The loop brings what each option reads; the engine is exact: importance weights are 1."""
  options = dict(
    objective='gspo',
    clip_low=3e-4,
    clip_high=4e-4,
    aggregation='sequence',
    importance_cap=2.0,
    uniform_kl=0.1,
    entropy_bonus=0.1,
    entropy_of='current',
    cosine_every=1,
    psi_words=('o',),
    kl_coefficient=0.0,
  )
  train(tmp_path, rl_config(steps=1, validation=0, **options))
  (row,) = read_metrics(tmp_path, 'rl')
  np.testing.assert_allclose(row['importance'], 1, atol=1e-4)
  assert row['entropy_bonus'] > 0 and row['psi_cosine'] is None
  assert row['uniform_kl'] > 0 and row['psi_grad_norm'] > 0 and 'kl' not in row


def test_kl_cov_holds_nothing_back_in_the_first_update():
  """It is made on the policy that old log-probabilities are of: a penalty on the distance to it
  would act on rounding alone.
  """
  config = rl_config(objective='kl_cov', cov_share=0.5, updates=2)
  engine = make_engine(params())
  source = questions(config)
  learner = make_learner(engine, source, config)
  batch = make_sampler(engine, source, config).step(0).batch
  batch.total_PG[:] = MIXED[[0, 0]]
  state, update = learner.update(
    init_state(params(), learner.programs.tx), Reference(params(), Execution()), batch
  )
  assert [float(values['clip_share']) for values in update.values] == [
    0,
    pytest.approx(0.5, abs=0.05),
  ]
  assert update.numbers(engine)['skipped'] == 0 and int(state.step) == 2


def test_uniform_kl_acts_on_groups_and_not_on_rollouts_at_their_mean():
  """The second and third rollout of the first group have advantage 0, and its rewards differ."""
  mixed = np.float32([[4, 1, 1, -2], [4, 0, 2, -2]])
  assert one_step(mixed, estimator='grpo', uniform_kl=0.1)[1]['uniform_kl'] == 0
  assert one_step(MIXED, estimator='grpo', uniform_kl=0.1)[1]['uniform_kl'] > 0


@pytest.mark.parametrize(('rounds', 'expected'), [(3, [3, 5]), (1, [0, 3])])
def test_dynamic_sampling_asks_on_until_groups_differ(rounds, expected):
  """Rounds of two groups: none with variance, one, one; then the batch is full.

  With one round less the first group fills it.
  """
  config = rl_config(dynamic_rounds=rounds)
  source = questions(config)
  judge = source.judge
  made = []

  def answers(batch, prompt):
    rollouts = batch.of(prompt, prompt + 1)
    return [rollout.exchanges[0].completion.tokens.tolist() for rollout in rollouts]

  def judged(chosen, rollouts):
    batch = judge(chosen, rollouts)
    batch.total_PG[:] = 1
    if made:
      batch.total_PG[1, 0] = 0
    made.extend([answers(batch, 0), answers(batch, 1)])
    return batch

  source.judge = judged
  batch, _, asked = make_sampler(make_engine(params()), source, config).step(0)
  assert [answers(batch, 0), answers(batch, 1)] == [made[number] for number in expected]
  assert len(made) == max(expected) + 1
  assert [row.min() for row in batch.total_PG] == [int(number == 0) for number in expected]
  # Of each round after the first, the second group has variance.
  uniform = [number for number in range(len(made)) if number < 2 or number % 2 == 0]
  assert asked == {
    'asked_groups': len(made),
    'asked_zero_variance': pytest.approx(len(uniform) / len(made)),
  }


def test_dynamic_sampling_and_length_penalties_go_with_psi(tmp_path):
  options = dict(
    dynamic_rounds=1,
    uniform_share=0.5,
    overlong_buffer=8,
    psi_when_wrong='punish',
    alpha_measure='norm_share',
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
  config = rl_config()
  bare = copy.deepcopy(TOKENIZER)
  bare.pad_token = None
  engine = make_engine(params())
  source = questions(config)
  batch = make_sampler(engine, source, config).step(0).batch
  packed = []
  for tokenizer in (TOKENIZER, bare):
    policy = dataclasses.replace(POLICY, tokenizer=tokenizer)
    learner = Learner(policy, engine, source, config, Execution())
    packed.append(learner.packer.mini_batches(batch)[0].tree)
  assert bare.pad_token_id is None and (packed[1].tokens >= 0).all()
  np.testing.assert_array_equal(packed[0].weight, packed[1].weight)


def test_mfu_refers_to_the_dtype_of_computation(tmp_path, monkeypatch):
  def rate(dtype):
    raise InterruptedError(dtype)  # all that is wanted to know

  monkeypatch.setattr(rl_loop, 'matmul_rate', rate)
  config = rl_config(validation=0, kl_coefficient=0.0)
  for compute, dtype in (('auto', 'float32'), ('bfloat16', 'bfloat16')):
    with pytest.raises(InterruptedError, match=dtype):
      train(tmp_path / compute, config, execution=Execution(compute=compute))


def test_sizes_that_do_not_fit_are_an_error_at_once():
  engine = make_engine(params())
  config = rl_config(capacity=20)
  with pytest.raises(ValueError, match='rl.capacity = 20 does not hold a rollout of'):
    check_options(config, engine, questions(config))
  config = rl_config()
  source = questions(config)
  source.longest_prompt = 96
  with pytest.raises(ValueError, match='leaves no room in engine.max_len = 96'):
    check_options(config, engine, source)
  config = rl_config(alpha_measure='entropy', alpha_target=0.0)
  with pytest.raises(ValueError, match='target = 0'):
    check_options(config, engine, questions(config))


def test_long_responses_lose_reward():
  plain = rl_config()
  shaped = rl_config(overlong_buffer=8, overlong_penalty=2.0)
  batches = []
  for config in (plain, shaped):
    sampler = make_sampler(make_engine(params()), questions(config), config)
    batches.append(sampler.step(0).batch)
  lengths = np.array(
    [len(rollout.exchanges[0].completion.tokens) for rollout in batches[0].rollouts]
  )
  penalty = -2 * np.clip((lengths - 4) / 8, 0, 1)
  np.testing.assert_allclose(
    batches[1].total_PG - batches[0].total_PG, penalty.reshape(2, 4), atol=1e-6
  )
  assert penalty.min() == -2


def test_an_estimator_from_outside_trains(tmp_path, monkeypatch):
  """It gets the options that the section has, and keeps its own default for one that it lacks."""
  monkeypatch.setattr(advantages, 'ADVANTAGES', dict(advantages.ADVANTAGES))
  monkeypatch.setattr(advantages, '_USE_ENTROPY', set(advantages._USE_ENTROPY))
  seen = []

  @advantages.register_estimator('toy', uses_entropy=True)
  def toy(rewards_PG, entropy_PGT, mask_PGT, *, alpha=0.0, scale=3.0):
    seen.append((alpha, scale))
    return (scale * alpha * entropy_PGT * mask_PGT).astype(np.float32)

  train(tmp_path, rl_config(steps=1, validation=0, estimator='toy'))
  assert set(seen) == {(0.4, 3.0)}
  (row,) = read_metrics(tmp_path, 'rl')
  assert row['psi_grad_norm'] > 0 and row['skipped'] == 0


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
    'cut_groups',
  } <= row.keys()
  phases = ('rollout', 'rewards', 'score', 'reference', 'update', 'engine_update')
  assert 0 < sum(row[f'seconds_{phase}'] for phase in phases) <= row['seconds'] * 1.01
