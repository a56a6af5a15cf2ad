"""From a model directory to a running server: loads, binds, and drains on SIGTERM."""

import asyncio
import dataclasses
import os
import pathlib
import signal
import socket
import ssl
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import uvicorn

from dcore_jax import distributed, sharding
from dcore_jax.config import ModelSection
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import load_policy
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.serve.connections import IdleConnections
from dcore_jax.serve.openai_api import Service

# Tokens of prompt and answer if nobody says otherwise.
_MAX_LEN = 4096
_LAST_PORT = 65535
# Addresses that no other machine reaches.
_LOOPBACK = ('127.0.0.1', '::1', 'localhost')
_IMPORTED = time.monotonic()
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass
class Model:
  """A model on its engine, as a server or a chat uses it; `folder` is where its weights are."""

  folder: pathlib.Path
  engine: Engine
  tokenizer: Any

  @property
  def name(self) -> str:
    """Returns the name that clients use if nobody says otherwise."""
    return self.folder.resolve().name

  def summary(self) -> str:
    """Returns one line for people about the model's size and the memory of its lanes."""
    config = self.engine.config
    engine = self.engine
    dtype = self.engine.params['embed'].dtype
    # A lane has slots for a trunk (the prompt) and for a branch (the answer).
    slots = engine.lanes * (engine.max_len + engine.max_new)
    cache = config.kv_bytes_per_token(dtype) * slots
    return (
      f'{config.param_count / 1e6:,.1f} million parameters in {dtype}, '
      f'{engine.lanes} lanes of {engine.max_len} tokens '
      f'({cache / 2**30:.2f} GiB of keys and values)'
    )


def load_model(
  path: str,
  *,
  dtype: str = 'auto',
  tensor: int = 1,
  lanes: int = 32,
  max_len: int = 0,
  max_new: int = 0,
  steps_per_call: int = 8,
) -> Model:
  """A model on an engine.

  Args:
    path: a Hugging Face directory, also below the data folder; '' is the organism inside the
      package.
    dtype: of weights, computation and cache: 'float32', 'bfloat16', or 'auto', which is float32 on
      a CPU alone.
    tensor: devices that heads, feed-forward and vocabulary are split over.
    lanes: rollouts at once.
    max_len: tokens of prompt and answer; 0: as many as the model has positions, but no more than
      4,096, since memory is set aside for all lanes.
    max_new: tokens of an answer; 0: as many as there is room for.
    steps_per_call: tokens that a lane samples between two looks of the host: pieces of a stream are
      so long.

  Raises:
    ValueError: a path that is not there, a checkpoint or a size that does not fit.
  """
  # Before anything is compiled, or the first programs would not be kept.
  distributed.keep_programs()
  if dtype not in (*DTYPES, 'auto'):
    raise ValueError(f'dtype = {dtype!r}; expected one of {(*DTYPES, "auto")}')
  if dtype == 'auto':
    dtype = 'float32' if sharding.platform() == 'cpu' else 'bfloat16'
  if not 1 <= tensor <= jax.device_count():
    raise ValueError(f'tensor = {tensor}, but there are {jax.device_count()} devices')
  policy = load_policy(ModelSection(path=path), seed=0)
  mesh = None
  if tensor > 1:
    # Devices beyond `tensor` stay unused: lanes are not split over them.
    mesh = sharding.make_mesh(tensor=tensor, devices=jax.devices()[:tensor])
  engine = Engine(
    policy.load(mesh, DTYPES[dtype]),
    policy.config,
    stop_ids=policy.stop_ids,
    sizes=EngineSizes(
      lanes=lanes,
      max_len=max_len or min(_MAX_LEN, policy.config.max_position_embeddings),
      max_new=max_new,
      steps_per_call=steps_per_call,
    ),
    decode=policy.decode,
  )
  return Model(policy.path, engine, policy.tokenizer)


def check_port(port: int) -> None:
  """Raises ValueError where there is no such port: a socket would take it modulo 65,536."""
  if not 0 <= port <= _LAST_PORT:
    raise ValueError(f'port = {port}; expected 0 (any that is free) to {_LAST_PORT}')


def check_reach(host: str, key: str, insecure: bool) -> None:
  """Checks that only those who have a key can use a server that others can reach.

  Raises:
    ValueError: an address beside this machine's own, no key, and nobody who says that it is meant.
  """
  if key or insecure or not reaches_others(host):
    return
  raise ValueError(
    f'{host} may be reached by others, and no key is asked for: set --api_key_env, or say '
    '--insecure'
  )


def reaches_others(host: str) -> bool:
  """Whether a server that listens on this address may be reached from other machines."""
  return host not in _LOOPBACK


