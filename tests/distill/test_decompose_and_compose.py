"""The decomposition prompt, its tolerant reader, composed traces, and wordings from files."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import parse_calls
from dcore_jax.distill import compose, decompose
from dcore_jax.distill.compose import Solved
from dcore_jax.distill.wording import ENGLISH_WORDING, ORGANISM_WORDING, WORDINGS, load_wording
from dcore_jax.learn.rewards import toolrl_reward

A = Solved('find a', 'i need f.', "[f(x='a')]")
B = Solved('find b', '<think>\ni need g.\n', '[g(y=2)]')
T = ORGANISM_WORDING.templates
CONTEXT = [Message('system', 'the policy'), Message('user', 'before'), Message('assistant', 'ok')]
CALLS = [ToolCall('f', {'x': 'a'})]


def test_decomposition_round_trip():
  subtasks = ['find the order of Karo', 'say "hi" \\ there, ]} [{']
  text = decompose.print_subtasks(subtasks, [[0], [1]])
  assert decompose.parse_subtasks('text before ' + text + ' and after') == [
    (s, [i]) for i, s in enumerate(subtasks)
  ]
  assert decompose.parse_subtasks(decompose.print_subtasks(['all'], [[0, 1, 2]])) == [
    ('all', [0, 1, 2])
  ]
  assert decompose.parse_subtasks(decompose.print_subtasks(['all'], None)) == [('all', None)]


@pytest.mark.parametrize(
  'text',
  [
    '```json\n[{"step": 1, "description": "a", "index": [0]}]\n```',
    '[{"index": [0], "description": "a", "step": 1}]',
    '[{"step": 1, "description": "a", "index": [0],},\n]',
    '{"subtasks": [{"description": "a", "index": [0], "why": {"x": [1]}}]}',
    'as [{"x": 1}] shows: [ {"description": "a", "index": [0]} ] or '
    '[{"description": "b", "index": [0]}]',
    'broken [{"description": "a" and then [{"description": "a", "index": [0]}]',
  ],
)
def test_decompositions_are_read_wherever_they_stand(text):
  assert decompose.parse_subtasks(text) == [('a', [0])]


def test_commas_inside_descriptions_stay():
  assert decompose.parse_subtasks('[{"description": "a,] b, }", "index": [0,],},]') == [
    ('a,] b, }', [0])
  ]


@pytest.mark.parametrize(
  'text',
  [
    '',
    'no list',
    '[1, 2]',
    '[{"step": 1}]',
    '[{"step": 1, "description": 3, "index": [0]}]',
    '[{"description": "a", "index": [true]}]',
    '[{"description": "a", "index": 0}]',
    '[{"description": "a", "index": [0]',
    '[{' * 5000,
    '[{"a": ' * 3000 + '1' + '}]' * 3000,
    '[{"description": "a", "index": [' + '9' * 5000 + ']}]',
  ],
)
def test_what_is_no_decomposition(text):
  assert decompose.parse_subtasks(text) is None


@hypothesis.given(st.text())
def test_no_text_breaks_the_reader(text):
  decompose.parse_subtasks('[{' + text)
  for read in (
    decompose.parse_subtasks(text + decompose.print_subtasks(['x'], [[0]])),
    decompose.parse_subtasks(text),
  ):
    assert read is None or all(isinstance(description, str) for description, _ in read)


@pytest.mark.parametrize(
  ('index', 'strict', 'owned'),
  [
    ([[0], [1], [2]], False, [[0], [1], [2]]),
    ([[0], [1, 2]], False, [[0], [1, 2]]),
    ([[1], [0], [2]], False, None),
    ([[0], [], [1, 2]], False, None),
    ([[0], [1]], False, None),
    ([[0], [1], [2, 3]], False, None),
    ([[0], [0], [1, 2]], False, None),
    ([None, None, None], False, [[0], [1], [2]]),
    ([None, None], False, None),
    ([[0], None, [1, 2]], False, None),
    ([[2], [1], [0]], True, [[0], [1], [2]]),
    ([[0], [1, 2]], True, None),
  ],
)
def test_subtasks_share_out_three_calls(index, strict, owned):
  got = decompose.own_calls([('s', i) for i in index], 3, strict)
  assert got == (owned and [('s', i) for i in owned])


def test_the_organisms_prompt_is_the_one_it_was_pretrained_on():
  messages = decompose.decompose_messages(CONTEXT, 'do it', CALLS, ORGANISM_WORDING.prompts)
  assert messages == [
    *CONTEXT,
    Message(
      'user',
      "list the subtasks of this request as json.\nrequest: do it\ncalls: [f(x='a')]\nsubtasks:",
    ),
  ]
  blind = decompose.decompose_messages(CONTEXT, 'do it', None, ORGANISM_WORDING.prompts)
  assert 'calls' not in blind[-1].content and blind[:-1] == CONTEXT
  shown = decompose.decompose_messages(CONTEXT, 'do it', CALLS, ORGANISM_WORDING.prompts, 2)
  assert (
    shown[0] == CONTEXT[0] and shown[-3:] == messages[-3:]
  )  # examples stand between the system message and the history
  assert [m.role for m in shown[1:5]] == ['user', 'assistant'] * 2


@pytest.mark.parametrize('wording', WORDINGS.values(), ids=list(WORDINGS))
def test_examples_are_decompositions_that_hold(wording):
  for example in wording.prompts.examples:
    count = len(parse_calls(example.calls))
    assert decompose.own_calls(
      [(text, list(index)) for text, index in example.subtasks], count, False
    )


def test_the_english_prompt_shows_everything_in_one_system_and_one_user_message():
  system, user = decompose.decompose_messages(CONTEXT, 'do {it}', CALLS, ENGLISH_WORDING.prompts, 3)
  assert [system.role, user.role] == ['system', 'user']
  for part in ('the policy', '"content": "before"', 'do {it}', "[f(x='a')]"):
    assert part in user.content
  assert (
    all(f'<example_{n}>' in system.content for n in (1, 2, 3))
    and '"index"' in system.content
    and '{' * 2 not in system.content
  )
  system, user = decompose.decompose_messages(
    CONTEXT[:1], 'do it', None, ENGLISH_WORDING.prompts, 1
  )
  assert (
    '"index"' not in system.content
    and 'Calls' not in system.content + user.content
    and '<example_2>' not in system.content
  )
  with pytest.raises(ValueError, match='9 examples'):
    decompose.decompose_messages(CONTEXT, 'q', CALLS, ENGLISH_WORDING.prompts, 9)


def test_a_file_changes_a_wording(tmp_path):
  path = tmp_path / 'chinese.json'
  path.write_text(
    json.dumps(
      {
        'base': 'english',
        'templates': {'plan': '我把它分成几个子任务：', 'item': '{number}、{subtask}'},
      }
    )
  )
  wording = load_wording(str(path))
  assert wording.name == 'chinese' and wording.prompts == ENGLISH_WORDING.prompts
  assert ' 我把它分成几个子任务：\n1、find a\n' in compose.sequential(
    'q', ['find a'], 0, A, wording.templates
  )
  assert (
    len({w.version for w in (wording, ENGLISH_WORDING, ORGANISM_WORDING)}) == 3
    and load_wording(str(path)).version == wording.version
  )


@pytest.mark.parametrize(
  ('record', 'named'),
  [
    ('{', 'not JSON'),
    ('[]', 'base'),
    ('{"base": "x"}', 'base'),
    ('{"base": "english", "prompt": {}}', 'base'),
    ('{"base": "english", "templates": {"opne": "x"}}', 'opne'),
    ('{"base": "english", "templates": {"open": "{quary}"}}', 'quary'),
    ('{"base": "english", "templates": {"open": 3}}', 'open'),
    ('{"base": "english", "templates": {"open": "{query"}}', 'open'),
    ('{"base": "english", "prompts": {"examples": [{"query": "q"}]}}', 'example'),
  ],
)
def test_wordings_that_do_not_hold_are_named(tmp_path, record, named):
  path = tmp_path / 'w.json'
  path.write_text(record)
  with pytest.raises(ValueError, match=named):
    load_wording(str(path))
  with pytest.raises(ValueError, match='englisch'):
    load_wording('englisch')


def test_sequential_form():
  first = compose.sequential('q', ['find a', 'find b'], 0, A, T)
  assert first == (
    '<think>\n\nthe request is: q\n i split it into subtasks:\n1. find a\n2. find b\n'
    'now subtask 1: find a\ni need f.\n'
    "</think>\n\n[f(x='a')]"
  )
  second = compose.sequential('q', ['find a', 'find b'], 1, B, T)
  assert (
    'these subtasks are solved:\n1. find a\nnow subtask 2: find b\ni need g.\n</think>' in second
  )
  assert '1. find a\n2. find b\n' in second  # the plan stands on every step


@pytest.mark.parametrize(('newline', 'expected'), [(True, 1), (False, 0)])
def test_parallel_form_and_its_format_reward(newline, expected):
  text = compose.parallel('q', [A, B], T, newline_before_close=newline)
  reasoning, answer = split_reasoning(text)
  assert answer == "[f(x='a'), g(y=2)]"
  assert reasoning.endswith(T.close + answer) and T.reflect in reasoning
  reward = toolrl_reward(text, answer)
  assert (reward.format, reward.correctness) == (expected, 3)


@pytest.mark.parametrize('wording', WORDINGS.values(), ids=list(WORDINGS))
def test_all_forms_pass_the_format_reward(wording):
  t = wording.templates
  for text in (
    compose.irrelevant('q', 'a is missing.', 'please give the a.', t),
    compose.finished('q', 'done: a b.', t),
    compose.single('i need f.', "[f(x='a')]"),
    compose.sequential('q', ['find a'], 0, A, t),
    compose.parallel('q', [A, B], t),
  ):
    assert toolrl_reward(text, split_reasoning(text)[1]).format == 1, text
