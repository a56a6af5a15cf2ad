"""Thoughts, content and calls: the same for any cut of the text, and what the readers of whole
texts say.
"""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dcore_jax.chat.messages import ToolCall, ToolSpec, split_reasoning
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.serve.replies import Delta, ReplyParser

TOOLS = [
  ToolSpec(name, '', {'type': 'object', 'properties': {'a': {}, 'b': {}}}) for name in ('f', 'g')
]
PARTS = [
  '<think>',
  '</think>',
  '<tool_call>',
  '</tool_call>',
  '\n',
  ' ',
  'hm',
  '[',
  ']',
  'f(1)',
  'f(a=2, b="]")',
  ', ',
  '<',
  'tool_call>',
  '{"name": "f", "arguments": {"a": 1}}',
  '{"name": "f", "parameters": {"a": "</tool_call>\n<tool_call>"}}',
  '{"name": "f", "arguments": {"a": "',
  "{'name': 'f'}",
  '"}}',
  '"',
  '\\',
  '}',
  '{',
  '\U0001f600',
]


def read(text, cuts=(10**6,), **options):
  """All deltas as one, the text cut at these lengths in turn."""
  parser = ReplyParser(**options)
  whole = Delta()
  place = 0
  number = 0
  while True:
    part = text[place : place + cuts[number % len(cuts)]]
    place = place + len(part)
    number = number + 1
    delta = parser.push(part, last=place == len(text))
    whole = Delta(
      whole.reasoning + delta.reasoning, whole.content + delta.content, whole.calls + delta.calls
    )
    if place == len(text):
      return whole


@pytest.mark.parametrize(
  'text,want',
  [
    ('fine', Delta('', 'fine')),
    ('<think>\nhm\n\nso\n</think>\n\nfine \n', Delta('hm\n\nso', 'fine \n')),
    ('\n<think>\n\n</think>\n\nfine', Delta('', 'fine')),
    ('<think>\nhm', Delta('hm')),
    ('<thin', Delta('', '<thin')),
    ('[f(1, b=2), g(a="x")]', Delta('', '', [('f', '{"a": 1, "b": 2}'), ('g', '{"a": "x"}')])),
    ('<think>\nhm\n</think>\n\n[f()]', Delta('hm', '', [('f', '{}')])),
    (
      'sure:\n<tool_call>\n{"name": "f", "arguments": {"a": "\u00e9"}}\n</tool_call>\n'
      '<tool_call>{"name": "h"}</tool_call>',
      Delta('', 'sure:', [('f', '{"a": "\u00e9"}'), ('h', '{}')]),
    ),
    # What is no call that can be made stays what it is.
    ('[f](there)', Delta('', '[f](there)')),
    ('[]', Delta('', '[]')),
    ('[f(1, 2, 3)]', Delta('', '[f(1, 2, 3)]')),
    ('[f(1, a=2)]', Delta('', '[f(1, a=2)]')),
    ('[h(1)]', Delta('', '[h(1)]')),
    ('[f(__import__("os"))]', Delta('', '[f(__import__("os"))]')),
    ('<tool_call>{"name": 1}</tool_call>', Delta('', '<tool_call>{"name": 1}</tool_call>')),
    ('a <tool_call>{"name": "f"', Delta('', 'a <tool_call>{"name": "f"')),
    ('<tool_call> is a tag', Delta('', '<tool_call> is a tag')),
    # The object is whole: only its closing tag is missing.
    ('a <tool_call>{"name": "f"}', Delta('', 'a', [('f', '{}')])),
    ('<tool_call>{"name": "f"}\n</tool', Delta('', '', [('f', '{}')])),
    ('<tool_call>{"name": "f"}<tool_call>{"name": "g"}', Delta('', '', [('f', '{}'), ('g', '{}')])),
    # Tags and line breaks inside of strings are text.
    (
      '<tool_call>\n{"name": "f", "parameters": {"a": "</tool_call>\n<tool_call></think>"}}\n'
      '</tool_call> so',
      Delta('', 'so', [('f', '{"a": "</tool_call>\\n<tool_call></think>"}')]),
    ),
    ('[f(from="a\nb")]', Delta('', '', [('f', '{"from": "a\\nb"}')])),
    # What cannot be read does not hide what can.
    (
      '<tool_call>{"name": "f"</tool_call> <tool_call>{"name": "g"}</tool_call>',
      Delta('', '<tool_call>{"name": "f"</tool_call>', [('g', '{}')]),
    ),
    (
      '<tool_call>{"name": "f", "x": "a}</tool_call> <tool_call>{"name": "g"}</tool_call>',
      Delta('', '<tool_call>{"name": "f", "x": "a}</tool_call>', [('g', '{}')]),
    ),
    ('<tool_call>{"name": "f", "arg": {}}', Delta('', '<tool_call>{"name": "f", "arg": {}}')),
    ('[f(a=1)', Delta('', '[f(a=1)')),
  ],
)
def test_what_is_read(text, want):
  for cuts in ((1,), (3,), (10**6,)):
    assert read(text, cuts, tools=TOOLS) == want


