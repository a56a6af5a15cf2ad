"""One seed at a time with a scripted model: what is asked, kept and dropped, and why."""

import dataclasses
import json

import pytest

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls, tool_response
from dcore_jax.data.seeds import Seed, decision_points
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.distill import verify
from dcore_jax.distill.asking import Dropped
from dcore_jax.distill.decompose import print_subtasks
from dcore_jax.distill.labels import pseudo_labelled
from dcore_jax.distill.solve import Distiller
from dcore_jax.distill.wording import ENGLISH_WORDING
from dcore_jax.learn.rewards import toolrl_reward
from dcore_jax.rollout.backends import TOO_LONG, Reply
from dcore_jax.worlds.toolworld.world import ToolWorld

THINK = '<think>\nreasoning.\n</think>\n\n'
LEAKY = Seed(
  id='s',
  kind='sequential',
  conversations=(Message('user', 'find the order of Karo, then cancel that order'),),
  calls=(ToolCall('f', {'c': 'Karo'}), ToolCall('g', {'o': 'R541', 'key': 'abc9'})),
  tool_response=('{}', '{}'),
)


def seeds(kind, count=20):
  result = []
  for task in ToolWorld().tasks(kind, count, seed=9, split='train'):
    result += task_seeds(ToolWorld(), task)
  return result


def with_subtasks(kind, count=20):
  for task in ToolWorld().tasks(kind, count, seed=9, split='train'):
    for seed, turn in zip(task_seeds(ToolWorld(), task), task.turns, strict=True):
      # The scripted model could not tell equal subtasks apart.
      if len(set(turn.subtasks)) == len(turn.subtasks):
        yield seed, turn.subtasks


def reply(text, finished=True, error='', prompt_tokens=1, completion_tokens=1):
  return Reply(
    text=text,
    finished=finished,
    prompt_tokens=prompt_tokens,
    completion_tokens=completion_tokens,
    error=error,
  )


def drive(ask, answer, rounds=None):
  """Holds a conversation with `answer(messages) -> text or Reply`.

  Returns what it returns, or the reason that it was dropped for.
  """
  try:
    prompts = ask.send(None)
    while True:
      if rounds is not None:
        rounds.append(len(prompts))
      texts = [answer(messages) for messages in prompts]
      prompts = ask.send([one if isinstance(one, Reply) else reply(one) for one in texts])
  except StopIteration as stop:
    return stop.value
  except Dropped as drop:
    return str(drop)


def run(seed, answer, rounds=None, **options):
  return drive(Distiller(**options).rows(seed), answer, rounds)


def oracle(seed, subtasks):
  """Answers as a perfect model would, given the reference decomposition."""
  # An irrelevant seed has a subtask, and no call that would solve it.
  answers = dict(zip(subtasks, seed.calls, strict=False))

  def answer(messages):
    last = messages[-1].content
    if last.startswith('list the subtasks'):
      return THINK + print_subtasks(list(subtasks), [[i] for i in range(len(subtasks))])
    if last.startswith('say which'):
      return THINK + seed.answer
    return THINK + print_calls([answers.get(last, seed.calls[0] if seed.calls else None)])

  return answer


@pytest.mark.parametrize(
  'options',
  [{}, {'verify': 'state'}, {'show_reference': False}, {'strict_count': True}, {'candidates': 3}],
  ids=str,
)
@pytest.mark.parametrize('kind', ['single', 'sequential', 'parallel', 'irrelevant', 'multi_turn'])
def test_a_perfect_model_keeps_everything(kind, options):
  for seed, subtasks in with_subtasks(kind):
    rows = run(seed, oracle(seed, subtasks), **options)
    assert isinstance(rows, list), (rows, seed)
    if seed.kind == 'sequential':
      assert len(rows) == len(seed.calls) + bool(seed.answer)
    for row in rows:
      assert row['conversations'][-1]['role'] == 'assistant'
      assert not any('<think>' in m['content'] for m in row['conversations'][:-1])
    # The rows train what reinforcement learning asks for: each answers one decision point with the
    # best reward.
    points = {}
    for point in decision_points(seed):
      points[tuple(message.content for message in point.messages)] = point.reference
    for row in rows:
      reference = points[tuple(m['content'] for m in row['conversations'][:-1])]
      assert toolrl_reward(row['conversations'][-1]['content'], reference).total == 4


TAGGED = 'find the order of </think> Karo'


