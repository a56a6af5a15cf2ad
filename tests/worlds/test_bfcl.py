"""BFCL's APIs as a world: references that run, requests that say what their calls need, and hostile calls that do no harm."""
import json
import re

import pytest

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.distill import verify
from dcore_jax.distill.overlap import Overlap
from dcore_jax.run.benchmark_tasks import bfcl_tests
from dcore_jax.run.seed_sources import bfcl_seeds
from dcore_jax.worlds import bfcl, bfcl_tasks
from dcore_jax.worlds.sandbox import open_sandbox
from tests.distill.test_solve import THINK, run


@pytest.fixture(autouse=True)
def installed():
  try:
    bfcl.package_folder()
  except ValueError as error:
    pytest.skip(str(error))


def tasks(kind, count=24, seed=5):
  return [bfcl_tasks.make_task(kind, index, seed=seed) for index in range(count)]


@pytest.mark.parametrize('kind', bfcl_tasks.KINDS)
def test_references_execute_to_their_recorded_outputs(kind):
  for task in tasks(kind):
    for seed in bfcl_seeds(task):
      sandbox = open_sandbox(json.loads(json.dumps(seed.world)))  # as a file has it
      assert [sandbox.run(call) for call in seed.calls] == list(seed.tool_response), seed.id
      assert not verify.state_problem(seed, seed.calls)
      assert seed.kind in ('sequential', 'single') if kind == 'multi_turn' else seed.kind == kind


@pytest.mark.parametrize('kind', bfcl_tasks.KINDS)
def test_a_task_is_a_function_of_its_arguments(kind):
  assert tasks(kind, 4) == tasks(kind, 4)
  assert [t.turns for t in tasks(kind, 4)] != [t.turns for t in tasks(kind, 4, seed=6)]


def test_values_of_the_first_call_stand_in_the_request_and_later_ones_there_or_in_outputs():
  for task in tasks('sequential'):
    turn, = task.turns
    said = turn.query.lower()
    for call, output in zip(turn.calls, turn.responses):
      for name, value in call.arguments.items():
        if name in ('mode', 'status', 'lines') or isinstance(value, dict):
          continue
        for one in value if isinstance(value, list) else [value]:
          assert str(one).lower() in said, (turn.query, call)
      said += output.lower()


def test_independent_calls_give_the_same_in_any_order_and_dependent_ones_speak_of_what_was_there_before():
  chained = re.compile('that (file|ticket|tweet)|the copy')
  for task in tasks('parallel'):
    seed, = bfcl_seeds(task)
    assert len(seed.calls) >= 2 and not chained.search(seed.query)
    sandbox = open_sandbox(seed.world)
    last = [sandbox.run(seed.calls[i]) for i in task.turn_calls[0][-1]]  # alone, before all others
    assert last == list(seed.tool_response[-len(last):])
  assert all(chained.search(task.turns[0].query) for task in tasks('sequential'))


def test_what_one_task_does_does_not_reach_the_next():
  """BFCL's `mention` changes the default value of `post_tweet`, which all instances share."""
  post, mention = ToolCall('post_tweet', {'content': 'x'}), ToolCall('mention', {'tweet_id': 0, 'mentioned_usernames': ['@a']})
  for _ in range(2):
    sandbox = bfcl.BfclSandbox(['TwitterAPI'], {'TwitterAPI': {'authenticated': True}})
    assert '"mentions": []' in sandbox.run(post) and 'success' in sandbox.run(mention)


def test_what_is_missing_is_not_listed_or_not_said():
  kinds = set()
  for task in tasks('irrelevant', 40):
    seed, = bfcl_seeds(task)
    listed = {doc['name'] for doc in task.functions}
    assert not listed & set(task.without) and not seed.calls and seed.answer
    kinds.add(bool(task.without))
    assert all(f'"name": "{name}"' not in seed.conversations[0].content for name in task.without)
  assert kinds == {True, False}


def test_new_tasks_are_none_of_the_tests():
  overlap = Overlap(bfcl_tests())
  assert overlap.tasks > 4441
  seeds = [seed for kind in bfcl_tasks.KINDS for task in tasks(kind) for seed in bfcl_seeds(task)]
  assert not [seed.id for seed in seeds if overlap.find(seed)]


def test_a_state_is_reached_by_other_calls_too():
  seed = next(s for t in tasks('single', 90) for s in bfcl_seeds(t) if s.calls[0].name == 'close_ticket')
  [row] = run(seed, lambda _: THINK + print_calls([ToolCall('get_ticket', seed.calls[0].arguments), *seed.calls]), verify='state')
  assert 'get_ticket' in row['conversations'][-1]['content']
  edited = ToolCall('edit_ticket', {**seed.calls[0].arguments, 'updates': {'status': 'Closed'}})
  assert run(seed, lambda _: THINK + print_calls([edited]), verify='state') == 'missing output'


@pytest.mark.parametrize('calls', [
    [ToolCall('_load_scenario', {'scenario': {}})], [ToolCall('__init__', {})], [ToolCall('os.system', {'command': 'true'})],
    [ToolCall('cat', {'file_name': ['x']})], [ToolCall('cat', {'nope': 1})], [ToolCall('cat', {}, ('x', 'y'))],
    [ToolCall('tail', {'file_name': 'x', 'lines': 10**40})], [ToolCall('cp', {'source': 'a', 'destination': 'a'}),
                                                             ToolCall('find', {}), ToolCall('du', {})]], ids=str)
def test_hostile_calls_are_answers_and_touch_nothing_outside(calls):
  config = {'GorillaFileSystem': {'root': {'r': {'type': 'directory', 'contents': {'a': {'type': 'directory', 'contents': {}}}}}}}
  sandbox = bfcl.BfclSandbox(['GorillaFileSystem'], config)
  before = sandbox.state
  outputs = [sandbox.run(call) for call in calls]
  assert all('rror' in output for output in outputs) or calls[0].name == 'cp'
  assert len(calls) == 3 or sandbox.state == before
  assert sandbox.state != before or len(calls) == 1
