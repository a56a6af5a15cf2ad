"""An MCP server's tools as a sandbox: our calls go to it, and its results come back as text."""

import dataclasses
import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall, ToolSpec
from dcore_jax.chat.tool_calls import parse_reference, print_calls
from dcore_jax.chat.tool_specs import python_name, read_tools
from dcore_jax.chat.untrusted import harmless, harmless_json
from dcore_jax.worlds.mcpworld.connection import Result, Server, ServerLost, Tool
from dcore_jax.worlds.mcpworld.sessions import NEVER, RESTART, Pool, Reset, find_pool

# What the seeds of a world carry of its options: all that executing calls needs.
_OPTIONS = (
  'command url env headers reset timeout start_timeout sessions max_output hide look_ups'.split()
)


# A server in Python has some 80 MB.
_SESSIONS = 32


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """How a server is run and shown; the fields are options of the world.

  Attributes:
    command: starts a server on stdin and stdout; one text, split as a shell would, without a shell.
    url: the endpoint of a server on HTTP, in place of a command.
    env: names of environment variables that the server gets beside PATH, HOME and their like.
      Their values are written nowhere.
    headers: header of an HTTP request -> name of the environment variable that holds its value.
    reset: how a session gets the server's first state. 'restart': a new process, or a new session
      on HTTP; 'never': the server keeps no state; or a tool, by its name or as {name, arguments}.
    timeout: seconds of a call or a reset.
    start_timeout: seconds until a server has started and listed its tools.
    sessions: connections at a time: processes, or sessions on HTTP. At least as many as the engine
      has lanes is best. 0 is 32, and 1 for a server on HTTP that a tool resets: its sessions may
      share one state.
    max_output: characters of an output; what is longer is cut, and says so.
    hide: tools that the model does not see; the reset tool is always hidden.
    look_ups: tools that change nothing, beside those that the server marks with `readOnlyHint`.

  Raises:
    ValueError: an option that is wrong, by name.
  """

  command: str | Sequence[str] = ''
  url: str = ''
  env: Sequence[str] = ()
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  reset: str | Mapping[str, Any] = RESTART
  timeout: float = 30.0
  start_timeout: float = 60.0
  sessions: int = 0
  max_output: int = 8000
  hide: Sequence[str] = ()
  look_ups: Sequence[str] = ()

  def __post_init__(self):
    if bool(self.command) == bool(self.url):
      raise ValueError('the world mcp needs one of the options command and url')
    for name in ('timeout', 'start_timeout', 'max_output'):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f'the option {name} of the world mcp is {value!r}; expected above 0')
    if not isinstance(self.sessions, int) or self.sessions < 0:
      raise ValueError(f'the option sessions of the world mcp is {self.sessions!r}; expected 0 on')
    for name in ('env', 'hide', 'look_ups'):
      if isinstance(getattr(self, name), str):
        raise ValueError(f'the option {name} of the world mcp is a list of names, got one text')

  @property
  def server(self) -> Server:
    """How the server is reached."""
    words = shlex.split(self.command) if isinstance(self.command, str) else self.command
    return Server(
      command=tuple(words),
      url=self.url,
      env=tuple(self.env),
      headers=tuple(sorted(self.headers.items())),
      timeout=float(self.timeout),
      start_timeout=float(self.start_timeout),
      stateful=self.reset_by.how == RESTART,
    )

  @property
  def reset_by(self) -> Reset:
    """How a session begins."""
    if isinstance(self.reset, str):
      return Reset(self.reset)
    arguments = self.reset.get('arguments', {})
    if set(self.reset) - {'name', 'arguments'} or 'name' not in self.reset:
      raise ValueError(f'the option reset of the world mcp needs name, got {dict(self.reset)}')
    return Reset(self.reset['name'], json.dumps(arguments))

  @property
  def most_sessions(self) -> int:
    """Connections at a time."""
    shared = self.url and self.reset_by.how not in (RESTART, NEVER)
    return self.sessions or (1 if shared else _SESSIONS)

  def record(self) -> dict[str, Any]:
    """The options as JSON data; `ServerOptions(**record)` reads them."""
    record = {}
    for name in _OPTIONS:
      value = getattr(self, name)
      if isinstance(value, Mapping):
        value = dict(value)
      record[name] = list(value) if isinstance(value, (list, tuple)) else value
    return record


