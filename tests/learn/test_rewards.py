"""Rule rewards: the golden values of the reference, its flags, the paper's formula and the
corrected reward.
"""

import itertools

import numpy as np
import pytest

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.learn import rewards
from dcore_jax.learn.rewards import batch_reward, corrected_reward, paper_reward, toolrl_reward
from dcore_jax.worlds.toolworld.world import ToolWorld

T = '<think>\nx\n</think>\n\n'
F = '[f(a=1)]'
FB = "[f(a=1, b='q')]"
# Wherever T itself is a row's prediction, its blank lines are stripped with the missing answer.
GOLDEN = [
  (T + FB, FB, 1, 3),
  (T + FB, T + FB, 1, 3),
  ('<think>\n\nx:[f(a=1)]</think>\n\n[f(a=1)]', F, 0, 3),
  ('<think>\nx\n</think>\n' + F, F, 0, 3),
  (F, F, 0, 3),
  (T + "[g(a=1, b='q')]", FB, 1, -3),
  (T + "[f(a=1, b='z')]", FB, 1, 1.5),
  (T + F, FB, 1, 0.75),
  (T + "[f(a=1, b='q', c=2)]", FB, 1, 2.5),
  (T + '[g(y=2), f(x=1)]', '[f(x=1), g(y=2)]', 1, 3),
  (T + '[f(x=1)]', '[f(x=1), g(y=2)]', 1, 0),
  (T + '[f(x=1), g(y=2)]', '[f(x=1)]', 1, 2),
  (T + '[f(x=1), f(x=1)]', '[f(x=1)]', 1, 2),
  (T + F, '[f()]', 1, 0),
  (T + '[f()]', F, 1, -1),
  (T + "[f(a='1')]", F, 1, 1),
  (T + '[f(a=1.0)]', F, 1, 3),
  (T + '[f(a=True)]', F, 1, 3),
  (T + '[f(5)]', '[f(7)]', 1, 3),
  (T + '[f(a=]', F, 1, -3),
  (T + '[]', F, 1, -3),
  (T + 'I cannot', F, 1, -3),
  (T + '[f(a=1)] done', F, 1, -3),
  (T + F, 'I cannot', 1, -3),
  (T + '[]', 'I cannot', 1, -3),
  (T + 'any text', 'I cannot', 1, 3),
  (T, 'I cannot', 0, 3),
  ('<think>\nx', 'I cannot', 0, 3),
  (T, F, 0, -3),
  ('<think>\nx', F, 0, -3),
  (T + 'sure', 'see [1]', 1, -3),
  (T + '[f(parameters=1)]', '[f(parameters=1)]', 1, -1),
  (T + '[f(x=2), f(x=1)]', '[f(x=1), f(x=2)]', 1, 3),
  (T + '[f(x=1,y=2), f(x=1,y=9)]', '[f(x=1,y=8), f(x=1,y=2)]', 1, 9 / 7),
]


@pytest.mark.parametrize('prediction, reference, form, correctness', GOLDEN)
def test_toolrl_golden(prediction, reference, form, correctness):
  reward = toolrl_reward(prediction, reference)
  assert reward.format == form
  assert reward.correctness == pytest.approx(correctness, abs=1e-12)
  assert reward.total == reward.format + reward.correctness


@pytest.mark.parametrize(
  'options, near, exact',
  [
    ({'credit': 'coarse'}, -2, 4),
    ({'credit': 'refined'}, 2.5, 4),
    ({'credit': 'intermediate'}, 1, 4),
    ({'correct_max': 1.0}, 1.5, 2),
    ({'correct_max': 2.0, 'format_range': (-2.0, 2.0)}, 3, 4),
    ({}, 2.5, 4),
  ],
  ids=[
    'COARSE',
    'REFINED',
    'INTERMEDIATE',
    'CORRECTMAX1 and MAX1STEP30MAX3',
    'SCHEDULE',
    'STRICT, which nothing reads',
  ],
)
def test_toolrl_flags(options, near, exact):
  assert toolrl_reward(T + "[f(a=1, b='z')]", FB, **options).total == near
  assert toolrl_reward(T + FB, FB, **options).total == exact


