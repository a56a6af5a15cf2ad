"""Serves a model to OpenAI clients.

    python -m experiments.serve --model=DIR --port=8000

It listens on this machine only unless --host says otherwise; then it demands a key, or --insecure.
The API key is read from the environment variable that --api_key_env names, so that no process list
shows it. --name may be given several times; the path of the model is always a name of it, too. It
prints its URL when all programs are compiled; until then requests wait, and /health answers 503
with how far it is. After SIGTERM it finishes what is under way and refuses the rest.
"""

import gc
import os
import pathlib
import sys
import threading

from absl import app, flags, logging

from dcore_jax.progress import show_compiling
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import (
  DTYPES,
  Server,
  check_port,
  check_reach,
  check_tls,
  check_weights,
  load_model,
  process_seconds,
)

_MODEL = flags.DEFINE_string(
  'model', '', 'Hugging Face directory; default: the organism inside the package.'
)
_NAMES = flags.DEFINE_multi_string(
  'name', [], 'What clients call the model; may be given again. Default: the name of its directory.'
)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
_PORT = flags.DEFINE_integer('port', 8000, 'Port to listen on; 0: any that is free.')
_API_KEY_ENV = flags.DEFINE_string(
  'api_key_env', '', "Environment variable with the key that clients must send; '': none."
)
_INSECURE = flags.DEFINE_bool(
  'insecure', False, 'Serve others without a key; needed where --host is not this machine.'
)
_TLS_CERT = flags.DEFINE_string(
  'tls_cert', '', 'PEM file of a certificate (chain); with --tls_key the server speaks HTTPS.'
)
_TLS_KEY = flags.DEFINE_string('tls_key', '', 'PEM file of its private key.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'auto', ['auto', *DTYPES], 'Of weights and cache; auto: float32 on a CPU, else bfloat16.'
)
_TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that the model is split over.')
_LANES = flags.DEFINE_integer('lanes', 32, 'Rollouts at once.')
_MAX_LEN = flags.DEFINE_integer(
  'max_len', 0, 'Tokens of prompt and answer; default: the positions of the model, at most 4096.'
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', 0, 'Tokens of an answer at most; default: what there is room for.'
)
_STEPS = flags.DEFINE_integer(
  'steps_per_call', 8, 'Tokens of a lane between two looks of the host.'
)
_MAX_WAITING = flags.DEFINE_integer(
  'max_waiting', 256, 'Rollouts that may wait for a lane; more are answered with 429.'
)
_MAX_REQUESTS = flags.DEFINE_integer(
  'max_requests', 256, 'Requests under way at once; more are answered with 429.'
)
_MAX_BODY = flags.DEFINE_integer(
  'max_body', 4 * 2**20, 'Bytes of a request; more are answered with 413.'
)
_WEIGHTS_DIR = flags.DEFINE_string(
  'weights_dir',
  '',
  "Directory below which POST /update_weights may find new weights; '': none are taken. Needs "
  '--api_key_env.',
)
_DRAIN_SECONDS = flags.DEFINE_float('drain_seconds', 30.0, 'After SIGTERM, for what is under way.')

help_lib.group('who may ask', _HOST, _PORT, _API_KEY_ENV, _INSECURE, _TLS_CERT, _TLS_KEY)
help_lib.group('the model', _MODEL, _NAMES, _DTYPE, _TENSOR, _WEIGHTS_DIR)
help_lib.group('size and speed', _LANES, _MAX_LEN, _MAX_TOKENS, _STEPS)
help_lib.group('limits', _MAX_WAITING, _MAX_REQUESTS, _MAX_BODY, _DRAIN_SECONDS)


def main(argv: list[str]) -> None:
  """Loads a model and serves it until it is told to end."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # jax reports the backends that it does not find
  key = os.environ.get(_API_KEY_ENV.value, '') if _API_KEY_ENV.value else ''
  if _API_KEY_ENV.value and not key:
    sys.exit(f'error: --api_key_env names {_API_KEY_ENV.value}, which is not set')
  try:
    check_port(_PORT.value)
    check_reach(_HOST.value, key, _INSECURE.value)
    tls = check_tls(_TLS_CERT.value, _TLS_KEY.value)
    check_weights(_WEIGHTS_DIR.value, key)
    model = load_model(
      _MODEL.value,
      dtype=_DTYPE.value,
      tensor=_TENSOR.value,
      lanes=_LANES.value,
      max_len=_MAX_LEN.value,
      max_new=_MAX_TOKENS.value,
      steps_per_call=_STEPS.value,
    )
    scheduler = Scheduler(model.engine, _MAX_WAITING.value)
    limits = Limits(
      model.engine.max_new,
      _MAX_BODY.value,
      requests=_MAX_REQUESTS.value,
      weights=pathlib.Path(_WEIGHTS_DIR.value) if _WEIGHTS_DIR.value else None,
    )
  except ValueError as error:
    sys.exit(f'error: {error}')
  # Threads that read large bodies hand the interpreter to the engine's thread after 0.5 ms, not 5.
  sys.setswitchinterval(5e-4)
  service = Service(
    scheduler,
    model.tokenizer,
    names=_NAMES.value or model.name,
    limits=limits,
    api_key=key,
    folder=model.folder,
  )

  def announce(url: str) -> None:
    # What is there now stays: a collection that looks at all of it holds every stream up for 0.2 s.
    gc.collect()
    gc.freeze()
    names = ' and '.join(service.model.names)
    ready = f'ready after {process_seconds():.1f} s'
    print(f'{url} serves {names}; {ready}', file=sys.stderr, flush=True)

  print(f'compiles for {model.name}, then listens: {model.summary()}', file=sys.stderr, flush=True)
  # A thread of its own, since the server's own loop is at work already. It ends with the process,
  # also where the server cannot listen and nothing is ever compiled.
  waiting = threading.Thread(target=show_compiling, args=(scheduler.wait_until_ready,), daemon=True)
  waiting.start()
  Server(service, _HOST.value, _PORT.value, _DRAIN_SECONDS.value, announce, tls).run()
  if scheduler.failure is not None:
    sys.exit(f'error: the engine failed: {scheduler.failure}')


if __name__ == '__main__':
  app.run(main, flags_parser=program.parse)
