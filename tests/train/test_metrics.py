import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from dcore_jax import files
from dcore_jax.train import metrics


def test_rows_come_back_as_written(tmp_path):
  with metrics.Metrics(tmp_path) as out:
    out.write('sft', 0, loss=jnp.float32(0.5), rows=np.int64(3), scale=jnp.bfloat16(2.0), ok=True)
    out.write('rl', 1, reward=float('nan'), kl=np.inf, entropy=None)
  assert metrics.read_metrics(tmp_path) == [
    {'stage': 'sft', 'step': 0, 'loss': 0.5, 'rows': 3, 'scale': 2.0, 'ok': True},
    {'stage': 'rl', 'step': 1, 'reward': None, 'kl': None, 'entropy': None},
  ]
  assert [row['step'] for row in metrics.read_metrics(tmp_path, 'rl')] == [1]
  assert list((tmp_path / 'tensorboard').iterdir())


def test_each_row_is_on_disk_at_once(tmp_path):
  with metrics.Metrics(tmp_path) as out:
    out.write('sft', 0, loss=1.0)
    assert len(metrics.read_metrics(tmp_path)) == 1


def test_a_torn_last_line_is_left_out_and_cut_when_the_run_goes_on(tmp_path):
  with metrics.Metrics(tmp_path) as out:
    out.write('sft', 0, loss=1.0)
  file = tmp_path / metrics.METRICS_FILE
  file.write_bytes(file.read_bytes() + b'{"stage": "sft", "st')
  assert len(metrics.read_metrics(tmp_path)) == 1
  with metrics.Metrics(tmp_path) as out:
    out.write('sft', 1, loss=0.5)
  assert [row['loss'] for row in metrics.read_metrics(tmp_path)] == [1.0, 0.5]


def test_a_damaged_line_inside_the_file_is_named(tmp_path):
  (tmp_path / metrics.METRICS_FILE).write_text(
    '{"stage": "sft", "step": 0}\nnonsense\n{"stage": "sft", "step": 1}\n'
  )
  with pytest.raises(ValueError, match='line 2 is not JSON'):
    metrics.read_metrics(tmp_path)


def test_rewind_drops_what_a_resumed_stage_writes_again(tmp_path):
  with metrics.Metrics(tmp_path) as out:
    for step in range(4):
      out.write('sft', step, loss=float(step))
    out.write('rl', 3, reward=1.0)
    out.rewind('sft', 2)
    out.write('sft', 2, loss=20.0)
  assert [(row['stage'], row['step']) for row in metrics.read_metrics(tmp_path)] == [
    ('sft', 0),
    ('sft', 1),
    ('rl', 3),
    ('sft', 2),
  ]


def test_no_file_is_no_rows(tmp_path):
  assert metrics.read_metrics(tmp_path) == []


@pytest.mark.parametrize('value', ['high', np.zeros(3)])
def test_what_is_no_number_is_refused_by_name(tmp_path, value):
  with metrics.Metrics(tmp_path) as out:
    with pytest.raises(ValueError, match="'entropy' must be one number"):
      out.write('rl', 0, entropy=value)
  assert metrics.read_metrics(tmp_path) == []


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'deep' / 'summary.json'
  files.write_json_atomic(path, {'x': 1, 'é': [1.5]})
  with pytest.raises(ValueError):
    files.write_json_atomic(path, {'x': float('nan')})
  with pytest.raises(TypeError):
    files.write_json_atomic(path, {'x': object()})
  assert files.read_json(path) == {'x': 1, 'é': [1.5]}
  assert [f.name for f in path.parent.iterdir()] == ['summary.json']
  path.write_text('{')
  with pytest.raises(ValueError, match='summary.json is not JSON'):
    files.read_json(path)


def test_tensorboard_gets_the_same_numbers(tmp_path):
  with metrics.Metrics(tmp_path) as out:
    for step in range(3):
      out.write('rl', step, reward=0.5 * step, kl=None, skipped=0)
  [path] = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  data = path.read_bytes()
  found = []
  while data:
    [length] = struct.unpack('<Q', data[:8])
    event = Event.FromString(data[12 : 12 + length])
    for value in event.summary.value:
      found.append((event.step, value.tag, value.simple_value))
    # Behind the length and behind the event stand their checksums, 4 bytes each.
    data = data[16 + length :]
  wanted = []
  for step in range(3):
    wanted += [(step, 'rl/reward', 0.5 * step), (step, 'rl/skipped', 0.0)]
  assert found == wanted