@pytest.mark.parametrize(
  'prediction, words, share',
  [
    (T + F, 512, 0),
    ('<think>\n' + 'so ' * 128 + '\n</think>\n\n' + F, 512, 0.25),
    ('<think>\n' + 'so ' * 100 + '\n</think>\n\n' + F, 384, 0.26),
    ('<think>\n' + 'so ' * 900 + '\n</think>\n\n' + F, 512, 1),
    ('<think>\n' + 'so ' * 900, 512, 0),
    ('so ' * 900 + '</think>\n\n' + F, 512, 0),
  ],
  ids=['one word', 'WITHLENGTH', 'SCHEDULELENGTH', 'at most 1', 'unclosed', 'unopened'],
)
def test_length_adds_to_the_total(prediction, words, share):
  """The parts stay what they are; one word of 512 rounds to 0."""
  plain = toolrl_reward(prediction, F)
  longer = toolrl_reward(prediction, F, length_words=words)
  assert longer[:2] == plain[:2] and longer.total == plain.total + share


@pytest.mark.parametrize(
  'prediction, reference, correctness',
  [
    ('[f(a=true)]', "[f(a='true')]", 3),  # a bare name is its string
    ('[f(a=-1)]', '[f(a=-1)]', 3),
    ('[f(a=2*3-1)]', '[f(a=5)]', 3),
    ('[a.b.f(a=(1, 2))]', '[a.b.f(a=(1, 2))]', 3),
    ('[f(a=(1, 2))]', '[f(a=[1, 2])]', 1),  # tuples are no lists
    ('[f(a=g(b=1))]', "[f(a={'g': {'b': 1}})]", 3),
    ('[f(a=g(1))]', "[f(a='g(1)')]", 3),
    ('[f(a=x[0])]', "[f(a='x[0]')]", 3),
    ('[{"name": "f", "arguments": {"a": 1}}]', '[{"name": "f", "arguments": {"a": 1}}]', 3),
    ('[{"name": "f", "arguments": {"a": 2}}]', '[{"name": "f", "arguments": {"a": 1}}]', -3),
    ('[1, 2]', F, -3),
    ('[f(a=]', '[f(a=]', 3),  # unreadable on both sides, and the same text
    ('[]', '[]', 3),
    ('[f(a=1)]', '[]', -3),
    ('[f(a=9**9**9)]', F, -3),
    (
      '[f(a=__import__("os").getcwd())]',
      F,
      1,
    ),  # its source text: the wrong value of the right argument
  ],
)
def test_toolrl_reader(prediction, reference, correctness):
  assert toolrl_reward(T + prediction, reference).correctness == correctness


def test_format_range_reaches_both_ends():
  assert toolrl_reward(F, F, format_range=(-2.0, 2.0)).format == -2
  assert toolrl_reward(T + F, F, format_range=(-2.0, 2.0)).format == 2


def test_special_tokens_frame_the_turn():
  framed = '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n' + T + F + '<|im_end|>\n'
  assert toolrl_reward(framed, F).total == 4


@pytest.mark.parametrize('name', sorted(rewards.REWARDS))
def test_bad_input_is_named(name):
  for reference in ('', '  \n', '<think>\nx\n</think>\n\n'):
    with pytest.raises(ValueError, match='holds no answer'):
      rewards.REWARDS[name](T + F, reference)
  with pytest.raises(ValueError, match='row 1: the reference'):
    batch_reward(name, [T + F] * 2, [F, ''])
  with pytest.raises(ValueError, match='2 predictions for 1'):
    batch_reward(name, [T] * 2, [F])
  with pytest.raises(ValueError, match='unknown reward'):
    batch_reward('best', [T], [F])
  with pytest.raises(ValueError, match='unknown credit'):
    toolrl_reward(T, F, credit='some')


@pytest.mark.parametrize(
  'prediction, reference, correctness',
  [
    (FB, FB, 3),
    (F, FB, 1.5),
    ("[f(a=1, b='z')]", FB, 2.5),
    ("[g(a=1, b='q')]", FB, 0),
    ('[f()]', '[f()]', 3),
    ('[f(x=1)]', '[f(x=1), g(y=2)]', 1),
    ('[g(y=2), f(x=1)]', '[f(x=1), g(y=2)]', 3),
    ('I cannot', FB, 0),
    ('sure', 'no', 3),
    (FB, 'no', 0),
    ('[f(a=]', FB, 0),
    ('[]', '[]', 3),
    ('[f(5)]', '[f(7)]', 2),
  ],
)
def test_paper_formula(prediction, reference, correctness):
  reward = paper_reward(T + prediction, reference)
  assert (reward.format, reward.correctness) == (1, correctness)


