"""Algorithm 1 over many seeds: their questions are in flight at once, on an engine or a fleet.

A seed decides the order of its own questions (solve.py) and never sees another's state. The random
stream of a question is derived from its seed's id and its number in the conversation. So what a
seed gives depends neither on the other seeds nor on when a run was interrupted.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dcore_jax.data.seeds import Seed
from dcore_jax.distill.asking import Ask, Dropped
from dcore_jax.distill.labels import pseudo_labelled
from dcore_jax.distill.solve import Distiller
from dcore_jax.rollout.backends import Backend, ChatRequest, Reply
from dcore_jax.rollout.sampling import SamplingParams

SEVERAL = ('sequential', 'parallel')  # kinds with subtasks; success rates are theirs alone
# Characters that are kept of a dropped seed's last reply: enough to see what went wrong, and a
# reply that never ends does not fill the files of outcomes.
_LAST_CHARS = 4000


@dataclasses.dataclass
class SeedOutcome:
  """What became of a seed, and what it cost.

  Attributes:
    seed: id of the seed.
    kind: kind of the seed as it was given.
    value: what its conversation returned; None where it was dropped.
    reason: why it was dropped; '' where it was not.
    stage: how far it came before it was dropped (`asking.Dropped`); '' where it was not.
    calls: number of completions asked for.
    prompt_tokens: their prompt tokens, as the backend counts them.
    completion_tokens: the tokens of the completions themselves.
    seconds: the time of its completions, one after the other where they depend on each other.
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
class _Conversation:
  """A seed whose conversation has begun.

  `replies` are those to its open questions, None where one is awaited.
  """

  number: int
  ask: Ask
  key: int
  outcome: SeedOutcome
  replies: list[Reply | None] = dataclasses.field(default_factory=list)


class _Conversations:
  """The conversations of all seeds: what they wait to ask, and which have ended."""

  def __init__(self, seeds: Sequence[Seed], ask: Callable[[Seed], Ask], purpose: str):
    self._ask = ask
    self._purpose = purpose
    # Lazily: a hundred thousand seeds need not all have a conversation in memory.
    self._unstarted = iter(enumerate(seeds))
    # First in, first out, and ahead of seeds that have not begun.
    self._waiting: collections.deque[tuple[_Conversation, int, ChatRequest]] = collections.deque()
    self.ended: collections.deque[tuple[int, SeedOutcome]] = collections.deque()

  def source(self, free: int) -> list[tuple[tuple[_Conversation, int], ChatRequest]]:
    """Gives up to `free` questions, each with its conversation and its place there."""
    # A seed is begun only when no open question could take its place: fewer conversations are under
    # way then, and an engine keeps the beginnings of their prompts.
    while len(self._waiting) < free:
      following = next(self._unstarted, None)
      if following is None:
        break
      self._begin(*following)
    count = min(free, len(self._waiting))
    given = [self._waiting.popleft() for _ in range(count)]
    return [((conversation, place), request) for conversation, place, request in given]

  def _begin(self, number: int, seed: Seed) -> None:
    conversation = _Conversation(
      number=number,
      ask=self._ask(seed),
      key=_key(self._purpose + seed.id),
      outcome=SeedOutcome(seed.id, seed.kind),
    )
    # Runs to the first question, or to the end of a seed that has none.
    self._go_on(conversation, None)

  def answer(self, conversation: _Conversation, place: int, reply: Reply) -> None:
    """Takes the reply to one question; the conversation goes on when all are answered."""
    _count(conversation.outcome, reply)
    conversation.replies[place] = reply
    # The questions of one round were asked together, and are answered in any order.
    if None not in conversation.replies:
      # These completions ran side by side: the slowest one says how long they took.
      conversation.outcome.seconds += max(reply.seconds for reply in conversation.replies)
      self._go_on(conversation, conversation.replies)

  def _go_on(self, conversation: _Conversation, replies: list[Reply] | None) -> None:
    outcome = conversation.outcome
    try:
      # A generator that has not begun takes None; later it is sent the replies to its questions.
      prompts = conversation.ask.send(replies)
    except Dropped as dropped:
      outcome.reason = str(dropped)
      outcome.stage = dropped.stage
      self.ended.append((conversation.number, outcome))
    except StopIteration as stop:
      outcome.value = stop.value
      # Only dropped seeds show their last reply; the rows of a kept one hold it.
      outcome.last = ''
      self.ended.append((conversation.number, outcome))
    else:
      conversation.replies = [None] * len(prompts)
      # The number of the question in its conversation selects its random stream. A question that is
      # asked again has a new number, and so gets another answer.
      for place, messages in enumerate(prompts):
        request = ChatRequest(tuple(messages), (conversation.key, outcome.calls))
        self._waiting.append((conversation, place, request))
        outcome.calls += 1


