"""A running MCP server as plain calls: every wait has a limit, and every process is ended.

The SDK (`pip install -e .[mcp]`) is asynchronous. One thread of this module runs its event loop for
all connections of the process; the functions here wait for it.
"""

import asyncio
import atexit
import concurrent.futures
import dataclasses
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

# Seconds beyond a limit that the event loop keeps, before the waiting thread gives up on it.
_GRACE = 10.0
# Seconds in which the SDK ends a process: 0.5 to flush, and three waits of 2.
_END = 10.0
# The SDK's codes of errors that it makes itself.
_CLOSED = -32000
_TIMED_OUT = -32001
# Characters of an error that are shown.
_SHOWN = 400


class ServerLost(Exception):
  """The server did not start, died, or did not answer in time; its state is unknown."""


@dataclasses.dataclass(frozen=True)
class Server:
  """How a server is reached and how long it may take.

  Attributes:
    command: the program and its arguments, for a server on stdin and stdout; () for none.
    url: the endpoint of a server on HTTP; '' for none.
    env: names of environment variables that the program gets beside PATH, HOME and their like.
    headers: (name of a header, name of the environment variable that holds its value).
    timeout: seconds of a call.
    start_timeout: seconds until the server has said which tools it has.
    stateful: whether an HTTP server keeps a state for each session. Newer versions of the protocol
      have no sessions, so that an older one is agreed on.
  """

  command: tuple[str, ...] = ()
  url: str = ''
  env: tuple[str, ...] = ()
  headers: tuple[tuple[str, str], ...] = ()
  timeout: float = 30.0
  start_timeout: float = 60.0
  stateful: bool = True


@dataclasses.dataclass(frozen=True)
class Tool:
  """A tool as the server describes it; `schema` is the JSON schema of its arguments."""

  name: str
  description: str
  schema: Mapping[str, Any]
  read_only: bool


@dataclasses.dataclass(frozen=True)
class Result:
  """What a call returned: its text, and whether the server calls it an error."""

  text: str
  failed: bool


def require_sdk() -> Any:
  """Imports the SDK.

  Raises:
    ValueError: it is not installed, or too old, with the command that installs it.
  """
  try:
    import mcp
  except ImportError as error:
    raise ValueError(
      f"the world 'mcp' needs the MCP SDK ({error}): pip install -e .[mcp]"
    ) from error
  if not hasattr(mcp, 'Client'):
    raise ValueError("the world 'mcp' needs version 2 of the MCP SDK: pip install -e .[mcp]")
  # Hundreds of lines of tracebacks for a server that prints to its stdout, once a line.
  logging.getLogger('mcp').setLevel(logging.CRITICAL)
  return mcp


class _Background:
  """The thread with the event loop, and the connections that are open."""

  def __init__(self):
    self.loop = asyncio.new_event_loop()
    self.open: set[Connection] = set()
    threading.Thread(target=self.loop.run_forever, name='mcp', daemon=True).start()
    # Before the interpreter ends its threads: servers must not outlive the process.
    atexit.register(self.shutdown)

  def run(self, coroutine: Any, seconds: float) -> Any:
    """Runs a coroutine in the thread and returns its result.

    Raises:
      TimeoutError: the loop itself is stuck.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
    try:
      return future.result(seconds)
    except concurrent.futures.TimeoutError:
      future.cancel()
      raise

  def shutdown(self) -> None:
    """Ends all connections and waits for their processes."""
    # A copy, since connections take themselves out.
    connections = list(self.open)
    for connection in connections:
      connection.close(hard=True)
    for connection in connections:
      connection.wait_closed(_END)


_lock = threading.Lock()
_background: _Background | None = None


def _loop_thread() -> _Background:
  global _background
  with _lock:
    if _background is None:
      _background = _Background()
    return _background


def close_all() -> None:
  """Ends every connection of the process and waits until the servers' processes are gone."""
  if _background is not None:
    _background.shutdown()


