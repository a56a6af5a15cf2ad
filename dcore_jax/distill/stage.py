"""The stage that distils: seeds in, shards of rows out, with everything needed to stop it anywhere and go on.

W/distill/claim.json               what the rows are made with and from; anything else needs another W
W/distill/labels.jsonl             pseudo-labelled seeds, where the config asks for them
W/distill/replies.jsonl            the journal of completions: what was answered is not asked again
W/distill/rows-00000.jsonl         rows of seeds 0..shard_seeds-1 in their order; written when all of them are finished
W/distill/outcomes-00000.jsonl     what became of each of these seeds, and what it cost
W/distill/distill.json             counts and rates
W/distill/seconds.json             the time that all calls of the run have taken so far
W/distill/sample.html              kept rows and dropped seeds to look at
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
import ml_collections

from dcore_jax.data.seeds import Seed
from dcore_jax.distill.pipeline import Outcome, by_length, check_ids, distill, label, summarise
from dcore_jax.distill.solve import Distiller
from dcore_jax.distill.wording import load_wording
from dcore_jax.files import read_json, replace_text, write_json_atomic
from dcore_jax.rollout.backends import Backend, LocalBackend, OpenAIBackend
from dcore_jax.rollout.engine import EngineStats
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.run.config import to_json

REFERENCES = ('shown', 'hidden', 'pseudo')
BACKENDS = ('local', 'openai')
_KEPT_SHOWN, _DROPPED_SHOWN = 4, 3  # in the sample, of each kind and of each reason
_CLOCK_INTERVAL = 10.0  # seconds of its time that a killed call loses at most

Local = Callable[[pathlib.Path], LocalBackend]  # journal -> our engine with the base model


def run_distillation(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  seeds: Sequence[Seed],
  local: Local,
  *,
  progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
  """Distils the seeds into `folder` -> the content of distill.json.

  Its `seconds` are those of all calls that it took, from the first on; `usage` and `occupancy` are of the call that ended it. A
  call that finds the run finished returns what was written.

  Args:
    config: the whole pipeline config; sections `distill`, and its `seed`.
    folder: results; a second call goes on where a killed one stopped.
    seeds: see `data.seeds`.
    local: makes the backend where the config says 'local'.
    progress: told 1 for every seed that is finished or dropped, at once for those of finished shards.

  Raises:
    ValueError: a config that does not hold, seeds that share an id, a folder that was begun with something else, or no row.
    ConnectionError: an endpoint that stays away. Nothing that was answered is lost: call again.
  """
  c = config.distill
  if c.reference not in REFERENCES or c.backend not in BACKENDS or c.shard_seeds < 1:
    raise ValueError(
      f'distill.reference = {c.reference!r} is one of {REFERENCES}, distill.backend = {c.backend!r} one of '
      f'{BACKENDS}, distill.shard_seeds = {c.shard_seeds} at least 1'
    )
  check_ids(seeds)
  clock = Clock(folder / 'seconds.json')
  distiller = Distiller(
    load_wording(c.wording),
    show_reference=c.reference != 'hidden',
    examples=c.examples,
    strict_count=c.strict_count,
    candidates=c.candidates,
    retries=c.retries,
    samples=c.samples,
    verify=c.verify,
    max_chars=c.max_chars,
    exact_refusals=c.exact_refusals,
  )
  sampling = SamplingParams(
    temperature=c.temperature,
    top_p=c.top_p,
    top_k=c.top_k,
    max_tokens=c.max_tokens,
    seed=config.seed,
  )
  if c.backend == 'local' and (c.base_url or c.prompt_price or c.completion_price):
    raise ValueError(
      f'distill.base_url = {c.base_url!r} and the prices {c.prompt_price} and {c.completion_price} are for '
      "distill.backend = 'openai'"
    )
  journal = folder / 'replies.jsonl'
  backend = (
    local(journal) if c.backend == 'local' else endpoint(c, c.base_url, c.model, journal, prices(c))
  )
  _claim(folder, _describe(config, seeds, distiller, sampling, backend))
  asked, unlabelled, labels = {seed.id: seed.kind for seed in seeds}, {}, {}
  before = dataclasses.replace(backend.engine.stats) if isinstance(backend, LocalBackend) else None
  if c.reference == 'pseudo':
    labeller = backend
    if c.labels.base_url:
      labeller = endpoint(
        c, c.labels.base_url, c.labels.model, folder / 'label_replies.jsonl', prices(c.labels)
      )
    seeds, unlabelled, labels = _labelled(folder, seeds, labeller, sampling, c.labels.samples)
    if labeller is not backend:
      labels['labels']['usage'] = labeller.usage.record()
  progress = progress or (lambda count: None)
  run = Shards(folder, seeds, c.shard_seeds)
  # Seeds of all unfinished shards together: a shard's last ones leave no lane idle while others wait.
  numbers = run.unfinished()
  progress(len(seeds) - len(numbers))
  if not numbers and (folder / 'distill.json').exists():
    return read_json(folder / 'distill.json')
  for place, outcome in (
    distill([seeds[n] for n in numbers], backend, sampling, distiller) if numbers else ()
  ):
    run.file(numbers[place], outcome)
    clock.tick()
    progress(1)
  records = [record | {'asked': asked[record['seed']]} for record in run.outcomes()]
  records += [
    vars(Outcome(name, asked[name], reason=reason, stage='label'))
    for name, reason in unlabelled.items()
  ]
  summary = (
    summarise(records)
    | labels
    | {
      'model': backend.model,
      'wording': distiller.wording.version,
      'usage': backend.usage.record(),
      'seconds': round(clock.write(), 1),
    }
  )
  if before:
    spent = {
      name: value - getattr(before, name) for name, value in vars(backend.engine.stats).items()
    }
    summary['occupancy'] = round(EngineStats(**spent).occupancy, 4)
  if not summary['rows']:
    raise ValueError(
      f'self-distillation kept none of {summary["seeds"]} seeds: {summary["dropped"]}'
    )
  replace_text(folder / 'sample.html', render_sample(summary, *run.sample()))
  write_json_atomic(folder / 'distill.json', summary)
  return summary


def endpoint(
  c: ml_collections.ConfigDict,
  base_url: str,
  model: str,
  journal: pathlib.Path,
  prices: tuple[float, float],
) -> OpenAIBackend:
  """The model `model` behind a URL, asked as section `distill` says; ValueError where one of the two is not given."""
  if not base_url or not model:
    raise ValueError(
      f'an endpoint needs a URL and the name of its model, got {base_url!r} and {model!r}'
    )
  return OpenAIBackend(
    base_url,
    model,
    concurrency=c.concurrency,
    timeout=c.timeout,
    retries=c.request_retries,
    journal=journal,
    prices=prices,
  )


def prices(section: ml_collections.ConfigDict) -> tuple[float, float]:
  """Of a million prompt and completion tokens at the endpoint of section `distill` or `distill.labels`."""
  return section.prompt_price, section.completion_price


# Where answers come from, at what price and in what pieces: not what the rows are.
_PLACES = (
  'backend',
  'base_url',
  'model',
  'concurrency',
  'timeout',
  'request_retries',
  'prompt_price',
  'completion_price',
  'shard_seeds',
  'labels',
)


def _settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What a config says of the rows."""
  section = {name: value for name, value in to_json(config.distill).items() if name not in _PLACES}
  return {'seed': config.seed, 'world': to_json(config.world), 'distill': section}


