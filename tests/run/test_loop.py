"""The training loops on a tiny model: rows and prompts are encoded as sampled, and a killed RL run goes on as if it had not been."""
import json

import jax
import ml_collections
import numpy as np
import pytest

from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import render_prompt
from dcore_jax.distill.seeds import DecisionPoint
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.engine import Engine
from dcore_jax.run import loop
from dcore_jax.run.defaults import default_config
from dcore_jax.run.metrics import Metrics, read_metrics
from dcore_jax.worlds.toolworld.tokenizer import build_tokenizer
from dcore_jax.worlds.toolworld.vocabulary import sample_texts


@pytest.fixture(scope='module')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


@pytest.fixture(scope='module')
def model(tokenizer):
  return DecoderConfig.from_hf(dict(
      model_type='qwen3', vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
      num_key_value_heads=1, head_dim=16, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=256,
      eos_token_id=tokenizer.eos_token_id))


def points(count=8):
  return [DecisionPoint(str(i), 'single', (Message('user', f'find the order of Karo {i}'),), f"[find_order(customer='K{i}')]")
          for i in range(count)]


def rl_config(**changes):
  c = default_config().rl
  c.update(dict(steps=3, prompts=2, group=4, updates=2, learning_rate=1e-3, max_prompt_tokens=64, max_tokens=12, capacity=128, rows=2,
                checkpoint_every=1, validation=2) | changes)
  return c


def test_long_prompts_are_dropped_and_counted(tokenizer):
  lengths = [len(tokenizer(render_prompt(tokenizer, list(p.messages)))['input_ids']) for p in points()]
  kept, dropped = loop.encode_prompts(tokenizer, points(), min(lengths) - 1)
  assert (len(kept), dropped) == (0, 8)
  assert loop.encode_prompts(tokenizer, points(), max(lengths))[1] == 0


def test_sft_lowers_the_loss(tokenizer, model, tmp_path):
  rows = [{'id': i, 'conversations': [{'role': 'user', 'content': f'find {i}'}, {'role': 'assistant', 'content': 'done: status paid.'}]}
          for i in range(8)]
  config = default_config().sft
  config.update(dict(epochs=15, capacity=128, rows=1, learning_rate=1e-2))
  with Metrics(tmp_path) as metrics:
    _, result = loop.run_sft(decoder.init_params(model, jax.random.key(0)), model, tokenizer, rows, config, metrics, tmp_path / 'sft',
                             seed=0)
  assert result['last_loss'] < 0.5 * result['first_loss'] and result['dropped'] == 0
  assert len(read_metrics(tmp_path, 'sft')) == result['steps'] == 15
  assert result['attention'] == 'blockwise'


def test_a_resumed_sft_gives_the_same_numbers(tokenizer, model, tmp_path, monkeypatch):
  """Killed after 5 of 8 steps, the newest checkpoint being that of step 4."""
  rows = [{'id': i, 'conversations': [{'role': 'user', 'content': f'find {i} ' * 20}, {'role': 'assistant', 'content': 'done.'}]}
          for i in range(16)]
  config = default_config().sft
  config.update(dict(epochs=2, capacity=256, rows=1, learning_rate=1e-2, checkpoint_every=2))

  def run_in(folder):
    with Metrics(folder) as metrics:
      return loop.run_sft(decoder.init_params(model, jax.random.key(0)), model, tokenizer, rows, config, metrics, folder / 'sft', seed=0)

  whole, ran = run_in(tmp_path / 'whole')
  assert ran['steps'] >= 8 and ran['resumed_at'] == 0
  written = Metrics.write

  def killed_at_five(self, stage, step, **values):
    if step == 5:
      raise KeyboardInterrupt
    written(self, stage, step, **values)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Metrics, 'write', killed_at_five)
    run_in(tmp_path / 'parts')
  parts, result = run_in(tmp_path / 'parts')
  assert result['resumed_at'] == 4 and result['seconds_before'] > 0
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  timeless = lambda folder: [{k: v for k, v in row.items() if k != 'tokens_per_second'} for row in read_metrics(folder, 'sft')]
  assert timeless(tmp_path / 'whole') == timeless(tmp_path / 'parts')
  with pytest.raises(ValueError, match='made from other rows'):
    rows[0]['conversations'][1]['content'] = 'other'
    run_in(tmp_path / 'parts')
  assert {k: ran[k] for k in ('first_loss', 'last_loss', 'steps')} == {k: result[k] for k in ('first_loss', 'last_loss', 'steps')}


def test_sft_obeys_its_loss_mask_and_its_rule_for_long_rows(tokenizer, model, tmp_path):
  rows = [{'id': i, 'conversations': [{'role': 'user', 'content': 'find ' * (9 * i + 1)}, {'role': 'assistant', 'content': 'done'}]}
          for i in range(2)]
  config = default_config().sft
  # What just fits without the last newline, which is structure.
  fits = max(len(sequence.tokens) for sequence in loop.encode_rows(tokenizer, rows))
  config.update(dict(epochs=1, capacity=fits, rows=1, loss_mask='final+structure'))
  start = lambda: decoder.init_params(model, jax.random.key(0))
  with Metrics(tmp_path) as metrics:
    _, result = loop.run_sft(start(), model, tokenizer, rows, config, metrics, tmp_path / 'sft', seed=0)
    assert result['dropped'] == 1
    for field, value, message in (('overlong', 'error', '1 of 2 rows are longer'), ('overlong', 'cut', 'sft.overlong'),
                                  ('loss_mask', 'last', 'sft.loss_mask')):
      broken = ml_collections.ConfigDict(config)
      broken[field] = value
      with pytest.raises(ValueError, match=message):
        loop.run_sft(start(), model, tokenizer, rows, broken, metrics, tmp_path / 'broken', seed=0)


