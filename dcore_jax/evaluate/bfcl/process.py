"""Starts `runner` in the environment of a release, and waits for a server."""

import contextlib
import json
import os
import pathlib
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from dcore_jax.evaluate.bfcl import runner
from dcore_jax.evaluate.bfcl.environment import Environment
from dcore_jax.evaluate.bfcl.runner import Job
from dcore_jax.evaluate.suites import Served

# What a client needs to reach a server. Nothing else of the environment is passed on, some of which
# is secret.
_PASSED = (
  'PATH',
  'HOME',
  'LANG',
  'TMPDIR',
  'HTTP_PROXY',
  'HTTPS_PROXY',
  'NO_PROXY',
  'http_proxy',
  'https_proxy',
  'no_proxy',
  'SSL_CERT_FILE',
  'SSL_CERT_DIR',
)
_LOOK_SECONDS = 1.0  # between two looks at what is finished
_TRIES = 4  # of a request, as the client of the runner makes them
_START_SECONDS = 300.0  # imports and the tokenizer take ten seconds on a busy machine


def wait_for_server(served: Served, seconds: float) -> int | None:
  """Waits until the server lists its models.

  Returns:
    How many tokens prompt and answer may have together, if the server says that (`max_model_len`,
    as vLLM and our server do).

  Raises:
    ConnectionError: it does not within so many seconds, or wants another key.
  """
  request = urllib.request.Request(f'{served.base_url.rstrip("/")}/models')
  if served.key:
    request.add_header('Authorization', f'Bearer {served.key}')
  ends = time.monotonic() + seconds
  while True:
    try:
      with urllib.request.urlopen(request, timeout=min(seconds, 10.0)) as reply:
        return _context(reply.read(), served.model)
    except urllib.error.HTTPError as error:
      # Some servers list nothing; they answer all the same.
      if error.code == 404:
        return None
      if error.code in (401, 403):
        raise ConnectionError(f'{served.base_url} refuses the key: {error}') from error
      said = str(error)
    except OSError as error:
      said = str(error)
    if time.monotonic() >= ends:
      raise ConnectionError(f'{served.base_url} stays away for {seconds:g} s: {said}')
    time.sleep(min(0.5, seconds))


def _context(listing: bytes, model: str) -> int | None:
  """Returns the context that a list of models tells; None where it tells none."""
  try:
    cards = json.loads(listing)['data']
    lengths = [card['max_model_len'] for card in cards if card['id'] == model]
  # Whatever else a server answers says as much as no answer.
  except (ValueError, TypeError, KeyError):
    return None
  return lengths[0] if lengths and isinstance(lengths[0], int) else None


def generate(
  environment: Environment, job: Job, log: pathlib.Path, look: Callable[[], None]
) -> None:
  """Asks the model.

  Args:
    environment: of the release.
    job: see `Job`.
    log: the file that what the harness prints is appended to.
    look: is called now and then meanwhile.

  Raises:
    ConnectionError: the server went away, or answered nothing for as long as a request may take.
    ValueError: the harness ended with an error.
  """
  patience = _START_SECONDS + _TRIES * job['timeout']
  with log.open('ab') as printed:
    process = _start(environment, stderr=printed)
    answered = [time.monotonic()]

    def listen() -> None:
      for _ in process.stdout:
        answered[0] = time.monotonic()

    threading.Thread(target=listen, daemon=True).start()
    try:
      # One that ended at once says why in its log.
      with contextlib.suppress(BrokenPipeError):
        # Left open: the process ends with this one.
        process.stdin.write(json.dumps(job).encode() + b'\n')
        process.stdin.flush()
      while process.poll() is None:
        try:
          process.wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
          look()
        if time.monotonic() - answered[0] > patience:
          raise ConnectionError(f'{job["base_url"]} answered nothing for {patience:g} s')
    finally:
      if process.poll() is None:
        process.kill()
        process.wait()
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
  if process.returncode == runner.AWAY:
    raise ConnectionError(f'{job["base_url"]} went away; what was answered is kept')
  if process.returncode:
    last = (log.read_text(errors='replace').strip().splitlines() or ['no message'])[-1]
    raise ValueError(f'bfcl generate ended with status {process.returncode}: {last} (see {log})')


def evaluate(environment: Environment, job: Job) -> tuple[int, list[str], str]:
  """Judges answers -> (exit status, ids of the tasks that were begun, what was printed)."""
  process = _start(environment, stderr=subprocess.PIPE)
  begun, printed = process.communicate(json.dumps(job).encode() + b'\n')
  # A line without its end was not written whole.
  names = [json.loads(line) for line in begun.split(b'\n')[:-1]]
  return process.returncode, names, printed.decode(errors='replace')


def _start(environment: Environment, stderr: object) -> subprocess.Popen:
  passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
  return subprocess.Popen(
    # Without the folder of the script, whose modules would hide others.
    [str(environment.python), '-B', '-P', runner.__file__],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=stderr,
    env=passed
    | {
      'HF_HUB_OFFLINE': '1',
      'TOKENIZERS_PARALLELISM': 'false',
      # A matrix library reserves memory for each core.
      'OMP_NUM_THREADS': '1',
      'OPENBLAS_NUM_THREADS': '1',
    },
  )
