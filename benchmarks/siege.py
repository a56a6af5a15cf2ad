"""Streams of good clients while 500 hostile connections stand: do their tokens keep coming?

    python -m benchmarks.siege --connections=500 --seconds=60

`experiments.serve` serves the organism with more lanes than there are good clients. These stream
answer after answer, first alone and then beside another process, which holds hostile connections
open and opens each again that the server closes: silent ones, halves of a head and of a body,
clients that ask for a stream and do not read it, and pipelined requests that nobody reads. It also
sends bodies that are too large or too deep, and floods of odd characters, without a pause.

A gap is the time between two pieces of one answer; a piece has the tokens of one call of the
engine. One JSON line: the 99th percentile of the gaps under siege, against the median gap of the
clients alone (wanted: at most 3 times it), both medians, both longest gaps, how many answers came
whole, what the server's memory grew by, and how often it closed a hostile connection. All of it
runs on the same cores; the attacker gives way to the server (nice 10), as though it were elsewhere.
The exit status is 1 where an answer was lost.
"""

import collections
import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
from absl import app, flags

from benchmarks.measure import line, say

_CONNECTIONS = flags.DEFINE_integer('connections', 500, 'Hostile connections at once.')
_SECONDS = flags.DEFINE_float('seconds', 60.0, 'Of each of the two parts.')
_CLIENTS = flags.DEFINE_integer('clients', 3, 'Good clients at once; the server has 8 lanes.')
_ATTACK = flags.DEFINE_string('attack', '', 'Attacks this address; the program calls it.')

WANTED = 3.0  # the 99th percentile under siege over the median alone
ASK = {
  'model': 'organism',
  'messages': [{'role': 'user', 'content': 'find the order of Karo, then cancel that order.'}],
  'max_tokens': 160,
  'stream': True,
}
FLOODS = (
  b' ' * (5 << 20),
  b'[' * 100_000,
  b'{"a":' * 50_000,
  json.dumps({**ASK, 'messages': [{'role': 'user', 'content': '\u202e\u200b' * 40_000}]}).encode(),
  json.dumps({**ASK, 'messages': [{'role': 'user', 'content': '<|im_start|>' * 9_000}]}).encode(),
)


def _head(length: int) -> bytes:
  text = f'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n'
  return f'{text}Content-Type: application/json\r\n\r\n'.encode()


def _post(connection: http.client.HTTPConnection, body: bytes) -> None:
  connection.request('POST', '/v1/chat/completions', body, {'Content-Type': 'application/json'})


def attack(url: str, count: int) -> None:
  """Holds `count` hostile connections and floods, until SIGTERM; then prints what it did."""
  os.nice(10)
  parts = urllib.parse.urlsplit(url)
  place = (parts.hostname, parts.port)
  body = json.dumps(ASK).encode()
  openings = (
    b'',
    b'POST /v1/chat/completions HTTP/1.1\r\nHost:',
    _head(5000) + b'{"model"',
    _head(len(body)) + body,
    b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n' * 20,
  )
  done: collections.Counter[str] = collections.Counter()
  stop = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: stop.set())
  flood = threading.Thread(target=_flood, args=(url, stop, done))
  flood.start()
  held: list[socket.socket | None] = [None] * count
  while not stop.is_set():
    for number in range(count):
      with contextlib.suppress(OSError):
        if held[number] is None:
          held[number] = _opened(place, openings[number % len(openings)])
          done['opened'] += 1
        elif _is_closed(held[number]):
          held[number].close()
          held[number] = None
          done['closed by the server'] += 1
    stop.wait(0.2)
  flood.join()
  print(json.dumps(done))


def _opened(place: tuple[str, int], opening: bytes) -> socket.socket:
  connection = socket.socket()
  # The smallest window, so that who does not read holds up whoever writes.
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
  connection.settimeout(5)
  connection.connect(place)
  connection.sendall(opening)
  connection.setblocking(False)
  return connection


def _is_closed(connection: socket.socket) -> bool:
  """Whether the server has closed it; what it has sent stays unread."""
  try:
    return connection.recv(1, socket.MSG_PEEK) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True


def _flood(url: str, stop: threading.Event, done: collections.Counter[str]) -> None:
  number = 0
  while not stop.is_set():
    body = FLOODS[number % len(FLOODS)]
    number += 1
    # A body that is refused before it is read whole may end the connection.
    with contextlib.suppress(OSError, http.client.HTTPException):
      connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)
      with contextlib.closing(connection):
        _post(connection, body)
        done[f'flood: {connection.getresponse().status}'] += 1