class Connection:
  """A server that has been started, or a session of one that runs.

  Attributes:
    tools: what it offers.
    lost: why it can no longer be called; '' while it can.

  Raises:
    ServerLost: it cannot be started, or does not list its tools in time.
  """

  def __init__(self, server: Server):
    self.server = server
    self.tools: tuple[Tool, ...] = ()
    self.lost = ''
    self._mcp = require_sdk()
    self._client: Any = None
    self._scope: Any = None
    self._stop = asyncio.Event()
    self._ready: concurrent.futures.Future = concurrent.futures.Future()
    self._closed = threading.Event()
    self._background = _loop_thread()
    self._background.open.add(self)
    # What the server writes to stderr says why it has failed; on a terminal it would disturb.
    self._errors = tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace')
    asyncio.run_coroutine_threadsafe(self._live(), self._background.loop)
    try:
      self._ready.result(server.start_timeout + _GRACE)
    except concurrent.futures.TimeoutError:
      self.close(hard=True)
      raise ServerLost('the server does not start, and cannot be ended') from None

  def call(self, name: str, arguments: Mapping[str, Any]) -> Result:
    """Calls a tool by the server's name of it.

    Raises:
      ServerLost: no answer in time, or no server any more. The connection is then closed.
    """
    if self.lost:
      raise ServerLost(self.lost)
    limit = self.server.timeout
    try:
      return self._background.run(self._call(name, dict(arguments)), limit + _GRACE)
    except TimeoutError:
      self._lose(f'no answer to {name!r} within {limit:g} s')
    except Exception as error:  # the SDK and its transports raise errors of many kinds
      self._lose(f'the server is gone: {_text_of(error)}')
    raise ServerLost(self.lost)

  def close(self, *, hard: bool = False) -> None:
    """Ends the session without waiting for it; `hard` also gives up a call that is under way."""
    self.lost = self.lost or 'the session is closed'
    end = self._cancel if hard else self._stop.set
    # A loop that has stopped has no connections left.
    if not self._background.loop.is_closed():
      self._background.loop.call_soon_threadsafe(end)

  def wait_closed(self, seconds: float) -> bool:
    """Waits until the session and its process have ended; returns whether they have."""
    return self._closed.wait(seconds)

  def _lose(self, reason: str) -> None:
    self.lost = reason
    self.close(hard=True)

  def _cancel(self) -> None:
    if self._scope is not None:
      self._scope.cancel()

  async def _live(self) -> None:
    """Opens the session, keeps it until it is closed, and ends what belongs to it."""
    import anyio

    problem = f'the server has not listed its tools within {self.server.start_timeout:g} s'
    try:
      # One scope around the whole life: the SDK must be left in the task that has entered it.
      with anyio.move_on_after(self.server.start_timeout) as self._scope:
        async with self._open_client() as client:
          self._client = client
          self.tools = await _list_tools(client)
          self._scope.deadline = math.inf
          self._ready.set_result(None)
          await self._stop.wait()
    except BaseException as error:  # also groups of errors, which the SDK's tasks raise
      problem = f'the server cannot be used: {_text_of(error)}'
    finally:
      self._end(problem)

  def _end(self, problem: str) -> None:
    self.lost = self.lost or problem
    if not self._ready.done():
      self._ready.set_exception(ServerLost(problem + self._said()))
    self._errors.close()
    self._background.open.discard(self)
    self._closed.set()

  def _said(self) -> str:
    """The last line that the server has written to stderr, for an error."""
    self._errors.seek(0)
    lines = [line.strip() for line in self._errors.read()[-4000:].splitlines() if line.strip()]
    return f'; it says: {lines[-1][:_SHOWN]}' if lines else ''

  def _open_client(self) -> Any:
    server = self.server
    options: dict[str, Any] = {'read_timeout_seconds': max(server.timeout, server.start_timeout)}
    if server.command:
      # Values of variables stay in the environment: configs and seeds hold their names alone.
      environment = {name: _variable(name) for name in server.env}
      parameters = self._mcp.StdioServerParameters(
        command=server.command[0], args=list(server.command[1:]), env=environment
      )
      return self._mcp.Client(self._mcp.stdio_client(parameters, errlog=self._errors), **options)
    if server.stateful:
      options['mode'] = 'legacy'
    return self._mcp.Client(_http_transport(server), **options)

  async def _call(self, name: str, arguments: dict[str, Any]) -> Result:
    import anyio
    import pydantic

    limit = self.server.timeout
    try:
      with anyio.fail_after(limit):
        # The SDK's own limit comes second, since it would look like any other error.
        answer = await self._client.call_tool(name, arguments, read_timeout_seconds=limit + _GRACE)
    except self._mcp.MCPError as error:
      # Some servers use the code of a closed connection for any error of theirs.
      closed = error.code == _CLOSED and 'closed' in error.message.lower()
      if closed or error.code == _TIMED_OUT:
        raise
      # An unknown tool or wrong arguments leave the session as it is.
      return Result(error.message, True)
    except (pydantic.ValidationError, RuntimeError) as error:
      # A result that the protocol, or the tool's own schema, does not allow.
      return Result(f'the server has sent an invalid result: {_text_of(error)}', True)
    return Result(_result_text(answer), bool(answer.is_error))


def _variable(name: str) -> str:
  if name not in os.environ:
    raise ValueError(f'the environment variable {name!r} is not set')
  return os.environ[name]


def _http_transport(server: Server) -> Any:
  from mcp.client.streamable_http import streamable_http_client

  if not server.headers:
    return streamable_http_client(server.url)
  import httpx2

  values = {header: _variable(name) for header, name in server.headers}
  client = httpx2.AsyncClient(headers=values, timeout=server.timeout + _GRACE)
  return streamable_http_client(server.url, http_client=client)


async def _list_tools(client: Any) -> tuple[Tool, ...]:
  tools = []
  cursor = None
  # A server that goes on for ever is stopped by the time limit around.
  while True:
    page = await client.list_tools(cursor=cursor)
    for tool in page.tools:
      hints = tool.annotations
      tools.append(
        Tool(
          name=tool.name,
          description=tool.description or tool.title or '',
          schema=tool.input_schema or {},
          read_only=bool(hints and hints.read_only_hint),
        )
      )
    cursor = page.next_cursor
    if not cursor:
      return tuple(tools)


def _result_text(answer: Any) -> str:
  """The text of a result; what is no text is named in brackets."""
  parts = []
  for block in answer.content or ():
    if block.type == 'text':
      parts.append(block.text)
    elif block.type == 'resource' and hasattr(block.resource, 'text'):
      parts.append(block.resource.text)
    elif block.type in ('resource', 'resource_link'):
      uri = block.uri if block.type == 'resource_link' else block.resource.uri
      parts.append(f'[{block.type}: {str(uri)[:200]}]')
    else:
      # Base64 holds three bytes in four letters.
      size = len(getattr(block, 'data', '')) * 3 // 4
      parts.append(f'[{block.type}: {getattr(block, "mime_type", "?")}, {size} bytes]')
  # Servers with an output schema repeat the structure as text; a few send the structure alone.
  if not parts and answer.structured_content is not None:
    parts.append(json.dumps(answer.structured_content, ensure_ascii=False))
  return '\n'.join(parts)


def _text_of(error: BaseException) -> str:
  """What an error says, on one line; of a group of errors the first one."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text}'[:_SHOWN]