@pytest.mark.parametrize('kind', ['sequential', 'parallel', 'irrelevant', 'single'])
def test_a_tag_in_a_request_or_report_closes_no_thoughts(kind):
  """It is refused before anything is asked, where a trace would quote it."""
  seed, subtasks = next(with_subtasks(kind))
  asked = dataclasses.replace(
    seed, conversations=(*seed.conversations[:-1], Message('user', TAGGED))
  )
  reported = dataclasses.replace(seed, answer='see </think>')
  rounds = []
  for bad in (asked, reported):
    if bad.answer:
      assert run(bad, oracle(bad, subtasks), rounds) == verify.TAG_IN_TEXT
  assert not rounds
  if kind == 'single':
    unreported = dataclasses.replace(asked, answer='')
    [row] = run(unreported, oracle(unreported, subtasks))
    assert row['conversations'][-1]['content'].count('</think>') == 1


def test_a_tag_in_a_subtask_or_trace_is_refused():
  seed, subtasks = next(with_subtasks('parallel'))
  bad = [f'{subtasks[0]} </think>', *subtasks[1:]]
  assert run(seed, oracle(seed, bad)) == verify.TAG_IN_TEXT
  for trace in (
    'a </think> b\n</think>\n\nc',
    'a\n</think>\n\nc</think>',
    '<think>\n</think>\n\nc',
  ):
    row = [Message('user', '</think>'), Message('assistant', f'<think>\n{trace}')]
    assert verify.row_problem(row, 1000) == verify.TAG_IN_TEXT


def test_a_tag_in_arguments_stays_an_argument():
  call = ToolCall('f', {'a': 'x</think>\n\n<think>', 'from': 1})
  seed = Seed(
    id='s',
    kind='single',
    conversations=(Message('user', 'what is </think>?'),),
    calls=(call,),
    tool_response=('</think>',),
  )
  for answer in (print_calls([call]), "[f(a='x</think>\n\n<think>', from=1)]"):
    [row] = run(seed, lambda _, answer=answer: THINK + answer)
    content = row['conversations'][-1]['content']
    assert content.count('</think>') == 1 and content.endswith(print_calls([call]))
    assert toolrl_reward(content, print_calls([call])).total == 4


def test_what_can_be_asked_together_is():
  parallel, subtasks = next((s, t) for s, t in with_subtasks('parallel') if len(t) == 4)
  rounds = []
  assert isinstance(run(parallel, oracle(parallel, subtasks), rounds, candidates=2), list)
  assert rounds == [2, 4]
  sequential, subtasks = next((s, t) for s, t in with_subtasks('sequential') if len(t) == 4)
  rounds = []
  assert isinstance(run(sequential, oracle(sequential, subtasks), rounds), list)
  assert rounds == [1] * 5


def test_a_step_sees_the_calls_and_outputs_before_it_and_no_reasoning():
  seed, subtasks = next((s, t) for s, t in with_subtasks('sequential') if len(t) == 3)
  seen = []
  right = oracle(seed, subtasks)

  def answer(messages):
    seen.append(messages)
    return right(messages)

  run(seed, answer)
  assert [m.content for m in seen[-1]] == [
    seed.conversations[0].content,
    subtasks[0],
    print_calls(seed.calls[:1]),
    tool_response(seed.tool_response[0]),
    subtasks[1],
    print_calls(seed.calls[1:2]),
    tool_response(seed.tool_response[1]),
    subtasks[2],
  ]