class Streams:
  """Good clients, each of which asks again as soon as it has its answer.

  Attributes:
    gaps: seconds between two pieces of an answer, of all answers.
    first: seconds from the request to the first piece.
    whole: answers that came to their end.
    lost: what became of others.
  """

  def __init__(self, url: str, count: int, seconds: float):
    self.gaps: list[float] = []
    self.first: list[float] = []
    self.whole = 0
    self.lost: list[str] = []
    self._place = urllib.parse.urlsplit(url).netloc
    self._end = time.monotonic() + seconds
    threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()

  def _run(self, seed: int) -> None:
    while time.monotonic() < self._end:
      try:
        self._ask(seed)
      except (OSError, ValueError, http.client.HTTPException) as error:
        self.lost.append(f'{type(error).__name__}: {error}')
      seed += 1000

  def _ask(self, seed: int) -> None:
    began = time.perf_counter()
    connection = http.client.HTTPConnection(self._place, timeout=300)
    with contextlib.closing(connection):
      _post(connection, json.dumps(ASK | {'seed': seed}).encode())
      answer = connection.getresponse()
      if answer.status != 200:
        raise ValueError(f'status {answer.status}: {answer.read(200)!r}')
      times = []
      text = b''
      for text in answer:
        if text.startswith(b'data: {'):
          times.append(time.perf_counter())
        if text.startswith(b'data: [DONE]'):
          break
      if not text.startswith(b'data: [DONE]'):
        raise ValueError('the stream was cut')
    self.whole += 1
    self.first.append(times[0] - began)
    gaps = np.diff(times)
    # Pieces of one call are sent at once.
    self.gaps += gaps[gaps > 1e-3].tolist()


def _resident(pid: int) -> float:
  """Megabytes of a process's own memory."""
  for text in pathlib.Path(f'/proc/{pid}/status').read_text(encoding='utf-8').splitlines():
    if text.startswith('RssAnon:'):
      return int(text.split()[1]) / 1024
  raise ValueError(f'/proc/{pid}/status lacks RssAnon')


def _start(*arguments: str, **options: object) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, '-m', *arguments], text=True, **options)


def _besiege(url: str, server: subprocess.Popen) -> bool:
  """Measures both parts and prints the line -> whether an answer was lost."""
  warm = Streams(url, _CLIENTS.value, 3.0)
  if not warm.gaps:
    raise RuntimeError(f'no answer came: {warm.lost[:1]}')
  alone = Streams(url, _CLIENTS.value, _SECONDS.value)
  before = _resident(server.pid)
  attacker = _start(
    'benchmarks.siege',
    f'--attack={url}',
    f'--connections={_CONNECTIONS.value}',
    stdout=subprocess.PIPE,
  )
  try:
    time.sleep(5)  # until all connections stand
    besieged = Streams(url, _CLIENTS.value, _SECONDS.value)
    grown = _resident(server.pid) - before
    attacker.terminate()
    done, _ = attacker.communicate(timeout=60)
  finally:
    attacker.kill()
  for text in [*alone.lost, *besieged.lost][:5]:
    say(f'lost: {text}')
  line(
    'siege: 99th percentile of the gaps',
    'median gap of the same clients alone',
    float(np.percentile(besieged.gaps, 99)),
    float(np.median(alone.gaps)),
    's',
    wanted=1 / WANTED,
    median=float(np.median(besieged.gaps)),
    longest=max(besieged.gaps),
    p99_alone=float(np.percentile(alone.gaps, 99)),
    longest_alone=max(alone.gaps),
    first_piece=float(np.median(besieged.first)),
    first_piece_alone=float(np.median(alone.first)),
    answers=besieged.whole,
    answers_alone=alone.whole,
    lost=len(alone.lost) + len(besieged.lost),
    grown_megabytes=grown,
    attacker=json.loads(done),
  )
  return bool(alone.lost or besieged.lost)


def main(argv: list[str]) -> None:
  del argv
  if _ATTACK.value:
    attack(_ATTACK.value, _CONNECTIONS.value)
    return
  server = _start(
    'experiments.serve', '--port=0', '--lanes=8', '--max_len=256', stderr=subprocess.PIPE
  )
  try:
    url = next(text.split()[0] for text in server.stderr if text.startswith('http'))
    # Read on, or a full pipe would stop the server.
    threading.Thread(target=server.stderr.read, daemon=True).start()
    lost = _besiege(url, server)
  finally:
    server.kill()
    server.wait()
  if lost:
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
