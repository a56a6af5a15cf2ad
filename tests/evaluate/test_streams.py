"""Each kind of task has random streams of its own: other kinds change neither tasks nor samples."""

import pytest

from dcore_jax.chat.messages import Message
from dcore_jax.rollout.backends import TOO_LONG, Reply
from dcore_jax.worlds import bfcl_tasks
from dcore_jax.worlds.environment import UserTurn, WorldTask
from dcore_jax.worlds.rollouts import act_through
from dcore_jax.worlds.toolworld import tasks as toolworld_tasks
from dcore_jax.worlds.toolworld.world import ToolWorld


class Recorder:
  """A backend that refuses everything, and keeps the streams that it was asked with."""

  def __init__(self):
    self.asked = []

  def stream(self, source, sampling):
    while arrivals := list(source(4)):
      for tag, request in arrivals:
        self.asked.append(request.key_id)
        yield tag, Reply('', False, 0, 0, TOO_LONG)


def streams(tokenizer, tasks):
  recorder = Recorder()
  act_through(recorder, tokenizer, ToolWorld(), tasks, None)
  return recorder.asked


def test_kinds_share_no_random_numbers(tokenizer):
  world = ToolWorld()
  by_kind = {}
  for kind in world.kinds:
    by_kind[kind] = streams(tokenizer, world.tasks(kind, 6, seed=1, split='eval'))
  every = [key for keys in by_kind.values() for key in keys]
  assert len(set(every)) == 6 * len(world.kinds)
  # Fewer tasks of a kind are the first ones, and beside other kinds they keep their streams.
  few = world.tasks('single', 2, seed=1, split='eval')
  others = world.tasks('parallel', 3, seed=1, split='eval')
  assert streams(tokenizer, few) == by_kind['single'][:2]
  together = [few[0], *others, few[1]]
  assert streams(tokenizer, together) == [
    by_kind['single'][0],
    *by_kind['parallel'][:3],
    by_kind['single'][1],
  ]


@pytest.mark.parametrize('module', [toolworld_tasks, bfcl_tasks])
def test_a_new_kind_does_not_change_the_tasks_of_the_others(module):
  """The numbers are those that task sets and seed files have been drawn with."""
  numbers = {'single': 0, 'sequential': 1, 'parallel': 2, 'irrelevant': 3, 'multi_turn': 4}
  assert {kind: module._STREAMS[kind] for kind in numbers} == numbers
  assert len(set(module._STREAMS.values())) == len(module._STREAMS) == len(module.KINDS)


def test_tasks_of_a_kind_are_the_same_beside_another_order_of_kinds(monkeypatch):
  tasks = ToolWorld().tasks('parallel', 3, seed=5, split='train')
  reordered = {'new': 9, **dict(reversed(toolworld_tasks._STREAMS.items()))}
  monkeypatch.setattr(toolworld_tasks, '_STREAMS', reordered)
  monkeypatch.setattr(toolworld_tasks, 'KINDS', tuple(reordered))
  assert ToolWorld().tasks('parallel', 3, seed=5, split='train') == tasks


class Unplayed:
  """An episode that is only asked about."""

  def __init__(self, name):
    self.messages = [Message('user', name)]

  def stop(self, reason):
    pass

  def outcome(self):
    return None


class Riddles(ToolWorld):
  def episode(self, task):
    return Unplayed(task.id)


def test_a_kind_of_a_world_of_ones_own_has_streams_too(tokenizer):
  turn = UserTurn(query='q', calls=(), responses=(), subtasks=('q',), answer='a')
  tasks = [WorldTask(f'{kind}{n}', kind, (turn,)) for n in range(2) for kind in ('rhyme', 'pun')]
  recorder = Recorder()
  act_through(recorder, tokenizer, Riddles(), tasks, None)
  assert len(set(recorder.asked)) == 4
  assert [number for _, number, _ in recorder.asked] == [0, 0, 1, 1]