def check_rows(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
  """ValueError where the rows of a finished distillation, which another program may have made, are not those of this config."""
  claim = folder / 'claim.json'
  theirs = read_json(claim).get('settings') if claim.exists() else None
  if theirs is None:  # rows from elsewhere, or from before this was noted
    return
  mine = json.loads(json.dumps(_settings(config)))
  different = [name for name in ('seed', 'world') if mine[name] != theirs[name]]
  different += [
    f'distill.{name}'
    for name in mine['distill']
    if mine['distill'][name] != theirs['distill'].get(name)
  ]
  if different:
    raise ValueError(
      f'{str(folder)!r} was distilled with other {", ".join(different)}; name another --workdir'
    )


def _describe(
  config: ml_collections.ConfigDict,
  seeds: Sequence[Seed],
  distiller: Distiller,
  sampling: SamplingParams,
  backend: Backend,
) -> dict[str, Any]:
  """All that rows depend on. Where the model is, and how many questions are under way, may change between two calls."""
  digest = hashlib.sha256()
  for seed in seeds:
    digest.update(json.dumps(seed.to_json(), sort_keys=True).encode())
  options = {field.name: getattr(distiller, field.name) for field in dataclasses.fields(distiller)}
  labels = {'reference': config.distill.reference}
  if config.distill.reference == 'pseudo':
    labels |= {'samples': config.distill.labels.samples, 'label_model': config.distill.labels.model}
  return {
    'seeds': len(seeds),
    'seeds_sha256': digest.hexdigest(),
    'shard_seeds': config.distill.shard_seeds,
    'model': backend.model,
    'sampling': vars(sampling) | {'stop': list(sampling.stop)},
    'distiller': options | {'wording': distiller.wording.version},
    'labels': labels,
    'settings': _settings(config),
  }


def _claim(folder: pathlib.Path, mine: dict[str, Any]) -> None:
  """Notes what the rows are made of, or checks that the folder was begun with the same."""
  path = folder / 'claim.json'
  if path.exists():
    theirs = read_json(path)
    # A file of seeds may have moved; what it holds is compared by its digest.
    names = (mine.keys() | theirs.keys()) - {'settings'}
    different = sorted(name for name in names if mine.get(name) != theirs.get(name))
    if different:
      raise ValueError(
        f'{str(folder)!r} was begun with other {", ".join(different)}; name another --workdir'
      )
  else:
    write_json_atomic(path, mine)


def _labelled(
  folder: pathlib.Path,
  seeds: Sequence[Seed],
  backend: Backend,
  sampling: SamplingParams,
  samples: int,
) -> tuple[list[Seed], dict[str, str], dict[str, Any]]:
  """(seeds with pseudo-labels in the order of `seeds`, why others have none, counts); from labels.jsonl where that is there."""
  path = folder / 'labels.jsonl'
  if not path.exists():
    found: dict[int, Outcome] = dict(label(seeds, backend, sampling, samples))
    lines = [
      json.dumps(
        found[n].value.to_json() if found[n].value else {'id': seed.id, 'dropped': found[n].reason}
      )
      + '\n'
      for n, seed in enumerate(seeds)
    ]
    replace_text(path, ''.join(lines))
  records = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
  reasons = {record['id']: record['dropped'] for record in records if 'dropped' in record}
  dropped = collections.Counter(reasons.values())
  labelled = [Seed.from_json(record) for record in records if 'dropped' not in record]
  given = {seed.id: seed for seed in seeds}
  agree = sum(seed.calls == given[seed.id].calls for seed in labelled)
  if not labelled:
    raise ValueError(f'no seed got a pseudo-label: {dict(dropped)}')
  return (
    labelled,
    reasons,
    {
      'labels': {
        'seeds': len(seeds),
        'labelled': len(labelled),
        'agree': agree,
        'dropped': dict(dropped),
      }
    },
  )


class Clock:
  """The time of a run that may take several calls: from here on, and what earlier calls have left in a file."""

  def __init__(self, path: pathlib.Path):
    self._path, self._began = path, time.perf_counter()
    self._before = read_json(path)['seconds'] if path.exists() else 0.0
    self._written = self._began

  def tick(self) -> None:
    """Writes the time down where that was last done some seconds ago."""
    if time.perf_counter() - self._written >= _CLOCK_INTERVAL:
      self.write()

  def write(self) -> float:
    self._written = time.perf_counter()
    seconds = self._before + self._written - self._began
    write_json_atomic(self._path, {'seconds': seconds})
    return seconds


class Shards:
  """Outcomes of a run in files of `size` seeds each; a shard is written, whole, when the last of its seeds is finished."""

  def __init__(self, folder: pathlib.Path, seeds: Sequence[Seed], size: int):
    self._folder, self._seeds, self._size = folder, seeds, size
    self._open: dict[int, dict[int, Outcome]] = collections.defaultdict(dict)

  def _numbers(self, shard: int) -> range:
    return range(shard * self._size, min((shard + 1) * self._size, len(self._seeds)))

  def _paths(self, shard: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Rows are written last: a shard that has them is finished."""
    return self._folder / f'rows-{shard:05d}.jsonl', self._folder / f'outcomes-{shard:05d}.jsonl'

  @property
  def _shards(self) -> range:
    return range(-(-len(self._seeds) // self._size))

  def unfinished(self) -> list[int]:
    """The numbers of the seeds of shards that are not written, in the order to begin with: shard after shard, so that they are
    written on the way, and in each the longest chains first."""
    result = []
    for shard in self._shards:
      if not self._paths(shard)[0].exists():
        numbers = self._numbers(shard)
        result += [numbers[place] for place in by_length(self._seeds[n] for n in numbers)]
    return result

  def file(self, number: int, outcome: Outcome) -> None:
    """Takes the outcome of seed `number`; writes its shard if it was the last one."""
    shard = number // self._size
    self._open[shard][number] = outcome
    if len(self._open[shard]) < len(self._numbers(shard)):
      return
    done = self._open.pop(shard)
    rows_path, outcomes_path = self._paths(shard)
    ordered = [done[n] for n in self._numbers(shard)]
    records = [vars(outcome) | {'value': len(outcome.value)} for outcome in ordered]
    replace_text(outcomes_path, ''.join(json.dumps(record) + '\n' for record in records))
    replace_text(
      rows_path, ''.join(json.dumps(row) + '\n' for outcome in ordered for row in outcome.value)
    )

  def outcomes(self) -> Iterator[dict[str, Any]]:
    """Of all seeds, from the files; `value` is the number of rows."""
    for shard in self._shards:
      with self._paths(shard)[1].open(encoding='utf-8') as lines:
        yield from map(json.loads, lines)

  def sample(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of the first kept seeds of each kind, outcomes of the first dropped seeds of each reason)."""
    kept, dropped, wanted = collections.Counter(), collections.defaultdict(list), set()
    for record in self.outcomes():
      if record['reason']:
        if len(dropped[record['reason']]) < _DROPPED_SHOWN:
          dropped[record['reason']].append(record)
      elif kept[record['kind']] < _KEPT_SHOWN:
        kept[record['kind']] += 1
        wanted.add(record['seed'])
    rows = [
      row
      for shard in self._shards
      for row in _lines(self._paths(shard)[0])
      if row['provenance']['seed'] in wanted
    ]
    return rows, [record for records in dropped.values() for record in records]


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  with path.open(encoding='utf-8') as lines:
    yield from map(json.loads, lines)


def render_sample(
  summary: dict[str, Any], rows: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]]
) -> str:
  """A page of kept rows and dropped seeds. What models wrote is text in it, whatever it contains."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template('distill_sample.html.jinja').render(
    summary=summary, rows=rows, dropped=dropped
  )
