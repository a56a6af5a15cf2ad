"""The thread that owns the engine: what it takes, frees, refuses, and how it ends."""

import queue

import numpy as np
import pytest

from dcore_jax.rollout.engine import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.serve.scheduler import Overloaded, Scheduler, Stopped
from tests.serve.servers import ScriptedEngine
from tests.waiting import until

RULE = SamplingParams()


def request(length=3):
  return Request(np.arange(length), (0,))


@pytest.fixture
def made():
  """(engine with 2 lanes, its scheduler, the events it delivers)."""
  engine = ScriptedEngine([7, 8, 9])
  events = queue.SimpleQueue()
  scheduler = Scheduler(engine, max_waiting=1)
  yield engine, scheduler, events
  scheduler.close()


def listen(events):
  return lambda place, event: events.put((place, event))


def test_every_rollout_of_a_job_is_told_to_its_end(made):
  _, scheduler, events = made
  scheduler.submit([request()] * 3, RULE, listen(events))
  got = [events.get(timeout=30) for _ in range(9)]
  for place in range(3):
    parts = [event for one, event in got if one == place]
    assert [part.tokens.tolist() for part in parts] == [[7], [8], [9]]
    assert [part.completion is None for part in parts] == [True, True, False]
  until(lambda: scheduler.in_flight == 0)


def test_jobs_are_taken_whole_or_not_at_all(made):
  engine, scheduler, events = made
  engine.go.clear()
  scheduler.submit([request()] * 2, RULE, listen(events))
  with pytest.raises(Overloaded, match='2 rollouts are in flight and 2 more'):
    scheduler.submit([request()] * 2, RULE, listen(events))
  scheduler.submit([request()], RULE, listen(events))
  engine.go.set()
  assert len([events.get(timeout=30) for _ in range(9)]) == 9


def test_cancelled_rollouts_are_freed_and_not_heard_of_again(made):
  engine, scheduler, events = made
  engine.go.clear()
  job = scheduler.submit([request()] * 2, RULE, listen(events))
  other = scheduler.submit([request()], RULE, listen(queue.SimpleQueue()))
  scheduler.cancel(job, 1)
  until(lambda: engine.cancelled == [2])
  scheduler.cancel(other)
  until(lambda: engine.cancelled == [2, 3])
  engine.go.set()
  assert [events.get(timeout=30)[0] for _ in range(3)] == [0, 0, 0]
  scheduler.cancel(job)  # has ended
  until(lambda: scheduler.in_flight == 0)
  assert engine.cancelled == [2, 3] and events.empty()


def test_what_the_engine_refuses_ends_that_rollout_alone(made):
  _, scheduler, events = made
  scheduler.submit([request(13), request()], RULE, listen(events))
  got = [events.get(timeout=30) for _ in range(4)]
  assert [str(event) for place, event in got if place == 0] == ['thirteen tokens'] and got[-1][
    1
  ].completion is not None


def test_a_broken_engine_ends_everything_with_its_reason(made):
  engine, scheduler, events = made
  engine.go.clear()
  scheduler.submit([request()] * 2, RULE, listen(events))
  engine.broken = FloatingPointError('not a number')
  errors = [events.get(timeout=30)[1] for _ in range(2)]
  assert all(isinstance(error, Stopped) and 'not a number' in str(error) for error in errors)
  assert scheduler.failure is engine.broken and scheduler.in_flight == 0
  with pytest.raises(Stopped):
    scheduler.submit([request()], RULE, listen(events))


def test_closing_ends_what_runs_and_what_waits(made):
  engine, scheduler, events = made
  engine.go.clear()
  scheduler.submit([request()] * 3, RULE, listen(events))
  until(lambda: engine.rollouts == 3)
  scheduler.close()
  assert (
    all(isinstance(events.get(timeout=30)[1], Stopped) for _ in range(3))
    and scheduler.failure is None
  )
  assert sorted(engine.cancelled) == [1, 2, 3]
  with pytest.raises(Stopped, match='no requests any more'):
    scheduler.submit([request()], RULE, listen(events))


def test_progress_tells_by_which_weights_its_tokens_were_drawn(made):
  engine, scheduler, events = made
  engine.go.clear()
  scheduler.submit([request()], RULE, listen(events))
  scheduler.exchange('weights', 7).result(timeout=30)
  with pytest.raises(ValueError, match='do not fit'):
    scheduler.exchange('too large', 8).result(timeout=30)
  engine.go.set()
  assert [events.get(timeout=30)[1].version for _ in range(3)] == [7, 7, 7]
  assert engine.exchanged == ['weights'] and scheduler.version == 7


def test_weights_for_an_engine_that_has_stopped_are_refused(made):
  _, scheduler, _ = made
  scheduler.close()
  with pytest.raises(Stopped):
    scheduler.exchange('weights', 7)
