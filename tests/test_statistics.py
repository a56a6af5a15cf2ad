"""Intervals of shares, means and differences: what they hold, how wide, how often right."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dcore_jax.statistics import (
  RUNS,
  bootstrap_difference,
  change_probability,
  estimate_mean,
  estimate_share,
  format_estimate,
  interval_of,
  paired_difference,
  standard_error,
  wilson_interval,
)

SHARES = (0.0, 1.0)


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

  1.58 with a standard error of 0.389, which is t = 4.06; the 95 % interval is 0.70 to 2.46.
  """
  first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0, 2]
  second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
  assert paired_difference(first, second, unit='patients') == {
    'difference': pytest.approx(1.58),
    'standard_error': pytest.approx(0.388959, rel=1e-5),
    'interval': pytest.approx([0.700114, 2.459886], rel=1e-5),
    'n': 10,
    'unit': 'patients',
  }
  for pair in (([], []), ([1], [1, 2])):
    with pytest.raises(ValueError, match='are no pairs'):
      paired_difference(*pair)


def test_few_runs_do_not_bound_what_others_could_give():
  """Two runs, t = 12.7062 with one degree of freedom: further than any of them differs."""
  found = paired_difference([0.1, 0.1], [0.2, 0.4], unit=RUNS)
  half = 12.706205 * 0.1
  assert found['interval'] == pytest.approx([0.2 - half, 0.2 + half])
  bounded = paired_difference([0.1, 0.1], [0.2, 0.4], unit=RUNS, bounds=SHARES)
  assert bounded['interval'] == pytest.approx([-1, 1])


def test_one_unit_has_no_interval():
  for found in (
    paired_difference([True], [False]),
    paired_difference([1, 2], [2, 3.5], clusters=['task', 'task']),
    estimate_share(1.0, 1),
    estimate_mean([0.5], unit=RUNS, bounds=SHARES),
  ):
    assert (found['standard_error'], found['interval'], found['n']) == (None, None, 1)
  assert format_estimate(paired_difference([1], [0]), 1) == '-1.0 (1 task: no interval)'
  assert format_estimate(estimate_mean([0.5], unit=RUNS), 1, 100) == '50.0 (1 run: no interval)'
  assert standard_error([3.0]) is None and standard_error([3.0, 3.0]) is None


def test_a_change_that_no_task_shows_has_an_interval():
  """0 of 128 tasks gained and 0 lost: 2.9 points each way, as of a share of 0 of 128."""
  found = paired_difference([True] * 128, [True] * 128)
  high = wilson_interval(0.0, 128)[1]
  assert found['interval'] == pytest.approx([-high, high]) and high == pytest.approx(
    0.0291, abs=1e-4
  )
  assert format_estimate(found, 1, 100) == '+0.0 [-2.9, +2.9] (128 tasks)'
  # Fractions right of 8 rollouts are no shares of tasks: 2.8 % of the tasks may differ by 1.
  found = paired_difference([0.125] * 128, [0.125] * 128, bounds=SHARES)
  assert found['interval'] == pytest.approx([-0.0284, 0.0284], abs=1e-4)
  # Nothing says how far apart two reflection counts could be.
  found = paired_difference([2.0] * 5, [2.0] * 5)
  assert found['interval'] is None
  assert format_estimate(found, 1) == '+0.0 (5 tasks, all alike: no interval)'


def test_all_or_none_right_has_an_interval():
  assert estimate_share(0.0, 20)['interval'] == pytest.approx([0, 0.16113], abs=1e-5)
  assert estimate_share(1.0, 20)['interval'] == pytest.approx([0.83887, 1], abs=1e-5)
  # Three runs, none of which solves a task: of 70.8 % of runs it is not excluded (0.025^(1/3)).
  found = estimate_mean([0.0, 0.0, 0.0], unit=RUNS, bounds=SHARES)
  assert found['interval'] == pytest.approx([0, 1 - 0.025 ** (1 / 3)])


def test_prompts_of_one_task_are_one_unit():
  """Copying a task's prompts adds nothing; with a prompt a task nothing changes."""
  values = [0.0, 1.0, 5.0, 2.0]
  plain = estimate_mean(values)
  assert estimate_mean(values, clusters=list('abcd')) == plain
  doubled = estimate_mean(np.repeat(values, 2), clusters=list('aabbccdd'))
  assert doubled['n'] == 4 and doubled['interval'] == pytest.approx(plain['interval'])
  assert estimate_mean(np.repeat(values, 2))['standard_error'] < 0.8 * doubled['standard_error']
  with pytest.raises(ValueError, match='2 values of 1 units'):
    estimate_mean([1, 2], clusters=['a'])


def test_files_of_earlier_programs_are_shown():
  old = {'difference': 0.5, 'standard_error': 0.1, 'n': 3}
  assert interval_of(old) == pytest.approx([0.5 - 0.430265, 0.5 + 0.430265], rel=1e-5)
  assert format_estimate(old, 1) == '+0.5 [+0.1, +0.9] (3 tasks)'
  assert interval_of({'mean': 0.5, 'half_width': 0.1}) == pytest.approx([0.4, 0.6])
  assert interval_of({'mean': 0.5, 'standard_error': None, 'n': 1}) is None


numbers = st.floats(-100, 100).map(lambda value: round(value, 3))


@hypothesis.given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_interval_of_a_share_holds_it_and_has_a_width(right):
  found = estimate_share(float(np.mean(right)), len(right))
  low, high = found['interval']
  assert 0 <= low <= found['mean'] <= high <= 1 and low < high
  # Four times as many tasks with the same share say more.
  more = estimate_share(found['mean'], 4 * len(right))['interval']
  assert more[1] - more[0] < high - low


