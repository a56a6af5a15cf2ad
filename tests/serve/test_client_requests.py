"""What clients send beside OpenAI's fields: hints, other spellings, histories of other servers."""

import http.client
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.chat.template import qwen3_template
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.serve import fields
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.parts import ChatMessage, FunctionCall, RequestError
from dcore_jax.serve.requests import ChatCompletionRequest, read_request
from dcore_jax.serve.scheduler import Scheduler
from tests.serve.servers import ScriptedEngine, running
from tests.serve.test_limits import CHAT, post

USER = {'role': 'user', 'content': 'find'}
TOOL = {
  'type': 'function',
  'function': {'name': 'f', 'parameters': {'type': 'object', 'properties': {}}},
}


@pytest.fixture(scope='module')
def url(tokenizer):
  """A server on an engine that says what a script says; one for all that is only asked."""
  engine = ScriptedEngine([*tokenizer('find it')['input_ids'], tokenizer.eos_token_id], 2, 4096)
  service = Service(Scheduler(engine, 2), tokenizer, 'm', Limits(64))
  with running(service, 1) as (url, _):
    yield url


def ignored(url, change):
  """(status, the header of ignored fields, the error's message)."""
  status, headers, answer = post(url, {**CHAT, **change})
  return status, headers['x-ignored-fields'], answer.get('error', {}).get('message', '')


def said(call=None, **message):
  """A conversation with an assistant's message in the middle."""
  if call is not None:
    message['tool_calls'] = [call]
  return {'messages': [USER, {'role': 'assistant', 'content': None, **message}, USER]}


CALL = {'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}


@pytest.mark.parametrize(
  'change',
  [
    {'metadata': {'a': 1}, 'store': False, 'service_tier': 'auto', 'user': 'u'},
    {'safety_identifier': 's', 'prompt_cache_key': 'k', 'parallel_tool_calls': True},
    {'stream_options': {'include_usage': True}},
    {'tools': [{**TOOL, 'function': {**TOOL['function'], 'strict': True}}]},
    {'tools': [{**TOOL, 'cache_control': {'type': 'ephemeral'}}], 'tool_choice': 'auto'},
    {'top_k': -1},
    {'top_k': 0},
    {'stop': list('abcdefghijklmnop')},
    {'max_completion_tokens': 3},
    {'response_format': {'type': 'text'}},
    {'logit_bias': {}, 'frequency_penalty': 0, 'presence_penalty': 0.0, 'repetition_penalty': 1.0},
    {'ignore_eos': False, 'min_tokens': 0, 'skip_special_tokens': True, 'use_beam_search': False},
    {'functions': [], 'modalities': ['text'], 'n': 1, 'best_of': 1, 'stop_token_ids': []},
    {'add_generation_prompt': True, 'continue_final_message': False, 'echo': False},
    said({**CALL, 'index': 0}),
    said({**CALL, 'name': 'f'}),
    said(content='a', annotations=[], refusal=None, audio=None, function_call=None),
    said(content='a', reasoning='hm'),
    said(content='a', reasoning_content='hm', reasoning='hm', reasoning_details=[]),
    said(refusal='no'),
    said(content=[{'type': 'refusal', 'refusal': 'no'}]),
    said(function_call={'name': 'f', 'arguments': '{}'}),
    said(content='a', tool_calls=[]),
    {
      'messages': [
        {
          'role': 'user',
          'content': [{'type': 'text', 'text': 'hi', 'cache_control': {'type': 'ephemeral'}}],
        }
      ]
    },
    {'messages': [USER, *said(CALL)['messages'], {'role': 'tool', 'content': None}]},
    {
      'messages': [USER, *said(CALL)['messages'], {'role': 'function', 'content': '1', 'name': 'f'}]
    },
  ],
)
def test_hints_and_histories_pass_without_a_word(url, change):
  assert ignored(url, change) == (200, None, '')


@pytest.mark.parametrize(
  'change,named',
  [
    ({'what': 1}, 'what'),
    ({'b': [1], 'a': {'c': None}}, 'b, a'),
    ({'messages': [{**USER, 'what': 1}, {**USER, 'what': 2}]}, 'messages.what'),
    (said({**CALL, 'what': 1}), 'messages.tool_calls.what'),
    ({'stream_options': {'what': True}}, 'stream_options.what'),
    ({'tools': [{**TOOL, 'what': 1}]}, 'tools.what'),
    ({'x\r\nSet-Cookie: a': 1}, r'x\r\nSet-Cookie: a'),
    ({'\u00e9': 1}, r'\u00e9'),
    ({'x' * 100: 1}, 'x' * 64),
    ({f'f{number:02}': 1 for number in range(40)}, ', '.join(f'f{n:02}' for n in range(16))),
  ],
)
def test_unknown_fields_are_ignored_and_named(url, change, named):
  assert ignored(url, change) == (200, named, '')


def test_unknown_fields_are_named_once_in_the_log_and_in_streams_too(scripted, caplog):
  url = scripted().url
  with caplog.at_level(logging.WARNING, logger='absl'):
    for _ in range(3):
      assert ignored(url, {'what': 1})[1] == 'what'
    assert ignored(url, {'what': 1, 'more': 1})[1] == 'what, more'
  lines = [record.getMessage() for record in caplog.records if 'ignored' in record.getMessage()]
  assert [line.rpartition(': ')[2] for line in lines] == ['what', 'more']
  connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=60)
  body = json.dumps({**CHAT, 'what': 1, 'stream': True})
  connection.request(
    'POST', '/v1/chat/completions', body.encode(), {'Content-Type': 'application/json'}
  )
  answer = connection.getresponse()
  assert answer.getheader('x-ignored-fields') == 'what'
  answer.read()
  connection.close()


