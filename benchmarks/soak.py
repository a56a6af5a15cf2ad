"""A server under mixed load beside a trainer that starts over and over: does anything grow?

    python -m benchmarks.soak --minutes=30

`experiments.serve` serves the organism to clients that stream, ask for whole answers, leave in the
middle, send what is no request, or more than is allowed. Each request has the outcomes that it may
have; any other, or none, is counted as unaccounted. Beside it a process fine-tunes and writes
checkpoints in a loop. Two JSON lines, one a process: growth of memory in MB a minute after the
warm-up (wanted: below 1), the most open files and threads in both halves of the rest, and what the
clients got. The exit status is 1 where an answer is unaccounted for, or a lane not free at the end.
"""

import collections
import http.client
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from typing import Any

import numpy as np
from absl import app, flags, logging

from benchmarks.measure import line, say

_MINUTES = flags.DEFINE_float('minutes', 30.0, 'How long, the warm-up included.')
_WARM = flags.DEFINE_float('warm', 0.3, 'Share of the time that is the warm-up.')
_CLIENTS = flags.DEFINE_integer('clients', 8, 'Clients at once; the server has 4 lanes.')
_TRAIN = flags.DEFINE_string('train', '', 'Trains in this folder for ever; the program calls it.')

EVERY = 2.0  # seconds between two looks at the processes
ASK = {'model': 'organism', 'messages': [{'role': 'user', 'content': 'find the order of Karo'}]}
# What is sent: (body, which statuses are right). A full server may always say 429.
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
  'whole': (ASK | {'max_tokens': 24}, (200,)),
  'stream': (ASK | {'max_tokens': 24, 'stream': True}, (200,)),
  'several': (ASK | {'max_tokens': 8, 'n': 3, 'logprobs': True}, (200,)),
  'leaves': (ASK | {'max_tokens': 64, 'stream': True}, (200,)),
  'no json': (b'{"model": ', (400,)),
  'no model': (ASK | {'model': 'other'}, (404,)),
  'bad field': (ASK | {'temperature': -1}, (400,)),
  'too long': (ASK | {'messages': [{'role': 'user', 'content': 'find ' * 5000}]}, (400,)),
  'too large': (b' ' * (5 * 2**20), (413,)),
  'deep': (b'[' * 100_000, (400,)),
}


class Clients:
  """Threads that ask at random until they are told to stop."""

  def __init__(self, url: str, count: int):
    self._place = urllib.parse.urlsplit(url).netloc
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self.outcomes: collections.Counter[str] = collections.Counter()
    self.unaccounted: list[str] = []
    self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(count)]
    for thread in self._threads:
      thread.start()

  def stop(self) -> None:
    self._stop.set()
    for thread in self._threads:
      thread.join()

  def _run(self, seed: int) -> None:
    draw = random.Random(seed)
    while not self._stop.is_set():
      kind = draw.choice(list(KINDS))
      try:
        outcome, fine = self._ask(kind)
      except (OSError, ValueError, http.client.HTTPException) as error:
        # A body that is refused before it is read whole may end the connection under the client.
        fine = kind == 'too large' and isinstance(error, OSError)
        outcome = f'{kind}: {type(error).__name__}'
      with self._lock:
        self.outcomes[outcome] += 1
        if not fine:
          self.unaccounted.append(outcome)

  def _ask(self, kind: str) -> tuple[str, bool]:
    """Asks once -> (what came, whether that is right)."""
    body, right = KINDS[kind]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(self._place, timeout=300)
    try:
      connection.request(
        'POST', '/v1/chat/completions', content, {'Content-Type': 'application/json'}
      )
      answer = connection.getresponse()
      if kind == 'leaves' and answer.status == 200:
        answer.read(10)
        return 'leaves: left', True
      text = answer.read()
      whole = answer.status != 200 or _is_whole(body, text)
      said = f'{kind}: {answer.status}' + ('' if whole else ' cut short')
      return said, whole and answer.status in (*right, 429)
    finally:
      connection.close()


def _is_whole(body: Any, text: bytes) -> bool:
  """Whether an answer has all of its choices, and its end."""
  if body.get('stream'):
    return text.endswith(b'data: [DONE]\n\n')
  choices = json.loads(text)['choices']
  return len(choices) == body.get('n', 1) and all(one['finish_reason'] for one in choices)


class Watched:
  """Memory, files and threads of a process, looked at again and again."""

  def __init__(self, pid: int):
    self._folder = pathlib.Path('/proc') / str(pid)
    self.rows: list[tuple[float, float, int, int]] = []

  def look(self) -> None:
    status = {}
    for text in (self._folder / 'status').read_text(encoding='utf-8').splitlines():
      name, _, value = text.partition(':')
      status[name] = value.split()
    files = len(list((self._folder / 'fd').iterdir()))
    # What is its own, also what the system has swapped out. Pages of mapped files come and go as
    # other programs need memory.
    memory = (int(status['RssAnon'][0]) + int(status['VmSwap'][0])) / 1024
    self.rows.append((time.monotonic(), memory, files, int(status['Threads'][0])))

  def report(self, case: str, began: float, **more: Any) -> None:
    """Prints the line of this process; `began` ended the warm-up."""
    kept = np.array([row for row in self.rows if row[0] >= began])
    slope = np.polyfit(kept[:, 0] / 60, kept[:, 1], 1)[0]
    halves = np.array_split(kept, 2)
    line(
      case,
      'its own warm-up',
      float(slope),
      None,
      'MB a minute',
      wanted=1.0,
      megabytes=float(kept[-1, 1]),
      most_files=[int(half[:, 2].max()) for half in halves],
      most_threads=[int(half[:, 3].max()) for half in halves],
      looks=len(kept),
      **more,
    )