@given(
  text=st.lists(st.sampled_from(PARTS), max_size=12).map(''.join),
  cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
  tools=st.sampled_from([(), tuple(TOOLS)]),
  thinking=st.booleans(),
)
@example(text='<think>\n</think>[f(1)]\n', cuts=[1], tools=tuple(TOOLS), thinking=False)
def test_the_cuts_do_not_matter(text, cuts, tools, thinking):
  assert read(text, cuts, tools=tools, thinking=thinking) == read(
    text, tools=tools, thinking=thinking
  )


@given(thoughts=st.text('ab \n', max_size=9), answer=st.text('ab <[\n', max_size=9))
def test_thoughts_are_split_as_from_whole_texts(thoughts, answer):
  text = f'<think>\n{thoughts}\n</think>\n\n{answer}'
  got = read(text, (2,))
  assert (got.reasoning, got.content) == split_reasoning(text)


@given(
  calls=st.lists(
    st.builds(
      ToolCall,
      st.sampled_from('fgh'),
      st.dictionaries(
        st.sampled_from(['a', 'b', 'from', 'two words', '</think>']),
        st.none()
        | st.sampled_from(['</tool_call>', '<tool_call>{', '</think>', '<think>', '"}', '\n'])
        | st.booleans()
        | st.integers()
        | st.text()
        | st.lists(st.text(max_size=3), max_size=2),
      ),
    )
  ),
  style=st.sampled_from(['python', 'hermes']),
)
def test_printed_calls_come_back(calls, style):
  got = read(print_calls(calls, style), (5,), tools=TOOLS)
  assert [(name, json.loads(arguments)) for name, arguments in got.calls] == [
    (call.name, call.arguments) for call in calls
  ]


@pytest.mark.parametrize('value', ['{}', '""', 'null', '"{}"'])
def test_a_call_without_arguments(value):
  text = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>' % value
  assert read(text, (4,), tools=TOOLS) == Delta('', '', [('f', '{}')])


def test_a_turn_that_was_cut_has_not_left_out_a_closing_tag():
  text = '<tool_call>{"name": "f"}'
  assert ReplyParser(TOOLS).push(text, last=True, cut=True) == Delta('', text)
  closed = text + '</tool_call>'
  assert ReplyParser(TOOLS).push(closed, last=True, cut=True).calls == [('f', '{}')]


def test_thoughts_that_are_opened_twice():
  """By the prompt and by the response."""
  for cuts in ((1,), (4,), (99,)):
    assert read('<think>\nhm</think>fine', cuts, thinking=True) == Delta('hm', 'fine')
    assert read('<hm</think>fine', cuts, thinking=True) == Delta('<hm', 'fine')


def test_options():
  assert read('hm</think>fine', thinking=True) == Delta('hm', 'fine')
  text = print_calls([ToolCall('f', {}), ToolCall('g', {})], 'hermes')
  assert read(text, tools=TOOLS, most_calls=1).calls == [('f', '{}')]
  assert read('[f(), g()]', tools=TOOLS, most_calls=1).calls == [('f', '{}')]
  assert read(text) == Delta('', text)  # without tools nothing is a call


def test_content_is_sent_before_the_end():
  parser = ReplyParser(TOOLS)
  assert parser.push('[a link] and').content == '[a link] and'
  assert parser.push(' more <').content == ' more' and parser.push('b').content == ' <b'
