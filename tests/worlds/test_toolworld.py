"""ToolWorld: deterministic tasks that really execute, disjoint splits, state-based judging."""

import json
import re

import pytest

from dcore_jax.chat.messages import ToolSpec
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.organism.corpus import asked_tool
from dcore_jax.worlds.toolworld.entities import split_of
from dcore_jax.worlds.toolworld.tasks import KINDS, NO_TOOL, make_task
from dcore_jax.worlds.toolworld.tools import TOOLS, execute
from dcore_jax.worlds.toolworld.world import ToolWorld

THINK = '<think>\nx\n</think>\n\n'


def tasks(kind, count=60, split='eval', max_subtasks=5, seed=3):
  return ToolWorld(max_subtasks).tasks(kind, count, seed=seed, split=split)


def play_reference(task):
  episode = ToolWorld().episode(task)
  for turn in task.turns:
    if task.kind == 'parallel':
      episode.step(THINK + print_calls(list(turn.calls)))
      continue
    for call in turn.calls:
      episode.step(THINK + print_calls([call]))
    if task.kind != 'single':
      episode.step(THINK + turn.answer)
  return episode


@pytest.mark.parametrize('kind', KINDS)
def test_the_reference_solves_every_task(kind):
  for task in tasks(kind):
    outcome = play_reference(task).outcome()
    assert outcome.correct, (task.id, outcome)


@pytest.mark.parametrize('kind', KINDS)
def test_a_task_is_a_function_of_its_arguments(kind):
  assert tasks(kind, 5) == tasks(kind, 5)
  assert tasks(kind, 5) != tasks(kind, 5, seed=4)
  assert tasks(kind, 9)[:5] == tasks(kind, 5)


def test_splits_share_no_entity():
  entity = re.compile(r'\b(?:[A-Z][a-z]{3}|[RFHPDC]\d{3})\b')
  seen = {}
  for split in ('train', 'eval'):
    texts = [
      json.dumps([turn.query for turn in t.turns] + [t.initial_state])
      for k in KINDS
      for t in tasks(k, 100, split)
    ]
    seen[split] = set(entity.findall(' '.join(texts)))
    assert all(split_of(e) == split for e in seen[split])
  assert len(seen['eval']) > 100 and not seen['train'] & seen['eval']


def test_kinds_have_their_shape():
  for task in tasks('sequential', 100):
    (turn,) = task.turns
    assert 2 <= len(turn.calls) <= 5
    # At least one call takes what an earlier one returned, and the request says "that <kind>".
    assert 'that ' in turn.query
    for subtask, call in zip(turn.subtasks, turn.calls, strict=True):
      if 'that ' in subtask:
        before = ' '.join(turn.responses[: turn.calls.index(call)])
        assert any(str(value) in before for value in call.arguments.values())
  assert {len(t.turns[0].calls) for t in tasks('parallel', 100)} == {2, 3, 4, 5}
  assert all(len(t.turns) in (2, 3) for t in tasks('multi_turn'))
  for task in tasks('irrelevant', 100):
    (turn,) = task.turns
    assert not turn.calls
    if turn.answer != NO_TOOL:
      missing = re.fullmatch(r'please give the (\w+)\.', turn.answer)[1]
      assert any(missing in TOOLS[name].parameters for name in task.tools)
  answers = [t.turns[0].answer == NO_TOOL for t in tasks('irrelevant', 200)]
  assert 0.35 < sum(answers) / len(answers) < 0.65


def test_irrelevant_requests_fit_no_listed_tool():
  for task in tasks('irrelevant', 100):
    if task.turns[0].answer == NO_TOOL:
      assert asked_tool(task.turns[0].subtasks[0]) not in task.tools


@pytest.mark.parametrize(
  ('answer', 'reason'),
  [
    ('[]', 'no calls'),
    ('done.', 'no calls'),
    ('[nothing(a=1)]', "tool 'nothing' is not listed"),
    ('[f(a=]', 'unreadable calls'),
    ('[f(a b)]', 'unreadable calls'),
  ],
)
def test_wrong_answers_to_a_single_request(answer, reason):
  task = tasks('single', 1)[0]
  episode = ToolWorld().episode(task)
  episode.step(THINK + answer)
  assert episode.done and (episode.outcome().correct, episode.outcome().reason) == (False, reason)


def test_a_turn_that_ends_early_or_never_is_wrong():
  task = tasks('sequential', 1)[0]
  episode = ToolWorld().episode(task)
  episode.step(THINK + print_calls([task.turns[0].calls[0]]))
  episode.step(THINK + 'done.')
  assert not episode.outcome().correct
  episode = ToolWorld().episode(task)
  while not episode.done:
    episode.step(THINK + print_calls([task.turns[0].calls[0]]))
  assert episode.outcome().reason == 'too many steps'
  with pytest.raises(ValueError, match='is over'):
    episode.step('x')


def test_a_changed_argument_is_a_wrong_state_even_when_the_rest_is_right():
  for task in tasks('sequential', 40):
    call = task.turns[0].calls[-1]
    if call.name != 'pay_amount':
      continue
    episode = ToolWorld().episode(task)
    for c in task.turns[0].calls[:-1]:
      episode.step(THINK + print_calls([c]))
    wrong = type(call)(call.name, {**call.arguments, 'amount': call.arguments['amount'] + 1})
    episode.step(THINK + print_calls([wrong]))
    episode.step(THINK + 'done.')
    assert episode.outcome().reason == 'wrong state'
    return
  pytest.fail('no payment among the tasks')


def test_tools_answer_errors_and_never_raise():
  state = tasks('single', 1)[0].initial_state
  for name, arguments in (
    ('nope', {}),
    ('find_order', {}),
    ('find_order', {'customer': 'Zzzz'}),
    ('cancel_order', {'order': ['x']}),
    ('add_numbers', {'first': 'a', 'second': 1}),
    ('add_numbers', {'first': True, 'second': 1}),
    ('pay_amount', {'person': 'Zzzz', 'amount': 3}),
  ):
    assert 'error' in execute(state, name, arguments), name


def test_specs_and_seed_records():
  for tool in TOOLS.values():
    assert ToolSpec.from_json(tool.spec.to_json()) == tool.spec
  for kind in KINDS:
    for task in tasks(kind, 10):
      for seed in task_seeds(ToolWorld(), task):
        record = json.loads(json.dumps(seed.to_json()))
        assert {'id', 'conversations', 'ground_truth', 'tool_response'} <= record.keys()


@pytest.mark.parametrize(
  'arguments',
  [
    dict(kind='nope', split='eval'),
    dict(kind='single', split='test'),
    dict(kind='parallel', split='eval', max_subtasks=9),
  ],
)
def test_unknown_arguments_are_named(arguments):
  with pytest.raises(ValueError, match='nope|test|9'):
    make_task(index=0, seed=0, **arguments)
