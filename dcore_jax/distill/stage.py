"""The stage that distils: seeds in, shards of rows out.

Everything needed to stop it anywhere and go on stands in its folder:

W/distill/claim.json               what the rows are made with and from; others need another W
W/distill/labels.jsonl             pseudo-labelled seeds, where the config asks for them
W/distill/replies.jsonl            the journal of completions: what was answered is not asked again;
                                   further hosts have replies.host1.jsonl and so on
W/distill/rows-00000.jsonl         rows of seeds 0..shard_seeds-1 in their order; written when all
                                   of them are finished
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dcore_jax import distributed
from dcore_jax.config import DistillSection, LabelsSection, RunConfig
from dcore_jax.data.seeds import Seed
from dcore_jax.distill.algorithm import SeedOutcome, check_ids, distill, label, summarise
from dcore_jax.distill.divided import added, divide_seeds
from dcore_jax.distill.scripted import ScriptedBackend
from dcore_jax.distill.shards import Clock, Shards, json_lines
from dcore_jax.distill.solve import Distiller
from dcore_jax.distill.wording import load_wording
from dcore_jax.files import (
  read_json,
  read_json_lines,
  replace_text,
  write_json_atomic,
)
from dcore_jax.overrides import differences, to_json
from dcore_jax.pages import render_page
from dcore_jax.rollout.backends import Backend
from dcore_jax.rollout.endpoint import EndpointLimits, OpenAIBackend
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.requests import EngineStats
from dcore_jax.rollout.sampling import SamplingParams

# Whether the decomposer sees the reference calls, or labels take their place.
REFERENCES = ('shown', 'hidden', 'pseudo')
BACKENDS = ('local', 'openai', 'scripted')

Local = Callable[[pathlib.Path], LocalBackend]  # journal -> our engine with the base model


def run_distillation(
  config: RunConfig,
  folder: pathlib.Path,
  seeds: Sequence[Seed],
  local: Local,
  *,
  progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
  """Distils the seeds into `folder` and returns the content of distill.json.

  Its `seconds` are those of all calls that it took, from the first on; `usage` and
  `tokens_per_row` (tokens drawn for each token that went through the model behind a prompt) are of
  the call that ended it. A call that finds the run finished returns what was written.

  Args:
    config: the whole pipeline config; sections `distill` and `world`, and its `seed`.
    folder: folder of the results; a second call goes on where a killed one stopped.
    seeds: what to distil, see `data.seeds`.
    local: makes the backend where the config says 'local'.
    progress: called with 1 for every seed that is finished or dropped, and at once with the number
      of those in finished shards.

  Raises:
    ValueError: a config that does not hold, seeds that share an id, a folder that was begun with
      something else, or no row.
    ConnectionError: an endpoint that stays away. Nothing that was answered is lost: call again.
  """
  section = config.distill
  # Options are checked before the first completion is paid for.
  _check_section(section)
  check_ids(seeds)
  # It runs from here, so that loading a model counts as time of the run.
  clock = Clock(folder / 'seconds.json')
  distiller = _make_distiller(section)
  sampling = _make_sampling(config)
  if section.backend == 'scripted':
    backend = ScriptedBackend(seeds, distiller.wording.prompts)
  else:
    backend = _make_backend(section, distributed.own_file(folder / 'replies.jsonl'), local)
  # Before the first row: a folder of other rows must not be added to.
  _claim(folder, _describe(config, seeds, distiller, sampling, backend))
  # The engine may have served other stages. Only what distillation adds is counted.
  before = dataclasses.replace(backend.engine.stats) if isinstance(backend, LocalBackend) else None
  # Labels may change the kind of a seed and drop it. Success rates are about the given seeds.
  given = seeds
  # Without labels the given seeds are their own.
  labels = _Labels(labelled=list(seeds))
  if section.reference == 'pseudo':
    labels = _pseudo_labels(section, folder, seeds, backend, sampling)
    seeds = labels.labelled
  progress = progress or _ignore
  run = Shards(folder, seeds, section.shard_seeds)
  # The seeds of all unfinished shards are begun together: while the last seeds of one shard are
  # under way, those of the next keep the engine's lanes busy.
  # Whole shards only: an unfinished one is begun again, from the journal of replies.
  numbers = distributed.of_first(run.unfinished())
  progress(len(seeds) - len(numbers))
  # Finished by an earlier call: nothing is recomputed, and the same content is returned.
  if not numbers and distributed.of_first((folder / 'distill.json').exists()):
    return read_json(folder / 'distill.json')
  # Without numbers all rows are written, but the call that wrote them was killed before it summed
  # them up.
  if numbers:

    def rows_of(some: Sequence[Seed]) -> Iterator[tuple[int, SeedOutcome]]:
      return distill(some, backend, sampling, distiller)

    def ended(count: int) -> None:
      clock.tick()
      progress(count)

    for place, outcome in divide_seeds(rows_of, [seeds[n] for n in numbers], ended):
      run.file(numbers[place], outcome)
    # The first host has written the files, which all of them read.
    distributed.wait_for_others('distilled')
  # From the files, not from memory: earlier calls have written some of them.
  summary = summarise(_asked_records(run, given, labels)) | labels.counts
  summary['model'] = backend.model
  summary['wording'] = distiller.wording.version
  summary['usage'] = added(distributed.gather_json(backend.usage.record()))
  summary['seconds'] = round(clock.write(), 1)
  if before:
    counts = distributed.gather_json(vars(since(before, backend.engine.stats)))
    spent = EngineStats(**added(counts))
    summary['tokens_per_row'] = round(spent.tokens_per_row, 4)
  _finish(folder, run, summary)
  return summary


def _finish(folder: pathlib.Path, run: Shards, summary: dict[str, Any]) -> None:
  """Writes the sample page and the summary; raises ValueError where no row was kept."""
  # A run without a row ends here, and not in the training that would read it.
  if not summary['rows']:
    raise ValueError(
      f'self-distillation kept none of {summary["seeds"]} seeds: {summary["dropped"]}'
    )
  replace_text(folder / 'sample.html', render_sample(summary, *run.sample()))
  # The summary is written last, because a folder that has one counts as finished.
  write_json_atomic(folder / 'distill.json', summary)


def _ignore(count: int) -> None:
  del count


def _check_section(section: DistillSection) -> None:
  # One error for the three, which a person sets together.
  if (
    section.reference not in REFERENCES
    or section.backend not in BACKENDS
    or section.shard_seeds < 1
  ):
    raise ValueError(
      f'distill.reference = {section.reference!r} is one of {REFERENCES}, distill.backend = '
      f'{section.backend!r} one of {BACKENDS}, distill.shard_seeds = {section.shard_seeds} at '
      'least 1'
    )


def _make_distiller(section: DistillSection) -> Distiller:
  """Makes the distiller of section `distill`; raises ValueError where an option does not hold."""
  return Distiller(
    wording=load_wording(section.wording),
    # Labels are shown like references: the decomposer sees the calls in both cases.
    show_reference=section.reference != 'hidden',
    examples=section.examples,
    strict_count=section.strict_count,
    candidates=section.candidates,
    retries=section.retries,
    samples=section.samples,
    verify=section.verify,
    max_chars=section.max_chars,
    exact_refusals=section.exact_refusals,
  )


def _make_sampling(config: RunConfig) -> SamplingParams:
  section = config.distill
  return SamplingParams(
    temperature=section.temperature,
    top_p=section.top_p,
    top_k=section.top_k,
    max_tokens=section.max_tokens,
    # The run's seed: another one gives other answers to the same questions.
    seed=config.seed,
  )


def _make_backend(section: DistillSection, journal: pathlib.Path, local: Local) -> Backend:
  if section.backend == 'openai':
    return endpoint(section, section.base_url, section.model, journal, prices(section))
  # Options of an endpoint that no endpoint reads would be a silent mistake.
  if section.base_url or section.prompt_price or section.completion_price:
    raise ValueError(
      f'distill.base_url = {section.base_url!r} and the prices {section.prompt_price} and '
      f"{section.completion_price} are for distill.backend = 'openai'"
    )
  return local(journal)


def endpoint(
  section: DistillSection,
  base_url: str,
  model: str,
  journal: pathlib.Path,
  prices: tuple[float, float],
) -> OpenAIBackend:
  """Makes the backend of the model `model` behind a URL, asked as section `distill` says.

  Raises:
    ValueError: one of the two is not given.
  """
  # The endpoint may serve several models, and the journal knows replies by the model's name.
  if not base_url or not model:
    raise ValueError(
      f'an endpoint needs a URL and the name of its model, got {base_url!r} and {model!r}'
    )
  return OpenAIBackend(
    base_url,
    model,
    limits=EndpointLimits(
      concurrency=section.concurrency,
      timeout=section.timeout,
      retries=section.request_retries,
    ),
    journal=journal,
    prices=prices,
  )


def prices(section: DistillSection | LabelsSection) -> tuple[float, float]:
  """Returns the prices of a million prompt and completion tokens at a section's endpoint."""
  return section.prompt_price, section.completion_price


