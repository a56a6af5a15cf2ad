"""How long a server takes to start, cold and warm, and how even its streams are.

    python -m benchmarks.startup                          # about 15 minutes on 2 cores
    python -m benchmarks.startup --models=organism --cases=start,streams

The models are the organism and a random one of SmolLM2-135M's shape. One JSON line a case:
    start     seconds from the start of the process until the server is ready, until the first token
              of a request that is sent then, and of the parts before; with an empty folder of
              compiled programs (cold), and started again (warm). `compiled` are programs that were
              not in the folder; `late` are those that were asked for behind the ready line, whether
              they were in the folder or not, which should be none
    streams   the longest stall and the median gap between two pieces of a client's answer, while
              clients stream answers to short prompts and others ask with prompts of up to 4,000
              tokens (900 with the organism, which has 1,024 positions)
    requests  eleven mixed requests on eight lanes, right after a cold start and once more in the
              same process (135M alone)
"""

import asyncio
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from benchmarks.measure import line, say
from benchmarks.server import make_tokenizer
from benchmarks.shapes import SMOLLM2
from dcore_jax.models import decoder, hf_checkpoint

CASES = ('start', 'streams', 'requests')
_CASES = flags.DEFINE_list('cases', list(CASES), f'Which of {", ".join(CASES)} to run.')
_MODELS = flags.DEFINE_list('models', ['organism', '135M'], 'Which models to serve.')

LANES = 8
# Seconds until it is ready, cold and warm, that are asked for on two quiet cores.
WANTED = {('135M', 'cold'): 30, ('135M', 'warm'): 12}


class Model(NamedTuple):
  """What is served."""

  name: str
  path: str
  vocabulary: int
  max_len: int
  long_prompts: tuple[int, ...]  # of the clients that come while others stream


class Started(NamedTuple):
  """A server that is ready."""

  process: subprocess.Popen
  port: int
  began: float  # seconds since the epoch
  ready: float


@contextlib.contextmanager
def server(model: Model, cache: pathlib.Path, log: pathlib.Path) -> Iterator[Started]:
  """A server process that keeps its programs in `cache`, and writes `log`."""
  command = [sys.executable, '-m', 'benchmarks.startup_worker', str(log), 'serve', '--port=0']
  command += [f'--model={model.path}', f'--lanes={LANES}', f'--max_len={model.max_len}']
  began = time.time()
  process = subprocess.Popen(
    [*command, '--name=model'], stderr=subprocess.PIPE, text=True, env=environment(cache)
  )
  lines = []
  try:
    for said in process.stderr:
      lines.append(said)
      if said.startswith('http'):
        port = urllib.parse.urlsplit(said.split()[0]).port
        yield Started(process, port, began, time.time())
        return
    raise RuntimeError(f'the server does not start: {"".join(lines)}')
  finally:
    process.terminate()
    process.wait()


def environment(cache: pathlib.Path) -> dict[str, str]:
  """The variables of a process that keeps its programs in `cache`."""
  variables = os.environ | {'DCORE_CACHE': str(cache)}
  variables.pop('JAX_COMPILATION_CACHE_DIR', None)
  return variables


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
  """What a worker has written down."""
  return [json.loads(text) for text in path.read_text(encoding='utf-8').splitlines()]


async def stream(port: int, prompt: list[int], answer: int) -> list[float]:
  """Seconds since the epoch at which the pieces of an answer came."""
  body = {'model': 'model', 'prompt': prompt, 'max_tokens': answer, 'stream': True}
  # With its ids every token is in a piece, whatever text it is.
  text = json.dumps(body | {'temperature': 1.0, 'seed': 0, 'return_token_ids': True}).encode()
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  writer.write(
    b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
    b'Content-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(text) + text
  )
  pieces = []
  async for row in reader:
    # The end of the stream is no piece of the answer.
    if row.startswith(b'data: {') and b'"token_ids"' in row:
      pieces.append(time.time())
  writer.close()
  if not pieces:
    raise RuntimeError('the server gave no answer')
  return pieces


async def clients(model: Model, port: int) -> list[list[float]]:
  """Pieces of each answer: four clients ask in turn, and others come with long prompts."""
  rng = np.random.default_rng(0)

  def prompt(length: int) -> list[int]:
    return rng.integers(1, model.vocabulary - 3, length).tolist()

  async def talk(lengths: tuple[int, ...]) -> list[list[float]]:
    return [await stream(port, prompt(length), 64) for length in lengths]

  async def come(place: int, length: int) -> list[list[float]]:
    await asyncio.sleep(1.0 + 2.0 * place)
    return [await stream(port, prompt(length), 16)]

  talks = [talk(lengths) for lengths in ((16, 40, 24), (100, 16, 30), (250, 64), (400, 20))]
  comes = [come(place, length) for place, length in enumerate(model.long_prompts)]
  answers = []
  for some in await asyncio.gather(*talks, *comes):
    answers += some
  return answers


class Start(NamedTuple):
  """One start of a server.

  Attributes:
    ready: seconds until it is ready.
    first_token: seconds until the first token of a request that is sent then.
    parts: seconds of what is done before it is ready.
    counts: 'programs' that were asked for until it was ready, those 'compiled' of them, and 'late'
      ones, which were asked for afterwards.
    seconds: of 'compile' and 'trace' until it was ready, and of 'late' programs.
  """

  ready: float
  first_token: float
  parts: dict[str, float]
  counts: dict[str, int]
  seconds: dict[str, float]


