"""Who of several hosts is missing: a small process beside each, which ends its own where one is.

A host that waits for another in a collective, or in a barrier of a checkpoint, would wait for ever,
and nothing in Python can interrupt it there. So each host starts a process of its own, without jax,
that talks to that of the first host. It sees at once that its host's process ends, and after
`patience` seconds without a word that a whole machine has gone. Then it says on stderr which host
is missing and why, and kills its own host's process. Files are whole at any moment, so that the
same command goes on from the last checkpoint.

    python -m dcore_jax.host_watch JSON     # started by `start`; reads from its host on stdin

Members talk to the first one, in lines of JSON. It passes on what it learns.
"""

import dataclasses
import hmac
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Any

PATIENCE = 60.0  # seconds without a word from a host until it counts as gone
# Seconds until an error of this host counts as its own: a collective fails for all when one host
# dies, and the watch hears of that a moment later.
_SETTLE = 2.0
# Longer lines are nobody's of ours.
_LONGEST_LINE = 1 << 16


@dataclasses.dataclass
class _Started:
  """What this process knows of its watch, of which a process has one at most."""

  process: subprocess.Popen | None = None
  index: int = 0


def listen(address: str) -> socket.socket:
  """Returns a socket that the first host's watch listens on, on a free port.

  Args:
    address: of the first host, as others reach it; loopback is not left.
  """
  return socket.create_server((address if address.startswith('127.') else '', 0))


def start(
  index: int,
  count: int,
  *,
  address: tuple[str, int],
  token: str,
  patience: float = PATIENCE,
  server: socket.socket | None = None,
) -> None:
  """Starts the watch of this host; returns when it has met the others.

  Args:
    index: this host's number.
    count: number of hosts.
    address: where the first host's watch listens.
    token: what all watches of the run know, and nobody else.
    patience: seconds without a word from a host until it counts as gone.
    server: from `listen`, on the first host.
  """
  options = {
    'index': index,
    'count': count,
    'address': list(address),
    'patience': patience,
    'parent': os.getpid(),
    'server': server.fileno() if server else None,
  }
  _Started.index = index
  _Started.process = subprocess.Popen(
    [sys.executable, '-m', 'dcore_jax.host_watch', json.dumps(options)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    pass_fds=[server.fileno()] if server else [],
    # Of a session of its own: Ctrl-C is for the host, which may take its time to end.
    start_new_session=True,
  )
  # Not on the command line, which every user of the machine can read.
  _tell({'token': token})
  if server:
    server.close()
  # From here on whoever is missing has a name. A watch that meets nobody ends this process.
  with _Started.process.stdout as told:
    told.readline()


def done() -> None:
  """Says that this host has done its work, so that its end is no loss."""
  if _Started.process:
    _tell({'done': True})


def end(message: str, status: int) -> None:
  """Ends this process by an error, and tells the other hosts; returns where there are none.

  If the error is that of another host, the watch says so and ends this process meanwhile.
  """
  if not _Started.process:
    return
  _tell({'failed': message.strip().splitlines()[-1]})
  time.sleep(_SETTLE)
  print(message, file=sys.stderr, flush=True)
  # The others lose jax's coordinator with the first host, and should have said why they end.
  time.sleep(2 * _SETTLE if _Started.index == 0 else _SETTLE / 2)
  # jax would wait for the other hosts on the way out.
  os._exit(status)


def _tell(message: dict[str, Any]) -> None:
  try:
    _Started.process.stdin.write(json.dumps(message).encode() + b'\n')
    _Started.process.stdin.flush()
  except OSError:
    pass  # somebody has killed the watch; the run is none the worse


# --- the process ----------------------------------------------------------------------------------


class _Line:
  """Lines of JSON from and to a watch or the host.

  Attributes:
    file: a socket, or the host's end of stdin.
    index: the host at the other end; None where it has not said who it is.
    heard: when it was last heard of, by the monotonic clock.
  """

  def __init__(self, file: Any, index: int | None):
    self.file = file
    self.index = index
    self.heard = time.monotonic()
    self._rest = b''

  def read(self) -> list[dict[str, Any]] | None:
    """Returns the messages that have come; None where the other end has gone."""
    try:
      data = os.read(self.file.fileno(), _LONGEST_LINE)
    except BlockingIOError:
      return []
    except OSError:
      data = b''
    if not data or len(self._rest) > _LONGEST_LINE:
      return None
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + data).split(b'\n')
    try:
      return [message for message in map(json.loads, lines) if isinstance(message, dict)]
    except ValueError:
      return None

  def write(self, message: dict[str, Any]) -> None:
    """Sends a message; an end that has gone is noticed where it is read."""
    try:
      self.file.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
      pass


