"""States of an MCP server of which there may be many: sessions, and the pool of their connections.

A session is a state of its own that begins as the server's first one. Only `most` sessions have a
connection at a time. The one that has waited longest gives its connection up, and gets another when
it is called again; the calls that it has made are then repeated there.
"""

import collections
import dataclasses
import json
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from dcore_jax.worlds.mcpworld.connection import Connection, Result, Server, ServerLost, Tool

# How a connection is brought to the server's first state, where no tool of the server does it.
RESTART = 'restart'
NEVER = 'never'


@dataclasses.dataclass(frozen=True)
class Reset:
  """How a session begins.

  Attributes:
    how: RESTART for a new process (on HTTP a new session), NEVER for servers without a state, or
      the name of a tool that resets it.
    arguments: those of the tool, as the text of a JSON object.
  """

  how: str = RESTART
  # As text, since pools are found by what they are made of.
  arguments: str = '{}'


class _Handle:
  """What the pool knows of a session: its connection, if it has one, and what to repeat."""

  def __init__(self):
    self.connection: Connection | None = None
    self.made: list[tuple[str, Mapping[str, Any]]] = []


class Pool:
  """The connections to one server.

  Args:
    server: how it is reached.
    reset: how a session begins.
    most: connections at a time.

  Attributes:
    tools: what the server offers, by its own names.

  Raises:
    ServerLost: it cannot be started.
    ValueError: it has no tool of the name that resets it.
  """

  def __init__(self, server: Server, reset: Reset, most: int):
    self._server = server
    self._reset = reset
    self._most = most
    self._lock = threading.RLock()
    # In the order of their last calls.
    self._live: collections.OrderedDict[int, _Handle] = collections.OrderedDict()
    # Sessions that nobody refers to any more. The garbage collector may run in any thread, where it
    # must not wait for the lock.
    self._left: collections.deque[_Handle] = collections.deque()
    self._idle: list[Connection] = []
    first = Connection(server)
    self.tools: dict[str, Tool] = {tool.name: tool for tool in first.tools}
    if reset.how not in (RESTART, NEVER) and reset.how not in self.tools:
      first.close()
      raise ValueError(
        f'reset is {reset.how!r}; expected {RESTART!r}, {NEVER!r} or one of the tools of the '
        f'server, {sorted(self.tools)}'
      )
    # It has not been called yet, so that it serves the first session.
    self._idle.append(first)

  def session(self) -> 'Session':
    """Returns a session in the server's first state; it connects at its first call."""
    return Session(self)

  def call(self, handle: _Handle, name: str, arguments: Mapping[str, Any]) -> Result:
    """Calls a tool in the state of a session.

    Raises:
      ServerLost: the server did not start, died, or did not answer in time.
    """
    # One call at a time: no other thread may take the connection away meanwhile.
    with self._lock:
      return self._connected(handle).call(name, arguments)

  def leave(self, handle: _Handle) -> None:
    """Takes a session's connection back, from any thread and without waiting."""
    connection = handle.connection
    # Ended at once: the pool may not be asked again.
    if connection is not None and not self._kept(connection):
      connection.close()
    self._left.append(handle)

  def _kept(self, connection: Connection) -> bool:
    """Whether another session may use a connection after this one."""
    return self._reset.how != RESTART and not connection.lost

  def _connected(self, handle: _Handle) -> Connection:
    self._take_back()
    if handle.connection is None:
      while len(self._live) >= self._most:
        _, oldest = self._live.popitem(last=False)
        self._free(oldest)
      handle.connection = self._fresh()
      for name, arguments in handle.made:
        handle.connection.call(name, arguments)
    self._live[id(handle)] = handle
    self._live.move_to_end(id(handle))
    return handle.connection

  def _take_back(self) -> None:
    while self._left:
      handle = self._left.popleft()
      self._live.pop(id(handle), None)
      self._free(handle)

  def _free(self, handle: _Handle) -> None:
    connection = handle.connection
    handle.connection = None
    if connection is None:
      return
    # Servers without a state have one connection for all sessions, which stays where it is.
    if self._kept(connection):
      if connection not in self._idle:
        self._idle.append(connection)
    else:
      connection.close()

  def _fresh(self) -> Connection:
    """Returns a connection in the server's first state."""
    # A server may have died while nobody called it.
    self._idle = [connection for connection in self._idle if not connection.lost]
    if self._reset.how == NEVER:
      if not self._idle:
        self._idle.append(Connection(self._server))
      return self._idle[0]
    connection = self._idle.pop() if self._idle else Connection(self._server)
    if self._reset.how != RESTART:
      # Also the first time: a server on HTTP may have served others before.
      result = connection.call(self._reset.how, json.loads(self._reset.arguments))
      if result.failed:
        connection.close()
        raise ServerLost(f'the reset tool {self._reset.how!r} fails: {result.text[:200]}')
    return connection

  def close(self) -> None:
    """Ends all connections."""
    with self._lock:
      self._take_back()
      for handle in self._live.values():
        if handle.connection is not None:
          handle.connection.close()
          handle.connection = None
      for connection in self._idle:
        connection.close()
      self._live.clear()
      self._idle.clear()


class Session:
  """A state of the server; see `Pool.session`."""

  def __init__(self, pool: Pool):
    self._pool = pool
    self._handle = _Handle()
    # Most sessions are dropped without a word: an episode is over, a candidate was compared.
    self._finalizer = weakref.finalize(self, pool.leave, self._handle)

  def call(self, name: str, arguments: Mapping[str, Any], *, repeat: bool = True) -> Result:
    """Calls a tool by the server's name of it.

    Args:
      name: of the tool.
      arguments: JSON values by name.
      repeat: whether the call has to be repeated where the session gets another connection.

    Raises:
      ServerLost: the server did not start, died, or did not answer in time.
    """
    result = self._pool.call(self._handle, name, arguments)
    if repeat:
      self._handle.made.append((name, arguments))
    return result

  def will_repeat(self, name: str, arguments: Mapping[str, Any]) -> None:
    """Adds a call to those that are made before the first one."""
    self._handle.made.append((name, arguments))

  def close(self) -> None:
    """Gives the connection back."""
    self._finalizer()


_pools: dict[tuple[Server, Reset, int], Pool] = {}
_pools_lock = threading.Lock()


def find_pool(server: Server, reset: Reset, most: int) -> Pool:
  """Returns the pool of a server; all worlds and seeds of one server share it.

  Raises:
    ValueError: the server cannot be started, or it has no such reset tool.
  """
  key = (server, reset, most)
  with _pools_lock:
    if key not in _pools:
      try:
        _pools[key] = Pool(server, reset, most)
      except ServerLost as error:
        place = server.url or ' '.join(server.command)
        raise ValueError(f'the MCP server {place!r}: {error}') from error
    return _pools[key]


def close_pools() -> None:
  """Ends the connections of all pools, which are made anew when they are asked for."""
  with _pools_lock:
    for pool in _pools.values():
      pool.close()
    _pools.clear()
