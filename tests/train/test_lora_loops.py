"""The loops with adapters: checkpoints of adapters alone, resumed to the bit; the base stays."""

import json

import jax
import numpy as np
import pytest

from dcore_jax.config import LoraSection
from dcore_jax.data.rows import encode_rows, parse_rows
from dcore_jax.learn import lora
from dcore_jax.models import decoder
from dcore_jax.models.decoder import Execution
from dcore_jax.models.projections import is_adapted
from dcore_jax.run.config import default_config
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.other_policies import Reference
from dcore_jax.train.rl_loop import run_rl
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.train.stage_run import StageRun
from tests.train import tiny_rl

MERGED = LoraSection(rank=2, alpha=4.0)
UNMERGED = LoraSection(rank=2, alpha=4.0, rollouts='unmerged')
ROWS = [
  {
    'id': i,
    'conversations': [
      {'role': 'user', 'content': f'find {i}'},
      {'role': 'assistant', 'content': 'done: status paid.'},
    ],
  }
  for i in range(8)
]


def fine_tune(folder, epochs):
  config = default_config().sft
  config.update(
    dict(epochs=epochs, capacity=128, rows=1, learning_rate=1e-2, floor=1.0, warmup=0.0)
  )
  config.checkpoint_every = 1
  sequences = encode_rows(tiny_rl.TOKENIZER, parse_rows(ROWS), capacity=128)
  base = tiny_rl.params()
  before = jax.device_get(base)
  with Metrics(folder) as metrics:
    run = StageRun(metrics, folder / 'checkpoints', 0, MERGED)
    params, result = run_sft(base, tiny_rl.POLICY, sequences, config, run, execution=Execution())
  # Still there, and as it was.
  jax.tree.map(np.testing.assert_array_equal, base, before)
  return params, result


def reinforce(folder, steps, section=MERGED):
  config = tiny_rl.rl_config(steps=steps)
  engines = []

  def make_engine(params):
    engines.append(tiny_rl.make_engine(params))
    return engines[-1]

  with Metrics(folder) as metrics:
    params, result = run_rl(
      tiny_rl.params(),
      tiny_rl.POLICY,
      tiny_rl.questions(config),
      config,
      StageRun(metrics, folder / 'checkpoints', 1, section),
      make_engine=make_engine,
      execution=Execution(),
    )
  return params, result, engines[0]


def stored_arrays(step):
  """Path -> shape of what a checkpoint holds."""
  leaves = json.loads((step / 'record' / 'metadata').read_text())['leaves']
  return {path: tuple(leaf['shape']) for path, leaf in leaves.items()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  return reinforce(folder, 3), folder


def adapted(params):
  return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_adapted) if is_adapted(leaf)]


def test_fine_tuning_lowers_the_loss_and_leaves_the_base(tmp_path):
  params, result = fine_tune(tmp_path, 15)
  # The head is frozen and its rows are short, so that no logit can become large.
  assert result['last_loss'] < result['first_loss'] - 0.1
  assert len(adapted(params)) == 7
  again, resumed = fine_tune(tmp_path, 15)
  assert resumed['resumed_at'] == result['steps']
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_checkpoint_holds_adapters_alone(whole):
  _, folder = whole
  shapes = stored_arrays(folder / 'checkpoints' / 'state' / '3')
  specs = lora.abstract_adapters(tiny_rl.MODEL, MERGED)
  held = {path.removeprefix('params/') for path in shapes if path.startswith('params/')}
  assert held == {f'{name}/{factor}' for name in specs for factor in ('a', 'b')}
  # Moments are those of adapters: nothing has the width of the vocabulary.
  assert not any(tiny_rl.MODEL.vocab_size in shape for shape in shapes.values())


def test_a_resumed_run_is_the_same_to_the_bit(whole, tmp_path):
  (params, _, _), folder = whole
  reinforce(tmp_path, 1)
  again, result, _ = reinforce(tmp_path, 3)
  assert result['resumed_at'] == 1
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert tiny_rl.timeless(tmp_path) == tiny_rl.timeless(folder)


def test_adapters_move_and_the_base_does_not(whole):
  (params, _, engine), folder = whole
  base = tiny_rl.params()
  for name, leaf in params['layers'].items():
    weight = leaf.weight if is_adapted(leaf) else leaf
    np.testing.assert_array_equal(weight, base['layers'][name])
  assert all(np.abs(leaf.b).max() > 0 for leaf in adapted(params))
  # The engine has plain weights, those of the newest adapters.
  assert not adapted(engine.params)
  merged = lora.merge(params)
  jax.tree.map(np.testing.assert_array_equal, engine.params, merged)
  rows = [row for row in read_metrics(folder) if row['stage'] == 'rl']
  # The rollouts come from the policy that is trained.
  assert max(row['logp_gap_max'] for row in rows) < 1e-4
  # At first the policy is the reference, and then it moves away from it.
  assert rows[-1]['kl'] > rows[0]['kl'] >= 0


def test_unmerged_rollouts_read_the_base_itself(tmp_path):
  params, _, engine = reinforce(tmp_path, 2, UNMERGED)
  assert len(adapted(engine.params)) == 7
  rows = [row for row in read_metrics(tmp_path) if row['stage'] == 'rl']
  assert max(row['logp_gap_max'] for row in rows) < 1e-4
  for held, trained in zip(adapted(engine.params), adapted(params), strict=True):
    assert held.weight.unsafe_buffer_pointer() == trained.weight.unsafe_buffer_pointer()
    np.testing.assert_array_equal(held.b, trained.b)


def test_the_reference_is_the_base_and_no_copy():
  base = tiny_rl.params()
  held = Reference(base, Execution(), copied=False).params()
  for one, other in zip(jax.tree.leaves(held), jax.tree.leaves(base), strict=True):
    assert one.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()
  with pytest.raises(ValueError, match='under LoRA'):
    Reference(base, Execution(offload=('reference',)), copied=False)


def test_an_engine_refuses_adapters_of_other_shapes():
  engine = tiny_rl.make_engine(tiny_rl.params())
  other = decoder.init_params(tiny_rl.MODEL, jax.random.key(1))
  other['layers'] = {**other['layers'], 'q': other['layers']['q'][..., :8]}
  trained, frozen = lora.split(tiny_rl.params(), tiny_rl.MODEL, MERGED, 0)
  engine.update(lora.attach(frozen, trained))
  with pytest.raises(ValueError, match='do not fit'):
    engine.update(other)