@pytest.mark.parametrize('name', sorted(fields.UNSUPPORTED | fields.UNSUPPORTED_IN_CHAT))
def test_what_is_not_supported_says_what_to_do(url, name):
  status, _, message = ignored(url, {name: {'no': 'neutral value'}})
  assert status == 400 and message.startswith(f'{name} = ') and len(message) > len(name) + 40


@pytest.mark.parametrize('name', sorted(fields.UNSUPPORTED_IN_TEXT))
def test_what_only_chat_has_is_no_field_of_a_completion(url, name):
  body = {'model': 'm', 'prompt': 'find', 'max_tokens': 2, name: {'no': 'neutral value'}}
  status, _, answer = post(url, body, path='/v1/completions')
  assert status == 400 and answer['error']['message'].startswith(f'{name} = ')
  assert answer['error']['param'] == name


@pytest.mark.parametrize('name', sorted(fields.UNSUPPORTED_IN_MESSAGE))
def test_a_message_that_would_begin_the_answer_is_refused(url, name):
  status, _, message = ignored(url, said(content='It', **{name: True}))
  assert status == 400 and message.startswith(f'{name} = true is not supported')
  for nothing in known_values(name):
    assert ignored(url, said(content='It', **{name: nothing})) == (200, None, '')


def known_values(name):
  """Values of a field of a message that say nothing."""
  return (None, *fields.UNSUPPORTED_IN_MESSAGE[name].neutral)


@pytest.mark.parametrize(
  'change',
  [
    {'reasoning_effort': 'medium'},
    {'do_sample': True, 'mirostat': 0, 'repeat_penalty': 1.0, 'xtc_probability': 0, 'num_beams': 1},
    {'options': {}, 'extra_body': {}, 'format': '', 'stop_sequences': [], 'system': ''},
    {'max_tokens': 4.0, 'top_k': 5.0, 'n': 1.0, 'seed': 7.0, 'prompt_logprobs': None},
  ],
)
def test_values_that_change_no_answer_pass_whoever_knows_the_field(url, change):
  assert ignored(url, change) == (200, None, '')


@pytest.mark.parametrize(
  'change', [{'max_tokens': 4.5}, {'top_k': True}, {'n': '1'}, {'seed': 1e300}]
)
def test_what_is_no_whole_number_is_refused(url, change):
  status, _, message = ignored(url, change)
  assert status == 400 and message.startswith(next(iter(change)))


def content_of(content):
  """The record of an assistant's message with this content."""
  return ChatMessage(role='assistant', content=content).record()


def test_texts_of_other_apis_are_read():
  parts = [{'type': 'input_text', 'text': 'a'}, {'type': 'output_text', 'text': 'b'}, 'c']
  assert content_of(parts) == {'role': 'assistant', 'content': 'a\nb\nc'}


@pytest.mark.parametrize(
  'part',
  [
    {'type': 'thinking', 'thinking': 'hm', 'signature': 's'},
    {'type': 'thinking', 'thinking': [{'type': 'text', 'text': 'hm'}]},
    {'type': 'reasoning', 'text': 'hm'},
    {'type': 'reasoning', 'reasoning': 'hm', 'index': 0},
  ],
)
def test_thoughts_among_the_parts_are_thoughts(part):
  parts = [part, {'type': 'text', 'text': 'a'}]
  assert content_of(parts) == {'role': 'assistant', 'content': 'a', 'reasoning_content': 'hm'}


def test_other_parts_are_refused_by_their_kind(url):
  parts = [{'type': 'image_url', 'image_url': {'url': 'u'}}]
  status, _, message = ignored(url, {'messages': [{'role': 'user', 'content': parts}]})
  assert status == 400 and "'image_url' cannot be read" in message


def test_an_option_that_only_resembles_one_of_the_template_is_refused(url):
  # "thinking" is in "enable_thinking", and "message" is a variable of the template's own loop.
  for name in ('thinking', 'message', 'loop'):
    status, _, message = ignored(url, {'chat_template_kwargs': {name: False}})
    assert (status, message) == (400, f"the chat template of 'm' knows no {name}")


