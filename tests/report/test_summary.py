import pytest

from dcore_jax.report.summary import format_changes, validate_summary
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
  # What may not be left out.
  del summary['stages']
  with pytest.raises(ValueError, match='stages is missing'):
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
  # Their figures are checked like those of known names.
  stage['n']['riddle'] = 'four'
  with pytest.raises(ValueError, match="stages.my_estimator.n.riddle = 'four'"):
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


def test_an_interval_must_hold_its_difference():
  summary = example_run.a_summary()
  pair = summary['changes'][0]['accuracy']['single']
  pair['interval'] = [0.0, 0.05]
  validate_summary(summary)
  pair['interval'] = [0.02, 0.05]
  with pytest.raises(ValueError, match=r'changes\[0\].accuracy.single: the interval .* 0.016'):
    validate_summary(summary)


def test_changes_are_lines():
  lines = format_changes(example_run.a_summary()).splitlines()
  assert (
    lines[0]
    == 'base -> sft, points of held-out tasks right: single +1.6 [-2.8, +6.0] (128 tasks), '
    'sequential +35.2 [+25.5, +44.9] (128 tasks)'
  )
  assert lines[-1] == (
    'reward on 32 prompts set aside: 3.400 -> 3.460, +0.060 [-0.042, +0.162] (32 tasks)'
  )
  assert (
    format_changes({'changes': [], 'rl': {'validation': {'before': None, 'difference': None}}})
    == ''
  )
