"""Serves a model to other programs and people: an OpenAI-compatible server, and a terminal."""

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dcore_jax.api.model import Model, make_engine, sampling_rule
from dcore_jax.data.show_rows import use_colour
from dcore_jax.progress import show_compiling
from dcore_jax.run.terminal import Chat, Speaker
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import Server, check_port
from dcore_jax.worlds.registry import WORLDS

_MOST_TOKENS = 2048  # of an answer in the terminal
_MAX_WAITING = 256  # rollouts that may wait for a lane; more are answered with 429
_DRAIN_SECONDS = 30.0  # after SIGTERM, for what is under way


class BackgroundServer:
  """A server on a thread of this process.

  It is ready when it is made: all programs of its engine are compiled.

  Attributes:
    url: where it listens, '/v1' included.

  Raises:
    OSError: it cannot listen there.
    RuntimeError: the engine failed.
  """

  def __init__(self, service: Service, host: str, port: int):
    self.url = ''
    self._listening = threading.Event()
    self._server = Server(
      service, host, port, drain_seconds=_DRAIN_SECONDS, announce=self._announce
    )
    # A daemon, so that a script that forgets to close the server still ends.
    self._thread = threading.Thread(target=self._run, name='server', daemon=True)
    self._thread.start()
    # Polled, since a thread that ends without listening sets no event.
    while not self._listening.wait(0.05):
      if not self._thread.is_alive():
        # The engine's thread would otherwise outlive the error and hold its memory.
        service.scheduler.close()
        if service.scheduler.failure is not None:
          raise _failed(service.scheduler)
        raise OSError(f'no server can listen on {host}:{port}')

  def _run(self) -> None:
    # uvicorn ends the process where it cannot listen, which is not for a thread to do.
    with contextlib.suppress(SystemExit):
      self._server.run()

  def _announce(self, url: str) -> None:
    self.url = url
    self._listening.set()

  def close(self) -> None:
    """Ends the server and its engine; requests under way have a second to end."""
    self._server.should_exit = True
    self._thread.join()


def serve_model(
  model: Model,
  *,
  port: int = 8000,
  host: str = '127.0.0.1',
  name: str | Sequence[str] = '',
  lanes: int = 32,
  background: bool = False,
) -> BackgroundServer | None:
  """Serves a model to OpenAI clients until the process gets SIGTERM, or until it is closed.

  It asks for no key: `python -m experiments.serve` does, and knows more limits.

  Args:
    model: from `load`; the server keeps the weights that it has now.
    port: 0 takes one that is free.
    host: the address to listen on; by default only this machine reaches it.
    name: what clients call the model, a name or several; by default the name of its directory. Its
      path is always a name, too.
    lanes: rollouts at once.
    background: returns a server that runs on a thread instead of waiting for the end.

  Raises:
    ValueError: a port that there is not.
    OSError: a background server that cannot listen there.
    RuntimeError: the engine failed.
  """
  # Checked before the engine is made, which takes seconds and much memory.
  check_port(port)
  # An engine of its own: a scheduler's thread is the only one that may touch its engine.
  engine = make_engine(model, lanes=lanes)
  scheduler = Scheduler(engine, _MAX_WAITING)
  service = Service(
    scheduler,
    model.tokenizer,
    names=name or model.folder.resolve().name,
    limits=Limits(max_tokens=engine.max_new),
    folder=model.folder,
  )
  if background:
    return BackgroundServer(service, host, port)

  def announce(url: str) -> None:
    print(f'{url} serves {service.names[0]}', file=sys.stderr, flush=True)

  server = Server(service, host, port, drain_seconds=_DRAIN_SECONDS, announce=announce)
  server.run()
  # The server drains and ends quietly when its engine fails; a script must not take that for
  # success.
  if scheduler.failure is not None:
    raise _failed(scheduler)
  return None


def _failed(scheduler: Scheduler) -> RuntimeError:
  error = RuntimeError(f'the engine failed: {scheduler.failure}')
  error.__cause__ = scheduler.failure
  return error


def chat_with(
  model: Model,
  *,
  system: str = '',
  world: str = '',
  kind: str = 'sequential',
  lines: Iterable[str] | None = None,
  **sampling: Any,
) -> None:
  """Talks in the terminal: answers are shown while they come, calls are run by the world.

  Args:
    model: from `load`.
    system: the system message of a conversation without a world.
    world: whose tools the model may call, a name in `worlds.registry`; '' for none.
    kind: of the world's tasks to begin with.
    lines: what the user says; by default what is typed, until Ctrl-D.
    **sampling: fields of `SamplingParams`; by default temperature 0.6, top_p 0.95, top_k 20 and
      2,048 tokens an answer.

  Raises:
    ValueError: an unknown world, an unknown option, or one out of its range.
  """
  if world and world not in WORLDS:
    raise ValueError(f'unknown world {world!r}; expected one of {sorted(WORLDS)}')
  rule = sampling_rule({'max_tokens': _MOST_TOKENS} | sampling)
  # Four tokens between two looks of the host: a person reads along, and nobody else waits.
  # One more may wait: the lane of a cancelled answer comes free a step later.
  scheduler = Scheduler(make_engine(model, lanes=1, steps_per_call=4), max_waiting=1)
  try:
    # Before the first line is typed, or its answer would wait for it.
    scheduler.prepare()
    show_compiling(scheduler.wait_until_ready)
    speaker = Speaker(
      scheduler, model.tokenizer, rule, out=sys.stdout, colour=use_colour(sys.stdout)
    )
    chat = Chat(speaker, system=system, world=WORLDS[world]() if world else None, kind=kind)
    chat.start()
    for line in _typed() if lines is None else lines:
      chat.take(line)
  finally:
    scheduler.close()


def _typed() -> Iterator[str]:
  """Yields the lines that are typed, until the end of the input."""
  while True:
    try:
      yield input('> ')
    except KeyboardInterrupt:  # at the prompt there is nothing to cancel but the line
      print()
    except EOFError:
      print()
      return
