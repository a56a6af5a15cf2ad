import pytest

from dcore_jax.report.summary import format_changes, validate_summary
from dcore_jax.statistics import paired_difference, wilson_interval
from tests.report import example_run


def test_the_published_shape_passes_and_stages_may_be_left_out():
  summary = example_run.a_summary()
  validate_summary(summary)
  for field in ('distill', 'rl', 'export', 'run', 'changes'):
    del summary[field]
  summary['stages'] = {'base': summary['stages']['base']}
  summary['stages']['base']['accuracy']['multi_turn'] = None
  summary['stages']['base']['behaviours'] = {'reflection': 2.0}
  validate_summary(summary)


def test_stages_and_kinds_may_have_any_name():
  summary = example_run.a_summary()
  stage = {
    'accuracy': {'riddle': 0.5},
    'lazy_ratio': {'riddle': None},
    'n': {'riddle': 4},
    'decomposition_rate': None,
    'reflections_per_response': 0.1,
    'reasoning_tokens_mean': 12,
  }
  summary['stages'] = {'base': stage, 'my_estimator': stage}
  pair = {'difference': 0.0, 'standard_error': None, 'n': 4}
  summary['changes'] = [{'from': 'base', 'to': 'my_estimator', 'accuracy': {'riddle': pair}}]
  validate_summary(summary)


def test_all_that_is_wrong_is_named_at_once():
  summary = example_run.a_summary()
  stages = summary['stages']
  stages['base']['accuracy']['single'] = 94.5
  del stages['sft']['reasoning_tokens_mean']
  stages['sft']['n']['single'] = 12.5
  summary['distill']['success_rate'] = 'high'
  summary['distill']['dropped'] = None
  summary['rl']['entropy'] = float('nan')
  summary['seconds']['sft'] = float('inf')
  summary['export'] = 3
  summary['changes'][0]['accuracy']['single'] = {'difference': 0.1, 'n': 3}
  with pytest.raises(ValueError) as error:
    validate_summary(summary)
  for part in (
    'stages.base.accuracy.single = 94.5: Input should be less than or equal to 1',
    'stages.sft.reasoning_tokens_mean is missing',
    'stages.sft.n.single = 12.5: ',
    "distill.success_rate = 'high': ",
    'distill.dropped = None: ',
    'rl.entropy = nan: Input should be a valid list',
    'seconds.sft = inf: Input should be a finite number',
    'changes[0].accuracy.single.standard_error is missing',
    'export = 3: Input should be a valid string',
  ):
    assert part in str(error.value), part


def test_parts_that_do_not_belong_together_are_named():
  summary = example_run.a_summary()
  del summary['stages']['base']['lazy_ratio']['parallel']
  summary['rl']['reward'] = summary['rl']['reward'][:-1]
  with pytest.raises(ValueError) as error:
    validate_summary(summary)
  assert 'stages.base: lazy_ratio lacks parallel, which n has' in str(error.value)
  assert 'rl: the curves of rl differ in length' in str(error.value)
  summary = example_run.a_summary()
  del summary['stages']['da_grpo']
  with pytest.raises(ValueError, match=r"changes\[1\] is of \['da_grpo'\], which are no stages"):
    validate_summary(summary)


@pytest.mark.parametrize(
  'summary', [None, [], {}, {'stages': {}}, {'stages': {'base': 3}, 'seconds': {}}]
)
def test_what_is_no_summary_is_refused(summary):
  with pytest.raises(ValueError, match='^summary: '):
    validate_summary(summary)


@pytest.mark.parametrize(
  'share, n, low, high',
  [
    (0.5, 100, 0.40383, 0.59617),
    (0.0, 10, 0.0, 0.27754),
    (1.0, 10, 0.72246, 1.0),
    (0.05, 100, 0.02154, 0.11175),
  ],
)
def test_wilson_interval_agrees_with_published_values(share, n, low, high):
  assert wilson_interval(share, n) == pytest.approx((low, high), abs=2e-5)


def test_wilson_interval_refuses_no_trials():
  with pytest.raises(ValueError, match='n=0'):
    wilson_interval(0.5, 0)


def test_what_tasks_have_in_common_does_not_widen_a_difference():
  """Student's sleep data, hours gained by ten patients from two drugs.

  1.58 with a standard error of 0.389, which is t = 4.06.
  """
  first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0, 2]
  second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
  drugs = paired_difference(first, second)
  assert drugs == {
    'difference': pytest.approx(1.58),
    'standard_error': pytest.approx(0.388959, rel=1e-5),
    'n': 10,
  }
  assert paired_difference([True], [False]) == {'difference': -1, 'standard_error': None, 'n': 1}
  for pair in (([], []), ([1], [1, 2])):
    with pytest.raises(ValueError, match='are no pairs'):
      paired_difference(*pair)


def test_changes_are_lines():
  lines = format_changes(example_run.a_summary()).splitlines()
  assert (
    lines[0]
    == 'base -> sft, points of held-out tasks right: single +1.6 ± 2.2, sequential +35.2 ± 4.9'
  )
  assert lines[-1] == 'reward on 32 prompts set aside: 3.400 -> 3.460, +0.060 ± 0.050'
  assert (
    format_changes({'changes': [], 'rl': {'validation': {'before': None, 'difference': None}}})
    == ''
  )