@pytest.mark.parametrize(
  'prediction, reference, form, correctness',
  [
    (T + FB, FB, 1, 3),
    ('<think>\n\nx:[f(a=1)]</think>\n\n[f(a=1)]', F, 1, 3),  # the parallel template
    ('<think>\nx\n</think>\n' + F, F, 0, 3),
    (T + '[f(5)]', '[f(7)]', 1, 1),
    (T + '[f(7)]', '[f(7)]', 1, 3),
    (T + '[f(parameters=1)]', '[f(parameters=1)]', 1, 3),
    (
      T + '[f(x=1,y=2), f(x=1,y=9)]',
      '[f(x=1,y=8), f(x=1,y=2)]',
      1,
      6 * 6 / 7 - 3,
    ),  # 1 + (1 + 1) + (1 + 2) of 7
    (T + 'any text', 'I cannot', 1, 3),
    (T, 'I cannot', 0, -3),
    ('<think>\nx', 'I cannot', 0, -3),
    (T + F, 'I cannot', 1, -3),
    (T + '[f(a=]', 'I cannot', 1, -3),
    (T + '[]', '[]', 1, 3),
    (T + F, '[]', 1, -3),
    (T + '[f(a=true)]', '[f(a=True)]', 1, 3),
    (T + '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', F, 1, 3),
  ],
)
def test_corrected(prediction, reference, form, correctness):
  reward = corrected_reward(prediction, reference)
  assert (reward.format, reward.correctness) == (form, pytest.approx(correctness, abs=1e-12))


BOOK = [ToolCall('book', {'from': 'SFO', 'to': 'LAX', 'class': 1})]
SPELLINGS = [
  "[book(from='SFO', to='LAX', class=1)]",
  "[book(class=1, from='SFO', to='LAX')]",
  "[book(to='LAX', **{'from': 'SFO', 'class': 1})]",
  print_calls(BOOK),
]
TAGGED = [
  print_calls(BOOK, 'hermes'),
  '<tool_call>{"name": "book", "parameters": {"from": "SFO", "to": "LAX", "class": 1}}</tool_call>',
  '<tool_call>{"name": "book", "arguments": "{\\"from\\": \\"SFO\\", \\"to\\": \\"LAX\\",'
  ' \\"class\\": 1}"}\n',
]


@pytest.mark.parametrize('name', sorted(rewards.REWARDS))
def test_every_spelling_of_a_call_earns_the_same(name):
  # The released reader knows no calls in tags.
  spellings = SPELLINGS if name.startswith('toolrl') else SPELLINGS + TAGGED
  nearly = [spelling.replace('LAX', 'OAK') for spelling in spellings]
  for reference in spellings:
    exact = [rewards.REWARDS[name](T + spelling, reference).total for spelling in spellings]
    assert exact == [4] * len(spellings)
    if name != 'toolrl_refined':  # which compares the order of names, too
      assert len({rewards.REWARDS[name](T + text, reference).total for text in nearly}) == 1


@pytest.mark.parametrize('name', ['paper', 'corrected', 'toolrl'])
def test_markup_and_line_breaks_in_an_argument(name):
  reference = print_calls([ToolCall('f', {'a': 'x</think>\n\ny'})])
  spellings = [reference, "[f(a='x</think>\\n\\ny')]", "[f(a='x</think>\n\ny')]"]
  if name != 'toolrl':
    spellings.append('<tool_call>{"name": "f", "arguments": {"a": "x</think>\n\ny"}}')
  for text in spellings:
    assert batch_reward(name, [T + text], [reference]).total == 4


@pytest.mark.parametrize('name', ['paper', 'corrected', 'toolrl', 'toolrl_coarse'])
def test_a_response_whose_prompt_has_opened_the_thoughts(name):
  """One closing tag and no opening one; not where the text is known to be whole."""
  responses = [
    'hm\n</think>\n\n[f()]',
    'hm</think>\n[f()]',
    'a</think>b\n</think>\n\n[f()]',
    '[f()]',
  ]
  got = batch_reward(name, responses, ['[f()]'] * 4)
  assert got.format.tolist() == [1, 0, 0, 0] and got.correctness.tolist() == [3] * 4
  framed = f'<|im_start|>assistant\n{responses[0]}<|im_end|>'
  assert batch_reward(name, [framed], ['[f()]']).total == 4
  assert batch_reward(name, responses, ['[f()]'] * 4, whole=True).format.tolist() == [0] * 4


