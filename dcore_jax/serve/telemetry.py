"""What the server counts, in the text format of Prometheus."""

import dataclasses
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dcore_jax.serve.scheduler import Scheduler

# Upper ends of the histograms' buckets in seconds, from a cached prompt to a long answer of
# thoughts.
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Telemetry:
  """Counts of one server; `text` is what /metrics answers."""

  def __init__(self, scheduler: Scheduler):
    # A registry of its own: in prometheus_client's global one a second server in the same process
    # (as in tests) could not register these names again.
    self._registry = prometheus_client.CollectorRegistry()
    kinds = {'registry': self._registry, 'namespace': 'dcore'}
    self.requests = prometheus_client.Counter(
      'http_requests', 'Requests by path and status.', ['path', 'status'], **kinds
    )
    self.cancelled = prometheus_client.Counter(
      'cancelled_requests', 'Requests whose client went away.', **kinds
    )
    self.prompt_tokens = prometheus_client.Counter(
      'prompt_tokens', 'Tokens of prompts, each counted once.', **kinds
    )
    self.completion_tokens = prometheus_client.Counter(
      'completion_tokens', 'Tokens sampled for clients.', **kinds
    )
    self.first_token_seconds = prometheus_client.Histogram(
      'time_to_first_token_seconds', 'From admission to the first token.', buckets=_SECONDS, **kinds
    )
    self.request_seconds = prometheus_client.Histogram(
      'request_seconds', 'From admission to the last token.', buckets=_SECONDS, **kinds
    )
    self._registry.register(_EngineCollector(scheduler))

  def text(self) -> bytes:
    """Returns all counts as they stand."""
    return prometheus_client.generate_latest(self._registry)


class _EngineCollector:
  """The engine's own counts, read when they are asked for."""

  def __init__(self, scheduler: Scheduler):
    self._scheduler = scheduler

  def collect(self) -> Iterator[Metric]:
    # Reading another thread's integers needs no lock: a count may be one step old, but never torn.
    stats = self._scheduler.engine.stats
    # Every count of EngineStats is exported, also one that is added later.
    for field in dataclasses.fields(stats):
      yield CounterMetricFamily(
        f'dcore_engine_{field.name}', f'{field.name} of EngineStats.', getattr(stats, field.name)
      )
    gauges = {
      'lanes': ('Rollouts that can run at once.', self._scheduler.engine.lanes),
      'rollouts_in_flight': ('Rollouts that run or wait.', self._scheduler.in_flight),
      # Prometheus shows truth values as 0 and 1.
      'ready': ('1 once all programs are compiled.', self._scheduler.ready),
      'up': ('0 once the engine has failed.', self._scheduler.failure is None),
    }
    for name, (meaning, value) in gauges.items():
      yield GaugeMetricFamily(f'dcore_engine_{name}', meaning, value)
