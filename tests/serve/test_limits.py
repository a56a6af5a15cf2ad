"""What is refused, how it is said, and what happens to those who leave: over plain sockets, on a
scripted engine.
"""

import http.client
import json
import socket
import threading
import time

import openai
import pytest

from tests.waiting import until

CHAT = {'model': 'm', 'messages': [{'role': 'user', 'content': 'find'}]}


def post(url, body, headers=None, path='/v1/chat/completions'):
  """(status, headers, JSON body)."""
  connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=60)
  body = body if isinstance(body, bytes) else json.dumps(body).encode()
  connection.request('POST', path, body, {'Content-Type': 'application/json', **(headers or {})})
  answer = connection.getresponse()
  content = answer.read()
  connection.close()
  return answer.status, answer.headers, json.loads(content)


def raw(url, text, wait=True):
  """A connection to which this was written; its whole answer where that is waited for."""
  host, port = url.removeprefix('http://').split(':')
  connection = socket.create_connection((host, int(port)), timeout=60)
  connection.sendall(text if isinstance(text, bytes) else text.encode())
  if not wait:
    return connection
  with connection:
    return b''.join(iter(lambda: connection.recv(65536), b'')).decode()


def head(length, path='/v1/chat/completions', extra=''):
  return (
    f'POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
    f'Content-Length: {length}\r\n{extra}\r\n'
  )