def _asked_records(run: Shards, given: Sequence[Seed], labels: '_Labels') -> list[dict[str, Any]]:
  """Returns the outcomes of all seeds, those without a label included.

  `asked` is the kind that a seed had before it was labelled.
  """
  # By id, since labels drop seeds and thereby shift their numbers.
  asked = {seed.id: seed.kind for seed in given}
  records = [record | {'asked': asked[record['seed']]} for record in run.outcomes()]
  for name, reason in labels.reasons.items():
    records.append(vars(SeedOutcome(name, asked[name], reason=reason, stage='label')))
  return records


def since(before: EngineStats, now: EngineStats) -> EngineStats:
  """Returns what an engine has done since a copy of its counts was taken."""
  return EngineStats(**{name: value - getattr(before, name) for name, value in vars(now).items()})


# --- what the rows of a folder are made of --------------------------------------------------------


# What a folder's claim compares by itself: the model by the name that its backend gives it, labels
# where there are any, and the size of shards.
_COMPARED_APART = ('backend', 'model', 'shard_seeds', 'labels')


def _settings(config: RunConfig) -> dict[str, Any]:
  """Returns the options of the seeds and of distillation, as JSON."""
  section = to_json(config.distill)
  for name in _COMPARED_APART:
    del section[name]
  return {'seed': config.seed, 'world': to_json(config.world), 'distill': section}


