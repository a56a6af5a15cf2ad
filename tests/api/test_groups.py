"""Groups that are sampled to be looked at are those of a step, with its advantages."""

import numpy as np
import pytest

import dcore_jax
from dcore_jax.api.groups import Group
from dcore_jax.report.trace_page import write_trace_page
from dcore_jax.run.config import default_config
from tests.train.tiny_rl import points

RL = dict(prompts=2, group=4, updates=1, max_tokens=12, alpha=0.4, delta=0.5)


@pytest.fixture(scope='module')
def small():
  config = default_config()
  config.engine.update(dict(lanes=8, max_len=96))
  return config


@pytest.fixture(scope='module')
def groups(tiny, small):
  return dcore_jax.sample_groups(tiny, points(3), config=small, seed=1, **RL)


def made_group(rewards, right, entropy=0.5, psi=0.0, advantage=1.0, tokens=2):
  count = len(rewards)
  return Group(
    kind='single',
    messages=({'role': 'user', 'content': 'q'},),
    reference='[f()]',
    texts=('a',) * count,
    tokens=(('a',) * tokens,) * count,
    rewards=tuple(rewards),
    right=tuple(right),
    entropies=(np.full(tokens, entropy),) * count,
    logprobs=(np.full(tokens, -1.0),) * count,
    advantages=tuple(np.full(tokens, advantage * (-1) ** g) for g in range(count)),
    psi=(np.full(tokens, psi),) * count,
    uniform=len(set(rewards)) == 1,
  )


def test_psi_takes_the_place_of_advantages_that_vanish(groups):
  assert len(groups) == 3 and all(len(group.texts) == 4 for group in groups)
  # Random weights are never right: equation 7, written out.
  for group in groups:
    assert group.uniform and group.verdict == 'all wrong'
    for g in range(4):
      expected = np.minimum(0.4 * group.entropies[g], 0.5)
      np.testing.assert_allclose(group.psi[g], expected, rtol=1e-6)
      np.testing.assert_allclose(group.advantages[g], expected, rtol=1e-6)
      assert len(group.tokens[g]) == len(expected) == len(group.logprobs[g]) <= 12


def test_plain_grpo_gives_them_nothing(tiny, small, groups):
  plain = dcore_jax.sample_groups(
    tiny, points(3), config=small, seed=1, **(RL | {'estimator': 'grpo'})
  )
  # The same rollouts: what is drawn does not depend on the estimator.
  assert [group.texts for group in plain] == [group.texts for group in groups]
  assert not any(np.any(advantage) for group in plain for advantage in group.advantages)


def test_a_prompt_has_its_rollouts_whichever_others_are_asked(tiny, small, groups):
  [alone] = dcore_jax.sample_groups(tiny, points(3)[1:2], config=small, seed=1, **RL)
  assert alone.texts == groups[1].texts
  other = dcore_jax.sample_groups(tiny, points(3)[1:2], config=small, seed=2, **RL)
  assert other[0].texts != alone.texts


def test_a_page_shows_their_tokens(groups, tmp_path):
  traces = [trace for number, group in enumerate(groups) for trace in group.to_traces(str(number))]
  assert write_trace_page(tmp_path / 'page.html', {'groups': traces}, 'groups') == 12
  assert traces[0]['query'] == 'find the order of Karo 0' and traces[0]['correct'] is False


def test_groups_are_counted_by_verdict():
  rows = dcore_jax.group_table(
    [
      made_group([4, 4], [True, True], entropy=0.2, psi=0.1),
      made_group([4, -3], [True, False], tokens=4),
      made_group([4, 4], [True, True], entropy=0.8, psi=0.3, tokens=6),
      made_group([1, 1], [True, False]),
    ]
  )
  assert [(row['verdict'], row['groups'], row['share']) for row in rows] == [
    ('all right', 2, 0.5),
    ('between', 1, 0.25),
    ('mixed', 1, 0.25),
  ]
  # Over tokens, so that long rollouts count more; the sign of an advantage does not.
  assert rows[0]['entropy'] == pytest.approx((2 * 0.2 + 6 * 0.8) / 8)
  assert rows[0]['psi'] == pytest.approx((2 * 0.1 + 6 * 0.3) / 8)
  assert rows[2]['advantage'] == 1 and rows[2]['reward'] == 0.5 and rows[2]['tokens'] == 4


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (dict(alhpa=1), "did you mean 'rl.alpha'"),
    (dict(files=('x',)), 'points are given, and files names others'),
    (dict(max_prompt_tokens=1), 'no prompt has at most'),
    (dict(estimator='self_distillation', teacher='{reference}'), 'reads a teacher'),
  ],
)
def test_what_cannot_be_asked_is_named(tiny, small, options, said):
  with pytest.raises(ValueError, match=said):
    dcore_jax.sample_groups(tiny, points(2), config=small, **(RL | options))


def test_episodes_are_no_groups(tiny, small):
  with pytest.raises(ValueError, match='groups are of single prompts'):
    dcore_jax.sample_groups(tiny, config=small, **(RL | {'episodes': True}))
