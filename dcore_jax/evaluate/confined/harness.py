"""Takes from the process of an official harness what it does not need, by limits and an audit hook.

Imports the standard library alone: it is also read by the Pythons of other environments.
"""

import os
import resource
import socket
import sys
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

from dcore_jax.evaluate.confined.confinement import PROGRAMS, WRITES


def confine_harness(*, memory: int, writable: str = '', addresses: Sequence[str] = ()) -> None:
  """Confines this process, which runs the program of others.

  Such a program starts threads, writes files and asks servers, which no filter lets pass. No text
  of a model may be run in it.

  Args:
    memory: bytes of its address space.
    writable: the only folder in which files may be written; '' forbids it everywhere.
    addresses: of the servers that it may reach, as URLs; none forbids the network.
  """
  inside = os.path.join(os.path.realpath(writable), '') if writable else None
  hosts = {urllib.parse.urlsplit(address).hostname for address in addresses}
  found: set[tuple[Any, ...]] = set()
  look_up = socket.getaddrinfo

  def recorded(host: Any, *values: Any, **named: Any) -> Any:
    entries = look_up(host, *values, **named)
    # The hook below has refused all other hosts.
    found.update(entry[4][:2] for entry in entries)
    return entries

  def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    # `open` tells path, mode and flags; reading is what imports and tasks need.
    if event == 'open' and (arguments[2] or 0) & WRITES and arguments[0] != os.devnull:
      path = arguments[0]
      # A file that is open already comes as its number.
      if not (inside and isinstance(path, str) and os.path.realpath(path).startswith(inside)):
        raise PermissionError('open for writing is not allowed here')
    elif event == 'socket.getaddrinfo' and hosts:
      host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
      if host not in hosts:
        raise PermissionError(f'{host!r} is not the host of an endpoint')
    elif event in ('socket.connect', 'socket.sendto') and hosts:
      if arguments[1][:2] not in found:
        raise PermissionError(f'{arguments[1]!r} is not the address of an endpoint')
    elif event.startswith((*PROGRAMS, 'ctypes.dlopen')):
      raise PermissionError(f'{event} is not allowed here')
    elif event.startswith('socket.') and not hosts:
      raise PermissionError(f'{event} is not allowed here')

  socket.getaddrinfo = recorded
  # A hook stays for the life of the process; nothing that runs in it can take it away.
  sys.addaudithook(refuse)
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_seconds(seconds: int) -> None:
  """Gives this process so much processor time from now on, after which the kernel ends it.

  No signal handler could: Python runs none during one long operation.
  """
  spent = int(time.process_time())
  resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))
