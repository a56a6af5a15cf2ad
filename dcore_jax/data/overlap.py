"""Finds seeds that repeat a test task by the words of its request, its calls, or its user."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import leaf_values, print_calls
from dcore_jax.data.seeds import Seed

WORDS = 8  # words of an n-gram of a request; a shorter request is compared as a whole
SHARE = 0.5  # share of a request's n-grams from which it counts as the test's
CALLS = 3  # calls in a row that count as the test's, whatever their arguments are
VALUES = 4  # argument values from which fewer calls in a row are no coincidence either
_WORD = re.compile(r'\w+')


@dataclasses.dataclass(frozen=True)
class TestTask:
  """The parts of a test task that a seed must not repeat.

  `names` are identifiers that belong to the task alone, such as its user's.
  """

  __test__ = False  # otherwise pytest collects the class because of its name

  id: str
  query: str
  calls: tuple[ToolCall, ...] = ()
  names: tuple[str, ...] = ()


class Overlap:
  """Finds test tasks by what seeds have in common with them."""

  def __init__(self, tasks: Iterable[TestTask]):
    self._queries: dict[tuple[str, ...], str] = {}
    # The tasks in which an n-gram of words stands, each once.
    self._grams: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    # The number of different n-grams of each task.
    self._sizes: collections.Counter[str] = collections.Counter()
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
    """Returns (test task, 'query' | 'calls' | 'name') that the seed repeats, None for none."""
    said = [message.content for message in seed.conversations if message.role == 'user']
    # Equal texts are compared once; the order stays, so that the same task is named every time.
    for words in dict.fromkeys(normalised(text) for text in said):
      task = self._find_query(words)
      if task is not None:
        return task, 'query'
    for run in _call_runs(seed.calls):
      if run in self._calls:
        return self._calls[run], 'calls'
    if self._names:
      task = self._find_name(said, seed.calls)
      if task is not None:
        return task, 'name'
    return None

  def _find_query(self, words: tuple[str, ...]) -> str | None:
    """Returns the test task whose request is in these words."""
    # A request of fewer than 8 words has no n-gram, and is found only as a whole.
    if words in self._queries:
      return self._queries[words]
    grams = dict.fromkeys(_runs(words, WORDS))
    shared = [gram for gram in grams if gram in self._grams]
    hits: collections.Counter[str] = collections.Counter()
    for gram in shared:
      hits.update(self._grams[gram])
    if grams and len(shared) >= SHARE * len(grams):
      return hits.most_common(1)[0][0]
    # Many other words may surround a test's request.
    for task, count in hits.most_common():
      if count >= SHARE * self._sizes[task]:
        return task
    return None

  def _find_name(self, said: Sequence[str], calls: Sequence[ToolCall]) -> str | None:
    """Returns the test task one of whose identifiers a user says or a call uses."""
    words = set()
    for text in said:
      words.update(_WORD.findall(text))
    for call in calls:
      # Identifiers such as mei_kovacs_8020 are one word for `_WORD`, and keep their case.
      words.update(map(str, leaf_values(call.arguments)))
    found = sorted(words & self._names.keys())
    return self._names[found[0]] if found else None


def normalised(text: str) -> tuple[str, ...]:
  """Returns the words of a text in lower case, without punctuation."""
  return tuple(_WORD.findall(text.lower()))


def fingerprint(seed: Seed) -> tuple[Any, ...]:
  """Makes a key that is equal for seeds that duplicate each other.

  Those have the same words in the same conversation, and the same calls.
  """
  said = tuple((message.role, normalised(message.content)) for message in seed.conversations)
  return said, print_calls(list(seed.calls))


def _runs(items: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
  for start in range(len(items) - size + 1):
    yield tuple(items[start : start + size])


def _call_runs(calls: Sequence[ToolCall]) -> Iterator[tuple[str, ...]]:
  """Yields runs of calls that have too much in them to be shared by chance."""
  texts = [_normalised_call(call) for call in calls]
  counts = [len(list(leaf_values(call.arguments))) + len(call.positional) for call in calls]
  for size in range(1, CALLS + 1):
    for start in range(len(texts) - size + 1):
      if size == CALLS or sum(counts[start : start + size]) >= VALUES:
        yield tuple(texts[start : start + size])


def _normalised_call(call: ToolCall) -> str:
  """Writes name and arguments in one order, texts by their words and numbers by their value."""
  return f'{call.name} {_plain(call.arguments)} {_plain(call.positional)}'


def _plain(value: Any) -> Any:
  if isinstance(value, str):
    return ' '.join(normalised(value))
  if isinstance(value, dict):
    return sorted((str(key), _plain(item)) for key, item in value.items())
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  # Integers above 2**53 would lose digits as floats, and two of them could become equal.
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return float(value) if is_number and abs(value) < 2**53 else value