def check_tls(certificate: str, key: str) -> tuple[str, str] | None:
  """Returns the files of TLS for `Server`; None where none are named.

  Raises:
    ValueError: one without the other, or files that are no certificate and its key.
  """
  if not certificate and not key:
    return None
  if not (certificate and key):
    raise ValueError('--tls_cert and --tls_key go together')
  try:
    # As uvicorn will; here the error comes before the model is loaded.
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
  except OSError as error:  # what ssl raises is one, too
    raise ValueError(f'{certificate} and {key} are no certificate and its key: {error}') from error
  return certificate, key


def check_weights(directory: str, key: str) -> None:
  """Checks that new weights are taken from a directory that is there, and not from anybody.

  Raises:
    ValueError: there is no such directory, or no key.
  """
  if not directory:
    return
  if not key:
    raise ValueError('--weights_dir lets clients replace the weights: set --api_key_env, too')
  if not pathlib.Path(directory).is_dir():
    raise ValueError(f'--weights_dir = {directory!r} is no directory')


def process_seconds() -> float:
  """Returns the seconds since this process began; off Linux, since this module was imported."""
  try:
    # Behind the name, which may hold blanks, the 20th field is the start in ticks since the boot.
    fields = pathlib.Path('/proc/self/stat').read_text(encoding='utf-8').rpartition(')')[2].split()
    began = int(fields[19]) / os.sysconf('SC_CLK_TCK')
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began
  except (OSError, AttributeError):
    return time.monotonic() - _IMPORTED


class Server(uvicorn.Server):
  """Serves until SIGTERM or SIGINT, then finishes what is under way, for `drain_seconds` at most,
  and takes nothing new.

  A second signal ends it at once. It ends by itself where the engine fails.

  As soon as it listens, the engine compiles its programs. Requests that come meanwhile wait for it,
  and /health answers 503. Then `announce` is told the URL. With `tls`, the paths of a certificate
  and of its key, it speaks HTTPS.
  """

  def __init__(
    self,
    service: Service,
    host: str,
    port: int,
    drain_seconds: float,
    announce: Callable[[str], None] = lambda url: None,
    tls: tuple[str, str] | None = None,
  ):
    # After draining nothing is under way; clients that do not close their connections get a second.
    certificate, key = tls or (None, None)
    super().__init__(
      uvicorn.Config(
        service.app,
        host,
        port,
        log_level='warning',
        timeout_graceful_shutdown=1,
        ws='none',
        ssl_certfile=certificate,
        ssl_keyfile=key,
      )
    )
    self._scheme = 'https' if tls else 'http'
    self._idle = IdleConnections(service.limits.idle_seconds)
    self._service = service
    self._drain_seconds = drain_seconds
    self._deadline = float('inf')
    self._announce = announce
    self._announced = False
    self._closing: asyncio.Task | None = None

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Binds, then lets the engine compile its programs."""
    # A port that is taken should come to light before that.
    await super().startup(sockets)
    self._service.scheduler.prepare()

  def _tell(self) -> None:
    """Announces the address."""
    self._announced = True
    # With port 0 the operating system has chosen one, which only the socket knows.
    host, port, *_ = self.servers[0].sockets[0].getsockname()
    place = f'[{host}]' if ':' in host else host
    self._announce(f'{self._scheme}://{place}:{port}/v1')

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """Begins to drain at the first signal, and ends the process at the second."""
    if self._service.draining:
      # At once, even while a step is compiled, which takes minutes. A signal does not end a
      # container's first process: there these two flags do.
      self.should_exit = True
      self.force_exit = True
      signal.signal(sig, signal.SIG_DFL)
      signal.raise_signal(sig)
    # The first signal only sets flags; `on_tick` acts on them from inside of the event loop.
    self._service.draining = True
    self._deadline = min(self._deadline, time.monotonic() + self._drain_seconds)

  async def on_tick(self, counter: int) -> bool:
    """Announces the server once it is ready.

    Ends it once it has drained, its time to drain is over, or its engine has failed.
    """
    service = self._service
    # uvicorn calls this ten times a second.
    if service.scheduler.ready and not self._announced:
      self._tell()
    self._idle.look(self.server_state.connections, time.monotonic())
    overdue = time.monotonic() > self._deadline
    if overdue and self._closing is None:
      # After the present step the scheduler ends the rollouts that are left, and their requests
      # answer.
      self._closing = asyncio.create_task(asyncio.to_thread(service.scheduler.close))
    closed = self._closing is not None and self._closing.done()
    drained = service.draining and not service.under_way
    # A failed engine cannot be mended from here: a supervisor has to start a new process.
    if closed or drained or service.scheduler.failure is not None:
      self.should_exit = True
    return await super().on_tick(counter)