def test_malformed_http_and_json(scripted):
  url = scripted().url
  assert ' 400 ' in raw(url, 'nonsense\r\n\r\n').splitlines()[0]
  assert (
    ' 400 ' in raw(url, b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n').splitlines()[0]
  )
  assert ' 400 ' in raw(url, head('-5')).splitlines()[0]
  for body in (
    b'',
    b'{',
    b'[1]',
    b'"text"',
    b'{"model": "m"}',
    b'\xff\xfe',
    b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'[' * 100_000,
    b'{"model": "m", "messages": [{"role": "user", "content": NaN}]}',
  ):
    status, headers, answer = post(url, body)
    assert status == 400 and answer['error']['type'] == 'invalid_request_error', body
    assert headers['Content-Type'] == 'application/json'
  assert post(url, CHAT)[0] == 200


@pytest.mark.parametrize(
  'change,param',
  [
    ({'tool_choice': 'required'}, 'tool_choice'),
    ({'tool_choice': 'perhaps'}, 'tool_choice'),
    ({'tool_choice': {'type': 'function', 'function': {}}}, 'tool_choice.function.name'),
    (
      {
        'tools': [{'type': 'function', 'function': {'name': 'g'}}],
        'tool_choice': {'type': 'function', 'function': {'name': 'f'}},
      },
      'tool_choice',
    ),
    ({'top_logprobs': 3}, 'top_logprobs'),
    ({'top_logprobs': 21, 'logprobs': True}, 'top_logprobs'),
    ({'response_format': {'type': 'json_object'}}, 'response_format'),
    ({'response_format': {'type': 'json_schema', 'json_schema': {}}}, 'response_format'),
    ({'guided_json': {'type': 'object'}}, 'guided_json'),
    ({'structured_outputs': {'regex': 'a'}}, 'structured_outputs'),
    ({'repetition_penalty': 1.1}, 'repetition_penalty'),
    ({'min_tokens': 3}, 'min_tokens'),
    ({'ignore_eos': True}, 'ignore_eos'),
    ({'echo': True}, 'echo'),
    ({'continue_final_message': True}, 'continue_final_message'),
    ({'best_of': 2}, 'best_of'),
    ({'stop_token_ids': [3]}, 'stop_token_ids'),
    ({'prompt_logprobs': 21}, 'prompt_logprobs'),
    ({'prompt_logprobs': 1, 'stream': True}, 'prompt_logprobs'),
    ({'chat_template_kwargs': {'unheard_of': 1}}, 'chat_template_kwargs'),
    ({'chat_template_kwargs': {'tokenize': True}}, 'chat_template_kwargs'),
    ({'top_k': -2}, 'top_k'),
    ({'frequency_penalty': 0.5}, 'frequency_penalty'),
    ({'presence_penalty': -0.5}, 'presence_penalty'),
    ({'logit_bias': {'5': 1.0}}, 'logit_bias'),
    ({'reasoning_effort': 'low'}, 'reasoning_effort'),
    ({'functions': [{'name': 'f'}]}, 'functions'),
    ({'temperature': -1}, 'temperature'),
    ({'temperature': '1'}, 'temperature'),
    ({'top_p': 0}, 'top_p'),
    ({'n': 0}, 'n'),
    ({'n': 5}, 'n'),
    ({'n': 10**12}, 'n'),
    ({'max_tokens': 0}, 'max_tokens'),
    ({'seed': 'x'}, 'seed'),
    ({'stop': ['']}, 'stop'),
    ({'stop': list('abcdefghijklmnopq')}, 'stop'),
    ({'messages': []}, 'messages'),
    ({'messages': [{'role': 'robot', 'content': ''}]}, 'messages.0.role'),
    (
      {
        'messages': [
          {'role': 'user', 'content': [{'type': 'image_url', 'image_url': {'url': 'x'}}]}
        ]
      },
      'messages.0.content.0.type',
    ),
    ({'messages': [{'role': 'user'}]}, 'messages'),
    (
      {
        'messages': [
          {
            'role': 'user',
            'content': 'x',
            'tool_calls': [
              {'id': '', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}
            ],
          }
        ]
      },
      'messages',
    ),
    (
      {
        'messages': [
          {
            'role': 'assistant',
            'tool_calls': [
              {'id': '', 'type': 'function', 'function': {'name': 'f', 'arguments': '[1'}}
            ],
          }
        ]
      },
      'messages',
    ),
    ({'tools': [{'type': 'function', 'function': {'name': 'a b'}}]}, 'tools.0.function.name'),
    (
      {
        'tools': [
          {
            'type': 'function',
            'function': {'name': 'f', 'parameters': {'type': 'object', 'properties': None}},
          }
        ]
      },
      'tools.0.function.parameters',
    ),
  ],
)
def test_what_cannot_be_honoured_is_refused_by_name(scripted, change, param):
  status, _, answer = post(scripted().url, {**CHAT, **change})
  assert (status, answer['error']['param']) == (400, param) and param in answer['error'][
    'message'
  ] + param


def test_nulls_ignored_fields_and_parts_of_text_are_fine(scripted):
  extra = {
    'tool_choice': None,
    'reasoning_effort': None,
    'user': 'u',
    'metadata': {'a': 'b'},
    'tools': None,
    'stop': None,
    'messages': [
      {'role': 'developer', 'content': [{'type': 'text', 'text': 'a'}]},
      {'role': 'user', 'content': 'x', 'name': 'n'},
    ],
  }
  assert post(scripted().url, {**CHAT, **extra})[0] == 200


def test_completion_requests_are_checked_too(scripted):
  url = scripted().url
  for change, param in (
    ({'prompt': []}, 'prompt'),
    ({'prompt': ''}, 'prompt'),
    ({'prompt': [640]}, 'prompt'),
    ({'max_tokens': 0}, 'max_tokens'),
    ({'prompt': ['a', '']}, 'prompt'),
    ({'logprobs': 21}, 'logprobs'),
    ({'suffix': 'x'}, 'suffix'),
    ({'prompt': [5] * 256}, 'prompt'),
  ):
    status, _, answer = post(
      url, {'model': 'm', 'prompt': 'find', **change}, path='/v1/completions'
    )
    assert (status, answer['error']['param']) == (400, param), change


@pytest.mark.parametrize(
  'body,path',
  [(CHAT, '/v1/chat/completions'), ({'model': 'm', 'prompt': [5] * 210}, '/v1/completions')],
)
def test_budgets_that_do_not_fit_are_refused_and_not_cut(scripted, body, path):
  """An answer has 64 tokens at most, prompt and answer together 256."""
  made = scripted()
  fields = ('max_tokens', 'max_completion_tokens') if body is CHAT else ('max_tokens',)
  for field in fields:
    status, _, answer = post(made.url, {**body, field: 65}, path=path)
    assert (status, answer['error']['param']) == (400, field)
    assert answer['error']['message'] == f'{field} = 65; an answer may have 64 tokens'
  if body is CHAT:
    assert (
      post(made.url, {**body, 'max_tokens': 65, 'max_completion_tokens': 64})[0] == 200
    )  # the smaller one is meant
    return
  status, _, answer = post(made.url, {**body, 'max_tokens': 47}, path=path)
  assert (status, answer['error']['param'], answer['error']['code']) == (
    400,
    'max_tokens',
    'context_length_exceeded',
  )
  assert answer['error']['message'] == (
    'the prompt has 210 tokens and max_tokens = 47; prompt and answer together may have 256 tokens'
  )
  assert post(made.url, {**body, 'max_tokens': 46}, path=path)[0] == 200
  assert post(made.url, body, path=path)[0] == 200  # who asks for none gets what fits


def test_paths_methods_and_types(scripted):
  url = scripted().url
  status, _, answer = post(url, CHAT, path='/v1/nothing')
  assert status == 404 and answer['error']['type'] == 'invalid_request_error'
  status, _, answer = post(url, CHAT, path='/v1/models')
  assert status == 405 and 'error' in answer
  assert post(url, CHAT, {'Content-Type': 'text/plain'})[0] == 415
  status, _, answer = post(url, {**CHAT, 'model': 'other'})
  assert (status, answer['error']['code']) == (404, 'model_not_found')


def test_bodies_are_bounded_in_size_and_time(scripted):
  url = scripted(body_bytes=1000, body_seconds=0.3).url
  status, _, answer = post(url, {**CHAT, 'user': 'x' * 1000})
  assert (status, answer['error']['code']) == (413, 'request_too_large')
  assert ' 413 ' in raw(url, head(10**9)).splitlines()[0]  # before a byte of it has come
  chunks = 'Transfer-Encoding: chunked\r\n\r\n' + ('190\r\n' + 'x' * 400 + '\r\n') * 3
  assert ' 413 ' in raw(url, head(0).replace('Content-Length: 0\r\n\r\n', chunks)).splitlines()[0]
  assert ' 408 ' in raw(url, head(500) + '{').splitlines()[0]
  assert post(url, CHAT)[0] == 200


def test_keys_are_asked_for_and_compared(scripted):
  url = scripted(api_key='s\u00e9cret').url
  for headers in (
    {},
    {'Authorization': 'Bearer wrong'},
    {'Authorization': 'Basic s\u00e9cret'.encode()},
    {'Authorization': 'Bearer'},
  ):
    status, answered, answer = post(url, CHAT, headers)
    assert (status, answer['error']['code']) == (401, 'invalid_api_key') and answered[
      'WWW-Authenticate'
    ] == 'Bearer'
  assert post(url, CHAT, {'Authorization': 'Bearer s\u00e9cret'.encode()})[0] == 200
  assert b'"ok"' in http_get(url, '/health')


def http_get(url, path):
  connection = http.client.HTTPConnection(url.removeprefix('http://'), timeout=60)
  connection.request('GET', path)
  content = connection.getresponse().read()
  connection.close()
  return content


def test_a_full_queue_answers_429_and_the_official_client_comes_back(scripted):
  made = scripted(max_waiting=0, lanes=1)
  made.engine.go.clear()
  first = threading.Thread(target=post, args=(made.url, CHAT))
  first.start()
  until(lambda: made.engine.busy)
  status, headers, answer = post(made.url, CHAT)
  assert (status, answer['error']['type'], headers['Retry-After']) == (429, 'rate_limit_error', '1')
  threading.Timer(0.3, made.engine.go.set).start()
  with openai.OpenAI(base_url=f'{made.url}/v1', api_key='none', max_retries=4) as client:
    assert client.chat.completions.create(**CHAT).choices[0].message.content == 'find the order'
  first.join()


def test_requests_under_way_are_bounded_while_their_bodies_arrive(scripted):
  made = scripted(requests=2)
  slow = [raw(made.url, head(100), wait=False) for _ in range(2)]
  until(lambda: made.service.under_way == 2)
  assert post(made.url, CHAT)[0] == 429
  assert b'"ok"' in http_get(made.url, '/health')
  for connection in slow:
    connection.close()
  until(lambda: made.service.under_way == 0)
  assert post(made.url, CHAT)[0] == 200


@pytest.mark.parametrize('stream', [False, True])
def test_clients_that_leave_free_their_lanes(scripted, stream):
  """Two choices run; a third waits; their client goes away."""
  made = scripted(max_waiting=1)
  made.engine.go.clear()
  body = json.dumps({**CHAT, 'n': 3, 'stream': stream})
  connection = raw(made.url, head(len(body)) + body, wait=False)
  until(lambda: made.service.scheduler.in_flight == 3)
  connection.close()
  until(lambda: made.service.scheduler.in_flight == 0)
  until(lambda: sorted(made.engine.cancelled) == [1, 2, 3] and made.service.under_way == 0)
  made.engine.go.set()
  assert post(made.url, CHAT)[0] == 200
  assert b'dcore_cancelled_requests_total 1.0' in http_get(made.url, '/metrics')


def test_an_engine_that_fails_is_told_to_everyone_and_ends_the_server(scripted):
  made = scripted(max_waiting=4)
  made.engine.go.clear()
  answers = []
  waiting = threading.Thread(target=lambda: answers.append(post(made.url, CHAT)))
  waiting.start()
  with openai.OpenAI(base_url=f'{made.url}/v1', api_key='none', max_retries=0) as client:
    stream = client.chat.completions.create(**CHAT, stream=True)
    until(lambda: made.service.scheduler.in_flight == 2)
    made.engine.broken = FloatingPointError('not a number')
    with pytest.raises(openai.APIError, match='the engine failed: not a number'):
      list(stream)
  waiting.join()
  [(status, _, answer)] = answers
  assert status == 503 and 'not a number' in answer['error']['message']
  until(lambda: made.server.should_exit)


def test_draining_finishes_what_runs_and_refuses_the_rest(scripted):
  made = scripted()
  made.engine.go.clear()
  with openai.OpenAI(base_url=f'{made.url}/v1', api_key='none', max_retries=0) as client:
    stream = client.chat.completions.create(**CHAT, stream=True)
    until(lambda: made.engine.busy)
    made.server.handle_exit(15, None)
    status, headers, answer = post(made.url, CHAT)
    assert (status, answer['error']['code'], headers['Connection']) == (503, 'draining', 'close')
    assert b'draining' in http_get(made.url, '/health')
    time.sleep(0.3)
    assert not made.server.should_exit
    made.engine.go.set()
    assert ''.join(piece.choices[0].delta.content or '' for piece in stream) == 'find the order'
  until(lambda: made.server.should_exit and made.service.scheduler.in_flight == 0)
  assert not made.engine.cancelled


def test_a_drain_ends_at_its_deadline(scripted):
  made = scripted(drain_seconds=0.2)
  made.engine.go.clear()
  with openai.OpenAI(base_url=f'{made.url}/v1', api_key='none', max_retries=0) as client:
    stream = client.chat.completions.create(**CHAT, stream=True)
    until(lambda: made.engine.busy)
    made.server.handle_exit(15, None)
    with pytest.raises(openai.APIError, match='the engine has stopped'):
      list(stream)
  until(lambda: made.server.should_exit)
  assert made.engine.cancelled == [1]


def test_a_step_that_takes_its_time_does_not_stop_the_server_from_answering(scripted):
  """One that is being compiled, say, when the deadline passes."""
  made = scripted(drain_seconds=0.1)
  gate = threading.Event()
  made.engine.step = lambda: gate.wait(60) and []
  with openai.OpenAI(base_url=f'{made.url}/v1', api_key='none', max_retries=0) as client:
    stream = client.chat.completions.create(**CHAT, stream=True)
    until(lambda: made.engine.busy)
    made.server.handle_exit(15, None)
    time.sleep(0.5)
    assert b'draining' in http_get(made.url, '/health') and not made.server.should_exit
    gate.set()
    with pytest.raises(openai.APIError, match='the engine has stopped'):
      list(stream)
  until(lambda: made.server.should_exit)