def test_outputs_are_executed_where_there_is_a_world_and_recorded_else():
  """A seed without recorded outputs, but with a world, gives the same rows."""
  seed, subtasks = next((s, t) for s, t in with_subtasks('sequential') if len(t) == 3)
  rows = run(seed, oracle(seed, subtasks))
  assert run(dataclasses.replace(seed, tool_response=()), oracle(seed, subtasks)) == rows
  assert run(dataclasses.replace(seed, world=None), oracle(seed, subtasks)) == rows
  stale = dataclasses.replace(seed, world=None, tool_response=tuple('x' for _ in seed.calls))
  assert '<tool_response>\nx\n</tool_response>' in json.dumps(
    run(stale, oracle(stale, subtasks))
  ).replace('\\n', '\n')


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('nothing', 'decomposition unparsable'),
    (THINK + print_subtasks(['only one'], [[0]]), 'decomposition does not partition the calls'),
    (THINK + print_subtasks(['x', 'y'], [[1], [0]]), 'decomposition does not partition the calls'),
    (THINK + print_subtasks(['x', ' '], [[0], [1]]), 'empty subtask'),
    (THINK + print_subtasks(['x', 'use R541'], [[0], [1]]), 'leaks a fact'),
    (THINK + print_subtasks(['x', 'use abc9'], [[0], [1]]), 'leaks a fact'),
  ],
)
def test_bad_decompositions_are_counted(text, reason):
  assert run(LEAKY, lambda _: text) == reason


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('[f(a=1)]', 'unclosed reasoning'),
    (THINK + 'I cannot.', 'no call'),
    (THINK + '[f(a b)]', 'unreadable call'),
    (THINK + "[nope(a='b')]", 'wrong call'),
    (THINK + '<tool_call>{"name": "a b"}</tool_call>', 'unreadable call'),
    (reply(THINK + '[f(a=1', finished=False), 'cut off'),
    (reply('', finished=False, error=TOO_LONG), TOO_LONG),
    (reply('', finished=False, error='status 400: ...'), 'refused by the endpoint'),
  ],
)
def test_bad_solutions_are_counted(text, reason):
  assert run(seeds('single')[0], lambda _: text) == reason


@pytest.mark.parametrize(
  ('bad', 'options', 'kept'),
  [
    (1, {}, True),
    (2, {}, False),
    (2, {'retries': 2}, True),
    (0, {'retries': 0}, True),
    (1, {'retries': 0}, False),
  ],
)
def test_what_cannot_be_read_is_asked_again(bad, options, kept):
  seed = seeds('single')[0]
  texts = iter(['bad'] * bad + [THINK + print_calls(list(seed.calls))])
  assert isinstance(run(seed, lambda _: next(texts), **options), list) == kept


def test_what_is_wrong_is_asked_again_only_where_more_samples_are_allowed():
  seed = seeds('single')[0]
  good = THINK + print_calls(list(seed.calls))
  wrong = THINK + "[nope(a='b')]"
  texts = iter([wrong, good])
  assert run(seed, lambda _: next(texts)) == 'wrong call' and next(texts) == good
  texts = iter(['bad', wrong, wrong, good])  # the two budgets do not touch each other
  assert isinstance(run(seed, lambda _: next(texts), samples=3), list)
  assert run(seed, lambda _: wrong, samples=3) == 'wrong call'


def test_one_subtask_may_own_several_calls():
  """The released code drops these: it compares the numbers of subtasks and responses.

  docs/method.md, section 7, point 12.
  """
  seed = next(s for s in seeds('sequential') if len(s.calls) == 3)

  def answer(messages):
    if messages[-1].content.startswith('list the subtasks'):
      return THINK + print_subtasks(['first', 'the rest'], [[0], [1, 2]])
    return THINK + print_calls(
      list(seed.calls[:1] if messages[-1].content == 'first' else seed.calls[1:])
    )

  rows = run(seed, answer)
  assert len(rows) == 2 + bool(seed.answer)
  # The report comes after two messages of calls, and not three.
  assert sum(m['role'] == 'assistant' for m in rows[-1]['conversations']) == 3
  assert run(seed, answer, strict_count=True) == 'not as many subtasks as calls'


def test_the_best_of_several_decompositions_is_the_first_that_verifies():
  seed, subtasks = next((s, t) for s, t in with_subtasks('sequential') if len(t) == 2)
  right = oracle(seed, subtasks)
  lists = iter(
    [
      'no list',
      print_subtasks(['mislead', 'this'], [[0], [1]]),
      print_subtasks(list(subtasks), [[0], [1]]),
    ]
  )

  def answer(messages):
    last = messages[-1].content
    if last.startswith('list'):
      return THINK + next(lists)
    return THINK + 'What?' if last == 'mislead' else right(messages)

  rows = run(seed, answer, candidates=3, retries=0)
  assert isinstance(rows, list) and subtasks[0] in rows[0]['conversations'][-1]['content']
  lists = iter(['no list', print_subtasks(['mislead', 'this'], [[0], [1]])])
  assert run(seed, answer, candidates=2, retries=0) == 'no call'


