"""The order of prompts: complete epochs, further turns of a step, and which items are held out."""

import pytest

from dcore_jax.train.prompt_order import PromptOrder, set_aside


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


def test_every_kind_gives_its_share_of_the_held_out_items():
  aside, rest = set_aside(['a', 'b', 'a', 'b', 'a', 'a', 'a', 'a'], 4)
  assert aside == [0, 2, 4, 1] and rest == [5, 6, 7, 3]
  with pytest.raises(ValueError, match='rl.validation = 9 exceeds the 8 prompts'):
    set_aside(['a'] * 8, 9)