def start(model: Model, kind: str, cache: pathlib.Path, folder: pathlib.Path) -> Start:
  """Measures one start of a server; `kind` names its log in the folder."""
  log = folder / f'{model.name}-{kind}.jsonl'
  with server(model, cache, log) as started:
    first = min(asyncio.run(stream(started.port, list(range(1, 17)), 1)))
  events = read_log(log)
  early = [event for event in events if event['at'] <= started.ready]
  # The log is written a little before the ready line is read.
  late = [event for event in events if event['at'] > started.ready]

  def seconds(some: list[dict[str, Any]], name: str) -> float:
    return sum(event['seconds'] for event in some if event['kind'] == name)

  def count(some: list[dict[str, Any]], name: str) -> int:
    return sum(event['kind'] == name for event in some)

  ready = started.ready - started.began
  imports = next(event['at'] for event in early if event['kind'] == 'imports') - started.began
  parts = {
    'imports': imports,
    'tokenizer': seconds(early, 'policy'),
    'weights': seconds(early, 'weights'),
    'engine': seconds(early, 'engine'),
  }
  return Start(
    ready=ready,
    first_token=first - started.began,
    parts=parts | {'prepare and the rest': ready - sum(parts.values())},
    counts={
      'programs': count(early, 'compile'),
      'compiled': count(early, 'miss'),
      'late': count(late, 'compile'),
    },
    seconds={
      'compile': seconds(early, 'compile'),
      'trace': seconds(early, 'trace'),
      'late': seconds(late, 'compile'),
    },
  )


def print_start(model: Model, kind: str, measured: Start) -> None:
  """Prints the line of a start."""
  line(
    f'start, {model.name}, {kind}',
    'seconds that are asked for',
    measured.ready,
    WANTED.get((model.name, kind)),
    'seconds',
    wanted=1.0,
    first_token=measured.first_token,
    parts=measured.parts,
    programs=measured.counts['programs'],
    compiled=measured.counts['compiled'],
    compile_seconds=measured.seconds['compile'],
    trace_seconds=measured.seconds['trace'],
    late=measured.counts['late'],
    late_compile_seconds=measured.seconds['late'],
  )


def streams(model: Model, cache: pathlib.Path, folder: pathlib.Path) -> None:
  """Measures how even streams are, in a server that has just become ready."""
  with server(model, cache, folder / f'{model.name}-streams.jsonl') as started:
    for kind in ('first', 'second'):
      answers = asyncio.run(clients(model, started.port))
      gaps = [gap for pieces in answers for gap in np.diff(pieces).tolist()]
      line(
        f'streams, {model.name}, {kind} round',
        'median gap',
        max(gaps),
        statistics.median(gaps),
        'seconds, longest stall',
        answers=len(answers),
        pieces=len(gaps),
        p99=float(np.percentile(gaps, 99)),
      )


def requests(model: Model, folder: pathlib.Path) -> None:
  """Measures the mixed requests right after a cold start, and again."""
  log = folder / 'requests.jsonl'
  command = [sys.executable, '-m', 'benchmarks.startup_worker', str(log), 'requests', model.path]
  answer = subprocess.run(
    command, stdout=subprocess.PIPE, text=True, check=True, env=environment(folder / 'empty')
  )
  seconds = json.loads(answer.stdout.splitlines()[-1])
  events = read_log(log)
  ready = next(event['at'] for event in events if event['kind'] == 'ready')
  line(
    f'requests, {model.name}, right after a cold start',
    'the second time',
    seconds['first'],
    seconds['again'],
    'seconds',
    wanted=1 / 1.1,
    prepare_seconds=seconds['prepare'],
    late=sum(event['kind'] == 'compile' and event['at'] > ready for event in events),
  )


def make_model(name: str, folder: pathlib.Path) -> Model:
  """The model of that name; the random one is written down first."""
  if name == 'organism':
    return Model(name, '', 640, 1024, (900, 300, 900))
  tokenizer = make_tokenizer(SMOLLM2.vocab_size)
  tokenizer.save_pretrained(folder / 'tokenizer')
  hf_checkpoint.save_checkpoint(
    folder / 'model',
    SMOLLM2,
    jax.jit(decoder.init_params, static_argnums=0)(SMOLLM2, jax.random.key(0)),
    hf_checkpoint.ModelFiles(tokenizer_dir=folder / 'tokenizer'),
  )
  return Model(name, str(folder / 'model'), SMOLLM2.vocab_size, 4096, (1000, 4000, 2000))


def main(_) -> None:
  """Runs the cases that are asked for, of each model."""
  unknown = {*_CASES.value} - {*CASES} | {*_MODELS.value} - {'organism', '135M'}
  if unknown:
    raise app.UsageError(f'unknown cases or models {sorted(unknown)}')
  for name in _MODELS.value:
    with tempfile.TemporaryDirectory() as temporary:
      folder = pathlib.Path(temporary)
      model = make_model(name, folder)
      cache = folder / 'cache'
      if 'start' in _CASES.value:
        for kind in ('cold', 'warm'):
          measured = start(model, kind, cache, folder)
          print_start(model, kind, measured)
          say(f'{name}, {kind}: ready after {measured.ready:.1f} s')
      if 'streams' in _CASES.value:
        streams(model, cache, folder)
      if 'requests' in _CASES.value and name == '135M':
        requests(model, folder)


if __name__ == '__main__':
  app.run(main)
