"""Serves all seeds together: whatever any of them has to ask is in flight at once, on one engine's lanes or a fleet.

The order of a seed's questions is its own affair (solve.py); a seed never sees another's state, and the random stream of a
question is folded from its seed's id and its number in the conversation. So what a seed gives depends neither on the other
seeds nor on when a run was interrupted.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dcore_jax.data.seeds import Seed
from dcore_jax.distill.labels import pseudo_labelled
from dcore_jax.distill.solve import Ask, Distiller, Dropped
from dcore_jax.rollout.backends import Backend, ChatRequest, Reply
from dcore_jax.rollout.sampling import SamplingParams

SEVERAL = ('sequential', 'parallel')  # kinds with subtasks, of which the success rates speak
_LAST_CHARS = 4000  # of a dropped seed's last reply that are kept


@dataclasses.dataclass
class Outcome:
  """What became of a seed, and what it cost.

  Attributes:
    seed, kind: id and kind of the seed as it was given.
    value: what its conversation returned; None where it was dropped.
    reason, stage: why and how far it came (`solve.Dropped`); '' where it was not.
    calls, prompt_tokens, completion_tokens: completions asked for, and tokens as the backend counts them.
    seconds: that its completions took, one after the other where they depend on each other.
    last: the last reply of a dropped seed, shortened.
  """

  seed: str
  kind: str
  value: Any = None
  reason: str = ''
  stage: str = ''
  calls: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  seconds: float = 0.0
  last: str = ''


@dataclasses.dataclass
class _Talk:
  """A seed whose conversation has begun: the replies to its open questions, as far as they are there."""

  number: int
  ask: Ask
  key: int
  outcome: Outcome
  replies: list[Reply | None] = dataclasses.field(default_factory=list)


def converse(
  seeds: Sequence[Seed],
  ask: Callable[[Seed], Ask],
  backend: Backend,
  sampling: SamplingParams,
  purpose: str = '',
) -> Iterator[tuple[int, Outcome]]:
  """Holds one conversation with the model for every seed -> (number, outcome) as they end.

  Conversations that have begun come before new ones: an engine still holds what their next prompts begin with. New ones
  begin in the order of the seeds. Conversations of another `purpose` with the same seeds have other random streams.
  """
  waiting: collections.deque[tuple[_Talk, int, ChatRequest]] = collections.deque()
  ended: collections.deque[tuple[int, Outcome]] = collections.deque()
  unstarted = iter(enumerate(seeds))

  def go_on(talk: _Talk, replies: list[Reply] | None) -> None:
    outcome = talk.outcome
    try:
      prompts = talk.ask.send(replies)
    except Dropped as dropped:
      outcome.reason, outcome.stage = str(dropped), dropped.stage
      ended.append((talk.number, outcome))
    except StopIteration as stop:
      outcome.value, outcome.last = stop.value, ''
      ended.append((talk.number, outcome))
    else:
      talk.replies = [None] * len(prompts)
      for place, messages in enumerate(prompts):
        waiting.append((talk, place, ChatRequest(tuple(messages), (talk.key, outcome.calls))))
        outcome.calls += 1

  def source(free: int) -> list[tuple[tuple[_Talk, int], ChatRequest]]:
    while len(waiting) < free and (following := next(unstarted, None)):
      number, seed = following
      go_on(_Talk(number, ask(seed), _key(purpose + seed.id), Outcome(seed.id, seed.kind)), None)
    given = [waiting.popleft() for _ in range(min(free, len(waiting)))]
    return [((talk, place), request) for talk, place, request in given]

  for (talk, place), reply in backend.stream(source, sampling):
    _count(talk.outcome, reply)
    talk.replies[place] = reply
    if None not in talk.replies:
      talk.outcome.seconds += max(reply.seconds for reply in talk.replies)
      go_on(talk, talk.replies)
    while ended:
      yield ended.popleft()
  yield from ended  # conversations without a single question


def _key(name: str) -> int:
  """31 bits of a seed's id, for its random streams."""
  return (
    int.from_bytes(hashlib.sha256(name.encode('utf-8', 'surrogatepass')).digest()[:4], 'big') >> 1
  )


def _count(outcome: Outcome, reply: Reply) -> None:
  outcome.prompt_tokens += reply.prompt_tokens
  outcome.completion_tokens += reply.completion_tokens
  outcome.last = reply.error or (
    reply.text if len(reply.text) <= _LAST_CHARS else reply.text[:_LAST_CHARS] + ' ...'
  )


def by_length(seeds: Iterable[Seed]) -> list[int]:
  """The places of the seeds in the order to begin with: longest chains of dependent completions first, so that what is left
  when the lanes begin to empty are single short ones."""
  chain = {'sequential': lambda seed: 1 + len(seed.calls), 'parallel': lambda seed: 2}
  lengths = [chain.get(seed.kind, lambda seed: 1)(seed) for seed in seeds]
  return sorted(range(len(lengths)), key=lambda place: -lengths[place])


