"""A process of `benchmarks.startup`: runs one of its programs, and writes down what it compiles.

    python -m benchmarks.startup_worker LOG serve FLAGS...
    python -m benchmarks.startup_worker LOG requests MODEL

The first one is `experiments.serve`. Each line of LOG is {"at": seconds since the epoch, "kind",
"seconds"}. Kinds: 'imports', 'policy' (config and tokenizer), 'weights', 'engine', 'trace',
'compile' (or read from the cache), 'hit' and 'miss' (of the cache).
"""

import functools
import json
import pathlib
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

# Prompt and answer of each request, in tokens.
REQUESTS = (
  (420, 60),
  (380, 80),
  (510, 300),
  (450, 120),
  (610, 90),
  (390, 200),
  (700, 600),
  (480, 70),
  (520, 100),
  (1900, 50),
  (640, 400),
)
_EVENTS = {
  '/jax/compilation_cache/cache_hits': 'hit',
  '/jax/compilation_cache/cache_misses': 'miss',
}
_DURATIONS = {
  '/jax/core/compile/jaxpr_trace_duration': 'trace',
  '/jax/core/compile/jaxpr_to_mlir_module_duration': 'trace',
  '/jax/core/compile/backend_compile_duration': 'compile',
}


class Log:
  """The file of what happened when."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    jax.monitoring.register_event_listener(self._event)
    jax.monitoring.register_event_duration_secs_listener(self._duration)

  def note(self, kind: str, seconds: float = 0.0) -> None:
    """Writes a line."""
    # Opened anew each time: several threads compile, and the process is ended by a signal.
    with self._path.open('a', encoding='utf-8') as file:
      file.write(json.dumps({'at': time.time(), 'kind': kind, 'seconds': seconds}) + '\n')

  def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, whose calls are written down."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
      began = time.perf_counter()
      result = function(*arguments, **options)
      self.note(kind, time.perf_counter() - began)
      return result

    return call

  def _event(self, name: str, **_: Any) -> None:
    if name in _EVENTS:
      self.note(_EVENTS[name])

  def _duration(self, name: str, seconds: float, **_: Any) -> None:
    if name in _DURATIONS:
      self.note(_DURATIONS[name], seconds)


def serve(log: Log, flags: list[str]) -> None:
  """Runs `experiments.serve` with the flags."""
  from dcore_jax.serve import server

  log.note('imports')
  load_policy = server.load_policy

  def load(*arguments: Any, **options: Any) -> Any:
    policy = load_policy(*arguments, **options)
    policy.load = log.timed('weights', policy.load)
    return policy

  server.load_policy = log.timed('policy', load)
  server.Engine = log.timed('engine', server.Engine)
  sys.argv = ['experiments.serve', *flags]
  runpy.run_module('experiments.serve', run_name='__main__')


def requests(log: Log, model: str) -> None:
  """Answers the requests right after the start, and once more; prints a JSON object."""
  import numpy as np

  from dcore_jax.rollout.engine import Engine
  from dcore_jax.rollout.requests import Request
  from dcore_jax.rollout.sampling import SamplingParams
  from dcore_jax.rollout.sizes import EngineSizes
  from dcore_jax.serve.server import load_model

  loaded = load_model(model, lanes=8, max_len=4096).engine
  config = loaded.config
  # Without stop tokens, so that every answer has its length.
  engine = Engine(
    loaded.params,
    config,
    stop_ids=(),
    sizes=EngineSizes(lanes=8, max_len=4096, steps_per_call=8),
  )
  began = time.perf_counter()
  engine.prepare()
  prepared = time.perf_counter() - began
  log.note('ready')
  rounds = []
  for seed in range(2):
    rng = np.random.default_rng(seed)
    asked = []
    for number, (prompt, answer) in enumerate(REQUESTS):
      tokens = rng.integers(1, config.vocab_size, prompt)
      asked.append(Request(tokens, (number,), max_tokens=answer))
    began = time.perf_counter()
    done = engine.generate(asked, SamplingParams(temperature=1.0, seed=seed))
    rounds.append(time.perf_counter() - began)
    if [len(one.tokens) for one in done] != [answer for _, answer in REQUESTS]:
      raise AssertionError('an answer has not the length that was asked for')
  print(json.dumps({'prepare': prepared, 'first': rounds[0], 'again': rounds[1]}), flush=True)


def main() -> None:
  """Runs what the command line says."""
  path, program, *rest = sys.argv[1:]
  log = Log(pathlib.Path(path))
  if program == 'serve':
    serve(log, rest)
  else:
    requests(log, *rest)


if __name__ == '__main__':
  main()
