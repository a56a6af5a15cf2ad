"""Counts of the four behaviours in reasoning texts."""

import json

import numpy as np
import pytest

from dcore_jax.evaluate.behaviour.labels import BEHAVIOURS, behaviour_counts, count_behaviours


@pytest.mark.parametrize(
  'text, counts',
  [
    ('', (0, 0, 0, 0)),
    ('An attribute of the button, distributed.', (0, 0, 0, 0)),
    ('First, break the task down into sub-tasks: subtask 1, then Step 2.', (4, 0, 0, 0)),
    ('Wait, BUT hmmm. However, let me rethink.', (0, 5, 0, 0)),
    ('Let me check. I should double-check and verify; make sure it is confirmed.', (0, 0, 5, 0)),
    ('Since it rains, we stay. Therefore, because of this, so the park is out.', (0, 0, 0, 4)),
  ],
)
def test_counts(text, counts):
  assert count_behaviours(text) == dict(zip(BEHAVIOURS, counts, strict=True))


def test_batch():
  counts = behaviour_counts(['wait', 'therefore, wait', ''])
  assert tuple(counts) == BEHAVIOURS == ('decomposition', 'reflection', 'verification', 'deduction')
  np.testing.assert_array_equal(counts['reflection'], [1, 1, 0])
  np.testing.assert_array_equal(counts['deduction'], [0, 1, 0])
  assert all(
    array.shape == (0,) and array.dtype == np.int32 for array in behaviour_counts([]).values()
  )


def test_published_models_differ_in_decomposition(data_dir):
  means = {}
  for model in ('Qwen3-8B', 'D-CORE-14B'):
    path = data_dir / 'dcore_published' / 'result' / model / 'BFCL_v3_parallel_result.json'
    texts = [
      json.loads(line)['reasoning_content']
      for line in path.read_text(encoding='utf-8').splitlines()
    ]
    means[model] = {name: counts.mean() for name, counts in behaviour_counts(texts).items()}
  assert means['D-CORE-14B']['decomposition'] > 10 * means['Qwen3-8B']['decomposition']
