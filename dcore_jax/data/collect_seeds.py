"""Gathers seeds from several sources, without duplicates and without test tasks."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from dcore_jax.data.benchmark_tasks import TESTS
from dcore_jax.data.overlap import Overlap, fingerprint
from dcore_jax.data.seed_sources import Found, load_seeds
from dcore_jax.data.seeds import KINDS, Seed
from dcore_jax.progress import SLOW, progress


def load_overlap(*, allow_unchecked: bool) -> tuple[Overlap, dict[str, str]]:
  """Returns an index of the test tasks, and the reason for each test that is not in it.

  Args:
    allow_unchecked: go on without the tests that cannot be read.

  Raises:
    ValueError: a test cannot be read, and that is not allowed.
  """
  tasks = []
  absent = {}
  tests = progress(list(TESTS.items()), description='read tests', unit='test', delay=SLOW)
  for name, read in tests:
    try:
      tasks += read()
    except ValueError as error:
      # All missing benchmarks are named at once, so that one installation mends the error.
      absent[name] = str(error)
  if absent and not allow_unchecked:
    raise ValueError(
      f'seeds cannot be compared with the test tasks of {" and ".join(absent)}: '
      f'{"; ".join(absent.values())}. Install what is missing, or pass --allow_unchecked and keep '
      'what comes of it away from these tests'
    )
  return Overlap(tasks), absent


def collect(
  sources: Sequence[str], overlap: Overlap, *, count: int, seed: int
) -> tuple[list[Seed], dict[str, Any]]:
  """Loads the seeds of all sources and returns what `gather` makes of them.

  Args:
    sources: as `seed_sources.load_seeds` takes them.
    overlap: the test tasks.
    count: tasks of each kind, where a source makes its tasks.
    seed: what such a source draws from.

  Raises:
    ValueError: a source that cannot be read, or two seeds of one id.
  """
  found = ((source, load_seeds(source, count=count, seed=seed)) for source in sources)
  return gather(found, overlap)


def gather(
  sources: Iterable[tuple[str, Found]], overlap: Overlap
) -> tuple[list[Seed], dict[str, Any]]:
  """Returns the seeds of all sources, in order, and a report of counts.

  Of duplicates the first one stays. A seed that repeats a test task is refused, and with it every
  other turn of its dialogue and trial of its task: their histories contain the same words.

  Args:
    sources: the name and the seeds of each source.
    overlap: the test tasks.

  Raises:
    ValueError: two seeds of one id.
  """
  kept: list[Seed] = []
  refusals: list[dict[str, str]] = []
  duplicates = 0
  # One set for all sources, since data sets are often made from each other.
  seen = set()
  report = {}
  for source, found in sources:
    # All seeds of a source are compared before the first is kept, because a match in a later turn
    # also refuses the earlier turns of its dialogue.
    compared = progress(
      found.seeds, description=f'compare {source} with tests', unit='seed', delay=SLOW
    )
    matches = {one.id: overlap.find(one) for one in compared}
    spoiled = {_group(one): matches[one.id] for one in found.seeds if matches[one.id]}
    before = len(kept)
    for one in found.seeds:
      mark = fingerprint(one)
      # Refused seeds are marked as seen too: a copy of one in another source is counted once.
      if mark in seen:
        duplicates += 1
        continue
      seen.add(mark)
      if _group(one) in spoiled:
        # A seed without a match of its own is refused for its dialogue, with the test task that
        # another turn of it matched.
        test, by = matches[one.id] or (spoiled[_group(one)][0], 'dialogue')
        refusals.append({'seed': one.id, 'test': test, 'by': by})
      else:
        kept.append(one)
    report[source] = {
      'records': found.records,
      'seeds': len(found.seeds),
      'kept': len(kept) - before,
      # A reader may have touched a counter without a drop: zeros are no reasons.
      'dropped': {reason: n for reason, n in found.dropped.most_common() if n},
    }
  # Only kept seeds are written, so that a clash with a dropped one does no harm.
  _check_ids(kept)
  # Kinds without a seed are listed with 0, which shows what a mix lacks.
  kinds = collections.Counter(one.kind for one in kept)
  return kept, {
    'seeds': len(kept),
    'kinds': {kind: kinds[kind] for kind in KINDS},
    'executable': sum(one.world is not None for one in kept),
    'duplicates': duplicates,
    'refused': len(refusals),
    'refusals': refusals,
    'sources': report,
  }


def _check_ids(seeds: Sequence[Seed]) -> None:
  """Raises ValueError where two seeds have one id: replies and rows are found again by it."""
  ids = collections.Counter(one.id for one in seeds)
  twice = [name for name, n in ids.items() if n > 1]
  if twice:
    raise ValueError(
      f'{len(twice)} seed ids occur twice, {twice[0]!r} first: two sources have one name'
    )


def _group(seed: Seed) -> str:
  """Returns what turns of a dialogue, and trials of a task, have in common."""
  return seed.dialogue or seed.id
