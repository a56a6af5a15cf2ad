"""Whether a seed repeats a test task: by the words of its request, by its calls, or by whom it is about."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import leaf_values, print_calls
from dcore_jax.data.seeds import Seed

WORDS = 8  # of an n-gram of a request; a shorter request must be the same one
SHARE = 0.5  # of a request's n-grams, from which it is the test's
CALLS = 3  # in a row, whatever their arguments
VALUES = 4  # argument values between fewer calls in a row, from which they are no coincidence
_WORD = re.compile(r'\w+')


@dataclasses.dataclass(frozen=True)
class TestTask:
  """What a test says that a seed must not. `names` are identifiers of its own, such as that of its user."""

  __test__ = False  # pytest would take it for a test of its own

  id: str
  query: str
  calls: tuple[ToolCall, ...] = ()
  names: tuple[str, ...] = ()


class Overlap:
  """Finds test tasks by what seeds have in common with them."""

  def __init__(self, tasks: Iterable[TestTask]):
    self._queries: dict[tuple[str, ...], str] = {}
    self._grams: dict[tuple[str, ...], list[str]] = collections.defaultdict(
      list
    )  # the tasks that have a word run, each once
    self._sizes: collections.Counter[str] = (
      collections.Counter()
    )  # different word runs of each task
    self._calls: dict[tuple[str, ...], str] = {}
    self._names: dict[str, str] = {}
    self.tasks = 0
    for task in tasks:
      self.tasks += 1
      words = normalised(task.query)
      if words:
        self._queries.setdefault(words, task.id)
      grams = set(_runs(words, WORDS))
      self._sizes[task.id] += len(grams)
      for gram in grams:
        self._grams[gram].append(task.id)
      for run in _call_runs(task.calls):
        self._calls.setdefault(run, task.id)
      for name in task.names:
        self._names.setdefault(name, task.id)

  def find(self, seed: Seed) -> tuple[str, str] | None:
    """(test task, 'query' | 'calls' | 'name') that the seed repeats; None for none."""
    for words in {
      normalised(message.content): None for message in seed.conversations if message.role == 'user'
    }:
      if words in self._queries:
        return self._queries[words], 'query'
      grams = dict.fromkeys(_runs(words, WORDS))
      owners = [self._grams[gram] for gram in grams if gram in self._grams]
      hits = collections.Counter(task for tasks in owners for task in tasks)
      if grams and len(owners) >= SHARE * len(grams):
        return hits.most_common(1)[0][0], 'query'
      for task, count in hits.most_common():  # a test's words in the middle of many others
        if count >= SHARE * self._sizes[task]:
          return task, 'query'
    for run in _call_runs(seed.calls):
      if run in self._calls:
        return self._calls[run], 'calls'
    if self._names:
      said = {
        word
        for message in seed.conversations
        if message.role == 'user'
        for word in _WORD.findall(message.content)
      }
      said |= {value for call in seed.calls for value in map(str, leaf_values(call.arguments))}
      for name in sorted(said & self._names.keys()):
        return self._names[name], 'name'
    return None


def normalised(text: str) -> tuple[str, ...]:
  """Words in lower case; spelling apart, what is asked."""
  return tuple(_WORD.findall(text.lower()))


def fingerprint(seed: Seed) -> tuple[Any, ...]:
  """Equal for seeds that are duplicates of each other: the same words in the same conversation, and the same calls."""
  return (
    tuple((message.role, normalised(message.content)) for message in seed.conversations),
    print_calls(list(seed.calls)),
  )


def _runs(items: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
  for start in range(len(items) - size + 1):
    yield tuple(items[start : start + size])


def _call_runs(calls: Sequence[ToolCall]) -> Iterator[tuple[str, ...]]:
  """Runs of calls that are too much to be shared by chance."""
  texts = [_normalised_call(call) for call in calls]
  counts = [len(list(leaf_values(call.arguments))) + len(call.positional) for call in calls]
  for size in range(1, CALLS + 1):
    for start in range(len(texts) - size + 1):
      if size == CALLS or sum(counts[start : start + size]) >= VALUES:
        yield tuple(texts[start : start + size])


def _normalised_call(call: ToolCall) -> str:
  """Name and arguments in one order, texts by their words and numbers by their value."""

  def plain(value):
    if isinstance(value, str):
      return ' '.join(normalised(value))
    if isinstance(value, dict):
      return sorted((str(key), plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
      return [plain(item) for item in value]
    return (
      float(value)
      if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**53
      else value
    )

  return f'{call.name} {plain(call.arguments)} {plain(call.positional)}'
