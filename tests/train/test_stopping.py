"""A run that is told to end: at the end of its step, with a checkpoint, and it goes on bit for bit.

And a run whose gradients are no numbers.
"""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dcore_jax.data.rows import encode_rows, parse_rows
from dcore_jax.models import decoder
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.policy import ORGANISM, Policy
from dcore_jax.run.config import default_config
from dcore_jax.train import stopping
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.train.skips import Skips
from dcore_jax.train.stage_run import StageRun
from tests.train import tiny_rl


@pytest.fixture
def handled():
  """The handlers of a program, for one test."""
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  stopping.handle_signals()
  yield
  stopping._Process.handles = False
  stopping._Process.asked = None
  for number, handler in before.items():
    signal.signal(number, handler)


def told_at(monkeypatch, wanted, number=signal.SIGTERM):
  """Sends the signal as the row of step `wanted` is written."""
  written = Metrics.write

  def write(self, stage, step, **values):
    written(self, stage, step, **values)
    if step == wanted and stage != 'validation':
      os.kill(os.getpid(), number)

  monkeypatch.setattr(Metrics, 'write', write)


def fine_tune(folder, tokenizer, model, **options):
  rows = []
  for number in range(8):
    asked = {'role': 'user', 'content': f'find {number} ' * 20}
    rows.append({'id': number, 'conversations': [asked, {'role': 'assistant', 'content': 'done.'}]})
  config = default_config().sft
  config.update(dict(epochs=2, capacity=256, rows=1, learning_rate=1e-2) | options)
  policy = Policy(config=model, load=None, tokenizer=tokenizer, tokenizer_dir=ORGANISM, path=None)
  with Metrics(folder) as metrics:
    return run_sft(
      decoder.init_params(model, jax.random.key(0)),
      policy,
      encode_rows(tokenizer, parse_rows(rows)),
      config,
      StageRun(metrics=metrics, checkpoints=folder / 'sft', seed=0),
      execution=Execution(),
    )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_fine_tuning_ends_with_a_checkpoint_and_goes_on(
  tokenizer, model, tmp_path, handled, monkeypatch, capfd, number
):
  whole, _ = fine_tune(tmp_path / 'whole', tokenizer, model)
  with monkeypatch.context() as patch, pytest.raises(stopping.Stopped) as stopped:
    told_at(patch, 2, number)
    fine_tune(tmp_path / 'parts', tokenizer, model)
  assert stopped.value.number == number
  assert capfd.readouterr().err.count('ends after this step, with a checkpoint') == 1
  parts, result = fine_tune(tmp_path / 'parts', tokenizer, model)
  # The row of a step is written while the next one runs, at whose end the run ends.
  assert result['resumed_at'] == 4
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  losses = [[row['loss'] for row in read_metrics(tmp_path / name)] for name in ('whole', 'parts')]
  assert losses[0] == losses[1]


def test_reinforcement_ends_with_a_checkpoint_and_goes_on(tmp_path, handled, monkeypatch):
  """Between two checkpoints that are due: the rows of validation stay those of a whole run."""
  config = tiny_rl.rl_config(steps=4, checkpoint_every=3)
  whole, before = tiny_rl.train(tmp_path / 'whole', config)
  with monkeypatch.context() as patch, pytest.raises(stopping.Stopped):
    told_at(patch, 0)
    tiny_rl.train(tmp_path / 'parts', config)
  stage = tmp_path / 'parts' / 'checkpoints'
  [saved] = [path.name for path in (stage / 'state').iterdir()]
  parts, after = tiny_rl.train(tmp_path / 'parts', config)
  assert after['resumed_at'] == int(saved) in (1, 2)
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  assert tiny_rl.timeless(tmp_path / 'whole') == tiny_rl.timeless(tmp_path / 'parts')
  for name in ('validation', 'best_step', 'prompts'):
    assert before[name] == after[name]


def test_a_signal_behind_the_last_step_ends_the_run_too(handled):
  with pytest.raises(stopping.Stopped), stopping.in_steps():
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_shell_has_told_to_ignore_stays_ignored(handled):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  stopping.handle_signals()
  os.kill(os.getpid(), signal.SIGINT)
  with pytest.raises(stopping.Stopped):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError('not raised')
  assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


WAITS = """
import os, signal, sys, time
from dcore_jax.run import program
from dcore_jax.train import stopping

def main():
  if sys.argv[0] == 'steps':
    with stopping.in_steps():
      print('begun', flush=True)
      while not stopping.asked():
        time.sleep(0.01)
      print('step over', flush=True)
      if not HANGS:
        stopping.stop()
      time.sleep(600)
  print('begun', flush=True)
  time.sleep(600)

sys.argv = [KIND]
program.run(main)
"""


@pytest.mark.parametrize(
  ('kind', 'signals', 'status'),
  [
    ('steps', [signal.SIGTERM], 143),
    ('steps', [signal.SIGINT], 130),
    ('other', [signal.SIGTERM], 143),
    ('other', [signal.SIGINT], 130),
    ('hanging', [signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM),
    ('hanging', [signal.SIGTERM, signal.SIGINT], -signal.SIGINT),
  ],
)
def test_exit_statuses(kind, signals, status):
  name = 'steps' if kind == 'hanging' else kind
  text = WAITS.replace('KIND', repr(name)).replace('HANGS', str(kind == 'hanging'))
  process = subprocess.Popen(
    [sys.executable, '-c', text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'begun\n'
  process.send_signal(signals[0])
  if name == 'steps':
    assert process.stdout.readline() == 'step over\n'
  for number in signals[1:]:
    process.send_signal(number)
  _, said = process.communicate(timeout=60)
  assert process.returncode == status, said
  assert ('interrupted; to go on: python -m ' in said) == (status > 0)
  assert 'Traceback' not in said


def test_gradients_that_are_no_numbers_end_a_run_and_change_no_weight(tokenizer, model, tmp_path):
  """The rate is so large that the second step has infinite weights, and no gradient."""
  with pytest.raises(ValueError, match=r'steps 1 to 3 are no finite.* sft.most_skipped = 2\. '):
    fine_tune(
      tmp_path, tokenizer, model, learning_rate=1e38, epochs=3, most_skipped=2, checkpoint_every=1
    )
  rows = read_metrics(tmp_path, 'sft')
  assert [row['skipped'] for row in rows] == [0, 1, 1, 1]


def test_reinforcement_without_gradients_ends(tmp_path):
  config = tiny_rl.rl_config(steps=6, learning_rate=1e38, most_skipped=1, validation=0)
  with pytest.raises(ValueError, match=r'rl.most_skipped = 1\. Parameters are those of step'):
    tiny_rl.train(tmp_path, config)
  rows = read_metrics(tmp_path, 'rl')
  assert [row['skipped'] for row in rows[-2:]] == [config.updates] * 2


def test_only_steps_in_a_row_count_also_those_of_the_process_before():
  skips = Skips('rl', 2, updates=2, rows=[{'skipped': 2}] * 2)
  skips.see(2, {'skipped': 1})  # one of its two updates was made
  skips.see(3, {'skipped': 2})
  skips.see(4, {'skipped': 2})
  with pytest.raises(ValueError, match='steps 3 to 5'):
    skips.see(5, {'skipped': 2})
  with pytest.raises(ValueError, match='steps 0 to 2'):
    Skips('rl', 2, rows=[{'skipped': 1}] * 2).see(2, {'skipped': 1})
  endless = Skips('rl', 0)
  for step in range(100):
    endless.see(step, {'skipped': 1})
