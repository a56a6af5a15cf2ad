"""Makes seeds of self-distillation from any mix of sources, without duplicates and without test tasks:

    python -m experiments.seeds --source=toolworld --source=toolrl/rlla_sft.json --out=seeds.jsonl
    python -m experiments.seeds --source=bfcl --count=500 --source=taubench --source=Team-ACE/ToolACE --out=seeds.jsonl

Sources: toolworld, bfcl, tau2, taubench[:FILE], files of seeds, and data sets of ToolACE, xLAM, APIGen-MT, Hermes and ToolRL
rows by path or hub name (data/seed_sources.py). A seed that repeats a test task of BFCL or tau2-bench, in words or in calls, is
refused with its whole dialogue. Both packages must be there for that; --allow_unchecked writes seeds that were compared with
what there is.
Prints counts by scenario as JSON, `unchecked` being how many seeds were not compared with which test; refusals are on stderr.
`experiments.distill --config.distill.files="('seeds.jsonl',)"` takes the file.
"""

import collections
import json
import pathlib
import sys

from absl import app, flags, logging

from dcore_jax.data.benchmark_tasks import TESTS
from dcore_jax.data.overlap import Overlap, fingerprint
from dcore_jax.data.seed_sources import load_seeds
from dcore_jax.data.seeds import KINDS, Seed
from dcore_jax.files import replace_text

_SOURCES = flags.DEFINE_multi_string(
  'source', [], 'Where seeds come from; may be given several times.'
)
_OUT = flags.DEFINE_string('out', None, 'JSON-lines file to write.')
_COUNT = flags.DEFINE_integer('count', 100, 'Tasks of each kind, of sources that make them.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of what such sources draw.')
_ALLOW_UNCHECKED = flags.DEFINE_bool(
  'allow_unchecked', False, 'Write seeds though a test is not there to compare them with.'
)


def load_overlap(*, allow_unchecked: bool) -> tuple[Overlap, dict[str, str]]:
  """(index of the test tasks, why which tests are not in it); ValueError where there are such and they are not allowed."""
  tasks, absent = [], {}
  for name, read in TESTS.items():
    try:
      tasks += read()
    except ValueError as error:
      absent[name] = str(error)
  if absent and not allow_unchecked:
    raise ValueError(
      f'seeds cannot be compared with the test tasks of {" and ".join(absent)}: {"; ".join(absent.values())}. '
      'Install what is missing, or pass --allow_unchecked and keep what comes of it away from these tests'
    )
  return Overlap(tasks), absent


def collect(sources: list[str], overlap: Overlap, *, count: int, seed: int) -> tuple[list, dict]:
  """(seeds, counts): of all sources in order; the first of duplicates stays, and what repeats a test task goes, with all other
  turns of its dialogue and trials of its task: their histories say the same."""
  kept, seen, repeats, report = [], set(), [], {}
  counts = collections.Counter()
  for source in sources:
    found = load_seeds(source, count=count, seed=seed)
    matches = {one.id: overlap.find(one) for one in found.seeds}
    spoiled = {_group(one): matches[one.id] for one in found.seeds if matches[one.id]}
    before = len(kept)
    for one in found.seeds:
      mark = fingerprint(one)
      if mark in seen:
        counts['duplicates'] += 1
        continue
      seen.add(mark)
      if _group(one) in spoiled:
        test, by = matches[one.id] or (spoiled[_group(one)][0], 'dialogue')
        repeats.append({'seed': one.id, 'test': test, 'by': by})
      else:
        kept.append(one)
    report[source] = {
      'records': found.records,
      'seeds': len(found.seeds),
      'kept': len(kept) - before,
      'dropped': {reason: n for reason, n in found.dropped.most_common() if n},
    }
  ids = collections.Counter(one.id for one in kept)
  if twice := [name for name, n in ids.items() if n > 1]:
    raise ValueError(
      f'{len(twice)} seed ids occur twice, {twice[0]!r} first: two sources have one name'
    )
  kinds = collections.Counter(one.kind for one in kept)
  executable = sum(one.world is not None for one in kept)
  return kept, {
    'seeds': len(kept),
    'kinds': {kind: kinds[kind] for kind in KINDS},
    'executable': executable,
    'duplicates': counts['duplicates'],
    'refused': len(repeats),
    'refusals': repeats,
    'sources': report,
  }


def _group(seed: Seed) -> str:
  return seed.dialogue or seed.id


def main(argv: list[str]) -> None:
  if len(argv) > 1 or not _SOURCES.value or not _OUT.value:
    raise app.UsageError('needs --source and --out, and nothing else')
  logging.set_verbosity(logging.WARNING)
  try:
    overlap, absent = load_overlap(allow_unchecked=_ALLOW_UNCHECKED.value)
    for name, reason in absent.items():
      print(f'not compared with the test tasks of {name}: {reason}', file=sys.stderr)
    seeds, report = collect(_SOURCES.value, overlap, count=_COUNT.value, seed=_SEED.value)
    if not seeds:
      raise ValueError(f'no seed is left: {report["refused"]} repeat test tasks')
  except ValueError as error:
    sys.exit(f'error: {error}')
  for refusal in report['refusals']:
    print(
      f'refused: {refusal["seed"]} repeats the {refusal["by"]} of {refusal["test"]}',
      file=sys.stderr,
    )
  replace_text(
    pathlib.Path(_OUT.value), ''.join(json.dumps(seed.to_json()) + '\n' for seed in seeds)
  )
  unchecked = {name: len(seeds) for name in absent}
  print(
    json.dumps(report | {'test_tasks': overlap.tasks, 'unchecked': unchecked, 'out': _OUT.value})
  )


if __name__ == '__main__':
  app.run(main)