def check_rows(config: RunConfig, folder: pathlib.Path) -> None:
  """Checks that the rows of a finished distillation are those of this config.

  Another program may have made them.

  Raises:
    ValueError: they were made with other options; names each of them.
  """
  claim = folder / 'claim.json'
  theirs = read_json(claim).get('settings') if claim.exists() else None
  # Rows from elsewhere have no claim, and claims of earlier versions have no settings.
  if theirs is None:
    return
  different = differences(RunConfig(), theirs, _settings(config))
  if different:
    raise ValueError(
      f'{str(folder)!r} was distilled with other {"; ".join(different)}; name another --workdir, '
      'or give the old values'
    )


def _describe(
  config: RunConfig,
  seeds: Sequence[Seed],
  distiller: Distiller,
  sampling: SamplingParams,
  backend: Backend,
) -> dict[str, Any]:
  """Returns all that rows depend on.

  Where the model is, and how many questions are under way, may change between two calls.
  """
  # A digest of the content: the order of seeds and each of their fields counts.
  digest = hashlib.sha256()
  for seed in seeds:
    digest.update(json.dumps(seed.to_json(), sort_keys=True).encode())
  options = {field.name: getattr(distiller, field.name) for field in dataclasses.fields(distiller)}
  # Labels are made by another model, perhaps; then the rows depend on it.
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
  """Notes what the rows are made of, or checks that the folder was begun with the same.

  Raises:
    ValueError: it was begun with something else.
  """
  path = folder / 'claim.json'
  if path.exists():
    # Options that the program has learned since had their defaults then.
    defaults = {'sampling': SamplingParams(), 'distiller': Distiller()}
    # A file of seeds may have moved; what it holds is compared by its digest.
    compared = {name: value for name, value in mine.items() if name != 'settings'}
    different = differences(defaults, read_json(path), json.loads(json.dumps(compared)))
    if different:
      raise ValueError(
        f'{str(folder)!r} was begun with other {"; ".join(different)}; name another --workdir, '
        'or give the old values'
      )
  else:
    # Whole or not at all: half a claim would lock the folder for good.
    write_json_atomic(path, mine)