def test_assignment_is_optimal():
  """Against all pairings of up to four calls of one name: the greedy pairing of `toolrl` falls
  short in some.
  """
  rng = np.random.default_rng(0)
  fell_short = 0
  for _ in range(200):

    def draw():
      return [tuple(rng.integers(3, size=3).tolist()) for _ in range(rng.integers(1, 5))]

    given = draw()
    wanted = draw()

    def show(rows):
      return '[' + ', '.join('f(x={}, y={}, z={})'.format(*row) for row in rows) + ']'

    longer, shorter = sorted((given, wanted), key=len, reverse=True)
    equal = max(
      sum(
        a == b
        for first, second in zip(order, shorter, strict=True)
        for a, b in zip(first, second, strict=True)
      )
      for order in itertools.permutations(longer, len(shorter))
    )
    names = min(len(given), len(wanted)) / max(len(given), len(wanted))
    best = 6 * (names + min(len(given), len(wanted)) + equal) / (1 + 4 * len(wanted)) - 3
    assert corrected_reward(T + show(given), show(wanted)).correctness == pytest.approx(
      best, abs=1e-12
    )
    fell_short += toolrl_reward(T + show(given), show(wanted)).correctness < best - 1e-9
  assert fell_short


def test_corrected_never_below_greedy():
  # On call lists without positional arguments the two differ only in who is paired with whom.
  rng = np.random.default_rng(1)

  def calls():
    names = rng.choice(['f', 'g'], 4)
    values = rng.integers(3, size=(4, 2))
    return (
      '['
      + ', '.join(f'{name}(x={x}, y={y})' for name, (x, y) in zip(names, values, strict=True))
      + ']'
    )

  for _ in range(100):
    prediction = T + calls()
    reference = calls()
    assert (
      corrected_reward(prediction, reference).total
      >= toolrl_reward(prediction, reference).total - 1e-12
    )


def say(calls):
  return T + print_calls(list(calls))


def state_reward(world, task, texts):
  """Of responses that are acted out until the episode ends: the calls are executed by the world."""
  episode = world.episode(task)
  said = []
  for text in itertools.takewhile(lambda _: not episode.done, texts):
    episode.step(text)
    said.append(text)
  return rewards.state_reward(said, episode.outcome().correct)


def test_state_reward_looks_at_what_was_done():
  """The same end by another way is right; a wrong call, early end or missing report is not."""
  world = ToolWorld()
  task = world.tasks('sequential', 1, seed=0, split='train')[0]
  (turn,) = task.turns
  one_by_one = [say([call]) for call in turn.calls]
  report = T + turn.answer
  assert state_reward(world, task, [*one_by_one, report]) == (1, 3, 4)
  assert state_reward(world, task, [*one_by_one, report, 'and more']) == (
    1,
    3,
    4,
  )  # nobody listens any more
  assert state_reward(world, task, [*one_by_one, turn.answer]).total == -3
  assert state_reward(world, task, one_by_one).total == -2
  assert state_reward(world, task, [one_by_one[0], report]).total == -2
  assert (
    state_reward(world, task, [say([ToolCall('no_such_tool', {})]), *one_by_one, report]).total == 4
  )  # a detour
  assert state_reward(world, task, []) == (0, -3, -3)


def test_state_reward_of_parallel_calls_ignores_their_order():
  world = ToolWorld()
  task = world.tasks('parallel', 1, seed=0, split='train')[0]
  calls = task.turns[0].calls
  assert len(calls) > 1
  for order in (calls, calls[::-1]):
    assert (
      state_reward(world, task, ['<think>\nx</think>\n\n' + print_calls(list(order))]).total == 4
    )
  assert state_reward(world, task, [say(calls[:1])]).total == -2


@pytest.mark.parametrize('name', sorted(rewards.REWARDS))
def test_batch_is_exact(name):
  calls = [
    f"tool_{i % 4}(city='somewhere {i}', days={i}, tags=['a', 'b'], nested={{'k': {i}}})"
    for i in range(8)
  ]
  answer = '[' + ', '.join(calls) + ']'
  wrong = answer.replace('days=3', 'days=4')
  prediction = '<think>\n' + 'word ' * ((4000 - len(answer)) // 5) + '\n</think>\n\n'
  reward = batch_reward(name, [prediction + answer, prediction + wrong] * 128, [answer] * 256)
  assert reward.total.shape == (256,) and reward.total.dtype == np.float64
  assert (reward.total[::2] == 4 + (name == 'toolrl_length')).all() and len(
    set(reward.total[1::2])
  ) == 1


@pytest.mark.parametrize('name', sorted(rewards.REWARDS))
def test_hostile_text_earns_nothing(name):
  reference = '[f(a=2), ' + 'f(a=3), ' * 9 + 'f(a=1)]'
  unreadable = [
    '[' * 4000 + ']',
    '[' + '9**' * 1300 + '9]',
    '[f(a=' + '-' * 4000 + '1)]',
    '[f(a=' + '(' * 90 + ']',
  ]
  for text in unreadable:
    assert rewards.REWARDS[name](T + text, reference).correctness <= 0
  assert rewards.REWARDS[name](T + '[' + 'f(a=1),' * 600 + ']', reference).correctness < 3