@pytest.mark.parametrize('prompt, field', [([], 'prompt'), (['a'] * 9, 'prompt'), ([[]], 'prompt')])
def test_the_prompts_are_named_where_it_is_their_number(url, prompt, field):
  body = {'model': 'm', 'prompt': prompt, 'max_tokens': 2}
  status, _, answer = post(url, body, path='/v1/completions')
  assert (status, answer['error']['param']) == (400, field)


ARGUMENTS = st.one_of(
  st.sampled_from(['', ' ', 'null', '""', None, {}, '{}', '"{}"']).map(lambda given: (given, {})),
  st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3)).map(
    lambda given: (given, given)
  ),
)


@given(ARGUMENTS)
def test_arguments_are_an_object_however_they_are_written(pair):
  given_, want = pair
  record = {'name': 'f'} if given_ is None else {'name': 'f', 'arguments': given_}
  assert FunctionCall.model_validate(record).record() == {'name': 'f', 'arguments': want}
  assert FunctionCall.model_validate({'name': 'f', 'arguments': given_}).record() == {
    'name': 'f',
    'arguments': want,
  }


@pytest.mark.parametrize('arguments', ['[1', '[1]', '1', '"a"', 'true'])
def test_arguments_that_are_no_object_are_refused(arguments):
  with pytest.raises(RequestError, match="call of 'f' are no"):
    FunctionCall(name='f', arguments=arguments).record()


def test_a_history_is_shown_whatever_its_spelling(tokenizer):
  """The same prompt for the same conversation, as several servers and clients write it."""
  tokenizer.chat_template, before = qwen3_template(), tokenizer.chat_template
  engine = ScriptedEngine([1, 2], 2, 4096)
  service = Service(Scheduler(engine, 2), tokenizer, 'm', Limits(64))
  result = {'role': 'tool', 'tool_call_id': 'c', 'content': '18'}
  spellings = [
    ({**CALL}, {'reasoning_content': 'hm'}),
    ({**CALL, 'index': 0, 'name': 'f'}, {'reasoning': 'hm'}),
    ({**CALL, 'function': {'name': 'f', 'arguments': ''}}, {'reasoning_content': 'hm'}),
    ({**CALL, 'function': {'name': 'f', 'arguments': None}}, {'reasoning': 'hm'}),
    ({**CALL, 'function': {'name': 'f'}}, {'reasoning_content': 'hm', 'annotations': []}),
    ({**CALL, 'function': {'name': 'f', 'arguments': {}}}, {'reasoning_content': 'hm'}),
  ]
  try:
    with running(service) as (url, _):
      for call, extra in spellings:
        turn = {'role': 'assistant', 'content': '', 'tool_calls': [call], **extra}
        assert post(url, {**CHAT, 'messages': [USER, turn, result]})[0] == 200
  finally:
    tokenizer.chat_template = before
  assert len(engine.prompts) == 6 and len(set(map(tuple, engine.prompts))) == 1
  assert '\nhm\n</think>' in tokenizer.decode(engine.prompts[0])


def test_the_newer_name_of_the_budget_goes_first(scripted):
  url = scripted('find the order of Mora').url
  for path, body in (('/v1/chat/completions', CHAT), ('/v1/completions', {'prompt': 'find'})):
    change = {'model': 'm', 'max_tokens': 5, 'max_completion_tokens': 2}
    _, _, answer = post(url, {**body, **change}, path=path)
    assert answer['usage']['completion_tokens'] == 2


def test_all_names_and_the_path_of_the_model_are_served(tokenizer, tmp_path):
  engine = ScriptedEngine([1, 2])
  link = tmp_path / 'link'
  link.symlink_to(ORGANISM)
  service = Service(Scheduler(engine, 2), tokenizer, ['a', 'b/c', 'a'], Limits(64), folder=ORGANISM)
  with running(service) as (url, _):
    for name in ('a', 'b/c', str(ORGANISM), f'{ORGANISM}/', str(link)):
      status, _, answer = post(url, {**CHAT, 'model': name})
      assert (status, answer.get('model')) == (200, name)
    for name in ('c', '', str(ORGANISM.parent), '/nowhere', 'a/\0', 'x/' * 5000, 'organism'):
      status, _, answer = post(url, {**CHAT, 'model': name})
      assert (status, answer['error']['code']) == (404, 'model_not_found'), name
      assert "'a' or 'b/c'" in answer['error']['message']


def test_thoughts_are_turned_off_as_qwens_own_service_does():
  def options(**change):
    body = json.dumps({**CHAT, **change}).encode()
    return read_request(ChatCompletionRequest, body).template_options

  assert options() == {}
  assert options(enable_thinking=False) == {'enable_thinking': False}
  kwargs = {'enable_thinking': True, 'other': [1]}
  assert options(chat_template_kwargs=kwargs, enable_thinking=False) == kwargs


@pytest.mark.parametrize('path', ['/chat/completions', '/v1/responses', '/v1/embeddings', '/'])
def test_another_path_is_told_the_paths_that_there_are(url, path):
  status, _, answer = post(url, CHAT, path=path)
  assert status == 404 and '/v1/chat/completions' in answer['error']['message']
  assert f'there is no {path} here' in answer['error']['message']
