"""The data of a run by a recipe: so many seeds of each kind from each source, no test tasks.

    W/recipe/seeds.jsonl      what is distilled (section `recipe.seeds`)
    W/recipe/prompts.jsonl    seeds whose decision points reinforcement learning asks
    W/recipe/result.json      what was asked for, and what became of every source

An entry of the recipe is {source, count, get}, or {source, single, sequential, parallel,
irrelevant, get}: at most so many seeds of any kind, or of each kind; -1 is all, and none without a
number. `source` is what `experiments.seeds` takes, and `get` says how to come by it. Of the seeds
that are neither duplicates nor test tasks, those are taken whose ids have the smallest hashes: they
do not depend on the order of the source, or on how many are taken.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dcore_jax.config import RunConfig
from dcore_jax.data import tau2_tasks
from dcore_jax.data.collect_seeds import gather, load_overlap
from dcore_jax.data.seed_sources import TAUBENCH, Found, load_seeds
from dcore_jax.data.seeds import KINDS, Seed, decision_points
from dcore_jax.files import read_json, read_json_lines, replace_text, write_json_atomic
from dcore_jax.worlds.registry import WORLDS, named_world

SOURCE = 'source'
ANY = 'count'
FOLDER = 'recipe'
# (part of the recipe, the stage that it is for, the file of its seeds)
PARTS = (('seeds', 'distill', 'seeds.jsonl'), ('prompts', 'rl', 'prompts.jsonl'))
_ALL = -1
# Sources that are no files, and so have nothing to download.
_PACKAGES = ('tau2', 'taubench')


@dataclasses.dataclass(frozen=True)
class Source:
  """An entry of a recipe.

  Attributes:
    name: in the recipe.
    place: as `seed_sources.load_seeds` takes it.
    counts: seeds of each kind at most, or {ANY: seeds of all kinds}; -1 is all.
    get: how to come by it; '' where that is known.
  """

  name: str
  place: str
  counts: Mapping[str, int]
  get: str = ''

  @property
  def wanted(self) -> bool:
    """Whether it gives any seed."""
    return any(self.counts.values())

  def record(self) -> dict[str, Any]:
    """Returns all that its seeds depend on, as JSON."""
    return {SOURCE: self.place, **self.counts}


def local_source(place: str) -> bool:
  """Whether a source is a world or an installed benchmark, and not a data set."""
  name = place.partition(':')[0]
  return name in WORLDS or name in _PACKAGES


def read_sources(section: Mapping[str, Any], where: str) -> list[Source]:
  """Reads a part of a recipe.

  Raises:
    ValueError: names the entry that is wrong, and the field.
  """
  sources = []
  for name, fields in section.items():
    entry = f'{where}.{name}'
    if not isinstance(fields, Mapping):
      raise ValueError(f'{entry} must be a section, got {fields!r}')
    known = (SOURCE, 'get', ANY, *KINDS)
    unknown = sorted(set(fields) - set(known))
    if unknown:
      raise ValueError(f'{entry} has unknown fields {unknown}; known are {list(known)}')
    for field in (SOURCE, 'get'):
      if not isinstance(fields.get(field, ''), str):
        raise ValueError(f'{entry}.{field} must be text, got {fields[field]!r}')
    if not fields.get(SOURCE):
      raise ValueError(f'{entry} has no {SOURCE}')
    counts = {field: fields[field] for field in (ANY, *KINDS) if field in fields}
    for field, count in counts.items():
      if isinstance(count, bool) or not isinstance(count, int) or count < _ALL:
        raise ValueError(f'{entry}.{field} = {count!r} must be a whole number; {_ALL} is all')
    if ANY in counts and len(counts) > 1:
      raise ValueError(f'{entry} has both {ANY} and a number for a kind; set one of them')
    source = Source(name, fields[SOURCE], counts, fields.get('get', ''))
    if source.place.partition(':')[0] in WORLDS and _ALL in counts.values():
      raise ValueError(f'{entry}: a world makes as many tasks as it is asked for, and not all')
    sources.append(source)
  return sources


def parts(config: RunConfig) -> Iterator[tuple[str, str, list[Source]]]:
  """Yields (name, file, sources) of the parts of the recipe that the config's stages need.

  Raises:
    ValueError: an entry that cannot be read, or one beside the files that it replaces.
  """
  for name, stage, file in PARTS:
    sources = read_sources(getattr(config.recipe, name), f'recipe.{name}')
    if not sources or stage not in config.stages:
      continue
    if getattr(config, stage).files:
      raise ValueError(f'recipe.{name} and {stage}.files both say what is used; set one of them')
    if stage == 'rl' and config.rl.episodes:
      raise ValueError('rl.episodes acts out tasks of the world, and recipe.prompts asks prompts')
    yield name, file, [source for source in sources if source.wanted]


def check(config: RunConfig, present: Callable[[str], Any]) -> None:
  """Checks that everything is there that the recipe needs, before anything is begun.

  Args:
    config: the whole config.
    present: finds a data set by its place, or raises ValueError.

  Raises:
    ValueError: names all that is missing, and how to get it.
  """
  problems = []
  needed = list(parts(config))
  for name, _, sources in needed:
    for source in sources:
      try:
        _check_source(source, present)
      except ValueError as error:
        hint = f'; get it with: {source.get}' if source.get else ''
        problems.append(f'recipe.{name}.{source.name}: {error}{hint}')
  if needed and not config.recipe.allow_unchecked:
    try:
      load_overlap(allow_unchecked=False)
    except ValueError as error:
      problems.append(str(error).replace('pass --allow_unchecked', 'set recipe.allow_unchecked'))
  if problems:
    raise ValueError('; '.join(problems))


def _check_source(source: Source, present: Callable[[str], Any]) -> None:
  name, _, place = source.place.partition(':')
  if source.place == 'tau2':
    tau2_tasks.package_folder()
  elif name == 'taubench':
    present(place or TAUBENCH)
  elif name in WORLDS:
    named_world(source.place)
  else:
    present(source.place)


def prepare(config: RunConfig, folder: pathlib.Path) -> dict[str, Any]:
  """Writes the files of the recipe into `folder`, and returns what became of every source.

  Args:
    config: the whole config; its `recipe`, `seed` and `stages`.
    folder: see the top of this file. Files that are there and belong to the same recipe stay.

  Raises:
    ValueError: a source that cannot be read, a part without a seed, or files of another recipe.
  """
  asked = list(parts(config))
  result = folder / 'result.json'
  report = read_json(result) if result.exists() else {}
  missing = []
  for name, file, sources in asked:
    record = {'seed': config.seed, **{source.name: source.record() for source in sources}}
    if name not in report:
      missing.append((name, file, sources, record))
    elif report[name]['asked'] != record:
      was = report[name]['asked']
      raise ValueError(
        f'{str(folder)!r} holds the {name} of another recipe: was {was}, is {record}; name another '
        '--workdir'
      )
  if not missing:
    return report
  overlap, absent = load_overlap(allow_unchecked=config.recipe.allow_unchecked)
  for name, file, sources, record in missing:
    found = ((source, _load(source, config.seed, name)) for source in sources)
    seeds, counts = gather(((source.name, each) for source, each in found), overlap)
    chosen: list[Seed] = []
    begin = 0
    for source in sources:
      entry = counts['sources'][source.name]
      kept = seeds[begin : begin + entry['kept']]
      begin += entry['kept']
      taken = choose(kept, source.counts, config.seed)
      kinds = collections.Counter(seed.kind for seed in taken)
      entry |= {'taken': len(taken), 'kinds': {kind: kinds[kind] for kind in KINDS}}
      chosen += taken
    if not chosen:
      raise ValueError(f'recipe.{name} gives no seed: {counts["sources"]}')
    lines = [json.dumps(seed.to_json()) + '\n' for seed in chosen]
    replace_text(folder / file, ''.join(lines))
    points = sum(1 for seed in chosen for _ in decision_points(seed))
    report[name] = {
      'asked': record,
      'seeds': len(chosen),
      'prompts': points,
      'duplicates': counts['duplicates'],
      'contaminated': counts['refused'],
      'contaminated_by': dict(collections.Counter(r['test'] for r in counts['refusals'])),
      'unchecked': absent,
      'sources': counts['sources'],
    }
  # Written last: what it names is complete.
  write_json_atomic(result, report)
  return report


def read_part(folder: pathlib.Path, name: str) -> list[Seed]:
  """Reads the seeds of a part that `prepare` has written."""
  file = {part: file for part, _, file in PARTS}[name]
  return [Seed.from_json(record) for record in read_json_lines(folder / file)]


def choose(seeds: Sequence[Seed], counts: Mapping[str, int], seed: int) -> list[Seed]:
  """Returns at most as many seeds as asked for, in their order.

  Args:
    seeds: of one source.
    counts: see `Source`.
    seed: of the draw.
  """
  ranked = sorted(seeds, key=lambda one: hashlib.sha256(f'{seed} {one.id}'.encode()).digest())
  taken: collections.Counter[str] = collections.Counter()
  names = set()
  for one in ranked:
    kind = ANY if ANY in counts else one.kind
    limit = counts.get(kind, 0)
    if limit == _ALL or taken[kind] < limit:
      taken[kind] += 1
      names.add(one.id)
  return [one for one in seeds if one.id in names]


def format_report(report: Mapping[str, Any]) -> str:
  """Returns a table for a terminal: what each source gave, and why not more."""
  rows = [('part', 'source', 'records', 'taken', *KINDS, 'dropped')]
  for part, found in report.items():
    for name, entry in found['sources'].items():
      kinds = [str(entry['kinds'][kind]) for kind in KINDS]
      dropped = ', '.join(f'{reason} {count}' for reason, count in entry['dropped'].items())
      rows.append((part, name, str(entry['records']), str(entry['taken']), *kinds, dropped))
    rows.append((part, 'all', '', str(found['seeds']), '', '', '', '', _dropped(found)))
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = []
  for row in rows:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


def _dropped(found: Mapping[str, Any]) -> str:
  words = f'duplicates {found["duplicates"]}, test tasks {found["contaminated"]}'
  if found['unchecked']:
    words += f'; not compared with {", ".join(found["unchecked"])}'
  return words


def _load(source: Source, seed: int, part: str) -> Found:
  counts = [count for count in source.counts.values() if count > 0]
  # Prompts and seeds of one world are different tasks: the seeds of runs are two apart here.
  drawn = 2 * seed + (part == 'prompts')
  return load_seeds(source.place, count=max(counts, default=0), seed=drawn)
