"""The program itself: a real process that is asked, told to end in the middle of an answer, and
ends well.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import openai
import pytest

from dcore_jax.serve.server import load_model
from tests.waiting import until

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def launch(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.serve', *arguments],
    cwd=REPOSITORY,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, **environment},
  )


def test_sigterm_in_the_middle_of_an_answer():
  process = launch(
    '--port=0', '--lanes=1', '--max_len=64', '--steps_per_call=1', '--api_key_env=KEY', KEY='k'
  )
  try:
    url = next(line.split()[0] for line in process.stderr if line.startswith('http'))
    assert url.startswith('http://127.0.0.1:')
    client = openai.OpenAI(base_url=url, api_key='k', max_retries=0)
    host, port = url.split('/')[2].split(':')
    with socket.create_connection(
      (host, int(port))
    ) as slow:  # a request that is not whole yet, which the server waits for
      slow.sendall(
        b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\n'
        b'Content-Type: application/json\r\nContent-Length: 99\r\n\r\n'
      )
      stream = client.completions.create(
        model='organism', prompt='find', max_tokens=50, stream=True, temperature=5.0, seed=0
      )
      pieces = [next(stream)]
      process.send_signal(signal.SIGTERM)
      until(lambda: refused(url))
      pieces += stream
      assert pieces[-1].choices[0].finish_reason in ('stop', 'length') and len(pieces) > 5
      assert process.poll() is None
    assert process.wait(60) == 0
  finally:
    process.kill()
    process.stderr.close()
    process.wait()


def test_a_second_signal_ends_it_at_once():
  process = launch('--port=0', '--lanes=1', '--max_len=64')
  try:
    url = next(line.split()[0] for line in process.stderr if line.startswith('http'))
    host, port = url.split('/')[2].split(':')
    with socket.create_connection((host, int(port))) as slow:
      slow.sendall(
        b'POST /v1/completions HTTP/1.1\r\nHost: x\r\n'
        b'Content-Type: application/json\r\nContent-Length: 99\r\n\r\n'
      )
      openai.OpenAI(
        base_url=url, api_key='k', max_retries=0
      ).models.list()  # after which that one has been taken up
      process.send_signal(signal.SIGTERM)
      until(lambda: refused(url))
      process.send_signal(signal.SIGTERM)
      assert process.wait(60) == -signal.SIGTERM
  finally:
    process.kill()
    process.stderr.close()
    process.wait()


def refused(url):
  with openai.OpenAI(base_url=url, api_key='k', max_retries=0) as client:
    try:
      client.models.list()
    except openai.InternalServerError as error:
      return error.status_code == 503
    return False


@pytest.mark.parametrize(
  'argument,message',
  [
    ('--model=nowhere', "error: 'nowhere' is not there"),
    ('--port=99999', 'error: port = 99999; expected 0'),
    ('--port=-1', 'error: port = -1; expected 0'),
  ],
)
def test_what_cannot_be_served_is_one_line(argument, message):
  process = launch(argument)
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 1 and errors.startswith(message) and errors.count('\n') == 1


@pytest.mark.parametrize(
  'options,message',
  [
    ({'tensor': 64}, 'tensor = 64, but there'),
    ({'dtype': 'int8'}, "dtype = 'int8'"),
    ({'max_len': 100_000}, 'positions of the model'),
  ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    load_model('', **options)