def converse(
  seeds: Sequence[Seed],
  ask: Callable[[Seed], Ask],
  backend: Backend,
  sampling: SamplingParams,
  purpose: str = '',
) -> Iterator[tuple[int, SeedOutcome]]:
  """Holds one conversation with the model for every seed -> (number, outcome) as they end.

  Conversations that have begun come before new ones, because an engine still holds the beginning of
  their next prompts. New ones begin in the order of the seeds. Conversations of another `purpose`
  with the same seeds have other random streams.
  """
  conversations = _Conversations(seeds, ask, purpose)
  for (conversation, place), reply in backend.stream(conversations.source, sampling):
    conversations.answer(conversation, place, reply)
    # Ended ones leave at once, so that a killed run loses as little as possible.
    while conversations.ended:
      yield conversations.ended.popleft()
  # Conversations that ended without a single question have had no reply.
  yield from conversations.ended


def _key(name: str) -> int:
  """Returns 31 bits of a seed's id, from which its random streams are derived."""
  digest = hashlib.sha256(name.encode('utf-8', 'surrogatepass')).digest()
  # A part of a random key must be below 2^32. These 31 bits are what existing journals were made
  # with: another number of bits would give every question another random stream.
  return int.from_bytes(digest[:4], 'big') >> 1


def _count(outcome: SeedOutcome, reply: Reply) -> None:
  outcome.prompt_tokens += reply.prompt_tokens
  outcome.completion_tokens += reply.completion_tokens
  text = reply.text
  if len(text) > _LAST_CHARS:
    text = text[:_LAST_CHARS] + ' ...'
  # A refused request has no text, and says why instead.
  outcome.last = reply.error or text


def by_length(seeds: Iterable[Seed]) -> list[int]:
  """Returns the places of the seeds in the order to begin with.

  The longest chains of dependent completions come first, so that single short completions are left
  when an engine's lanes begin to empty.
  """
  # In completions: how long each of them will be is not known.
  lengths = [_chain_length(seed) for seed in seeds]
  return sorted(range(len(lengths)), key=lambda place: -lengths[place])


def _chain_length(seed: Seed) -> int:
  """The number of completions that wait for each other, the decomposition included."""
  # Its subtasks follow each other, one completion or more each.
  if seed.kind == 'sequential':
    return 1 + len(seed.calls)
  return 2 if seed.kind == 'parallel' else 1


def distill(
  seeds: Sequence[Seed],
  backend: Backend,
  sampling: SamplingParams,
  distiller: Distiller | None = None,
) -> Iterator[tuple[int, SeedOutcome]]:
  """Distils seeds, begun in their order -> (number, outcome) as they finish.

  The value of an outcome is the seed's rows, which say what they were made with.

  Args:
    seeds: what to distil.
    backend: the model that is asked.
    sampling: how its completions are sampled.
    distiller: how rows are made; None is one with its default options.

  Raises:
    ValueError: no seeds, or two of one id.
  """
  check_ids(seeds)
  distiller = distiller or Distiller()
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
    # Every row says what it was made with, since files of rows are copied and joined.
    outcome.value = [row | {'provenance': provenance} for row in outcome.value or ()]
    yield number, outcome


