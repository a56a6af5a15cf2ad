"""The order of prompts: complete epochs, further turns of a step, and which items are held out."""

import collections

import hypothesis
import pytest
from hypothesis import strategies as st

from dcore_jax.train.prompt_order import Label, PromptOrder, set_aside, training_order


def test_an_epoch_asks_every_item_once_and_the_next_in_another_order():
  order = PromptOrder(items=range(10, 18), prompts=2, seed=1)
  epochs = []
  for epoch in range(2):
    epochs.append([item for step in range(4) for item in order.chosen(4 * epoch + step)])
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10, 18))
  assert epochs[0] != epochs[1]


def test_further_turns_ask_all_other_items_before_any_a_second_time():
  order = PromptOrder(items=range(8), prompts=2, seed=1)
  turns = [index for turn in range(4) for index in order.chosen(0, turn)]
  assert sorted(turns) == list(range(8)) and len(set(order.chosen(0, 4))) == 2
  assert PromptOrder(items=range(8), prompts=2, seed=1).chosen(0, 1) == order.chosen(0, 1)


def labels(*kinds):
  """Items that are each a task of their own."""
  return [Label(task=f'{kind}{n}', kind=kind, stream=n) for n, kind in enumerate(kinds)]


def test_every_kind_gives_its_share_of_the_held_out_items():
  items = labels('a', 'b', 'a', 'b', 'a', 'a', 'a', 'a')
  aside = set_aside(items, 4, seed=0)
  assert [items[number].kind for number in aside].count('a') == 3 and len(aside) == 4
  assert set_aside(items, 0, seed=0) == []
  with pytest.raises(ValueError, match='rl.validation = 9 exceeds the 8 prompts'):
    set_aside(items, 9, seed=0)
  assert {tuple(set_aside(items, 4, seed=seed)) for seed in range(9)} != {tuple(aside)}


def test_a_task_is_not_cut_into_two():
  """Of tasks with 3, 3 and 2 prompts, 4 prompts are at most one task."""
  items = [Label(task=task, kind='a', stream=0) for task in 'xxxyyyzz']
  assert set_aside(items, 4, seed=0) in ([0, 1, 2], [3, 4, 5], [6, 7])
  with pytest.raises(ValueError, match='rl.validation = 1: .* the smallest has 2 prompts'):
    set_aside(items, 1, seed=0)


def test_a_kind_of_large_tasks_leaves_room_for_the_others():
  items = [Label(task='l', kind='long', stream=0)] * 4
  items += [Label(task='m', kind='long', stream=0), Label(task='s', kind='short', stream=0)]
  for count in (2, 5):
    aside = set_aside(items, count, seed=3)
    assert {items[number].kind for number in aside} == {'long', 'short'} and len(aside) <= count


@st.composite
def sources(draw):
  """Tasks of some kinds with 1 to 4 items each, the items in any order."""
  items = []
  for kind in draw(st.sets(st.sampled_from('abcd'), min_size=1)):
    for number in range(draw(st.integers(1, 6))):
      size = draw(st.integers(1, 4))
      items += [Label(task=f'{kind}-{number}', kind=kind, stream=0)] * size
  return draw(st.permutations(items))


@hypothesis.given(sources(), st.integers(0, 20), st.integers(0, 3), st.randoms())
def test_the_split_is_one_of_tasks(items, count, seed, random):
  count = min(count, len(items))
  smallest = min(collections.Counter(label.task for label in items).values())
  hypothesis.assume(count == 0 or count >= smallest)
  aside = set_aside(items, count, seed)
  rest = training_order([label.kind for label in items], aside)
  assert sorted(aside + rest) == list(range(len(items))) and len(aside) <= count
  held_out = {items[number].task for number in aside}
  assert held_out.isdisjoint(items[number].task for number in rest)
  # Every kind, where the smallest tasks of the kinds fit together.
  sizes = collections.Counter(label.task for label in items)
  least = {}
  for label in items:
    least[label.kind] = min(sizes[label.task], least.get(label.kind, 4))
  if sum(least.values()) <= count:
    assert {items[number].kind for number in aside} == set(least)
  # The same tasks, in whatever order the rows come.
  shuffled = list(items)
  random.shuffle(shuffled)
  assert {shuffled[number].task for number in set_aside(shuffled, count, seed)} == held_out


@hypothesis.given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 16), st.integers(0, 3))
def test_other_kinds_do_not_choose_among_the_tasks_of_a_kind(mine, others, count, seed):
  """They change how many of its tasks are held out, and not which come first."""
  alone = labels(*['a'] * mine)
  both = alone + [Label(task=f'b{n}', kind='b', stream=0) for n in range(others)]

  def chosen(items, count):
    tasks = {items[number].task for number in set_aside(items, min(count, len(items)), seed)}
    return {task for task in tasks if task.startswith('a')}

  shared = chosen(both, count)
  assert shared == chosen(alone, len(shared))
