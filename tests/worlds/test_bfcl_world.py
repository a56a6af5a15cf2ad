"""BFCL's APIs as an environment: references are right, and unlisted functions are not there."""

import pytest

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.worlds.bfcl_tasks import KINDS
from dcore_jax.worlds.bfcl_world import BfclWorld

THINK = '<think>\nhm\n</think>\n\n'


@pytest.fixture(scope='module')
def world():
  try:
    return BfclWorld()
  except ValueError as error:
    pytest.skip(str(error))


def tasks(world, kind, count=12, split='eval'):
  return world.tasks(kind, count, seed=3, split=split)


def act(world, task):
  """The reference, acted out."""
  episode = world.episode(task)
  for turn in task.turns:
    if task.kind in world.one_response and turn.calls:
      episode.step(THINK + print_calls(list(turn.calls)))
      break
    for call in turn.calls:
      episode.step(THINK + print_calls([call]))
    episode.step(THINK + turn.answer)
  return episode


@pytest.mark.parametrize('kind', KINDS)
def test_references_are_right_and_prompts_are_those_of_seeds(world, kind):
  for task in tasks(world, kind):
    episode = act(world, task)
    assert episode.done and episode.outcome().correct, (task.id, episode.outcome())
    assert episode.messages[0] == task_seeds(world, task)[0].conversations[0]
    outputs = [response for turn in task.turns for response in turn.responses]
    said = '\n'.join(message.content for message in episode.messages if message.role == 'user')
    assert all(output in said for output in outputs)


def test_what_differs_from_the_reference_is_wrong(world):
  reasons = set()
  for task in tasks(world, 'sequential'):
    calls = task.turns[0].calls
    episode = world.episode(task)
    for call in calls[:-1]:
      episode.step(THINK + print_calls([call]))
    episode.step(THINK + 'done.')
    assert not episode.outcome().correct
    reasons.add(episode.outcome().reason)
  assert reasons <= {'wrong state', 'missing output'} and 'wrong state' in reasons
  (single,) = tasks(world, 'single', 1)
  episode = world.episode(single)
  episode.step(THINK + print_calls([ToolCall('__init__', {})]))
  assert episode.outcome().reason == "tool '__init__' is not listed"


def test_functions_that_are_not_listed_are_not_there(world):
  task = next(task for task in tasks(world, 'irrelevant', 30) if task.without)
  session = world.session(task)
  before = session.state
  session.ask('do it')
  session.step(print_calls([ToolCall(task.without[0], {})]))
  assert f'there is no function {task.without[0]}' in session.messages[-1].content and session.asked
  session.step('I cannot.')
  assert not session.asked and session.state == before


def test_sessions_keep_what_was_done(world):
  changing = ('create_ticket', 'post_tweet', 'mkdir')
  task = next(
    task for task in tasks(world, 'single', 30) if task.turns[0].calls[0].name in changing
  )
  session = world.session(task)
  before = session.state
  session.ask('do it')
  session.step(print_calls(list(task.turns[0].calls)))
  assert session.state != before and world.session(task).state == before


def test_splits_are_other_draws(world):
  assert tasks(world, 'single', 3) == tasks(world, 'single', 3)
  assert not {task.id for task in tasks(world, 'single')} & {
    task.id for task in tasks(world, 'single', split='train')
  }
