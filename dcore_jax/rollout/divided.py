"""Rollouts divided among hosts: each makes its share, and all of them get all.

A host samples its share with an engine on its own devices, writes down what the engine gave, and
the hosts exchange these records by a collective. Then every host does the whole work once more from
the records, without sampling: it decodes, acts and judges as one process would. What all hosts
compute from there on is therefore equal, bit for bit.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from dcore_jax import distributed
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Completion, Request, RequestSource, Tag
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.streams import Stream

Result = TypeVar('Result')
# Completions by the `key_id` of their requests, which does not depend on their order.
Made = dict[tuple[int, ...], Completion]


class Recorder(Stream):
  """An engine that writes down what it gives.

  Attributes:
    made: what streams that came to their end have given.
    max_len: of the engine; read by those who render prompts, to refuse what does not fit.
  """

  def __init__(self, engine: Engine):
    self._engine = engine
    self.max_len = engine.max_len
    self.made: Made = {}

  def stream(
    self, source: RequestSource, sampling: SamplingParams
  ) -> Iterator[tuple[Tag, Completion]]:
    """Does what `Engine.stream` does.

    Raises:
      ValueError: stop strings, for which a record has no place.
    """
    check_recordable(sampling)
    keys: dict[Any, tuple[int, ...]] = {}
    made: Made = {}

    # Completions come without their key; remember it by the tag of the request.
    def noted(free: int) -> Sequence[tuple[Tag, Request]]:
      arrivals = source(free)
      # Tags are the caller's, and may be used again when a rollout has ended.
      keys.update({tag: request.key_id for tag, request in arrivals})
      return arrivals

    for tag, completion in self._engine.stream(noted, sampling):
      made[keys.pop(tag)] = completion
      yield tag, completion
    self.made |= made


class Recalled(Stream):
  """Gives again what an engine has given.

  Args:
    made: its completions.
    lanes: of the engine: so many requests are taken at once.
    max_len: of the engine.
  """

  def __init__(self, made: Made, *, lanes: int, max_len: int):
    self._made = made
    self._lanes = lanes
    self.max_len = max_len

  def stream(
    self, source: RequestSource, sampling: SamplingParams
  ) -> Iterator[tuple[Tag, Completion]]:
    """Does what `Engine.stream` does, for requests that the engine was asked."""
    check_recordable(sampling)
    # All lanes are free: nothing is sampled, and the source gives as much as it has.
    arrivals = source(self._lanes)
    while arrivals:
      for tag, request in arrivals:
        yield tag, self._made[request.key_id]
      arrivals = source(self._lanes)


def check_recordable(sampling: SamplingParams) -> None:
  """Raises ValueError where rollouts end at stop strings, for which records have no place."""
  if sampling.stop:
    raise ValueError(f'rollouts with stop strings {sampling.stop} cannot be journaled')


def is_divided(engine: Engine) -> bool:
  """Whether hosts have an engine each, which has to be asked for a share."""
  # One engine over the devices of all hosts is asked by all of them, the same at the same time.
  return jax.process_count() > 1 and engine.params['embed'].is_fully_addressable


def sample_share(
  engine: Engine, count: int, work: Callable[[Recorder, Sequence[int]], Any]
) -> Made:
  """Samples `count` rollouts, each on one of the hosts; returns what all of them have made.

  Args:
    engine: this host's.
    count: number of rollouts.
    work: makes the rollouts of the given numbers; equal ones on all hosts.
  """
  recorder = Recorder(engine)
  mine = distributed.share(count)
  if mine:
    work(recorder, mine)
  return gather(recorder.made)


def divide(
  engine: Engine, count: int, work: Callable[[Engine | Recalled, Sequence[int]], Result]
) -> Result:
  """Returns work(engine, all numbers below count), sampled on all hosts where each has an engine.

  Args:
    engine: this host's.
    count: number of rollouts.
    work: makes the rollouts of the given numbers. It is called twice on several hosts: for this
      host's share, and for all rollouts without sampling.
  """
  if not is_divided(engine):
    return work(engine, range(count))
  made = sample_share(engine, count, work)
  return work(Recalled(made, lanes=engine.lanes, max_len=engine.max_len), range(count))


def gather(made: Made) -> Made:
  """Returns what all hosts have made."""
  file = io.BytesIO()
  if made:
    np.savez(file, **columns(made))
  everything: Made = {}
  for data in distributed.gather_bytes(file.getvalue()):
    # A host without a rollout has written nothing.
    if data:
      # No pickle: what came over the network is data.
      with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        everything |= completions({name: stored[name] for name in stored.files})
  return everything


def columns(made: Made) -> dict[str, np.ndarray]:
  """Returns completions as arrays: per-token columns end to end, and one entry each."""
  # In the order of finishing; the key ids go along.
  given = list(made.values())
  found = {
    'tokens': np.concatenate([c.tokens for c in given]),
    'logprobs': np.concatenate([c.logprobs for c in given]),
    'full_logprobs': np.concatenate([c.full_logprobs for c in given]),
    'entropies': np.concatenate([c.entropies for c in given]),
    'lengths': np.array([len(c.tokens) for c in given]),
    'key_ids': np.array(list(made), np.int64),
    'finished': np.array([c.finished for c in given]),
    'prompt_len': np.array([c.prompt_len for c in given]),
  }
  if given[0].versions is not None:
    found['versions'] = np.concatenate([c.versions for c in given])
  return found


def completions(columns: dict[str, np.ndarray]) -> Made:
  """The inverse of `columns`."""
  # The last end is that of the whole column, where `split` needs no cut.
  ends = np.cumsum(columns['lengths'])[:-1]
  tokens = np.split(columns['tokens'], ends)
  logprobs = np.split(columns['logprobs'], ends)
  full_logprobs = np.split(columns['full_logprobs'], ends)
  entropies = np.split(columns['entropies'], ends)
  # Of a fleet alone.
  versions = None
  if 'versions' in columns:
    versions = np.split(columns['versions'], ends)
  made = {}
  for index, key_id in enumerate(columns['key_ids'].tolist()):
    made[tuple(key_id)] = Completion(
      tokens=tokens[index],
      logprobs=logprobs[index],
      full_logprobs=full_logprobs[index],
      entropies=entropies[index],
      finished=bool(columns['finished'][index]),
      stop=None,
      prompt_len=int(columns['prompt_len'][index]),
      versions=versions[index] if versions else None,
    )
  return made