def label(
  seeds: Sequence[Seed], backend: Backend, sampling: SamplingParams, samples: int
) -> Iterator[tuple[int, SeedOutcome]]:
  """Pseudo-labels seeds by majority over `samples` attempts -> (number, outcome) as they finish.

  The value of an outcome is the seed with its label.

  Raises:
    ValueError: no seeds, two of one id, or no attempts.
  """
  # Before anything is asked: a wrong option must not cost completions.
  check_ids(seeds)
  if samples < 1:
    raise ValueError(f'samples = {samples}: a pseudo-label needs at least one')

  def ask(seed: Seed) -> Ask[Seed]:
    return pseudo_labelled(seed, samples)

  # Labels have random streams of their own. Otherwise a single call, which is asked for with the
  # same words, would be solved by the first sample of its label.
  yield from converse(seeds, ask, backend, sampling, 'label ')


def check_ids(seeds: Sequence[Seed]) -> None:
  """Raises ValueError where there are no seeds, or two have one id."""
  if not seeds:
    raise ValueError('no seeds to distil')
  # Ids name random streams and files of results, so that two of one name would be mixed up.
  counts = collections.Counter(seed.id for seed in seeds)
  duplicate = [name for name, count in counts.items() if count > 1]
  if duplicate:
    raise ValueError(f'seed ids occur twice: {duplicate[:3]}')


def summarise(outcomes: Iterable[SeedOutcome | dict[str, Any]]) -> dict[str, Any]:
  """Computes counts and rates of all outcomes.

  `success_rate` is the paper's (docs/method.md, section 1.8): of the seeds with several subtasks
  for whose subtasks a reasoning was generated, the share that verifies. `success_rate_all` is the
  share of all seeds with several subtasks, and `decomposition_rate` the share of those whose
  decomposition holds.

  Args:
    outcomes: also as records, as a shard holds them. `value` may be rows or their number. `asked`,
      where there is one, is the kind that the seed had before it was labelled anew. The seed is
      counted by that kind, and where the label has no subtasks its decomposition does not hold.
  """
  # Records of shards are dicts, fresh outcomes are not.
  records = [vars(one) if isinstance(one, SeedOutcome) else one for one in outcomes]
  kept = [record for record in records if not record['reason']]
  several = [record for record in records if _asked_kind(record) in SEVERAL]
  split = [record for record in several if record['kind'] in SEVERAL]
  # A seed that fails verification has come further than one without a complete reasoning. The paper
  # leaves the latter out.
  reasoned = [record for record in split if record['stage'] in ('', 'verify')]
  decomposed = [record for record in split if record['stage'] not in ('decompose', 'label')]
  verified = [record for record in split if not record['reason']]
  scenarios = {}
  # By the kind that was given; labels change kinds, and rates are about the given seeds.
  for kind in sorted({_asked_kind(record) for record in records}):
    mine = [record for record in records if _asked_kind(record) == kind]
    right = [record for record in mine if not record['reason']]
    scenarios[kind] = {
      'seeds': len(mine),
      'kept': len(right),
      'rate': _share(right, mine),
      'rows': sum(map(_row_count, right)),
      'dropped': _reasons(mine),
    }
  return {
    'seeds': len(records),
    'kept': len(kept),
    'rows': sum(map(_row_count, kept)),
    'dropped': _reasons(records),
    'kept_by_kind': {kind: scenario['kept'] for kind, scenario in scenarios.items()},
    'seeds_by_kind': {kind: scenario['seeds'] for kind, scenario in scenarios.items()},
    'several': len(several),
    'decomposed': len(decomposed),
    'decomposition_rate': _share(decomposed, several),
    'success_rate': _share(verified, reasoned),
    'success_rate_all': _share(verified, several),
    'scenarios': scenarios,
    'calls': sum(record['calls'] for record in records),
    'prompt_tokens': sum(record['prompt_tokens'] for record in records),
    'completion_tokens': sum(record['completion_tokens'] for record in records),
  }


def _asked_kind(record: dict[str, Any]) -> str:
  return record.get('asked', record['kind'])


def _row_count(record: dict[str, Any]) -> int:
  value = record['value']
  return value if isinstance(value, int) else len(value or ())


def _share(part: Sequence[Any], whole: Sequence[Any]) -> float:
  return len(part) / len(whole) if whole else 0.0


def _reasons(records: Iterable[dict[str, Any]]) -> dict[str, int]:
  counts = collections.Counter(record['reason'] for record in records if record['reason'])
  return dict(counts.most_common())
