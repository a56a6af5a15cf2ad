"""Reading, writing and comparing tool calls, hostile text included."""

import keyword

import hypothesis
import pytest
from hypothesis import strategies as st

from dcore_jax.chat.lenient_calls import parse_lenient
from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import (
  MAX_CHARS,
  ToolCallError,
  calls_equal,
  parse_calls,
  parse_hermes,
  parse_python,
  parse_reference,
  print_calls,
  tool_response,
)


@pytest.mark.parametrize(
  'text, calls',
  [
    ('[]', []),
    ("[f(a=1, b='x'), g(c=2)]", [ToolCall('f', {'a': 1, 'b': 'x'}), ToolCall('g', {'c': 2})]),
    (' \n[ f ( a = 1 ) , ]\n', [ToolCall('f', {'a': 1})]),
    ('[f(\n  a=1,\n  b="two\\nlines",\n)]', [ToolCall('f', {'a': 1, 'b': 'two\nlines'})]),
    (
      "[a.b.c(x=-1.5, y=[1, (2, 'z')], z={'k': [None]})]",
      [ToolCall('a.b.c', {'x': -1.5, 'y': [1, [2, 'z']], 'z': {'k': [None]}})],
    ),
    (
      '[f(a=true, b=false, c=null, d=none, e=True, g=None)]',
      [ToolCall('f', {'a': True, 'b': False, 'c': None, 'd': None, 'e': True, 'g': None})],
    ),
    ('[f(a=celsius, b=units.metric)]', [ToolCall('f', {'a': 'celsius', 'b': 'units.metric'})]),
    ("[f(1, 'b', c=3)]", [ToolCall('f', {'c': 3}, (1, 'b'))]),
    (
      "[f(**{'from': 'here', 'two words': 1}, to='there')]",
      [ToolCall('f', {'from': 'here', 'two words': 1, 'to': 'there'})],
    ),
    (r"[f(pattern='\d+')]", [ToolCall('f', {'pattern': r'\d+'})]),
    ("[f(a='<tool_call>')]", [ToolCall('f', {'a': '<tool_call>'})]),
    ("[f(a='北京')]", [ToolCall('f', {'a': '北京'})]),
  ],
)
def test_python_calls(text, calls):
  assert parse_calls(text) == calls


@pytest.mark.parametrize(
  'text', ['', 'I cannot do that.', 'f(a=1)', '[f(a=1)] done', 'Sure: [f(a=1)]', '[f(a=1), g(']
)
def test_plain_text_is_no_call_list(text):
  assert parse_calls(text) is None


