"""Serves a model to other programs and people: an OpenAI-compatible server, and a terminal."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dcore_jax.api.model import Model, make_engine, sampling_rule
from dcore_jax.data.show_rows import use_colour
from dcore_jax.progress import show_compiling
from dcore_jax.run.terminal import Chat, Speaker
from dcore_jax.serve.background import DRAIN_SECONDS, BackgroundServer, engine_failed
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import Server, check_port, reaches_others
from dcore_jax.worlds.registry import world_and_kind

_MOST_TOKENS = 2048  # of an answer in the terminal
_MAX_WAITING = 256  # rollouts that may wait for a lane; more are answered with 429


def serve_model(
  model: Model,
  *,
  port: int = 8000,
  host: str = '127.0.0.1',
  name: str | Sequence[str] = '',
  lanes: int = 32,
  background: bool = False,
  api_key: str | None = None,
) -> BackgroundServer | None:
  """Serves a model to OpenAI clients until the process gets SIGTERM, or until it is closed.

  `python -m experiments.serve` knows more limits, and HTTPS.

  Args:
    model: from `load`; the server keeps the weights that it has now.
    port: 0 takes one that is free.
    host: the address to listen on; by default only this machine reaches it.
    name: what clients call the model, a name or several; by default the name of its directory. Its
      path is always a name, too.
    lanes: rollouts at once.
    background: returns a server that runs on a thread instead of waiting for the end.
    api_key: what clients must send. None asks for nothing, and serves this machine alone; '' says
      that others are to be served without a key.

  Raises:
    ValueError: a port that there is not, or a host that others can reach without an `api_key`.
    OSError: a background server that cannot listen there.
    RuntimeError: the engine failed.
  """
  # Checked before the engine is made, which takes seconds and much memory.
  check_port(port)
  if api_key is None and reaches_others(host):
    raise ValueError(
      f"{host} may be reached by others, and no key is asked for: name an api_key, or '' if "
      'everybody is to be served'
    )
  # An engine of its own: a scheduler's thread is the only one that may touch its engine.
  engine = make_engine(model, lanes=lanes)
  scheduler = Scheduler(engine, _MAX_WAITING)
  service = Service(
    scheduler,
    model.tokenizer,
    names=name or model.folder.resolve().name,
    limits=Limits(max_tokens=engine.max_new),
    api_key=api_key or '',
    folder=model.folder,
  )
  if background:
    return BackgroundServer(service, host, port)

  def announce(url: str) -> None:
    print(f'{url} serves {service.model.names[0]}', file=sys.stderr, flush=True)

  server = Server(service, host, port, drain_seconds=DRAIN_SECONDS, announce=announce)
  server.run()
  # The server drains and ends quietly when its engine fails; a script must not take that for
  # success.
  if scheduler.failure is not None:
    raise engine_failed(scheduler)
  return None


def chat_with(
  model: Model,
  *,
  system: str = '',
  world: str = '',
  kind: str = '',
  lines: Iterable[str] | None = None,
  **sampling: Any,
) -> None:
  """Talks in the terminal: answers are shown while they come, calls are run by the world.

  Args:
    model: from `load`.
    system: the system message of a conversation without a world.
    world: whose tools the model may call, as `worlds.registry.world_and_kind` takes it; '' is none.
    kind: of the world's tasks to begin with, taken in the same way.
    lines: what the user says; by default what is typed, until Ctrl-D.
    **sampling: fields of `SamplingParams`; by default temperature 0.6, top_p 0.95, top_k 20 and
      2,048 tokens an answer.

  Raises:
    ValueError: an unknown world, an unknown option, or one out of its range.
  """
  # Before the model is compiled, since a world may not be there.
  place, kind = world_and_kind(world or 'none', kind)
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
    chat = Chat(speaker, system=system, world=place, kind=kind)
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
