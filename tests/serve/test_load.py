"""Many connections at once, most of them bad: nobody else waits, nothing is left behind.

Over plain sockets, on a scripted engine, which makes a token of each lane in every step.
"""

import contextlib
import json
import pathlib
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

from dcore_jax.serve import server as serving
from tests.serve.test_limits import CHAT, head, http_get, post, raw
from tests.waiting import until

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BAD = 500


def resident():
  """Megabytes of this process, which the server is part of."""
  for line in pathlib.Path('/proc/self/status').read_text(encoding='utf-8').splitlines():
    if line.startswith('VmRSS'):
      return int(line.split()[1]) / 1024
  raise AssertionError('no VmRSS')


def bad_connections(url, count):
  """Sockets that begin something and go on with nothing: five kinds in turn."""
  body = json.dumps({**CHAT, 'stream': True, 'n': 1})
  kinds = [
    b'',  # connected, and silent
    b'POST /v1/chat/completions HTTP/1.1\r\nHost:',  # half a head
    head(5000).encode() + b'{"model"',  # half a body
    head(len(body)).encode() + body.encode(),  # asks, and does not read
    b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n' * 3,  # the same, without the engine
  ]
  return [raw(url, kinds[number % len(kinds)], wait=False) for number in range(count)]


@pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='memory is in /proc')
def test_five_hundred_bad_connections(scripted):
  """Other clients get every token; all lanes, requests and connections come back."""
  made = scripted(
    'find the order ' * 4, lanes=4, max_waiting=1000, requests=1000, body_seconds=2, idle_seconds=2
  )
  expected = post(made.url, CHAT)[2]['choices'][0]['message']['content']
  threads = threading.active_count()
  before = resident()
  with contextlib.ExitStack() as stack:
    for connection in bad_connections(made.url, BAD):
      stack.enter_context(connection)
    for _ in range(5):
      status, _, answer = post(made.url, CHAT)
      assert status == 200 and answer['choices'][0]['message']['content'] == expected
    assert b'"ok"' in http_get(made.url, '/health')
    # Without a word from those clients: bodies are given up, silent connections closed.
    until(lambda: made.service.scheduler.in_flight == 0)
    until(lambda: made.service.under_way == 0)
    until(lambda: not made.server.server_state.connections)
  assert not made.engine.busy
  assert resident() - before < 100
  assert threading.active_count() <= threads + 1
  assert post(made.url, CHAT)[0] == 200


def test_a_head_that_comes_byte_by_byte_is_cut_off(scripted):
  made = scripted(idle_seconds=0.5)
  with raw(made.url, b'POST /v1', wait=False) as connection:
    began = time.monotonic()
    with contextlib.suppress(OSError):
      while time.monotonic() - began < 60 and made.server.server_state.connections:
        connection.sendall(b'x')
        time.sleep(0.05)
    until(lambda: not made.server.server_state.connections)
  assert post(made.url, CHAT)[0] == 200


def test_who_asks_and_never_reads_is_cut_off_and_the_lane_is_free(scripted):
  """The answers are larger than what the system and the server keep for a client."""
  made = scripted('find the order ' * 40, max_new=200, idle_seconds=1, requests=2, max_waiting=64)
  body = json.dumps({**CHAT, 'stream': True, 'n': 32, 'logprobs': True, 'top_logprobs': 0})
  host, port = made.url.removeprefix('http://').split(':')
  with contextlib.ExitStack() as stack:
    for _ in range(2):
      connection = stack.enter_context(socket.socket())
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
      connection.connect((host, int(port)))
      connection.sendall(head(len(body)).encode() + body.encode())
    until(lambda: made.service.under_way == 2)
    # Both places of this server are taken, until those who do not read have lost theirs.
    until(lambda: made.service.under_way == 0)
    until(lambda: made.service.scheduler.in_flight == 0)
    assert post(made.url, CHAT)[0] == 200


def test_a_slow_step_or_reader_is_not_taken_for_a_dead_one(scripted):
  """Nothing comes for longer than `idle_seconds`, because the engine is busy: nobody is cut off."""
  made = scripted(idle_seconds=0.3)
  made.engine.go.clear()
  threading.Timer(1.5, made.engine.go.set).start()
  assert post(made.url, CHAT)[0] == 200