def train_forever(folder: pathlib.Path) -> None:
  """Fine-tunes a tiny model from its start to its end, again and again, in the same process."""
  from types import SimpleNamespace

  import jax

  from dcore_jax.models import decoder
  from dcore_jax.models.config import DecoderConfig
  from dcore_jax.models.decoder import Execution
  from dcore_jax.rollout.policy import ORGANISM, Policy
  from dcore_jax.run.config import default_config
  from dcore_jax.tokentree import TokenSequence
  from dcore_jax.train.metrics import Metrics
  from dcore_jax.train.sft_loop import run_sft
  from dcore_jax.train.stage_run import StageRun

  model = DecoderConfig(
    vocab_size=640,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    tie_word_embeddings=True,
    max_position_embeddings=256,
  )
  tokenizer = SimpleNamespace(pad_token_id=0)
  policy = Policy(config=model, load=None, tokenizer=tokenizer, tokenizer_dir=ORGANISM, path=None)
  config = default_config().sft
  config.update(dict(capacity=128, rows=1, epochs=4, checkpoint_every=4))
  numbers = np.random.default_rng(0)
  sequences = []
  for _ in range(8):
    tokens = numbers.integers(1, 640, 100, dtype=np.int32)
    # Nothing predicts the first token.
    weights = np.append(np.float32(0), np.ones(99, np.float32))
    sequences.append(TokenSequence(tokens, weights, len(tokens)))
  for count in range(10**9):
    with tempfile.TemporaryDirectory(dir=folder) as made:
      place = pathlib.Path(made)
      with Metrics(place) as metrics:
        run = StageRun(metrics=metrics, checkpoints=place / 'sft', seed=0)
        params = decoder.init_params(model, jax.random.key(0))
        run_sft(params, policy, sequences, config, run, execution=Execution())
    (folder / 'count').write_text(str(count + 1), encoding='utf-8')


def _start(*arguments: str, **options: Any) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, '-m', *arguments], text=True, **options)


def _in_flight(url: str) -> float:
  """Rollouts that still run or wait, from /metrics."""
  connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
  connection.request('GET', '/metrics')
  text = connection.getresponse().read().decode()
  connection.close()
  for row in text.splitlines():
    if row.startswith('dcore_engine_rollouts_in_flight '):
      return float(row.split()[1])
  raise ValueError('/metrics lacks dcore_engine_rollouts_in_flight')


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)  # orbax tells of every checkpoint
  if _TRAIN.value:
    train_forever(pathlib.Path(_TRAIN.value))
    return
  with tempfile.TemporaryDirectory() as made:
    folder = pathlib.Path(made)
    server = _start(
      'experiments.serve', '--port=0', '--lanes=4', '--max_len=256', stderr=subprocess.PIPE
    )
    # Without its bars; an error of it is shown.
    quiet = os.environ | {'TQDM_DISABLE': '1'}
    trainer = _start('benchmarks.soak', f'--train={folder}', env=quiet)
    try:
      url = next(text.split()[0] for text in server.stderr if text.startswith('http'))
      # Read on, or a full pipe would stop the server.
      threading.Thread(target=server.stderr.read, daemon=True).start()
      bad = _soak(url, server, trainer, folder)
    finally:
      server.kill()
      trainer.kill()
      server.wait()
      trainer.wait()
  if bad:
    sys.exit(1)


def _soak(
  url: str, server: subprocess.Popen, trainer: subprocess.Popen, folder: pathlib.Path
) -> bool:
  """Loads and looks, then prints both lines -> whether an answer or a lane was lost."""
  counted = folder / 'count'
  while not counted.exists() and trainer.poll() is None:
    time.sleep(0.5)
  began = time.monotonic()
  warm = began + _WARM.value * 60 * _MINUTES.value
  watched = {'server': Watched(server.pid), 'trainer': Watched(trainer.pid)}
  clients = Clients(url, _CLIENTS.value)
  while time.monotonic() < began + 60 * _MINUTES.value:
    time.sleep(EVERY)
    for name, process in (('server', server), ('trainer', trainer)):
      if process.poll() is not None:
        clients.stop()
        raise RuntimeError(f'the {name} ended with status {process.returncode}')
      watched[name].look()
  clients.stop()
  deadline = time.monotonic() + 60
  while _in_flight(url) and time.monotonic() < deadline:
    time.sleep(0.2)
  left = _in_flight(url)
  asked = sum(clients.outcomes.values())
  say('\n'.join(f'{count:7} {outcome}' for outcome, count in sorted(clients.outcomes.items())))
  watched['server'].report(
    'soak: server',
    warm,
    requests=asked,
    unaccounted=len(clients.unaccounted),
    in_flight_at_the_end=left,
  )
  watched['trainer'].report('soak: trainer', warm, runs=int(counted.read_text(encoding='utf-8')))
  return bool(clients.unaccounted or left)


if __name__ == '__main__':
  app.run(main)
