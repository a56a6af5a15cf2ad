import pytest

from dcore_jax.run.summary import validate_summary, wilson_interval
from tests.run import example_run


def test_the_published_shape_passes_and_stages_may_be_left_out():
  summary = example_run.a_summary()
  validate_summary(summary)
  for field in ('distill', 'rl', 'export', 'run'):
    del summary[field]
  summary['stages'] = {'base': summary['stages']['base']}
  summary['stages']['base']['accuracy']['multi_turn'] = None
  summary['stages']['base']['behaviours'] = {'reflection': 2.0}
  validate_summary(summary)


def test_all_that_is_wrong_is_named_at_once():
  summary = example_run.a_summary()
  stages = summary['stages']
  stages['final'] = stages.pop('da_grpo')
  stages['base']['accuracy']['single'] = 94.5
  del stages['base']['lazy_ratio']['parallel']
  del stages['sft']['reasoning_tokens_mean']
  stages['sft']['n']['single'] = 12.5
  summary['distill']['success_rate'] = 'high'
  summary['distill']['dropped'] = None
  summary['rl']['reward'] = summary['rl']['reward'][:-1]
  summary['rl']['entropy'] = float('nan')
  summary['seconds']['sft'] = float('inf')
  summary['export'] = 3
  with pytest.raises(ValueError) as error:
    validate_summary(summary)
  for part in ('stages.final is not one of base, sft, grpo, dr_grpo, rl_zvp, da_grpo',
               'stages.base.accuracy.single = 94.5 is not a share',
               'stages.base.lazy_ratio lacks parallel', 'stages.sft.reasoning_tokens_mean is missing',
               'stages.sft.n.single = 12.5 is not a count', "distill.success_rate = 'high' is not a share",
               'distill.dropped is missing', 'rl.entropy is not a list', 'curves of rl differ in length',
               'seconds.sft = inf is not a number', 'export is not a path'):
    assert part in str(error.value), part


@pytest.mark.parametrize('summary', [None, [], {}, {'stages': {}}, {'stages': {'base': 3}, 'seconds': {}}])
def test_what_is_no_summary_is_refused(summary):
  with pytest.raises(ValueError, match='^summary: '):
    validate_summary(summary)


@pytest.mark.parametrize('share, n, low, high', [(0.5, 100, 0.40383, 0.59617), (0.0, 10, 0.0, 0.27754),
                                                 (1.0, 10, 0.72246, 1.0), (0.05, 100, 0.02154, 0.11175)])
def test_wilson_interval_agrees_with_published_values(share, n, low, high):
  assert wilson_interval(share, n) == pytest.approx((low, high), abs=2e-5)


def test_wilson_interval_refuses_no_trials():
  with pytest.raises(ValueError, match='n=0'):
    wilson_interval(0.5, 0)