def test_without_the_reference_only_all_calls_together_can_be_compared():
  seed, subtasks = next((s, t) for s, t in with_subtasks('sequential') if len(t) == 3)
  right = oracle(seed, subtasks)

  def answer(count):
    def say(messages):
      last = messages[-1].content
      if last.startswith('list'):
        assert 'calls:' not in last
        return THINK + print_subtasks(['both', *subtasks[2:]][:count], None)
      return THINK + print_calls(list(seed.calls[:2])) if last == 'both' else right(messages)

    return say

  assert isinstance(run(seed, answer(2), show_reference=False), list)
  assert run(seed, answer(1), show_reference=False) == 'calls are missing'
  assert (
    run(seed, answer(2), show_reference=False, strict_count=True) == 'not as many subtasks as calls'
  )


def test_independent_calls_may_come_in_any_order_and_dependent_ones_may_not():
  parallel, subtasks = next((s, t) for s, t in with_subtasks('parallel') if len(t) == 3)
  sequential, steps = next((s, t) for s, t in with_subtasks('sequential') if len(t) == 3)
  for seed, texts, kept in ((parallel, subtasks, True), (sequential, steps, False)):
    right = oracle(seed, texts)

    def answer(messages, seed=seed, right=right):
      last = messages[-1].content
      if last.startswith('list'):
        return THINK + print_subtasks(['two', 'one'], [[0, 1], [2]])
      return THINK + print_calls(list(seed.calls[1::-1] if last == 'two' else seed.calls[2:]))

    assert isinstance(run(seed, answer), list) == kept


def test_a_state_may_be_reached_by_other_calls():
  """An additional look-up changes nothing, a skipped one leaves its output missing.

  A payment made twice leaves another state.
  """
  seed = next(s for s in seeds('single', 60) if s.calls[0].name == 'pay_amount')
  call = seed.calls[0]
  look = ToolCall('check_balance', {'person': call.arguments['person']})
  seed = dataclasses.replace(
    seed, world=seed.world | {'tools': [*seed.world['tools'], 'check_balance']}
  )
  more = THINK + print_calls([look, call])
  assert run(seed, lambda _: more) == 'wrong call'
  [row] = run(seed, lambda _: more, verify='state')
  assert row['conversations'][-1]['content'].endswith(print_calls([look, call]))
  assert run(seed, lambda _: THINK + print_calls([call, call]), verify='state') == 'wrong state'
  found = next(s for s in seeds('single', 60) if s.calls[0].name.startswith('find_'))
  assert run(found, lambda _: THINK + '[nothing(a=1)]', verify='state') == 'missing output'
  assert (
    run(dataclasses.replace(seed, world=None), lambda _: more, verify='state') == 'wrong call'
  )  # nothing to execute in


def test_leaks_are_facts_of_the_calls_alone():
  assert verify.leaked_facts(LEAKY, ['find the order of Karo', 'cancel R541']) == {'r541'}
  assert not verify.leaked_facts(LEAKY, ['Find the order of Karo', 'Cancel that order'])


@pytest.mark.parametrize(
  ('text', 'script'),
  [
    ('plain words and 数', ''),
    ('这是一个完全不同的语言 of it', 'CJK'),
    ('слово за словом', 'CYRILLIC'),
    ('naïve café', ''),
    ('123 []', ''),
  ],
)
def test_reasoning_in_another_script_than_its_conversation(text, script):
  assert verify.foreign_script(text, ['the request', 'policy']) == script
  assert not verify.foreign_script(text, ['请求 запрос', 'policy'])


def test_rows_in_another_language_or_too_long_are_dropped():
  seed = seeds('single')[0]
  answer = print_calls(list(seed.calls))
  assert (
    run(
      seed,
      lambda _: '<think>\n' + '我需要先想一想这个请求要我做什么' * 9 + '\n</think>\n\n' + answer,
    )
    == 'another language'
  )
  assert run(seed, lambda _: THINK + answer, max_chars=100) == 'too long'
  assert isinstance(run(seed, lambda _: THINK + answer, wording=ENGLISH_WORDING), list)


def test_calls_are_trained_in_one_form_whatever_form_they_were_written_in():
  seed, subtasks = next(with_subtasks('parallel'))
  written = {}
  for text, call in zip(subtasks, seed.calls, strict=True):
    record = json.dumps({'name': call.name, 'arguments': call.arguments})
    written[text] = f'<tool_call>\n{record}\n</tool_call>'
  right = oracle(seed, subtasks)
  [row] = run(
    seed,
    lambda messages: THINK + written.get(messages[-1].content, right(messages).removeprefix(THINK)),
  )
  assert row['conversations'][-1]['content'].endswith(
    '</think>\n\n' + print_calls(list(seed.calls))
  )