@pytest.mark.parametrize(
  'text, reason',
  [
    ('[f(a=]', 'not an expression'),
    ('[1]', 'expected a call, got Constant'),
    ("['f']", 'expected a call'),
    ('[f]', 'expected a call, got Name'),
    ('[f(a=1), x][0]', 'expected a bracketed list'),
    ('[f(a=1+1)]', 'expected a literal value, got BinOp'),
    ('[f(a=not 1)]', 'expected a literal value, got UnaryOp'),
    ("[f(a=-'x')]", 'expected a literal value'),
    ('[f(a=g(1))]', 'expected a literal value, got Call'),
    ("[f(a=f'{x}')]", 'expected a literal value, got JoinedStr'),
    ('[f(a={1, 2})]', 'expected a literal value, got Set'),
    ('[f(a={[1]: 2})]', 'expected a literal value, got Dict'),
    ('[f(a={**b})]', 'expected a literal value'),
    ('[f(*a)]', 'expected a literal value, got Starred'),
    ('[f(**a)]', 'needs a dict'),
    ('[f(a=1, a=2)]', "argument 'a' is given twice"),
    ("[f(a=b'x')]", 'got a bytes'),
    ('[f(a=2j)]', 'got a complex'),
    ('[f(a=...)]', 'got a ellipsis'),
    ('[f(a=1e999)]', 'finite'),
    ('[f()()]', 'called by its name'),
    ('[(lambda: 1)()]', 'called by its name'),
    ('[f(a=__import__("os").system("true"))]', 'expected a literal value'),
    ('[f(a="\x00")]', 'not an expression|null'),
    ('[f(a={1: 2, True: 3})]', 'given twice'),
    ("[f(from=1, **{'from': 2})]", "argument 'from' is given twice"),
    ('[f(from=1, from=2)]', "argument 'from' is given twice"),
    ('[f(a==1)]', 'expected a literal value'),
    ('[f(from==1)]', 'not an expression'),
    ('<tool_call>{"name": "f"', 'never closed'),
    ('<tool_call>{"name": "f", "arguments": {"a": "x</tool_call>', 'not JSON'),
    ('<tool_call>{"name": "f"} and more</tool_call>', 'not JSON'),
    ('<tool_call> is a tag', 'holds no call'),
    ('<tool_call>{"name": "f"}\n<tool_call>{"name"', 'never closed'),
    ('<tool_call>{"name": "f", "args": {}}</tool_call>', "unknown key 'args'"),
    ('<tool_call>{"name": "f", "type": "tool"}</tool_call>', "unknown key 'type'"),
    ('<tool_call>{"name": "f", "function": {"name": "f"}}</tool_call>', "unknown key 'name'"),
    (
      '<tool_call>{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}</tool_call>',
      'differ',
    ),
    ('<tool_call>{"name": "f", "name": "g"}</tool_call>', 'given twice'),
    ('<tool_call>{"name": "f", "arguments": {"a": 1, "a": 1}}</tool_call>', 'given twice'),
    (
      '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}</tool_call>',
      'given twice',
    ),
    ('<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>', 'expected {"name"'),
    ('<tool_call>{"name": "f", "arguments": {"a": 1e400}}</tool_call>', 'finite'),
    ("<tool_call>{'name': f}</tool_call>", 'neither JSON nor a literal'),
    ('<tool_call>{"name": f}</tool_call>', 'not JSON'),
    ('<tool_call>[]</tool_call>', 'expected {"name"'),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', 'expected {"name"'),
    ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', 'finite'),
  ],
)
def test_unreadable_call_lists(text, reason):
  with pytest.raises(ToolCallError, match=reason):
    parse_calls(text)


HOSTILE = [
  '[' * 10_000 + ']',
  '[' * 80 + ']' * 80,
  '[f(a=' + '[' * 70 + ']' * 70 + ')]',
  '[f(a=9**9**9)]',
  '[f(a=' + '9' * 1_000_000 + ')]',
  '[f(a=' + '9' * 5_000 + ')]',
  '[f(a=0x' + 'f' * 50_000 + ')]',
  '[f(a=' + '-' * 50_000 + '1)]',
  '[f(a=' + '1+' * 30_000 + '1)]',
  '[f(a=x' + '.a' * 30_000 + '())]',
  '[f' + '()' * 30_000 + ']',
  "[f(a='x'*10**10)]",
  '[f(a=' + '{1:' * 50 + ' 1 2]',
  '[f(a=' + 'lambda:' * 8_000 + '1)]',
  '[f(a=\ud800)]',
  '[' + 'f(a=1),' * 9_000 + '*]',
  '[' + 'x' * (MAX_CHARS + 1) + ']',
  "[f(a='" + "\\'" * 30_000 + ']',
  '[f(from=' + '"\'' * 30_001 + ')]',
  '[f(' + 'from=' * 10_000 + ')]',
]


@pytest.mark.parametrize('text', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_an_error(text):
  with pytest.raises(ToolCallError) as error:
    parse_calls(text)
  assert len(str(error.value)) < 400
  parse_lenient(text)


def test_hermes_hostile():
  for body in (
    '[' * 100_000,
    '{"name": "f", "arguments": {"a": ' + '[' * 70 + ']' * 70 + '}}',
    '9' * 5_000,
  ):
    with pytest.raises(ToolCallError):
      parse_hermes(f'<tool_call>{body}</tool_call>')


def test_hermes_calls():
  text = (
    'Let me look.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, null]}}\n</tool_call>\n'
    '<tool_call>{"name": "g.h", "arguments": "{\\"b\\": true}"}</tool_call>'
    '<tool_call>{"name": "i"}</tool_call>'
  )
  assert parse_calls(text) == [
    ToolCall('f', {'a': [1, None]}),
    ToolCall('g.h', {'b': True}),
    ToolCall('i', {}),
  ]


@pytest.mark.parametrize(
  'body',
  [
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "f", "parameters": {"a": 1}}',
    '{"arguments": "{\\"a\\": 1}", "name": "f"}',
    '{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 1}}',
    '{"name": "f", "arguments": null, "parameters": {"a": 1}}',
    '{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
    '{"type": "function", "name": "f", "parameters": {"a": 1}}',
    '[{"name": "f", "arguments": {"a": 1}}]',
    "{'name': 'f', 'arguments': {'a': 1}}",
  ],
)
def test_spellings_of_one_call(body):
  tagged = f'<tool_call>\n {body} \n</tool_call>\n'
  for text in (f'<tool_call>{body}</tool_call>', f'So:\n{tagged}', f'[So] {tagged} [end]'):
    assert parse_calls(text) == [ToolCall('f', {'a': 1})]


@pytest.mark.parametrize('value', ['{}', '""', 'null', '" "', '"{}"', '"null"', '[]', '"[]"'])
@pytest.mark.parametrize('key', ['arguments', 'parameters'])
def test_calls_without_arguments(key, value):
  text = '<tool_call>{"name": "f", "%s": %s}</tool_call>' % (key, value)
  assert parse_calls(text) == [ToolCall('f', {})]


def test_the_object_says_where_a_call_ends():
  inside = 'a\n</tool_call>\r<tool_call>\t</think>{"'
  body = '{"name": "f", "arguments": {"a": "a\n</tool_call>\r<tool_call>\t</think>{\\""}}'
  call = ToolCall('f', {'a': inside})
  for text in (
    f'<tool_call>{body}</tool_call>',
    f'<tool_call>\n{body}\n',
    f'<tool_call>{body}</tool',
    f'<tool_call>{body}',
  ):
    assert parse_calls(text) == [call]
  for between in ('', '\n', '</tool_call>and\n<tool_call>', '</tool_call><tool_call>'):
    assert parse_calls(f'<tool_call>{body}{between}{body}') == [call, call]
  assert parse_calls(f'<tool_call>{body}\n<tool_call>{body}') == [call, call]


def test_line_breaks_inside_of_python_strings():
  assert parse_calls("[f(a='x\n y\\n', b=r'\\d', c=\"it's\n\")]") == [
    ToolCall('f', {'a': 'x\n y\n', 'b': '\\d', 'c': "it's\n"})
  ]


@pytest.mark.parametrize('word', keyword.kwlist + ['__debug__', 'match', 'print'])
def test_python_keywords_name_arguments(word):
  """In the first place and behind others, beside strings that look like them."""
  call = ToolCall('book', {word: ', %s=1' % word, 'to': [word, {word: None}]})
  text = print_calls([call])
  assert text.startswith(f'[book({word}=') and '**' not in text
  assert parse_calls(text) == [call]
  assert parse_calls(f'[ book(to = 1 ,\n {word} = 2) ]') == [ToolCall('book', {'to': 1, word: 2})]
  assert parse_calls("[book(**{'%s': 2}, to=1)]" % word) == [ToolCall('book', {'to': 1, word: 2})]
  assert parse_lenient(f'[book({word}=2, to=k_1)]') == [{'book': {word: 2, 'to': 'k_1'}}]
  assert parse_lenient("[book(to=1, **{'%s': 2})]" % word) == [{'book': {word: 2, 'to': 1}}]


ODD_TEXTS = [
  'true',
  'it\'s "so"',
  '</tool_call>',
  '</think>',
  '<think>',
  '[f(a=1)]',
  '\\',
  '\x00',
  '\ud800',
  ', from=1',
  '{"}',
]
SCALARS = (
  st.none()
  | st.booleans()
  | st.integers()
  | st.integers(-(2**4000), 2**4000)
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(max_size=8)
  | st.sampled_from(ODD_TEXTS)
)
NAMES = st.sampled_from(['f', 'a.b.c', '_x1', 'find_flights', 'größe', 'true', 'print'])
KEYS = (
  st.sampled_from(['a', 'b', 'ﬁ', 'self', 'two words', '', 'a.b', 'k_', '__debug__'])
  | st.sampled_from(keyword.kwlist)
  | st.text(max_size=5)
)
VALUES = st.recursive(
  SCALARS,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2),
  max_leaves=6,
)
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)


