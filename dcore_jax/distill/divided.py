"""Seeds divided among hosts: each asks about its share, and all of them get all outcomes."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from dcore_jax import distributed
from dcore_jax.data.seeds import Seed
from dcore_jax.distill.algorithm import SeedOutcome

# Seeds -> (place, outcome) as they end.
Asking = Callable[[Sequence[Seed]], Iterator[tuple[int, SeedOutcome]]]


def divide_seeds(
  ask: Asking, seeds: Sequence[Seed], ended: Callable[[int], Any] | None = None
) -> Iterator[tuple[int, SeedOutcome]]:
  """Yields (place, outcome) of all seeds: as they end, or in their order on several hosts.

  What a seed gives does not depend on the others, nor therefore on the number of hosts.

  Args:
    ask: asks the model about some seeds.
    seeds: all of them, in the order to begin with; equal on all hosts.
    ended: called with the number of seeds that have ended since.
  """
  hosts = jax.process_count()
  # In turn, since the longest conversations come first.
  mine = range(jax.process_index(), len(seeds), hosts)
  outcomes = ask([seeds[place] for place in mine]) if mine else iter(())
  records = []
  for number, outcome in outcomes:
    if hosts == 1:
      yield number, outcome
    else:
      records.append((mine[number], _to_json(outcome)))
    if ended:
      ended(1)
  if hosts == 1:
    return
  # Only now: what ends at different times on different hosts must not meet in a collective.
  found = {}
  for part in distributed.gather_json(records):
    found |= {place: _from_json(record) for place, record in part}
  if ended:
    ended(len(seeds) - len(mine))
  yield from sorted(found.items())


def added(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Adds counts by their names."""
  total: collections.Counter[str] = collections.Counter()
  for record in records:
    total.update(record)
  return dict(total)


def _to_json(outcome: SeedOutcome) -> dict[str, Any]:
  value = outcome.value
  # A label is a seed, and everything else is rows.
  stored = {'seed': value.to_json()} if isinstance(value, Seed) else {'rows': value}
  return vars(outcome) | {'value': stored}


def _from_json(record: dict[str, Any]) -> SeedOutcome:
  stored = record['value']
  value = Seed.from_json(stored['seed']) if 'seed' in stored else stored['rows']
  return SeedOutcome(**record | {'value': value})