@pytest.mark.parametrize(
  'content',
  [
    '\ufffd' * 50_000,
    '\u202e\u200b\u2066' * 20_000,
    'e' + '\u0301' * 100_000,
    '\U0001f468\u200d\U0001f469\u200d' * 10_000,
    '<|im_start|>' * 10_000,
    '\x00' * 100_000,
  ],
)
def test_floods_of_odd_characters_are_answered_and_hold_nobody_up(scripted, content):
  """A prompt that is too long is refused; meanwhile others are answered."""
  made = scripted()
  found = []
  body = {**CHAT, 'messages': [{'role': 'user', 'content': content}]}
  flood = threading.Thread(target=lambda: found.append(post(made.url, body)))
  flood.start()
  assert b'"ok"' in http_get(made.url, '/health')
  flood.join(60)
  [(status, _, answer)] = found
  assert status == 400 and answer['error']['type'] == 'invalid_request_error'
  assert post(made.url, CHAT)[0] == 200


@pytest.mark.parametrize('depth', [50, 5_000, 500_000])
def test_nested_bodies_are_refused_or_answered(scripted, depth):
  made = scripted()
  nested = '[' * depth + ']' * depth
  for body in (
    nested,
    '{"a":' * depth + '1' + '}' * depth,
    json.dumps(CHAT)[:-1] + f', "metadata": {nested}}}',
    json.dumps(CHAT)[:-1] + f', "tools": {nested}}}',
  ):
    assert post(made.url, body.encode())[0] in (200, 400)
  assert post(made.url, CHAT)[0] == 200


def test_nothing_that_is_asked_is_logged(scripted, capfd, caplog):
  secret = 'Zanzibar'
  made = scripted()
  for content in (secret, secret * 10_000):
    body = {**CHAT, 'messages': [{'role': 'user', 'content': content}], secret: 1}
    post(made.url, body)
  post(made.url, f'{{"model": "{secret}'.encode())
  raw(made.url, f'{secret}\r\n\r\n')
  printed = ''.join(capfd.readouterr()) + caplog.text
  # Names of unknown fields are logged once, so that a misspelt one can be found; values never.
  assert printed.count(secret) <= printed.count(f'ignored: {secret}')


def serve(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.serve', *arguments],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.mark.parametrize('host', ['0.0.0.0', '::', '192.0.2.1', 'example.org'])
def test_others_are_served_with_a_key_or_on_purpose(host):
  with pytest.raises(ValueError, match='no key is asked for: set --api_key_env, or say --insecure'):
    serving.check_reach(host, '', insecure=False)
  serving.check_reach(host, 'k', insecure=False)
  serving.check_reach(host, '', insecure=True)


def test_this_machine_needs_no_key():
  for host in ('127.0.0.1', '::1', 'localhost'):
    serving.check_reach(host, '', insecure=False)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--host=0.0.0.0'], '0.0.0.0 may be reached by others'),
    (['--tls_cert=a.pem'], '--tls_cert and --tls_key go together'),
    (['--tls_cert=a.pem', '--tls_key=b.pem'], 'a.pem and b.pem are no certificate and its key'),
  ],
)
def test_the_program_refuses_before_it_loads_a_model(arguments, message):
  done = serve('--model=nowhere', *arguments)
  assert done.returncode == 1 and message in done.stderr and done.stderr.count('\n') == 1


def test_tls(scripted, tmp_path):
  """With a certificate of its own, made here by openssl."""
  certificate, key = tmp_path / 'cert.pem', tmp_path / 'key.pem'
  command = f'openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate}'
  made = subprocess.run(
    [*command.split(), '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1'],
    capture_output=True,
    check=False,
  )
  if made.returncode:
    pytest.skip('openssl makes no certificate here')
  files = serving.check_tls(str(certificate), str(key))
  told = []
  base = scripted()
  server = serving.Server(base.service, '127.0.0.1', 0, 1.0, told.append, files)
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  until(lambda: told)
  assert told[0].startswith('https://127.0.0.1:')
  port = int(told[0].split(':')[2].split('/')[0])
  context = ssl.create_default_context(cafile=certificate)
  with socket.create_connection(('127.0.0.1', port), timeout=60) as plain:
    with context.wrap_socket(plain, server_hostname='127.0.0.1') as secure:
      secure.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
      answer = b''.join(iter(lambda: secure.recv(65536), b''))
  assert b' 200 ' in answer.splitlines()[0] and b'"ok"' in answer
  server.should_exit = server.force_exit = True
  thread.join(60)
