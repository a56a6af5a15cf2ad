"""BFCL's APIs as a world: references run, requests say what calls need, hostile calls are safe."""

import copy
import json
import re

import pytest

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.benchmark_tasks import bfcl_tests
from dcore_jax.data.overlap import Overlap
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.distill import verify
from dcore_jax.worlds import bfcl, bfcl_tasks, bfcl_world
from dcore_jax.worlds.registry import open_sandbox
from tests.distill.test_solve import THINK, run


@pytest.fixture(autouse=True)
def installed():
  try:
    bfcl.package_folder()
  except ValueError as error:
    pytest.skip(str(error))


def tasks(kind, count=24, seed=5, classes=tuple(bfcl.CLASSES)):
  return [bfcl_tasks.make_task(kind, index, seed=seed, classes=classes) for index in range(count)]


# Functions that change nothing which BFCL compares; all others in the references do.
READS = {
  'cat',
  'wc',
  'sort',
  'tail',
  'grep',
  'get_ticket',
  'get_user_tickets',
  'get_user_stats',
  'search_tweets',
  'get_user_id',
  'view_messages_sent',
  'search_messages',
  'get_message_stats',
  'get_stock_info',
  'get_order_details',
  'get_watchlist',
  'get_account_info',
  'get_order_history',
  'notify_price_change',
  'displayCarStatus',
  'find_nearest_tire_shop',
  'liter_to_gallon',
  'estimate_drive_feasibility_by_mileage',
  'get_zipcode_based_on_city',
  'get_flight_cost',
  'get_nearest_airport_by_city',
  'retrieve_invoice',
  'contact_customer_support',
  'get_credit_card_balance',
  'compute_exchange_rate',
  'verify_traveler_information',
}
CALCULATES = {
  'mean',
  'standard_deviation',
  'sum_values',
  'max_value',
  'min_value',
  'add',
  'subtract',
  'multiply',
  'divide',
  'power',
  'percentage',
  'si_unit_conversion',
  'imperial_si_conversion',
  'round_number',
}
WRITES = {
  'GorillaFileSystem': {'echo', 'cp', 'mv', 'rm', 'mkdir'},
  'MathAPI': set(),
  'MessageAPI': {'send_message', 'add_contact', 'delete_message'},
  'TicketAPI': {'create_ticket', 'edit_ticket', 'close_ticket', 'resolve_ticket'},
  'TradingBot': {
    'place_order',
    'cancel_order',
    'add_to_watchlist',
    'remove_stock_from_watchlist',
    'fund_account',
    'make_transaction',
  },
  'TravelAPI': {
    'book_flight',
    'cancel_booking',
    'purchase_insurance',
    'register_credit_card',
    'set_budget_limit',
  },
  'TwitterAPI': {'post_tweet', 'comment', 'retweet', 'mention', 'follow_user', 'unfollow_user'},
  'VehicleControlAPI': {
    'fillFuelTank',
    'lockDoors',
    'adjustClimateControl',
    'setHeadlights',
    'activateParkingBrake',
    'pressBrakePedal',
    'releaseBrakePedal',
    'startEngine',
    'set_navigation',
  },
}


@pytest.mark.parametrize('name', sorted(bfcl.CLASSES))
def test_references_of_every_api_read_or_change_its_state_as_meant(name):
  """Functions run without an error, and leaving out all calls, or the last one, is noticed."""
  called = set()
  changed = set()
  for kind in ('single', 'sequential', 'parallel', 'multi_turn'):
    for task in tasks(kind, 30, classes=(name,)):
      for seed in task_seeds(bfcl_world.BfclWorld(), task):
        sandbox = open_sandbox(seed.world)
        for call in seed.calls:
          before = copy.deepcopy(sandbox.state)
          output = sandbox.run(call)
          assert (
            not output.startswith('Error') and '"error"' not in output and 'False' not in output
          ), (call, output)
          called.add(call.name)
          if sandbox.state != before:
            changed.add(call.name)
        assert verify.state_problem(seed, ()) and verify.state_problem(seed, seed.calls[:-1]), (
          seed.id
        )
  assert changed == WRITES[name] and called == changed | called & (
    CALCULATES if name == 'MathAPI' else READS
  )
  assert name != 'MathAPI' or called == CALCULATES


@pytest.mark.parametrize('kind', bfcl_tasks.KINDS)
def test_references_execute_to_their_recorded_outputs(kind):
  for task in tasks(kind):
    for seed in task_seeds(bfcl_world.BfclWorld(), task):
      sandbox = open_sandbox(json.loads(json.dumps(seed.world)))  # as a file has it
      assert [sandbox.run(call) for call in seed.calls] == list(seed.tool_response), seed.id
      assert not verify.state_problem(seed, seed.calls)
      assert seed.kind in ('sequential', 'single') if kind == 'multi_turn' else seed.kind == kind


@pytest.mark.parametrize('kind', bfcl_tasks.KINDS)
def test_a_task_is_a_function_of_its_arguments(kind):
  assert tasks(kind, 4) == tasks(kind, 4)
  assert [t.turns for t in tasks(kind, 4)] != [t.turns for t in tasks(kind, 4, seed=6)]


def plain(text):
  return text.lower().replace('_', ' ')


def test_values_of_the_first_call_stand_in_the_request_and_later_ones_there_or_in_outputs():
  for task in tasks('sequential', 80):
    (turn,) = task.turns
    said = plain(f'{task.policy} {turn.query}')
    for call, output in zip(turn.calls, turn.responses, strict=True):
      for name, value in call.arguments.items():
        if name in ('mode', 'status', 'lines', 'option', 'unlock') or isinstance(value, dict):
          continue
        for one in value if isinstance(value, list) else [value]:
          assert plain(str(one)) in said, (turn.query, call)
      said += plain(output)