@hypothesis.given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50))
def test_the_interval_of_a_change_of_shares_holds_it_and_has_a_width(pairs):
  before, after = zip(*pairs, strict=True)
  found = paired_difference(before, after)
  low, high = found['interval']
  assert -1 <= low <= found['difference'] <= high <= 1 and low < high
  more = paired_difference(before * 4, after * 4)['interval']
  assert more[1] - more[0] < high - low
  # The other way round it is the mirror image.
  assert paired_difference(after, before)['interval'] == pytest.approx([-high, -low])


@hypothesis.given(st.lists(st.tuples(numbers, numbers, st.integers(0, 5)), min_size=2))
def test_the_interval_of_a_difference_holds_it_and_has_a_width(rows):
  before, after, tasks = zip(*rows, strict=True)
  names = [str(task) for task in tasks]
  found = paired_difference(before, after, clusters=names, bounds=(-100.0, 100.0))
  assert found['n'] == len(set(names))
  if found['n'] == 1:
    assert found['interval'] is None
    return
  low, high = found['interval']
  assert low <= found['difference'] <= high and low < high


def _covers(found, truth):
  low, high = found['interval']
  return low <= truth <= high


def test_intervals_hold_the_truth_as_often_as_they_say():
  """2,000 draws of known populations: 95 % within three standard errors of a share of 2,000."""
  rng = np.random.default_rng(0)
  hits = {'share': 0, 'change': 0, 'rare change': 0, 'clusters': 0, 'runs': 0}
  draws = 2000
  for _ in range(draws):
    right = rng.random(64) < 0.3
    hits['share'] += _covers(estimate_share(float(right.mean()), 64), 0.3)
    # 10 and 5 %, and 2 and 0 %, of the tasks are gained and lost.
    for name, gained, lost in (('change', 0.1, 0.05), ('rare change', 0.02, 0.0)):
      drawn = rng.random(64)
      before = np.where(drawn < gained, 0, np.where(drawn < gained + lost, 1, right))
      after = np.where(drawn < gained, 1, np.where(drawn < gained + lost, 0, right))
      hits[name] += _covers(paired_difference(before, after), gained - lost)
    # 20 tasks with four prompts each, that have as much in common as they have not.
    values = rng.normal(size=(20, 1)) + rng.normal(size=(20, 4))
    tasks = np.repeat(np.arange(20), 4).astype(str).tolist()
    hits['clusters'] += _covers(estimate_mean(values.ravel(), clusters=tasks), 0)
    hits['runs'] += _covers(estimate_mean(rng.normal(size=3), unit=RUNS), 0)
  shares = {name: hit / draws for name, hit in hits.items()}
  assert all(share > 0.935 for share in shares.values()), shares
  # A rare change is covered more often than it need be; the others as they say.
  assert all(share < 0.98 for name, share in shares.items() if name != 'rare change'), shares


@pytest.mark.parametrize(
  'gained, lost, probability',
  [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 3, 10 / 16), (2, 8, 112 / 1024)],
)
def test_the_probability_of_a_change_is_that_of_coins(gained, lost, probability):
  assert change_probability(gained, lost) == pytest.approx(probability)


def test_no_probability_of_negative_counts():
  with pytest.raises(ValueError, match='-1 gained'):
    change_probability(-1, 2)


def test_bootstrap_intervals_hold_the_truth_and_know_their_units():
  rng = np.random.default_rng(1)
  hits = {'long tails': 0, 'clusters': 0}
  draws = 60
  owners = np.repeat(np.arange(30), 3).astype(str).tolist()
  for _ in range(draws):
    # Lengths of thoughts: most are short, and a few are very long.
    before, after = rng.exponential(size=(2, 80)) * 100
    hits['long tails'] += _covers(bootstrap_difference(before, after), 0)
    shift = np.repeat(rng.normal(size=30), 3) + 0.1 * rng.normal(size=90)
    hits['clusters'] += _covers(bootstrap_difference(np.zeros(90), shift, clusters=owners), 0)
  # Three standard errors of a share of 60 below 95 %.
  assert all(hit / draws > 0.86 for hit in hits.values()), hits


# Plain percentiles give 0.63, 0.78 and 0.91. Samples of 5 units have few different means.
@pytest.mark.parametrize(('n', 'least'), [(5, 0.8), (8, 0.93), (20, 0.96)])
def test_bootstrap_intervals_of_few_units_are_as_wide_as_others(n, least):
  rng = np.random.default_rng(n)
  ratios = []
  for _ in range(40):
    after = rng.normal(size=n)
    width, expected = (
      float(np.diff(estimate(np.zeros(n), after)['interval'])[0])
      for estimate in (bootstrap_difference, paired_difference)
    )
    ratios.append(width / expected)
  assert least < np.mean(ratios) < 1.05


def test_bootstrap_intervals_repeat_and_need_a_spread():
  before, after = np.arange(12.0), np.arange(12.0) ** 1.5
  found = bootstrap_difference(before, after)
  assert found == bootstrap_difference(before, after)
  assert found['difference'] == paired_difference(before, after)['difference']
  assert found['interval'] != bootstrap_difference(before, after, seed=1)['interval']
  assert bootstrap_difference([1], [3])['interval'] is None
  # Equal changes have no samples that differ: their interval is that of what was not seen.
  assert bootstrap_difference([1, 2], [2, 3]) == paired_difference([1, 2], [2, 3])