def test_refusals_may_be_asked_to_be_exact():
  seed = seeds('irrelevant')[0]
  assert run(seed, lambda _: THINK + 'I cannot.', exact_refusals=True) == 'wrong explanation'
  assert (
    run(seed, lambda _: THINK + '[f(a=1)]') == 'called a tool'
    and run(seed, lambda _: THINK + '[f(a b)]') == 'unreadable call'
  )
  [row] = run(seed, lambda _: THINK + 'I cannot.')
  assert row['conversations'][-1]['content'].endswith('</think>\n\n' + seed.answer)


@pytest.mark.parametrize(
  'options',
  [dict(verify='x'), dict(candidates=0), dict(retries=-1), dict(samples=0), dict(examples=9)],
  ids=str,
)
def test_options_that_cannot_be(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    Distiller(**options)


# --- pseudo-labels --------------------------------------------------------------------------------


def test_pseudo_labels_are_what_most_samples_do():
  seed = next(s for s in seeds('sequential') if len(s.calls) == 2)
  right = [
    THINK + print_calls([seed.calls[0]]),
    THINK + print_calls([seed.calls[1]]),
    THINK + 'done.',
  ]
  scripts = iter([right, [THINK + 'I cannot.'], right, ['unclosed'], [THINK + '[f(a b)]']])
  steps = {}

  def answer(messages):
    done = sum(m.role == 'assistant' for m in messages) - before
    if done == 0:
      key = len(steps)
      steps[key] = next(scripts)
      return steps[key][0]
    return right[done]  # only the two that called anything go on

  before = sum(m.role == 'assistant' for m in seed.conversations)
  rounds = []
  got = drive(pseudo_labelled(seed, 5), answer, rounds)
  assert rounds == [5, 2, 2]
  assert (got.kind, got.calls, got.tool_response, got.answer) == (
    'sequential',
    seed.calls,
    seed.tool_response,
    'done.',
  )
  assert got.conversations == seed.conversations and got.id == seed.id


def test_pseudo_labels_may_be_wrong_and_change_the_kind():
  seed = next(s for s in seeds('parallel') if len(s.calls) == 3)
  got = drive(pseudo_labelled(seed, 1), lambda _: THINK + print_calls(seed.calls[:1]))
  assert (got.kind, got.calls, got.answer) == ('single', seed.calls[:1], '')
  got = drive(pseudo_labelled(seed, 1), lambda _: THINK + print_calls(seed.calls[:2]))
  assert (got.kind, len(got.tool_response)) == ('parallel', 2)
  got = drive(pseudo_labelled(seed, 1), lambda _: THINK + 'No tool does this.')
  assert (got.kind, got.calls, got.answer) == ('irrelevant', (), 'No tool does this.')


def test_nothing_to_label_with():
  seed = seeds('sequential')[0]
  assert drive(pseudo_labelled(seed, 3), lambda _: '<think>\nno end') == 'no pseudo-label'
  endless = pseudo_labelled(seed, 3, max_steps=4)
  assert drive(endless, lambda _: THINK + '[f(a=1)]') == 'no pseudo-label'
  # Without a world, a call for which nothing is recorded ends the attempt.
  recorded = dataclasses.replace(seed, world=None)
  assert drive(pseudo_labelled(recorded, 1), lambda _: THINK + '[f(a=1)]') == 'no pseudo-label'


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['single', 'sequential', 'parallel', 'irrelevant', 'multi_turn'])
def test_seeds_round_trip_as_json(kind):
  for seed in seeds(kind, 5):
    assert Seed.from_json(json.loads(json.dumps(seed.to_json()))) == seed
  if kind == 'single':  # BFCL writes the reference as one string
    record = seed.to_json()
    assert Seed.from_json(record | {'ground_truth': print_calls(list(seed.calls))}) == seed


def test_bad_seeds_are_named():
  seed = next(s for s in seeds('sequential', 1))
  for change in (
    {'ground_truth': ['f(a=']},
    {'ground_truth': '[f(a=]'},
    {'conversations': [{'role': 'user'}]},
    {'tool_response': ['{}']},
    {'tool_response': [], 'world': None},
    {'tool_response': '{}'},
    {'kind': 'odd'},
    {'world': ['toolworld']},
  ):
    with pytest.raises(ValueError, match=seed.id):
      Seed.from_json(seed.to_json() | change)
  with pytest.raises(ValueError, match='not a seed record'):
    Seed.from_json({'id': 3})