def test_independent_calls_give_the_same_in_any_order_and_dependent_ones_speak_of_earlier_ones():
  chained = re.compile(
    r'that (file|ticket|tweet|user|contact|result|stock|order|booking|card|airport|shop|amount)\b'
    r'|the copy'
  )
  for task in tasks('parallel', 48):
    (seed,) = task_seeds(bfcl_world.BfclWorld(), task)
    assert len(seed.calls) >= 2 and not chained.search(seed.query)
    sandbox = open_sandbox(seed.world)
    if len(seed.calls) == len(task.turns[0].subtasks):
      # Each subtask is one call: the last one gives the same alone, before all others.
      assert sandbox.run(seed.calls[-1]) == seed.tool_response[-1]
  assert all(chained.search(task.turns[0].query) for task in tasks('sequential'))


def test_what_one_task_does_does_not_reach_the_next():
  """BFCL's `mention` changes the default value of `post_tweet`, which all instances share."""
  post = ToolCall('post_tweet', {'content': 'x'})
  mention = ToolCall('mention', {'tweet_id': 0, 'mentioned_usernames': ['@a']})
  for _ in range(2):
    sandbox = bfcl.BfclSandbox(['TwitterAPI'], {'TwitterAPI': {'authenticated': True}})
    assert '"mentions": []' in sandbox.run(post) and 'success' in sandbox.run(mention)


def test_what_is_missing_is_not_listed_or_not_said():
  kinds = set()
  for task in tasks('irrelevant', 40):
    (seed,) = task_seeds(bfcl_world.BfclWorld(), task)
    listed = {doc['name'] for doc in task.functions}
    assert not listed & set(task.without) and not seed.calls and seed.answer
    kinds.add(bool(task.without))
    assert all(f'"name": "{name}"' not in seed.conversations[0].content for name in task.without)
  assert kinds == {True, False}


def test_new_tasks_are_none_of_the_tests():
  overlap = Overlap(bfcl_tests())
  assert overlap.tasks > 4441
  seeds = [
    seed
    for kind in bfcl_tasks.KINDS
    for task in tasks(kind)
    for seed in task_seeds(bfcl_world.BfclWorld(), task)
  ]
  assert not [seed.id for seed in seeds if overlap.find(seed)]


def test_a_state_is_reached_by_other_calls_too():
  single = tasks('single', 90, classes=('TicketAPI',))
  seed = next(
    s
    for t in single
    for s in task_seeds(bfcl_world.BfclWorld(), t)
    if s.calls[0].name == 'close_ticket'
  )
  [row] = run(
    seed,
    lambda _: THINK + print_calls([ToolCall('get_ticket', seed.calls[0].arguments), *seed.calls]),
    verify='state',
  )
  assert 'get_ticket' in row['conversations'][-1]['content']
  edited = ToolCall('edit_ticket', {**seed.calls[0].arguments, 'updates': {'status': 'Closed'}})
  assert run(seed, lambda _: THINK + print_calls([edited]), verify='state') == 'missing output'


@pytest.mark.parametrize(
  'calls',
  [
    [ToolCall('_load_scenario', {'scenario': {}})],
    [ToolCall('__init__', {})],
    [ToolCall('os.system', {'command': 'true'})],
    [ToolCall('cat', {'file_name': ['x']})],
    [ToolCall('cat', {'nope': 1})],
    [ToolCall('cat', {}, ('x', 'y'))],
    [ToolCall('tail', {'file_name': 'x', 'lines': 10**40})],
    [ToolCall('cp', {'source': 'a', 'destination': 'a'}), ToolCall('find', {}), ToolCall('du', {})],
  ],
  ids=str,
)
def test_hostile_calls_are_answers_and_touch_nothing_outside(calls):
  config = {
    'GorillaFileSystem': {
      'root': {'r': {'type': 'directory', 'contents': {'a': {'type': 'directory', 'contents': {}}}}}
    }
  }
  sandbox = bfcl.BfclSandbox(['GorillaFileSystem'], config)
  before = sandbox.state
  outputs = [sandbox.run(call) for call in calls]
  assert all('rror' in output for output in outputs) or calls[0].name == 'cp'
  assert len(calls) == 3 or sandbox.state == before
  assert sandbox.state != before or len(calls) == 1


@pytest.mark.parametrize(
  'call',
  [
    ToolCall('power', {'base': 9, 'exponent': 10**9}),
    ToolCall('power', {}, (9, -(10**9))),
    ToolCall('square_root', {'number': 2, 'precision': 10**9}),
    ToolCall('power', {'base': 2, 'exponent': 'x'}),
    ToolCall('logarithm', {'value': 2, 'base': 3, 'precision': 10**9}),
    ToolCall('round_number', {'number': 5, 'decimal_places': -(10**9)}),
  ],
  ids=str,
)
def test_the_calculator_does_not_compute_for_ever(call):
  assert bfcl.BfclSandbox(['MathAPI'], {}).run(call).startswith('Error during execution')


def test_outputs_are_shown_as_bfcl_shows_them():
  """A number of mpmath is no JSON, so the dict is printed as it is, as in BFCL's own tests."""
  sandbox = bfcl.BfclSandbox(['MathAPI'], {})
  assert sandbox.run(ToolCall('logarithm', {'value': 8, 'base': 2, 'precision': 10})).startswith(
    "{'result': mpf('3.0"
  )
  assert sandbox.run(ToolCall('power', {'base': 2, 'exponent': 10})) == '{"result": 1024}'
