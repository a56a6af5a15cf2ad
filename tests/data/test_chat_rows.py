"""Rows of messages: whatever a message says is in the trained text, or refused by its name."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.config import SftSection
from dcore_jax.data.records import adapt_rows
from dcore_jax.data.rows import encode_rows, given_rows, parse_rows, section_sequences
from dcore_jax.data.seed_sources import load_seeds
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.rollout.requests import Completion, Progress
from dcore_jax.serve.answers import ChatChoice, ReplyForm, Report

SPEC = {
  'name': 'get_weather',
  'description': 'Weather of a city.',
  'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
}
TOOLS = [{'type': 'function', 'function': SPEC}]


@pytest.fixture(scope='module')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


def call(city='Paris', identity='call_1', **changes):
  function = {'name': 'get_weather', 'arguments': json.dumps({'city': city}), **changes}
  return {'id': identity, 'type': 'function', 'function': function}


def user(text='Weather in Paris?'):
  return {'role': 'user', 'content': text}


def assistant(content=None, **fields):
  return {'role': 'assistant', 'content': content, **fields}


def tool(content, identity='call_1', **fields):
  return {'role': 'tool', 'tool_call_id': identity, 'content': content, **fields}


def row(*messages, **fields):
  return {'messages': list(messages), **fields}


def contents(record, style='python'):
  (found,) = adapt_rows([record], 'made', call_style=style).rows
  return [message['content'] for message in found['conversations']]


def refused(record, reason, **options):
  with pytest.raises(ValueError, match=f'made, row 0, cannot be read as .*{reason}'):
    adapt_rows([record], 'made', **options)
  with pytest.raises(ValueError, match='none of 1 records'):
    adapt_rows([record], 'made', unreadable='drop', **options)


PYTHON = "[get_weather(city='Paris')]"
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize(
  'fields',
  [
    {'tool_calls': [call()]},
    {'tool_calls': [call(arguments={'city': 'Paris'})]},
    {'tool_calls': [{'name': 'get_weather', 'arguments': {'city': 'Paris'}}]},
    {'tool_calls': [{'index': 0, **call()}]},
    {'tool_calls': json.dumps([call()])},
    {'tool_calls': [{'name': 'get_weather', 'parameters': {'city': 'Paris'}}]},
    {'function_call': call()['function']},
  ],
)
def test_calls_as_data_are_trained_in_either_style(fields):
  record = row(user(), assistant(**fields), tools=TOOLS)
  system, _, target = contents(record)
  assert target == PYTHON and '"get_weather"' in system
  assert contents(record, 'hermes')[-1] == HERMES
  (found,) = adapt_rows([record], 'made', call_style='hermes').rows
  assert found['tools'] == TOOLS


@pytest.mark.parametrize('field', ['reasoning_content', 'reasoning', 'thinking'])
def test_thoughts_stand_before_words_and_calls(field):
  thinking = {field: 'I look it up.\n'}
  assert contents(row(user(), assistant('Who knows.', **thinking)))[-1] == (
    '<think>\nI look it up.\n</think>\n\nWho knows.'
  )
  record = row(user(), assistant(tool_calls=[call()], **thinking))
  assert contents(record)[-1] == '<think>\nI look it up.\n</think>\n\n' + PYTHON
  assert contents(record, 'hermes')[-1] == '<think>\nI look it up.\n</think>\n\n' + HERMES
  record = row(user(), assistant('Let me look.', tool_calls=[call()], **thinking))
  assert contents(record)[-1] == '<think>\nI look it up.\n\nLet me look.\n</think>\n\n' + PYTHON
  assert contents(record, 'hermes')[-1] == (
    '<think>\nI look it up.\n</think>\n\nLet me look.\n' + HERMES
  )
  same = assistant('Who knows.', reasoning='x', reasoning_content='x')
  assert contents(row(user(), same))[-1] == '<think>\nx\n</think>\n\nWho knows.'


@pytest.mark.parametrize(
  'tools',
  [
    TOOLS,
    [SPEC],
    json.dumps(TOOLS),
    json.dumps([SPEC]),
    [json.dumps(TOOLS[0])],
    json.dumps([json.dumps(SPEC)]),
    SPEC,
  ],
)
def test_tools_in_every_form(tools, tokenizer):
  text = row(user(), assistant(PYTHON), tools=tools)  # calls as text: the template shows the tools
  (found,) = adapt_rows([text], 'made').rows
  assert found['tools'] == TOOLS
  (sequence,) = encode_rows(tokenizer, parse_rows([found]))
  assert 'Weather of a city.' in tokenizer.decode(sequence.tokens)
  for answer in (assistant(tool_calls=[call()]), assistant('I cannot.')):
    assert 'Weather of a city.' in contents(row(user(), answer, tools=tools))[0]
  assert contents(row(user(), assistant('I cannot.'), functions=tools))[0].count('get_weather') == 1


def test_answers_go_to_their_calls_by_id_and_name():
  calls = [call('Paris', 'a'), call('Rome', 'b')]
  order = [tool('18', 'a'), tool('25', 'b')]
  expected = contents(row(user(), assistant(tool_calls=calls), *order, assistant('18 and 25.')))
  assert expected[2] == (
    '<tool_response>\n18\n</tool_response>\n<tool_response>\n25\n</tool_response>'
  )
  swapped = row(user(), assistant(tool_calls=calls), *order[::-1], assistant('18 and 25.'))
  assert contents(swapped) == expected
  named = [tool('18', 'a', name='get_weather'), tool('25', 'b')]
  assert contents(row(user(), assistant(tool_calls=calls), *named, assistant('18 and 25.'))) == (
    expected
  )
  for answers, reason in (
    ([tool('18', 'c')], "message 2 .tool.: 'tool_call_id' 'c' names no call"),
    ([tool('18', 'a'), tool('19', 'a')], 'two tool messages answer one call'),
    ([tool('25', 'b')], 'a call before it has no answer'),
    ([tool('18', 'a', name='get_news')], "'get_news' is not that of its call, 'get_weather'"),
    ([*order, tool('3', '')], '3 tool messages answer 2 calls'),
  ):
    refused(row(user(), assistant(tool_calls=calls), *answers, assistant('x')), reason)
  refused(row(user(), assistant('I look.'), tool('18'), assistant('x')), "'call_1' names no call")
  texts = (assistant(HERMES), tool('18', name='get_weather'), assistant('18.'))
  assert contents(row(user(), *texts))[1:] == [HERMES, '18', '18.']


def test_roles_parts_and_null():
  parts = [{'type': 'text', 'text': 'Weather'}, {'type': 'text', 'text': 'in Paris?'}]
  record = row({'role': 'developer', 'content': 'Be brief.'}, user(parts), assistant(PYTHON))
  (found,) = adapt_rows([record], 'made').rows
  assert [m['role'] for m in found['conversations']] == ['system', 'user', 'assistant']
  assert contents(record) == ['Be brief.', 'Weather\nin Paris?', PYTHON]
  plain = row(user(), assistant('x'))
  assert contents({**plain, 'system': 'Be brief.'})[0] == 'Be brief.'
  later = row(user(), assistant('x'), {'role': 'system', 'content': 'Now.'}, user(), assistant('y'))
  assert contents(later)[2] == 'Now.'
  answered = row(user(), assistant(tool_calls=[call()]), tool({'c': 18}), assistant('18'))
  assert '{"c": 18}' in contents(answered)[2]


HARMLESS = {
  'id': 'x',
  'index': 0,
  'refusal': None,
  'annotations': [],
  'audio': None,
  'function_call': None,
  'tool_calls': [],
}


def test_bookkeeping_passes():
  plain = row(user(), assistant('x'))
  noted = row(user(), assistant('x', **HARMLESS), id='7', source='here', metadata={'a': 1})
  assert contents(noted) == contents(plain)
  logged = {**plain, 'model': 'm', 'temperature': 0.5, 'tool_choice': 'auto', 'tools': None}
  assert contents(logged) == contents(plain)


@pytest.mark.parametrize(
  'message, reason',
  [
    (assistant('x', refusal='no'), "message 1 .assistant.: the field 'refusal'"),
    (assistant('x', audio={'id': 1}), "'audio'"),
    (assistant('x', mood='glad'), "'mood'"),
    (assistant('x', name='Bob'), "'name'"),
    (assistant('x', reasoning={'a': 1}), "'reasoning' is no text"),
    (assistant('x', reasoning='a', thinking='b'), 'different thoughts'),
    (assistant('<think>\na\n</think>\n\nx', reasoning='b'), "thoughts stand in .*'content'"),
    (assistant(None), 'says nothing'),
    (assistant('', reasoning='only thoughts'), 'says nothing'),
    (assistant([{'type': 'image_url', 'image_url': {}}]), "content.0. is of kind 'image_url'"),
    (assistant([{'type': 'text', 'text': 'x', 'bold': True}]), "content.0.*'bold'"),
    (assistant(3), "'content' is of type int"),
    (assistant(HERMES, tool_calls=[call()]), "'content' holds a <tool_call>"),
    (
      assistant(tool_calls=[call(arguments='{"a": ')]),
      r'tool_calls\[0\].function.arguments cannot be read: neither JSON',
    ),
    (assistant(tool_calls=[call(arguments='[1]')]), 'arguments cannot be read: a tool call needs'),
    (assistant(tool_calls=[call(arguments='{"a": "\\ud800"}')]), 'surrogate'),
    (assistant(tool_calls=[call(arguments='{"a": 1, "a": 2}')]), "'a' is given twice"),
    (assistant(tool_calls=[call(name='')]), 'name is no name'),
    (assistant(tool_calls=[call(parameters={'a': 1})]), 'arguments and parameters differ'),
    (assistant('<think>a', tool_calls=[call()]), "'content' holds tags of thoughts"),
    (assistant('Well. <think>a</think>', tool_calls=[call()]), 'not one block in front'),
    (assistant('<think>a</think><think>b</think>', tool_calls=[call()]), 'not one block'),
    (assistant('x', reasoning='about <think> tags'), "'reasoning' holds <think>"),
    (assistant(tool_calls=[call(), call()]), 'two of its calls have one id'),
    (assistant(tool_calls=[call() | {'type': 'custom'}]), 'custom'),
    (assistant(tool_calls=[call() | {'extra': 1}]), "'extra'"),
    (assistant(tool_calls=[3]), 'is no object'),
    (assistant(tool_calls=[call()], function_call=call()['function']), "both 'tool_calls' and"),
    (assistant('x', weight=0.5), 'weight = 0.5'),
    (assistant('x', weight=0, train=True), 'contradict'),
    (assistant('x', weight=0), 'marked as not to be trained'),
    ({'role': 'critic', 'content': 'x'}, "has the role 'critic'"),
    ({'role': ['user'], 'content': 'x'}, 'has the role'),
    ({'role': 'user', 'content': None}, "has no 'content'"),
    ({'role': 'user', 'content': 'x', 'reasoning': 'y'}, "message 1 .user.: the field 'reasoning'"),
    ({'role': 'user', 'content': 'x', 'weight': 1}, "'weight'"),
    ({'role': 'user', 'content': 'x', 'tool_calls': [call()]}, "'tool_calls'"),
    (None, 'message 1 is of type NoneType'),
  ],
)
def test_what_a_message_says_is_never_lost(message, reason):
  refused(row(user(), message), reason)


@pytest.mark.parametrize(
  'arguments, printed',
  [
    ('{"city": "a\nb\tc"}', "city='a\\nb\\tc'"),
    ("{'city': 'x', 'day': None, 'far': true}", "city='x', day=None, far=True"),
    (json.dumps(json.dumps({'from': 1})), 'from=1'),
    *((nothing, '') for nothing in ('null', '""', ' ', [], '[]', {}, None)),
  ],
)
def test_arguments_are_read_as_in_every_other_place(arguments, printed):
  for fields in ({'arguments': arguments}, {'arguments': '', 'parameters': arguments}):
    record = row(user(), assistant(tool_calls=[call(**fields)]))
    assert contents(record)[-1] == f'[get_weather({printed})]'
  record = row(user(), assistant('<tool_call>{"name": "f", "arguments": []}</tool_call>'))
  assert contents(record)[-1].startswith('<tool_call>')


def test_tools_as_json_text_may_break_lines():
  record = row(user(), assistant(tool_calls=[call()]), tools=json.dumps([SPEC]))
  broken = record['tools'].replace('Weather of', 'Weather\nof')
  assert contents(record | {'tools': broken})[-1] == "[get_weather(city='Paris')]"


@pytest.mark.parametrize(
  'thoughts', ['<think>\nhm\n</think>', '<think>hm', ' hm\n</think>\n', 'hm\n']
)
def test_thoughts_with_their_tags_are_trained_with_one_tag(thoughts):
  for answer in (assistant('Hi.', reasoning=thoughts), assistant(None, reasoning=thoughts)):
    if answer['content'] is None:
      answer['tool_calls'] = [call()]
    said = contents(row(user(), answer))[-1]
    assert said.startswith('<think>\n') and said.count('think>') == 2
    assert said.partition('</think>')[0].removeprefix('<think>').strip() == 'hm'


@pytest.mark.parametrize(
  'fields, reason',
  [
    ({'images': ['a.png']}, "'images'"),
    ({'answer': 'x'}, "'answer'"),
    ({'tool_choice': 'required'}, "'tool_choice'"),
    ({'tools': '[{"name": '}, 'tools is not JSON'),
    ({'tools': [3]}, r'tools\[0\] is no object'),
    ({'tools': [{'type': 'function', 'function': {}}]}, r'tools\[0\] has no name'),
    ({'tools': [{'type': 'web_search', 'name': 'x'}]}, 'web_search'),
    ({'tools': [SPEC | {'returns': 'text'}]}, r"tools\[0\].*'returns'"),
    ({'tools': [SPEC], 'functions': [SPEC]}, 'two fields'),
    ({'conversations': [user()]}, 'expected one of the fields'),
    ({'system': 3}, "'system' is no text"),
  ],
)
def test_what_a_row_says_is_never_lost(fields, reason):
  refused(row(user(), assistant(tool_calls=[call()]), **fields), reason)


@given(st.data())
def test_no_field_of_a_message_can_vanish(data):
  """A word put anywhere into a row is in what is trained or shown, or the row is refused."""
  record = row(
    {'role': 'system', 'content': 'policy'},
    user('asked'),
    assistant('said', reasoning_content='thought', tool_calls=[call('Paris')]),
    tool('output', name='get_weather'),
    assistant('end'),
    tools=copy.deepcopy(TOOLS),
  )
  message = data.draw(st.sampled_from(record['messages']))
  field = data.draw(st.sampled_from([*message, 'mood', 'reasoning', 'name', 'thinking']))
  where = data.draw(st.sampled_from([message, record]))
  if field in ('role', 'tool_calls', 'tool_call_id') or (where is record and field in record):
    return
  where[field] = 'zebra'
  style = data.draw(st.sampled_from(['python', 'hermes']))
  try:
    rows = adapt_rows([record], 'made', call_style=style).rows
  except ValueError as error:
    assert field in str(error)
  else:
    assert 'zebra' in json.dumps(rows)


# --- the other forms ---

CHOSEN = [user(), assistant(tool_calls=[call()])]


@pytest.mark.parametrize(
  'record',
  [
    {'conversations': CHOSEN},
    {'prompt': CHOSEN[:1], 'completion': CHOSEN[1:]},
    {'prompt': CHOSEN[0]['content'], 'completion': CHOSEN[1]},
    {'prompt': CHOSEN[0]['content'], 'chosen': CHOSEN[1:], 'rejected': [assistant('no')]},
    {'prompt': CHOSEN[0]['content'], 'chosen': CHOSEN, 'rejected': [user(), assistant('no')]},
    {'prompt': CHOSEN[:1], 'chosen': CHOSEN[1:], 'rejected': None, 'score_chosen': 5},
    {'chosen': CHOSEN, 'rejected': [user(), assistant('no')]},
    {'messages': CHOSEN[:1], 'chosen': CHOSEN[1], 'rejected': assistant('no')},
    {'messages': CHOSEN, 'chosen': CHOSEN[-1], 'rejected': assistant('no')},
    {'messages': CHOSEN, 'chosen': CHOSEN, 'prompt': CHOSEN[0]['content'], 'rejected': CHOSEN},
    {'messages': CHOSEN, 'rejected_response': 'no'},
    {'question': CHOSEN[0]['content'], 'chosen': CHOSEN[1:], 'rejected': 'no'},
    {
      'input': {'messages': CHOSEN[:1], 'parallel_tool_calls': True},
      'preferred_output': CHOSEN[1:],
      'non_preferred_output': [assistant('no')],
    },
    {'messages': json.dumps(CHOSEN)},
  ],
)
def test_the_common_forms_say_the_same_to_training_and_as_seeds(record, tmp_path):
  record = {**record, 'tools': TOOLS}
  assert contents(record) == contents({'messages': CHOSEN, 'tools': TOOLS})
  path = tmp_path / 'rows.json'
  path.write_text(json.dumps([record]))
  (seed,) = load_seeds(str(path), count=1, seed=0).seeds
  assert seed.calls == (ToolCall('get_weather', {'city': 'Paris'}),)
  assert seed.query == 'Weather in Paris?' and 'get_weather' in seed.conversations[0].content


def test_pairs_that_make_no_conversation_are_refused():
  refused({'chosen': 'x', 'rejected': 'y'}, "'chosen' is a text without a prompt")
  refused({'prompt': 'other', 'chosen': CHOSEN}, 'another prompt')
  refused({'prompt': 'other', 'messages': CHOSEN, 'chosen': CHOSEN}, 'different prompts')
  refused({'messages': CHOSEN, 'chosen': [assistant('no')]}, "is not 'chosen'")
  refused({'input': 'x', 'preferred_output': CHOSEN}, "'input' is no object")
  refused({'input': {'n': 1}, 'n': 2, 'preferred_output': CHOSEN}, "'n' stands in 'input'")
  refused({'prompt': 3, 'completion': 'x'}, "'prompt' is neither")
  sharegpt = [{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'ho'}]
  assert contents({'messages': sharegpt}) == ['hi', 'ho']
  assert contents({'conversations': sharegpt, 'system': 'Be brief.'}) == ['Be brief.', 'hi', 'ho']
  refused({'conversations': [sharegpt[0], sharegpt[1] | {'mood': 'x'}]}, "message 1.*'mood'")


# --- marks of what is trained ---


@pytest.mark.parametrize('mark', [{'weight': 0}, {'train': False}, {'trainable': False}])
def test_marks_are_honoured(mark, tokenizer):
  talk = [user('find'), assistant('one', **mark), user('go'), assistant('two'), user('end')]
  record = row(*talk, assistant('three', **mark))
  (found,) = adapt_rows([record], 'made').rows
  assert [m.get('train', True) for m in found['conversations']] == [True, False, True, True]
  for mask, trained in (('final', 'two<|im_end|>'), ('all_assistant', 'two<|im_end|>')):
    (sequence,) = encode_rows(tokenizer, parse_rows([found]), loss_mask=mask)
    assert tokenizer.decode(sequence.tokens[sequence.weights > 0]) == trained
  whole = row(*[{k: v for k, v in m.items() if k not in mark} for m in talk[:4]])
  (full,) = encode_rows(
    tokenizer, parse_rows(adapt_rows([whole], 'made').rows), loss_mask='all_assistant'
  )
  assert full.tokens.tolist() == sequence.tokens.tolist()  # marks change weights alone
  assert tokenizer.decode(full.tokens[full.weights > 0]) == 'one<|im_end|>two<|im_end|>'
  rows, _ = given_rows([record], SftSection(split_turns=True))
  assert [one.messages[-1].content for one in rows] == ['two']
  sharegpt = {
    'conversations': [
      {'from': 'human', 'value': 'a', 'weight': 0},
      {'from': 'gpt', 'value': 'b', 'weight': 1},
      {'from': 'human', 'value': 'c'},
      {'from': 'gpt', 'value': 'd', **mark},
    ]
  }
  assert contents(sharegpt) == ['a', 'b']


def test_a_row_that_no_mask_can_train_is_left_out_and_counted(tokenizer):
  records = [row(user('find'), assistant(text)) for text in ('a', 'b<|im_end|>c')]
  rows, _ = given_rows(records, SftSection())
  with pytest.raises(ValueError, match="row 'rows-1' cannot be trained on"):
    section_sequences(tokenizer, rows, SftSection())
  kept, sequences = section_sequences(tokenizer, rows, SftSection(unreadable='drop'))
  assert [one.id for one in kept] == ['rows-0'] and len(sequences) == 1
  with pytest.raises(ValueError, match='none of 1 rows can be trained on'):
    section_sequences(tokenizer, rows[1:], SftSection(unreadable='drop'))


def test_our_own_rows_say_everything_too():
  message = {'role': 'assistant', 'content': 'x', 'tool_calls': [call()]}
  with pytest.raises(ValueError, match="row 0 .*'tool_calls'"):
    parse_rows([{'conversations': [user(), message]}])
  assert Message.from_json({'role': 'user', 'content': 'x', 'name': None}) == Message('user', 'x')
  assert Message.from_json(Message('assistant', 'x', False).to_json()).trained is False


# --- the server's own answers ---


@pytest.mark.parametrize('style', ['python', 'hermes'])
def test_what_the_server_answers_can_be_trained_on(style, tokenizer):
  said = {'python': PYTHON, 'hermes': 'Let me look.\n' + HERMES}[style]
  text = '<think>\nWhich city?\n</think>\n\n' + said
  form = ReplyForm(specs=[ToolSpec(**SPEC)], thinking=False, begun='', most_calls=None)
  report = Report(
    stop=(),
    logprobs=False,
    alternatives=0,
    prompt_logprobs=None,
    token_ids=False,
    ids_as_tokens=False,
  )
  choice = ChatChoice(0, tokenizer, [], report, form)
  tokens = tokenizer(text + '<|im_end|>', add_special_tokens=False)['input_ids']
  tokens = np.array(tokens, np.int32)
  scores = np.zeros(len(tokens), np.float32)
  done = Completion(
    tokens=tokens,
    logprobs=scores,
    full_logprobs=scores,
    entropies=scores,
    finished=True,
    stop=None,
    prompt_len=1,
  )
  choice.take(Progress(0, tokens, scores, scores, done))
  message = choice.whole()['message']
  assert message['reasoning_content'] == 'Which city?' and message['tool_calls']
  record = row(user(), message, tools=TOOLS)
  assert contents(record, style)[-1] == text
  path = [{**record, 'id': 'a'}]
  assert adapt_rows(path, 'made', call_style=style).rows[0]['id'] == 'a'


def test_rows_of_a_run_are_read_again():
  """They lie in the work directory of a run, and are given to other runs as `sft.files`."""
  record = row(user(), {'role': 'assistant', 'content': '[f()]'})
  record |= {'id': 'a/0', 'kind': 'single', 'provenance': {'model': 'm', 'seconds': 1.5}}
  [read] = adapt_rows([record], 'made').rows
  assert read['id'] == 'a/0' and read['conversations'][-1]['content'] == '[f()]'
