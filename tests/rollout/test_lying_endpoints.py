"""Endpoints that send something else than an answer: asked again, then named; never kept."""

import contextlib
import http.server
import json
import threading

import pytest
from absl import logging

from dcore_jax.rollout.endpoint import EndpointLimits, OpenAIBackend
from tests.rollout.test_backends import SAMPLING, answer, ask, source_of

GOOD = json.dumps(answer('ok')).encode()


def page(content, kind='application/json', length=None):
  return (
    f'HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n'
    f'Content-Length: {len(content) if length is None else length}\r\n\r\n'
  ).encode() + content


CHUNKED = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n'
LIES = {
  'html': page(b'<html><body>502 Bad Gateway</body></html>', 'text/html'),
  'html as json': page(b'<html><body>Sign in</body></html>'),
  'empty': page(b''),
  'null': page(b'null'),
  'another object': page(b'{"object": "list", "data": []}'),
  'cut in the middle': page(GOOD[: len(GOOD) // 2], length=len(GOOD)),
  'cut in a chunk': CHUNKED + b'40\r\n' + GOOD[:20],
  'no http': b'\x16\x03\x01 nonsense',
  'closed at once': b'',
  'a gigabyte is promised': page(GOOD[:30], length=10**9),
  'not utf-8': page(b'{"choices": "\xff\xfe"}'),
}


@contextlib.contextmanager
def lying(first, times):
  """A server that sends these bytes so many times, and then a good answer -> its URL."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # pylint: disable=invalid-name
      self.rfile.read(int(self.headers['Content-Length']))
      asked.append(1)
      self.wfile.write(first if len(asked) <= times else page(GOOD))
      self.close_connection = True

    def do_GET(self):  # pylint: disable=invalid-name
      self.wfile.write(page(b'{"object": "list", "data": []}'))
      self.close_connection = True

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{server.server_port}/v1'
  server.shutdown()
  server.server_close()


def replies(url, journal, retries):
  limits = EndpointLimits(retries=retries, timeout=30)
  backend = OpenAIBackend(url, 'm', limits=limits, journal=journal)
  return dict(backend.stream(source_of([ask(0)]), SAMPLING))


@pytest.mark.parametrize('lie', LIES)
def test_what_is_no_answer_is_asked_again_and_not_kept(lie, tmp_path):
  journal = tmp_path / 'replies.jsonl'
  # Asked once, and once more when all else is done: then its reply says what came.
  with lying(LIES[lie], times=2) as url:
    [reply] = replies(url, journal, retries=0).values()
    assert reply.error and not reply.text and not journal.read_bytes()
    assert replies(url, journal, retries=0)[0].text == 'ok'
  with lying(LIES[lie], times=1) as url:
    assert replies(url, tmp_path / 'other.jsonl', retries=1)[0].text == 'ok'


def test_answers_of_another_model_are_told_once(monkeypatch):
  """Providers answer with the full name of what they serve: it is worth a line, and no error."""
  told = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: told.append(text % values))
  other = page(json.dumps(answer('ok') | {'model': 'm-2026-01-01'}).encode())
  with lying(other, times=99) as url:
    backend = OpenAIBackend(url, 'm', limits=EndpointLimits(retries=0))
    got = dict(backend.stream(source_of([ask(number) for number in range(5)]), SAMPLING))
  assert [reply.text for reply in got.values()] == ['ok'] * 5
  assert told == [f"{url} was asked for the model 'm', and answers as 'm-2026-01-01'"]
