"""The program that kills the pipeline: it sees what it has to see."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests import kills

ROOT = pathlib.Path(__file__).parents[2]


def finished(folder, *, loss=0.5, seconds=1.0, answers=('a', 'b')):
  """A folder that looks like one of a run."""
  (folder / 'sft').mkdir(parents=True)
  (folder / 'distill').mkdir()
  (folder / 'sft' / 'model.safetensors').write_bytes(b'weights')
  (folder / 'sft' / 'result.json').write_text(json.dumps({'seconds': seconds, 'last_loss': loss}))
  (folder / 'summary.json').write_text(
    json.dumps({'export': str(folder / 'export'), 'sft': {'seconds': seconds, 'loss': loss}})
  )
  rows = [{'stage': 'sft', 'step': step, 'loss': loss, 'mfu': seconds} for step in range(2)]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  replies = [json.dumps({'key': key, 'seconds': seconds}) + '\n' for key in answers]
  (folder / 'distill' / 'replies.jsonl').write_text(''.join(replies))
  row = {'id': 'a', 'conversations': [], 'provenance': {'seconds': seconds}}
  (folder / 'distill' / 'rows-00000.jsonl').write_text(json.dumps(row) + '\n')
  return folder


def test_times_and_the_order_of_arrival_are_no_differences(tmp_path):
  whole = finished(tmp_path / 'whole')
  other = finished(tmp_path / 'other', seconds=2.0, answers=('b', 'a'))
  assert kills.differences(other, whole) == []


def test_what_differs_or_is_there_twice_is_named(tmp_path):
  whole = finished(tmp_path / 'whole')
  other = finished(tmp_path / 'other', loss=0.25, answers=('a', 'b', 'a'))
  (other / 'sft' / 'model.safetensors').write_bytes(b'wEights')
  with (other / 'metrics.jsonl').open('a') as rows:
    rows.write(json.dumps({'stage': 'sft', 'step': 1, 'loss': 0.25}) + '\n')
  (other / '.sft.partial').mkdir()
  assert kills.differences(other, whole) == [
    'distill/replies.jsonl',
    'metrics.jsonl',
    'sft/model.safetensors',
    'sft/result.json',
    'summary.json',
    '.sft.partial is left over',
    'rows of metrics.jsonl',
    'replies of distill/replies.jsonl',
  ]


def test_the_stage_under_way_is_the_first_without_a_result(tmp_path):
  assert kills.stage_under_way(tmp_path) == 'evaluate_base'
  for folder in ('evaluate_base', 'distill'):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / 'result.json').write_text('{}')
  assert kills.stage_under_way(tmp_path) == 'sft'


@pytest.mark.slow
def test_ten_kills(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'tests.kills', '--kills=10', f'--workdir={tmp_path}'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  assert ' 0 differences' in done.stdout