def distill(
  seeds: Sequence[Seed],
  backend: Backend,
  sampling: SamplingParams,
  distiller: Distiller = Distiller(),
) -> Iterator[tuple[int, Outcome]]:
  """Distils seeds, begun in their order -> (number, outcome with rows as its value) as they finish; rows say what they were
  made with.

  Raises:
    ValueError: no seeds, or two of one id.
  """
  check_ids(seeds)
  drawn = {name: value for name, value in dataclasses.asdict(sampling).items() if name != 'stop'}
  for number, outcome in converse(seeds, distiller.rows, backend, sampling):
    provenance = {
      'seed': outcome.seed,
      'model': backend.model,
      'sampling': drawn,
      'wording': distiller.wording.version,
      'calls': outcome.calls,
      'completion_tokens': outcome.completion_tokens,
      'seconds': round(outcome.seconds, 3),
    }
    outcome.value = [row | {'provenance': provenance} for row in outcome.value or ()]
    yield number, outcome


def label(
  seeds: Sequence[Seed], backend: Backend, sampling: SamplingParams, samples: int
) -> Iterator[tuple[int, Outcome]]:
  """Pseudo-labels seeds -> (number, outcome with the relabelled seed as its value) as they finish."""
  check_ids(seeds)
  if samples < 1:
    raise ValueError(f'samples = {samples}: a pseudo-label needs at least one')
  # Random streams of their own: a single call asked for with the same words would be solved by its label's first sample.
  yield from converse(
    seeds, lambda seed: pseudo_labelled(seed, samples), backend, sampling, 'label '
  )


def check_ids(seeds: Sequence[Seed]) -> None:
  """ValueError where there are no seeds, or two have one id."""
  if not seeds:
    raise ValueError('no seeds to distil')
  duplicate = [i for i, n in collections.Counter(s.id for s in seeds).items() if n > 1]
  if duplicate:
    raise ValueError(f'seed ids occur twice: {duplicate[:3]}')


def summarise(outcomes: Iterable[Outcome | dict[str, Any]]) -> dict[str, Any]:
  """Counts and rates of all outcomes; `value` may be rows or, as in a shard's outcomes, their number.

  `success_rate` is the paper's (method: section 1.8): of the seeds with several subtasks for whose subtasks a reasoning was
  generated, the share that verifies; `success_rate_all` counts all seeds with several subtasks. `decomposition_rate` is the
  share of them whose decomposition holds. A record's `asked`, where there is one, is the kind that its seed had before it was
  labelled anew: by that it is counted, and where the label has no subtasks any more its decomposition does not hold.
  """
  records = [vars(o) if isinstance(o, Outcome) else o for o in outcomes]
  rows_of = lambda record: (
    record['value'] if isinstance(record['value'], int) else len(record['value'] or ())
  )
  kept = [record for record in records if not record['reason']]
  asked = lambda record: record.get('asked', record['kind'])
  several = [record for record in records if asked(record) in SEVERAL]
  split = [record for record in several if record['kind'] in SEVERAL]
  reasoned = [record for record in split if record['stage'] in ('', 'verify')]
  decomposed = [record for record in split if record['stage'] not in ('decompose', 'label')]
  verified = sum(not record['reason'] for record in split)
  share = lambda part, whole: part / whole if whole else 0.0
  scenarios = {}
  for kind in sorted(set(map(asked, records))):
    mine = [record for record in records if asked(record) == kind]
    right = [record for record in mine if not record['reason']]
    scenarios[kind] = {
      'seeds': len(mine),
      'kept': len(right),
      'rate': share(len(right), len(mine)),
      'rows': sum(map(rows_of, right)),
      'dropped': _reasons(mine),
    }
  total = lambda field: sum(record[field] for record in records)
  return {
    'seeds': len(records),
    'kept': len(kept),
    'rows': sum(map(rows_of, kept)),
    'dropped': _reasons(records),
    'kept_by_kind': {kind: s['kept'] for kind, s in scenarios.items()},
    'seeds_by_kind': {kind: s['seeds'] for kind, s in scenarios.items()},
    'several': len(several),
    'decomposed': len(decomposed),
    'decomposition_rate': share(len(decomposed), len(several)),
    'success_rate': share(verified, len(reasoned)),
    'success_rate_all': share(verified, len(several)),
    'scenarios': scenarios,
    'calls': total('calls'),
    'prompt_tokens': total('prompt_tokens'),
    'completion_tokens': total('completion_tokens'),
  }


def _reasons(records: Iterable[dict[str, Any]]) -> dict[str, int]:
  return dict(
    collections.Counter(record['reason'] for record in records if record['reason']).most_common()
  )