class Toolbox:
  """A server's tools under the names that calls can have.

  Args:
    options: how the server is run and shown.

  Raises:
    ValueError: it cannot be started, two tools have one name, or an option names none of them.
  """

  def __init__(self, options: ServerOptions):
    self.options = options
    self.pool: Pool = find_pool(options.server, options.reset_by, options.most_sessions)
    self._tools: dict[str, Tool] = {}
    for tool in self.pool.tools.values():
      # 'get-order' and 'orders/get' are no names that a Python-style call can have.
      name = python_name(tool.name)
      if name in self._tools:
        other = self._tools[name].name
        raise ValueError(f'the tools {other!r} and {tool.name!r} would both be called {name!r}')
      self._tools[name] = tool
    for field in ('hide', 'look_ups'):
      for name in getattr(options, field):
        self.named(name, f'the option {field} of the world mcp')
    hidden = {self.named(name, 'hide') for name in options.hide}
    if options.reset_by.how not in (RESTART, NEVER):
      hidden.add(self.named(options.reset_by.how, 'reset'))
    self.listed = tuple(name for name in self._tools if name not in hidden)
    self._look_ups = {self.named(name, 'look_ups') for name in options.look_ups}

  def named(self, name: str, where: str) -> str:
    """Returns our name of a tool, given that or the server's.

    Raises:
      ValueError: the server has no such tool; `where` says who asks for it.
    """
    for ours, tool in self._tools.items():
      if name in (ours, tool.name):
        return ours
    raise ValueError(f'{where}: the server has no tool {name!r}; it has {sorted(self._tools)}')

  def server_name(self, name: str) -> str:
    """The server's name of a tool."""
    return self._tools[name].name

  def changes(self, name: str) -> bool:
    """Whether a tool may change the server's state."""
    return not self._tools[name].read_only and name not in self._look_ups

  def completed(self, call: ToolCall) -> ToolCall:
    """Returns a call with the defaults of the arguments that it leaves out.

    Two calls that do the same are then equal.
    """
    tool = self._tools.get(call.name)
    properties = tool.schema.get('properties') if tool else None
    defaults = {}
    for name, schema in properties.items() if isinstance(properties, Mapping) else ():
      if isinstance(schema, Mapping) and schema.get('default') is not None:
        defaults[name] = schema['default']
    return dataclasses.replace(call, arguments=defaults | call.arguments)

  @functools.cached_property
  def specs(self) -> tuple[ToolSpec, ...]:
    """The listed tools as a prompt shows them."""
    records = []
    for name in self.listed:
      tool = self._tools[name]
      schema = {'type': 'object', 'properties': {}, **tool.schema}
      records.append(
        {
          'name': name,
          # Descriptions are the server's words, and must not open a turn either.
          'description': harmless(tool.description.strip()),
          'parameters': harmless_json(schema),
        }
      )
    return read_tools(records)

  def call(self, session: Any, call: ToolCall) -> Result:
    """Makes a call in a session; what is wrong with it comes back as a failed result.

    Raises:
      ServerLost: see `sessions.Session.call`.
    """
    if call.name not in self._tools:
      return Result(f'there is no tool {call.name[:80]!r}', True)
    if call.positional:
      return Result('arguments need their names', True)
    try:
      # Copied through JSON: what JSON cannot say, a server cannot be sent.
      arguments = json.loads(json.dumps(call.arguments, allow_nan=False))
    except (TypeError, ValueError) as error:
      return Result(f'the arguments are no JSON: {error}', True)
    changes = self.changes(call.name)
    return session.call(self._tools[call.name].name, arguments, repeat=changes)

  def shown(self, result: Result) -> str:
    """A result as the model sees it: harmless, cut to the limit, an error as JSON."""
    text = result.text
    most = int(self.options.max_output)
    if len(text) > most:
      text = f'{text[:most]}\n[cut here: the output has {len(text)} characters]'
    return harmless(json.dumps({'error': text}, ensure_ascii=False) if result.failed else text)


