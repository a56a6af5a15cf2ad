"""Connections on which nothing moves: closed after a while, or they would add up without end.

uvicorn waits as long as it takes for the head of a request, and for a client to read its answer.
Bodies have a time limit of their own (`openai_api.Limits`).
"""

from collections.abc import Iterable
from typing import Any


class IdleConnections:
  """Closes connections that neither ask nor read.

  Args:
    seconds: how long a connection may bring no whole head of a request, or take nothing of an
      answer that waits for it.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    # Connection -> (what would change if it moved, when it was first seen so).
    self._still: dict[Any, tuple[Any, float]] = {}

  def look(self, connections: Iterable[Any], now: float) -> None:
    """Looks at uvicorn's connections, and closes those that stand still for too long.

    Args:
      connections: of `uvicorn.server.ServerState`, whose HTTP protocols all have these fields.
      now: by the monotonic clock.
    """
    still = {}
    for connection in list(connections):
      if not _waits(connection):
        continue
      # A request that came and went between two looks has left another cycle; who reads slowly has
      # left fewer bytes to be sent.
      state = (connection.cycle, connection.transport.get_write_buffer_size())
      before, since = self._still.get(connection, (None, now))
      if state != before:
        since = now
      still[connection] = (state, since)
      if now - since > self._seconds:
        # Not `close`, which waits until all is sent.
        connection.transport.abort()
    self._still = still


def _waits(connection: Any) -> bool:
  """Whether the next move is the client's: to ask, or to read."""
  cycle = connection.cycle
  answered = cycle is None or cycle.response_complete
  return answered or connection.flow.write_paused
