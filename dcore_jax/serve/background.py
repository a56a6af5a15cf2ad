"""A server on a thread of this process, for a script or an evaluation that asks its own model."""

import contextlib
import threading

from dcore_jax.serve.openai_api import Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import Server

DRAIN_SECONDS = 30.0  # after SIGTERM, for what is under way


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
    self._server = Server(service, host, port, drain_seconds=DRAIN_SECONDS, announce=self._announce)
    # A daemon, so that a script that forgets to close the server still ends.
    self._thread = threading.Thread(target=self._run, name='server', daemon=True)
    self._thread.start()
    # Polled, since a thread that ends without listening sets no event.
    while not self._listening.wait(0.05):
      if not self._thread.is_alive():
        # The engine's thread would otherwise outlive the error and hold its memory.
        service.scheduler.close()
        if service.scheduler.failure is not None:
          raise engine_failed(service.scheduler)
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


def engine_failed(scheduler: Scheduler) -> RuntimeError:
  """Returns the error of a scheduler whose engine has failed."""
  error = RuntimeError(f'the engine failed: {scheduler.failure}')
  error.__cause__ = scheduler.failure
  return error
