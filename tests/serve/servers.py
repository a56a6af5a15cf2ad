"""Servers for tests: real ones on loopback ports, on the organism or on an engine that does what a
script says.
"""

import contextlib
import threading
from types import SimpleNamespace

import numpy as np

from dcore_jax.rollout.engine import Completion, Engine, EngineStats, Progress
from dcore_jax.rollout.requests import PromptScores
from dcore_jax.rollout.sampling import Alternatives
from dcore_jax.serve.server import Server
from tests.waiting import until

# The template of the organism's own prompts, tools as it knows them: a signature a line in the
# system turn.
SIGNATURES = (
  "{%- if tools -%}{{- '<|im_start|>system\npolicy: call listed tools only.\ntools:' -}}"
  '{%- for tool in tools -%}'
  "{{- '\n' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' -}}"
  "{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
  '{%- for m in messages -%}'
  "{{- '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' -}}"
  "{%- endfor -%}{{- '<|im_start|>assistant\n' -}}"
)


def engine_like(engine):
  """An engine of the same model and sizes, for a server or a test of its own."""
  return Engine(
    engine.params,
    engine.config,
    stop_ids=engine.stop_ids.tolist(),
    sizes=engine.sizes,
    decode=engine.decode,
  )


class ScriptedEngine:
  """Answers every prompt with the tokens of `reply`, one a step; steps wait for `go`, and fail
  where `broken` is set.
  """

  def __init__(self, reply, lanes=2, max_len=256, max_new=64):
    self.reply = np.asarray(reply, np.int32)
    self.lanes = lanes
    self.max_len = max_len
    self.max_new = max_new
    self.config = SimpleNamespace(vocab_size=640)
    self.stop_ids = np.array([self.reply[-1]])
    self.stats = EngineStats()
    self.go = threading.Event()
    # `prepare` waits here between its two programs.
    self.compiled = threading.Event()
    self.compiled.set()
    self.broken = None
    self.cancelled = []
    self.exchanged = []
    self.prompts = []
    self.go.set()
    self._rollouts = {}
    self._count = 0

  @property
  def rollouts(self):
    return len(self._rollouts)

  @property
  def busy(self):
    return bool(self._rollouts)

  def prepare(self, progress):
    progress(0, 2)
    progress(1, 2)
    while not self.compiled.wait(0.01):
      progress(1, 2)
    if self.broken:
      raise self.broken
    progress(2, 2)

  def submit(self, request, sampling):
    if len(request.prompt) == 13:
      raise ValueError('thirteen tokens')
    self._count += 1
    self.prompts.append(list(request.prompt))
    limit = sampling.max_tokens if request.max_tokens is None else request.max_tokens
    self._rollouts[self._count] = [0, limit, request]
    return self._count

  def exchange(self, params):
    if params == 'too large':
      raise ValueError('parameters do not fit')
    self.exchanged.append(params)

  def cancel(self, handle):
    del self._rollouts[handle]
    self.cancelled.append(handle)

  def step(self):
    self.go.wait(0.05)  # then commands are looked at, as between two calls of the device
    if self.broken:
      raise self.broken
    return (
      [self._advance(handle) for handle in list(self._rollouts)[: self.lanes]]
      if self.go.is_set()
      else []
    )

  def _advance(self, handle):
    rollout = self._rollouts[handle]
    before, limit, request = rollout
    count = min(before + 1, limit)
    tokens = self.reply[before:count]
    logprobs = np.full(len(tokens), -0.5, np.float32)
    # As the engine: the prompt's scores come with the first progress.
    scores = None if before or request.prompt_top is None else scripted_scores(request)
    rollout[0] = count
    whole = count == len(self.reply)
    if not whole and count < limit:
      return Progress(handle, tokens, logprobs, logprobs, None, prompt=scores)
    del self._rollouts[handle]
    logprobs_m = np.full(count, -0.5, np.float32)
    done = Completion(
      self.reply[:count], logprobs_m, logprobs_m, -logprobs_m, whole, None, len(request.prompt)
    )
    return Progress(handle, tokens, logprobs, logprobs, done, prompt=scores)


def scripted_scores(request):
  """Token i of the prompt has log-probability -i; the likeliest tokens are 1, 2, ..."""
  n = len(request.prompt) - 1
  top = None
  if request.prompt_top:
    top = Alternatives(
      np.tile(np.arange(1, request.prompt_top + 1), (n, 1)),
      np.tile(-np.arange(1.0, request.prompt_top + 1), (n, 1)),
    )
  return PromptScores(-np.arange(1.0, n + 1), np.full(n, 7), top)


@contextlib.contextmanager
def running(service, drain_seconds=30.0, ready=True):
  """The service on a port of its own -> (URL, uvicorn server); as a rule once it is ready."""
  server = Server(service, '127.0.0.1', 0, drain_seconds)
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  until(lambda: server.started or not thread.is_alive())
  if ready:
    until(lambda: service.scheduler.ready or not thread.is_alive())
  try:
    yield f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}', server
  finally:
    server.should_exit = server.force_exit = True
    thread.join()