def run(tokenizer, model, folder, config, points_=None):
  params = decoder.init_params(model, jax.random.key(0))
  make_engine = lambda p: Engine(p, model, stop_ids=[tokenizer.eos_token_id], lanes=8, max_len=96)
  with Metrics(folder) as metrics:
    return loop.run_rl(params, model, tokenizer, points_ or points(), config, metrics, folder / 'checkpoints', make_engine=make_engine, seed=1)


def test_a_resumed_run_gives_the_same_numbers(tokenizer, model, tmp_path):
  with Metrics(tmp_path / 'whole') as metrics:  # of a process that was killed before its first checkpoint
    metrics.write('rl', 0, reward=9.0)
  adaptive = dict(alpha_measure='entropy', alpha_target=9.0)
  whole, ran = run(tokenizer, model, tmp_path / 'whole', rl_config(**adaptive))
  validated = ran['validation']
  run(tokenizer, model, tmp_path / 'parts', rl_config(steps=1, **adaptive))
  parts, result = run(tokenizer, model, tmp_path / 'parts', rl_config(**adaptive))
  assert result['resumed_at'] == 1 and result['seconds_before'] > 0
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  assert validated == result['validation'] and validated['before']['reward'] != 0
  timeless = lambda rows: [{k: v for k, v in row.items() if not k.startswith('seconds')} for row in rows]
  assert timeless(read_metrics(tmp_path / 'whole', 'rl')) == timeless(read_metrics(tmp_path / 'parts', 'rl'))
  alphas = [row['alpha'] for row in read_metrics(tmp_path / 'parts', 'rl')]
  assert alphas[0] == 0.1 and alphas == sorted(set(alphas))  # its entropy is below the target


def test_zero_variance_groups_move_da_grpo_and_not_grpo(tokenizer, model, tmp_path):
  """An untrained model gets every reward wrong alike: GRPO's gradient vanishes, DA-GRPO's does not (paper, theorem 3.1)."""
  rows = {}
  for name, options in (('grpo', dict(estimator='grpo')), ('da_grpo', dict(estimator='da_grpo', alpha=0.4))):
    run(tokenizer, model, tmp_path / name, rl_config(steps=1, updates=1, kl_coefficient=0.0, **options))
    rows[name], = read_metrics(tmp_path / name, 'rl')
  assert rows['grpo']['zero_variance_fraction'] == rows['grpo']['all_wrong_fraction'] == 1
  assert rows['grpo']['grad_norm'] == 0 < rows['da_grpo']['grad_norm']
  np.testing.assert_allclose(rows['da_grpo']['psi_grad_norm'], rows['da_grpo']['grad_norm'], rtol=1e-4)
  # Float32 and the same weights: engine and trainer must agree on what was sampled.
  assert rows['da_grpo']['logp_gap_max'] < 1e-4


@pytest.mark.parametrize(('changes', 'message'), [(dict(prompts=7), 'too few'), (dict(validation=9), 'rl.validation = 9'), (dict(updates=3), 'does not divide'),
                                                  (dict(estimator='nope'), 'nope'), (dict(reward='nope'), 'nope'),
                                                  (dict(objective='nope'), 'nope'), (dict(alpha_measure='nope'), 'nope'),
                                                  (dict(estimator='grpo', psi_words=('wait',)), 'psi_words')])
def test_configs_that_cannot_work(tokenizer, model, tmp_path, changes, message):
  with pytest.raises((ValueError, KeyError), match=message):
    run(tokenizer, model, tmp_path, rl_config(**changes))
  assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


def test_options_of_the_loss_reach_the_step(tokenizer, model, tmp_path):
  """The loop brings what each option reads; the engine is exact, so that importance weights are 1."""
  options = dict(objective='gspo', aggregation='sequence', importance_cap=2.0, uniform_kl=0.1, psi_words=('o',), kl_coefficient=0.0)
  run(tokenizer, model, tmp_path, rl_config(steps=1, **options))
  row, = read_metrics(tmp_path, 'rl')
  np.testing.assert_allclose(row['importance'], 1, atol=1e-4)
  assert row['uniform_kl'] > 0 and row['psi_grad_norm'] > 0 and 'kl' not in row


def test_metrics_rows_are_plain_json(tokenizer, model, tmp_path):
  run(tokenizer, model, tmp_path, rl_config(steps=1))
  row = json.loads((tmp_path / 'metrics.jsonl').read_text())
  assert {'reward', 'entropy', 'zero_variance_fraction', 'psi_grad_norm', 'kl', 'reflections', 'logp_gap_mean'} <= row.keys()