def same_types(a, b):
  return repr(a) == repr(b)  # == alone would let True pass for 1


@hypothesis.settings(max_examples=150)
@hypothesis.given(
  st.lists(
    st.builds(ToolCall, NAMES, ARGUMENTS, st.lists(VALUES, max_size=2).map(tuple)), max_size=3
  )
)
def test_python_round_trip(calls):
  again = parse_calls(print_calls(calls))
  assert calls_equal(again, calls)
  for a, b in zip(again, calls, strict=True):
    assert same_types(sorted(a.arguments.items()), sorted(b.arguments.items()))
    assert same_types(a.positional, b.positional)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
  st.lists(st.builds(ToolCall, st.text(max_size=9), ARGUMENTS), min_size=1, max_size=3)
)
def test_hermes_round_trip(calls):
  assert parse_calls(print_calls(calls, 'hermes')) == calls


@hypothesis.given(
  st.text(max_size=6) | st.sampled_from(keyword.kwlist), st.sampled_from(['', 'a.'])
)
def test_a_python_name_is_written_so_that_it_is_read_or_refused(name, before):
  call = ToolCall(before + name, {'a': 1})
  try:
    text = print_calls([call])
  except ValueError as error:
    assert 'is no name' in str(error)
    with pytest.raises(AssertionError):
      assert _read_or_none(f'[{call.name}(a=1)]') == [call]
    return
  assert parse_calls(text) == [call]