class _Watch:
  """The watch of one host: the first one hears all, the others the first."""

  def __init__(self, options: dict[str, Any]):
    self._index = options['index']
    self._count = options['count']
    self._patience = options['patience']
    self._parent = options['parent']
    self._selector = selectors.DefaultSelector()
    self._host = _Line(sys.stdin.buffer, self._index)
    self._selector.register(self._host.file, selectors.EVENT_READ, self._host)
    # Read whole before anybody else is listened to.
    self._token = json.loads(sys.stdin.buffer.raw.readline())['token']
    # All hosts by number: this one, and those it has heard of.
    self._names = {self._index: f'{socket.gethostname()}, process {self._parent}'}
    self._done: set[int] = set()
    self._lines: dict[int, _Line] = {}
    self._failing: tuple[float, str] | None = None
    self._server = None
    self._began = time.monotonic()
    if options['server'] is None:
      self._connect(tuple(options['address']))
    else:
      self._server = socket.socket(fileno=options['server'])
      self._selector.register(self._server, selectors.EVENT_READ, None)

  def run(self) -> None:
    """Listens until its host has gone, or another one is missing."""
    while True:
      for key, _ in self._selector.select(timeout=min(1.0, self._patience / 5)):
        if key.data is None:
          self._accept()
        else:
          self._hear(key.data)
      self._look()

  # --- lines ---

  def _connect(self, address: tuple[str, int]) -> None:
    try:
      sock = socket.create_connection(address, timeout=self._patience)
    except OSError as error:
      self._lose(0, f'cannot be reached at {address[0]}:{address[1]} ({error})')
    # Nothing is read that is not there; a write that takes so long has nobody at the other end.
    sock.settimeout(self._patience)
    self._lines[0] = _Line(sock, 0)
    self._selector.register(sock, selectors.EVENT_READ, self._lines[0])
    hello = {'index': self._index, 'name': self._names[self._index], 'token': self._token}
    self._lines[0].write(hello)

  def _accept(self) -> None:
    sock, _ = self._server.accept()
    sock.settimeout(self._patience)
    self._selector.register(sock, selectors.EVENT_READ, _Line(sock, None))

  def _hear(self, line: _Line) -> None:
    messages = line.read()
    if messages is None:
      self._selector.unregister(line.file)
      self._gone(line)
      return
    for message in messages:
      if line is self._host:
        self._from_host(message)
      elif line.index is None:
        self._welcome(line, message)
      else:
        self._from_watch(line, message)

  def _welcome(self, line: _Line, message: dict[str, Any]) -> None:
    index = message.get('index')
    known = hmac.compare_digest(str(message.get('token')), self._token)
    if known and index in range(1, self._count) and index not in self._lines:
      line.index = index
      self._lines[index] = line
      self._names[index] = str(message.get('name'))
      line.write({'name': self._names[0]})
      if len(self._lines) == self._count - 1:
        _say_ready()
    else:
      self._selector.unregister(line.file)
      line.file.close()

  # --- what is heard ---

  def _from_host(self, message: dict[str, Any]) -> None:
    if message.get('done'):
      self._done.add(self._index)
      self._send({'done': self._index})
    if 'failed' in message:
      self._failing = (time.monotonic(), str(message['failed']))

  def _from_watch(self, line: _Line, message: dict[str, Any]) -> None:
    if 'name' in message:
      self._names[line.index] = str(message['name'])
      _say_ready()
    if 'done' in message:
      self._done.add(line.index)
    if 'lost' in message:
      index = int(message['lost']) if line.index == 0 else line.index
      if message.get('who'):
        self._names[index] = str(message['who'])
      # All hosts may end by the same mistake; each says so itself.
      if not (self._failing and message.get('failed')):
        self._lose(index, str(message.get('why')), failed=bool(message.get('failed')))

  def _gone(self, line: _Line) -> None:
    """Takes notice of an end that has closed."""
    if line is self._host:
      if self._index not in self._done:
        self._send_lost(self._index, 'has died')
      sys.exit()
    if line.index is not None and line.index not in self._done:
      self._lose(line.index, 'has died')

  def _look(self) -> None:
    """Does what is due: a word to the others, and a look at who is silent."""
    now = time.monotonic()
    if os.getppid() != self._parent:
      # A child of the host may still hold its end of the pipe.
      self._gone(self._host)
    if self._failing and now - self._failing[0] > _SETTLE:
      self._send_lost(self._index, f'has ended: {self._failing[1]}', failed=True)
      # Said once; the host ends by itself.
      self._failing = (math.inf, self._failing[1])
      self._done.add(self._index)
    self._send({'here': True})
    expected = range(1, self._count) if self._server else [0]
    for index in expected:
      line = self._lines.get(index)
      heard = line.heard if line else self._began
      if index not in self._done and now - heard > self._patience:
        self._lose(index, f'has not been heard of for {self._patience:g} s')

  # --- what is said ---

  def _send(self, message: dict[str, Any]) -> None:
    for line in self._lines.values():
      line.write(message)

  def _send_lost(self, index: int, why: str, failed: bool = False) -> None:
    self._send({'lost': index, 'who': self._names.get(index), 'why': why, 'failed': failed})

  def _lose(self, index: int, why: str, failed: bool = False) -> None:
    """Says that a host is missing, and ends this one."""
    # This host has been the first to fail, and is about to say so: others end for that reason.
    if self._failing and self._failing[0] == math.inf:
      sys.exit()
    if self._server:
      self._send_lost(index, why, failed)
    name = self._names.get(index)
    which = f'host {index} of 0..{self._count - 1}' + (f' ({name})' if name else '')
    text = f'\nerror: {which} {why}; host {self._index} stops. Start all of them again to go on.\n'
    os.write(2, text.encode('utf-8', 'replace'))
    if os.getppid() == self._parent:
      os.kill(self._parent, signal.SIGKILL)
    sys.exit(1)


def _say_ready() -> None:
  os.write(1, b'ready\n')


def main() -> None:
  """Watches as the host that has started this process asks."""
  # The host decides what a signal means; this process ends with it.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  _Watch(json.loads(sys.argv[1])).run()


if __name__ == '__main__':
  main()