# --- pseudo-labels --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Labels:
  """Seeds with pseudo-labels, in the order of the given ones.

  Attributes:
    labelled: the seeds that have a label.
    reasons: seed id -> why another seed has none.
    counts: what the summary says of labels.
  """

  labelled: list[Seed]
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)
  counts: dict[str, Any] = dataclasses.field(default_factory=dict)


def _pseudo_labels(
  section: DistillSection,
  folder: pathlib.Path,
  seeds: Sequence[Seed],
  backend: Backend,
  sampling: SamplingParams,
) -> _Labels:
  """Labels the seeds with `backend`, or with the endpoint that section `distill.labels` names."""
  options = section.labels
  # The labeller is the model itself, unless an endpoint is named.
  if not options.base_url:
    return _labelled(folder, seeds, backend, sampling, options.samples)
  # A journal of its own: another model answers, and its questions may be the same.
  journal = distributed.own_file(folder / 'label_replies.jsonl')
  labeller = endpoint(section, options.base_url, options.model, journal, prices(options))
  labels = _labelled(folder, seeds, labeller, sampling, options.samples)
  labels.counts['labels']['usage'] = added(distributed.gather_json(labeller.usage.record()))
  return labels


def _labelled(
  folder: pathlib.Path,
  seeds: Sequence[Seed],
  backend: Backend,
  sampling: SamplingParams,
  samples: int,
) -> _Labels:
  """Labels seeds, or reads labels.jsonl where an earlier call has written it."""
  path = folder / 'labels.jsonl'
  # Labels are made once. A later call reads them, so that all rows have the same.
  if not distributed.of_first(path.exists()):

    def labels_of(some: Sequence[Seed]) -> Iterator[tuple[int, SeedOutcome]]:
      return label(some, backend, sampling, samples)

    found = dict(divide_seeds(labels_of, seeds))
    records = []
    for number, seed in enumerate(seeds):
      outcome = found[number]
      if outcome.value:
        records.append(outcome.value.to_json())
      else:
        # Dropped seeds are written, too, so that a later call can count them.
        records.append({'id': seed.id, 'dropped': outcome.reason})
    replace_text(path, json_lines(records))
    distributed.wait_for_others('labelled')
  records = read_json_lines(path)
  reasons = {record['id']: record['dropped'] for record in records if 'dropped' in record}
  dropped = dict(collections.Counter(reasons.values()))
  labelled = [Seed.from_json(record) for record in records if 'dropped' not in record]
  if not labelled:
    raise ValueError(f'no seed got a pseudo-label: {dropped}')
  given = {seed.id: seed for seed in seeds}
  counts = {
    'seeds': len(seeds),
    'labelled': len(labelled),
    # How often the label equals the reference, where seeds have one.
    'agree': sum(seed.calls == given[seed.id].calls for seed in labelled),
    'dropped': dropped,
  }
  return _Labels(labelled=labelled, reasons=reasons, counts={'labels': counts})


def render_sample(
  summary: dict[str, Any], rows: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]]
) -> str:
  """Makes a page of kept rows and dropped seeds, on which what models wrote stays text."""
  # The template is a file of the package, beside this one.
  template = pathlib.Path(__file__).with_name('distill_sample.html.jinja')
  return render_page(template, summary=summary, rows=rows, dropped=dropped)