def _read_or_none(text):
  try:
    return parse_calls(text)
  except ToolCallError:
    return None


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  st.text(st.sampled_from('[](){}f,a=1\'"-.*: tn\\<'), max_size=30).map(lambda inner: f'[{inner}]')
)
def test_any_text_is_calls_or_an_error(text):
  try:
    calls = parse_calls(text)
  except ToolCallError:
    return
  assert calls is not None and calls_equal(parse_calls(print_calls(calls)), calls)


def nested(levels):
  value = -1
  for _ in range(levels):
    value = [value]
  return value


def test_no_tag_of_thoughts_stands_in_printed_calls():
  calls = [ToolCall('f', {'a': 'x</think>\n\n<think>', 'b': {'</think>': ['<think>']}})]
  for style in ('python', 'hermes'):
    text = print_calls(calls, style)
    assert 'think>' not in text.replace('x3cthink>', '').replace('x3c/think>', '')
    assert parse_calls(text) == calls
  deep = [ToolCall('f', {'a': nested(64)})]
  assert parse_calls(print_calls(deep)) == deep


@pytest.mark.parametrize(
  'call, style, reason',
  [
    (ToolCall('two words', {}), 'python', 'no name'),
    (ToolCall('', {}), 'python', 'no name'),
    (ToolCall('f.class', {}), 'python', 'no name'),
    (ToolCall('f', {'a': object()}), 'python', 'JSON-like'),
    (ToolCall('f', {'a': float('nan')}), 'python', 'finite'),
    (ToolCall('f', {'a': float('inf')}), 'hermes', 'JSON'),
    (ToolCall('f', {'a': {1: 2}}), 'hermes', 'text keys'),
    (ToolCall('f', {'a': nested(65)}), 'python', 'levels'),
    (ToolCall('f', {'a': nested(64)}), 'hermes', 'levels'),
    (ToolCall('f', {'a': 2**4097}), 'hermes', 'bits'),
    (ToolCall('f', {}, (1,)), 'hermes', 'positional'),
    (ToolCall('f', {}), 'xml', 'unknown call style'),
  ],
)
def test_what_cannot_be_written(call, style, reason):
  with pytest.raises(ValueError, match=reason):
    print_calls([call], style)


def test_reference_strings():
  calls = parse_reference(['f(a=1)', ' [g(2)] ', 'h(), i()'])
  assert calls == [
    ToolCall('f', {'a': 1}),
    ToolCall('g', {}, (2,)),
    ToolCall('h', {}),
    ToolCall('i', {}),
  ]
  assert parse_reference([]) == []
  with pytest.raises(ToolCallError, match='reference call 1: '):
    parse_reference(['f()', 'g(a=)'])
  with pytest.raises(ValueError, match='list of call strings'):
    parse_reference('[f()]')


def test_calls_equal():
  f = ToolCall('f', {'a': 1, 'b': [1, 2]})
  g = ToolCall('g', {})
  f2 = ToolCall('f', {'b': (1.0, 2), 'a': True})
  assert (
    calls_equal([f, g], [f2, g])
    and not calls_equal([f, g], [g, f])
    and calls_equal([f, g], [g, f], ordered=False)
  )
  assert not calls_equal([f, f], [f, g], ordered=False) and not calls_equal(
    [f], [f, f], ordered=False
  )
  assert not calls_equal([ToolCall('f', {}, (1,))], [ToolCall('f', {}, (2,))])
  assert not calls_equal([ToolCall('f', {'a': 'true'})], parse_python('[f(a=true)]'))


def test_lenient_forgives_and_forgets():
  assert parse_lenient("[f(5, a=true, b='x'), g.h()]") == [
    {'f': {'a': 'true', 'b': 'x'}},
    {'g.h': {}},
  ]
  assert parse_lenient('f(a=1)') == parse_lenient('[[f(a=1)]]') == [{'f': {'a': 1}}]
  assert parse_lenient('[f(a=2**3 - 1.5, b=7 // 2 % 2)]') == [{'f': {'a': 6.5, 'b': 1}}]
  assert parse_lenient("[{'name': 'f'}]") == [{'name': 'f'}]
  assert parse_lenient('[]') == []
  for value in ('x.y', '{1}', '1/0', '2**64**8', "'x'*9", '{[1]: 2}', '2**0.5**', '(-1)**0.5'):
    text = f'[f(a={value})]'
    assert parse_lenient(text) == text


def test_tool_response():
  assert tool_response('{"a": 1}') == '<tool_response>\n{"a": 1}\n</tool_response>'
