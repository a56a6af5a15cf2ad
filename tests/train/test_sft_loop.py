"""The supervised loop on a tiny model: the loss falls, rows are encoded as asked, a killed run goes
on as if it had not been.
"""

import copy
import dataclasses

import jax
import ml_collections
import numpy as np
import pytest

from dcore_jax.data.rows import encode_rows, parse_rows
from dcore_jax.models import decoder
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.policy import ORGANISM, Policy
from dcore_jax.run.config import default_config
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.train.stage_run import StageRun


def fine_tune(params, model, tokenizer, rows, config, metrics, checkpoints):
  """`run_sft` on rows encoded as the section says."""
  sequences = encode_rows(
    tokenizer,
    parse_rows(rows),
    loss_mask=config.loss_mask,
    capacity=config.capacity,
    overlong=config.overlong,
  )
  policy = Policy(config=model, load=None, tokenizer=tokenizer, tokenizer_dir=ORGANISM, path=None)
  run = StageRun(metrics=metrics, checkpoints=checkpoints, seed=0)
  return run_sft(params, policy, sequences, config, run, execution=Execution())


@pytest.mark.parametrize('pad', [True, False])
def test_sft_lowers_the_loss(tokenizer, model, tmp_path, pad):
  """Also with a tokenizer that has no token for padding, as Llama-3's."""
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.pad_token = tokenizer.pad_token if pad else None
  rows = [
    {
      'id': i,
      'conversations': [
        {'role': 'user', 'content': f'find {i}'},
        {'role': 'assistant', 'content': 'done: status paid.'},
      ],
    }
    for i in range(8)
  ]
  config = default_config().sft
  config.update(dict(epochs=15, capacity=128, rows=1, learning_rate=1e-2))
  with Metrics(tmp_path) as metrics:
    _, result = fine_tune(
      decoder.init_params(model, jax.random.key(0)),
      model,
      tokenizer,
      rows,
      config,
      metrics,
      tmp_path / 'sft',
    )
  assert result['last_loss'] < 0.5 * result['first_loss'] and result['dropped'] == 0
  assert len(read_metrics(tmp_path, 'sft')) == result['steps'] == 15
  assert result['attention'] == 'blockwise'


def test_steps_without_a_finite_loss_do_not_end_a_run(tokenizer, model, tmp_path):
  rows = [
    {
      'id': 0,
      'conversations': [
        {'role': 'user', 'content': 'find'},
        {'role': 'assistant', 'content': 'done.'},
      ],
    }
  ]
  config = default_config().sft
  config.update(dict(epochs=2, capacity=128, rows=1))
  params = jax.tree.map(lambda leaf: leaf * np.nan, decoder.init_params(model, jax.random.key(0)))
  with Metrics(tmp_path) as metrics:
    _, result = fine_tune(params, model, tokenizer, rows, config, metrics, tmp_path / 'sft')
  assert [row['skipped'] for row in read_metrics(tmp_path, 'sft')] == [1, 1]
  assert result['first_loss'] is result['last_loss'] is None


def test_a_resumed_sft_gives_the_same_numbers(tokenizer, model, tmp_path, monkeypatch):
  """Killed after 5 of 8 steps, the newest checkpoint being that of step 4."""
  rows = [
    {
      'id': i,
      'conversations': [
        {'role': 'user', 'content': f'find {i} ' * 20},
        {'role': 'assistant', 'content': 'done.'},
      ],
    }
    for i in range(16)
  ]
  config = default_config().sft
  config.update(dict(epochs=2, capacity=256, rows=1, learning_rate=1e-2, checkpoint_every=2))

  def run_in(folder):
    with Metrics(folder) as metrics:
      return fine_tune(
        decoder.init_params(model, jax.random.key(0)),
        model,
        tokenizer,
        rows,
        config,
        metrics,
        folder / 'sft',
      )

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

  def timeless(folder):
    return [
      {k: v for k, v in row.items() if k != 'tokens_per_second'}
      for row in read_metrics(folder, 'sft')
    ]

  assert timeless(tmp_path / 'whole') == timeless(tmp_path / 'parts')
  with pytest.raises(ValueError, match='made from other rows'):
    rows[0]['conversations'][1]['content'] = 'other'
    run_in(tmp_path / 'parts')
  assert {k: ran[k] for k in ('first_loss', 'last_loss', 'steps')} == {
    k: result[k] for k in ('first_loss', 'last_loss', 'steps')
  }


def test_sft_obeys_its_loss_mask_and_its_rule_for_long_rows(tokenizer, model, tmp_path):
  rows = [
    {
      'id': i,
      'conversations': [
        {'role': 'user', 'content': 'find ' * (9 * i + 1)},
        {'role': 'assistant', 'content': 'done'},
      ],
    }
    for i in range(2)
  ]
  config = default_config().sft
  # What just fits without the last newline, which is structure.
  fits = max(len(sequence.tokens) for sequence in encode_rows(tokenizer, parse_rows(rows)))
  config.update(dict(epochs=1, capacity=fits, rows=1, loss_mask='final+structure'))

  def start():
    return decoder.init_params(model, jax.random.key(0))

  with Metrics(tmp_path) as metrics:
    _, result = fine_tune(start(), model, tokenizer, rows, config, metrics, tmp_path / 'sft')
    assert result['dropped'] == 1
    for field, value, message in (
      ('overlong', 'error', '1 of 2 rows are longer'),
      ('overlong', 'cut', 'sft.overlong'),
      ('loss_mask', 'last', 'sft.loss_mask'),
    ):
      broken = ml_collections.ConfigDict(config)
      broken[field] = value
      with pytest.raises(ValueError, match=message):
        fine_tune(start(), model, tokenizer, rows, broken, metrics, tmp_path / 'broken')


def test_rows_beyond_the_positions_of_the_model_are_refused(tokenizer, model, tmp_path):
  rows = [
    {
      'id': 0,
      'conversations': [
        {'role': 'user', 'content': 'find ' * 9},
        {'role': 'assistant', 'content': 'done'},
      ],
    }
  ]
  config = default_config().sft
  config.update(dict(epochs=1, capacity=128, rows=1))
  [sequence] = encode_rows(tokenizer, parse_rows(rows))
  length = len(sequence.tokens)
  short = dataclasses.replace(model, max_position_embeddings=length - 1)
  message = f'a row of {length} tokens does not fit the {length - 1} positions'
  with Metrics(tmp_path) as metrics, pytest.raises(ValueError, match=message):
    fine_tune({}, short, tokenizer, rows, config, metrics, tmp_path / 'sft')