@dataclasses.dataclass(frozen=True)
class Made:
  """A call that was made, with the defaults that it left out.

  Attributes:
    call: the call.
    failed: whether the server called its result an error.
    changes: whether its tool may change the state.
  """

  call: ToolCall
  failed: bool
  changes: bool


class McpSandbox:
  """A server's listed tools in a state of their own; see `worlds.environment.Sandbox`.

  Args:
    toolbox: the tools.
    done: calls that were made before.

  Attributes:
    made: the calls so far, without those of `done`.
    lost: why the server cannot be called any more; '' while it can.
  """

  def __init__(self, toolbox: Toolbox, done: Sequence[ToolCall] = ()):
    self.made: list[Made] = []
    self.lost = ''
    self._toolbox = toolbox
    self._session = toolbox.pool.session()
    self._before: list[ToolCall] = []
    for call in done:
      name = toolbox.named(call.name, 'a call made before')
      if toolbox.changes(name):
        self._before.append(toolbox.completed(call))
        # It goes out when the model makes its first call.
        self._session.will_repeat(toolbox.server_name(name), call.arguments)

  @property
  def state(self) -> list[dict[str, Any]]:
    """What has been done: the calls that may have changed the server, without those that failed.

    What a server holds inside cannot be seen. Equal calls in equal order leave equal states.
    """
    calls = [*self._before]
    calls += [made.call for made in self.made if made.changes and not made.failed]
    state: list[dict[str, Any]] = [
      {'name': call.name, 'arguments': call.arguments} for call in calls
    ]
    # A state that nobody knows is equal to no other.
    return state + [{'lost': id(self)}] if self.lost else state

  def run(self, call: ToolCall) -> str:
    """See `Sandbox.run`."""
    if call.name not in self._toolbox.listed:
      # The same words as for a tool that does not exist: the model sees the listed ones alone.
      return self._toolbox.shown(Result(f'there is no tool {call.name[:80]!r}', True))
    result = self._call(call)
    made = Made(self._toolbox.completed(call), result.failed, self._toolbox.changes(call.name))
    self.made.append(made)
    return self._toolbox.shown(result)

  def ask(self, call: ToolCall) -> Result:
    """Makes a call of any tool for a verdict: it is not counted among the calls made."""
    return self._call(call)

  def close(self) -> None:
    """Gives the session back; later calls find the server lost."""
    self.lost = self.lost or 'the episode is over'
    self._session.close()

  def _call(self, call: ToolCall) -> Result:
    if not self.lost:
      try:
        return self._toolbox.call(self._session, call)
      except ServerLost as error:
        self.lost = str(error)
    return Result(self.lost, True)


@functools.lru_cache(maxsize=8)
def _cached_toolbox(record: str) -> Toolbox:
  return Toolbox(ServerOptions(**json.loads(record)))


def open_record(record: Mapping[str, Any]) -> McpSandbox:
  """Opens the sandbox of a record that `sandbox_record` wrote.

  Raises:
    KeyError: an entry is missing.
    ValueError: the server cannot be started, or an entry is wrong.
  """
  options = json.dumps({name: record[name] for name in _OPTIONS})
  return McpSandbox(_cached_toolbox(options), parse_reference(record['done']))


def sandbox_record(options: ServerOptions, done: Sequence[ToolCall]) -> dict[str, Any]:
  """What `open_record` needs: the server, and the calls made before as text."""
  texts = [print_calls([call])[1:-1] for call in done]
  return {'name': 'mcp', **options.record(), 'done': texts}
