"""Runs evaluation suites on a model: our own behind a server of this process, or an endpoint.

OUT/<suite>/claim.json     the model, settings and options that the folder's answers belong to
OUT/<suite>/result.json    see `suites`; a suite that has one is not run again
OUT/summary.json           what all suites have measured

A suite that was interrupted goes on; one that fails does not keep the others from running.
"""

import contextlib
import dataclasses
import inspect
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dcore_jax.claims import claim, hold
from dcore_jax.evaluate.known_suites import SUITES
from dcore_jax.evaluate.suites import (
  RESULT_FILE,
  Served,
  Suite,
  SuiteSettings,
  make_suite,
  write_result,
)
from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.models.hf_checkpoint import load_config
from dcore_jax.progress import progress, show_compiling
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.model_folders import find_model_folder, folder_name
from dcore_jax.statistics import format_estimate

CLAIM_FILE = 'claim.json'
SUMMARY_FILE = 'summary.json'
_PROMPT_TOKENS = 4096  # room for prompts, where the model has the positions
_MAX_WAITING = 1024  # rollouts that may wait for a lane
# Where or how fast a suite is run does not change its answers.
_FREE = ('concurrency', 'timeout', 'data')

Options = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Model:
  """What is measured.

  Attributes:
    name: a directory, a name on the hub, '' for the packaged organism; or the model's name at an
      endpoint.
    base_url: of an endpoint; '' serves the model in this process.
    key: what the endpoint must be sent.
    tokenizer: a directory, for suites that need one and an endpoint.
    lanes: of our engine; 0 is one for each request that is under way at once.
    max_len: tokens of prompt and answer of our engine; 0 has room for the answer and prompts of
      4,096 tokens, or for as many as the model has positions.
  """

  name: str = ''
  base_url: str = ''
  key: str = ''
  tokenizer: str = ''
  lanes: int = 0
  max_len: int = 0


# --- what is asked for ---


def read_names(text: str) -> tuple[str, ...]:
  """Returns the names of 'gsm8k,humaneval'.

  Raises:
    ValueError: an unknown name, or one that stands there twice.
  """
  names = tuple(name.strip() for name in text.split(',') if name.strip())
  check_names(names)
  return names


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError for an unknown suite, and for one that is named twice."""
  unknown = [name for name in names if name not in SUITES]
  if unknown:
    raise ValueError(f'unknown suites {unknown}; expected some of {sorted(SUITES)}')
  if len(set(names)) < len(names):
    raise ValueError(f'a suite is named twice in {list(names)}')


def read_options(text: str) -> dict[str, dict[str, Any]]:
  """Reads 'bfcl.mode=fc,bfcl.categories=simple,parallel' -> {suite: {option: value}}.

  A comma ends a value where the next option begins behind it. A value is read as the type that the
  suite declares for the option.

  Raises:
    ValueError: an entry without a suite, option or value, an option that the suite does not take,
      or a value of another kind.
  """
  options: dict[str, dict[str, Any]] = {}
  for entry in re.split(r',\s*(?=\w+\.\w+\s*=)', text.strip()) if text.strip() else ():
    match = re.fullmatch(r'\s*(\w+)\.(\w+)\s*=(.*)', entry, re.DOTALL)
    if not match:
      raise ValueError(f'suite option {entry!r}; expected SUITE.OPTION=VALUE')
    suite, name, value = match[1], match[2], match[3].strip()
    if suite not in SUITES:
      raise ValueError(f'suite option {entry!r}: unknown suite; expected one of {sorted(SUITES)}')
    kinds = typing.get_type_hints(SUITES[suite].__init__)
    known = [each for each in inspect.signature(SUITES[suite]).parameters if each != 'settings']
    if name not in known:
      raise ValueError(f'suite option {entry!r}: unknown option; {suite!r} takes {known}')
    options.setdefault(suite, {})[name] = _read_value(entry, kinds.get(name, str), value)
  return options


def _read_value(entry: str, kind: Any, value: str) -> Any:
  origin = typing.get_origin(kind) or kind
  if origin is bool:
    if value.lower() not in ('true', 'false'):
      raise ValueError(f'suite option {entry!r}: expected true or false')
    return value.lower() == 'true'
  if origin in (int, float):
    try:
      return origin(value)
    except ValueError:
      raise ValueError(f'suite option {entry!r}: expected a number') from None
  # Any kind of sequence: the suites that take several words take a tuple.
  if origin is not str and isinstance(origin, type) and issubclass(origin, Sequence):
    return tuple(word.strip() for word in value.split(',') if word.strip())
  return value


def make_suites(names: Sequence[str], settings: SuiteSettings, options: Options) -> list[Suite]:
  """Makes suites, and prepares them all before a model is loaded.

  Raises:
    ValueError: an unknown name, options of a suite that is not run, or what is missing, in all
      suites together.
  """
  check_names(names)
  unused = sorted(set(options) - set(names))
  if unused:
    raise ValueError(f'options of suites that are not run: {unused}')
  suites = [make_suite(name, settings, options.get(name, {})) for name in names]
  problems = []
  for suite in suites:
    try:
      suite.prepare()
    except (ValueError, OSError) as error:
      problems.append(str(error))
  if problems:
    raise ValueError('; '.join(problems))
  return suites


# --- the model ---


@contextlib.contextmanager
def serve_engine(engine: Engine, tokenizer: Any, folder: pathlib.Path, name: str) -> Iterator[str]:
  """Serves an engine on a free port of this machine while the block runs; yields the address.

  Nobody else may touch the engine meanwhile. Afterwards it is its owner's again.

  Args:
    engine: of the model.
    tokenizer: of the model.
    folder: with the tokenizer.
    name: by which clients ask for the model.

  Raises:
    RuntimeError: the engine failed.
  """
  # Imported here: a run without suites does not need what a server needs (the extra `serve`).
  from dcore_jax.serve.background import BackgroundServer, engine_failed
  from dcore_jax.serve.openai_api import Limits, Service
  from dcore_jax.serve.scheduler import Scheduler

  scheduler = Scheduler(engine, _MAX_WAITING)
  try:
    scheduler.prepare()
    show_compiling(scheduler.wait_until_ready)
    limits = Limits(engine.max_new, requests=engine.lanes + _MAX_WAITING, body_bytes=2**26)
    service = Service(scheduler, tokenizer, names=name, limits=limits, folder=folder)
    server = BackgroundServer(service, '127.0.0.1', 0)
    try:
      yield server.url
    finally:
      server.close()
    if scheduler.failure is not None:
      raise engine_failed(scheduler)
  finally:
    scheduler.close()


@contextlib.contextmanager
def serve(model: Model, settings: SuiteSettings, folder: pathlib.Path) -> Iterator[Served]:
  """Loads a model and serves it while the block runs.

  Raises:
    ValueError: a directory that is no model, or one without room for answers as long as asked for.
  """
  from dcore_jax.serve.server import load_model

  positions = load_config(folder).max_position_embeddings
  room = min(positions, model.max_len or settings.max_tokens + _PROMPT_TOKENS)
  if settings.max_tokens >= room:
    raise ValueError(
      f'max_tokens = {settings.max_tokens} leaves no room for a prompt: prompt and answer together '
      f'may have {room} tokens'
    )
  loaded = load_model(str(folder), lanes=model.lanes or settings.concurrency, max_len=room)
  name = folder_name(folder)
  with serve_engine(loaded.engine, loaded.tokenizer, folder, name) as url:
    yield Served(url, name, tokenizer=folder)


# --- running ---


def run_suites(
  names: Sequence[str],
  model: Model,
  settings: SuiteSettings,
  options: Options,
  out: pathlib.Path,
) -> dict[str, Any]:
  """Runs suites and writes their results; see the top of this file.

  Args:
    names: of the suites, in the order in which they are run.
    model: what is measured.
    settings: of all suites.
    options: of single suites, by name.
    out: the folder of all results.

  Returns:
    the content of OUT/summary.json: {'model', 'suites': {name: result}, 'failed': {name: reason}}.

  Raises:
    ValueError: anything that is wrong before the first request, or a folder that holds answers of
      another model, other settings or other options.
  """
  suites = make_suites(names, settings, options)
  if model.base_url:
    tokenizer = find_model_folder(model.tokenizer) if model.tokenizer else None
    served = Served(model.base_url, model.name, model.key, tokenizer)
    name = model.name
  else:
    folder = find_model_folder(model.name)
    name = folder_name(folder)

  def source() -> contextlib.AbstractContextManager[Served]:
    return contextlib.nullcontext(served) if model.base_url else serve(model, settings, folder)

  with hold(out):
    return run_prepared(suites, source, name, options, out)


def run_prepared(
  suites: Sequence[Suite],
  source: Callable[[], contextlib.AbstractContextManager[Served]],
  model: str,
  options: Options,
  out: pathlib.Path,
) -> dict[str, Any]:
  """Runs suites that are prepared; see `run_suites`.

  Args:
    suites: from `make_suites`.
    source: serves the model; called only where a suite has still something to ask.
    model: tells the model from others.
    options: as given to `make_suites`.
    out: the folder of all results.
  """
  for suite in suites:
    _claim(suite, model, options.get(suite.name, {}), out)
  waiting = [suite for suite in suites if not (out / suite.name / RESULT_FILE).exists()]
  failed: dict[str, str] = {}
  if waiting:
    with source() as served:
      for suite in waiting:
        try:
          _answer(suite, served, out / suite.name)
        # Whatever a harness raises is no reason to lose the suites behind it.
        except Exception as error:  # pylint: disable=broad-except
          failed[suite.name] = _reason(error)
  # Without the model, whose memory the checkers of some suites have a use for.
  for suite in waiting:
    if suite.name not in failed:
      try:
        write_result(out / suite.name, *suite.score(out / suite.name))
      except Exception as error:  # pylint: disable=broad-except
        failed[suite.name] = _reason(error)
  results = {}
  for suite in suites:
    if suite.name not in failed:
      results[suite.name] = read_json(out / suite.name / RESULT_FILE)
  summary = {'model': model, 'suites': results, 'failed': failed}
  write_json_atomic(out / SUMMARY_FILE, summary)
  return summary


def _answer(suite: Suite, served: Served, folder: pathlib.Path) -> None:
  with progress(total=0, description=suite.name, unit='task') as bar:

    def told(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    suite.answer(served, folder, told)


def _reason(error: Exception) -> str:
  """Returns why a suite failed; the place of what nobody has foreseen goes to stderr."""
  if isinstance(error, (ValueError, OSError)):
    return str(error)
  traceback.print_exception(error, file=sys.stderr)
  return f'{type(error).__name__}: {error}'


def _claim(suite: Suite, model: str, options: Mapping[str, Any], out: pathlib.Path) -> None:
  """Writes down what the answers of a folder belong to, or refuses the folder of others."""
  settings = dataclasses.asdict(suite.settings) | {'data': str(suite.settings.data)}
  # With all defaults: an option that is left out this time is another value, too.
  bound = inspect.signature(type(suite)).bind(suite.settings, **options)
  bound.apply_defaults()
  taken = {f'{suite.name}.{name}': value for name, value in bound.arguments.items()}
  del taken[f'{suite.name}.settings']
  parameters = inspect.signature(type(suite)).parameters
  # A suite may have learned an option since the folder was begun.
  defaults = {
    f'{suite.name}.{name}': parameter.default
    for name, parameter in parameters.items()
    if parameter.default is not inspect.Parameter.empty
  }
  claim(
    out / suite.name / CLAIM_FILE,
    {'model': model, **settings, **taken},
    'holds answers of an evaluation that differs in',
    free=_FREE,
    defaults=defaults,
    flag='--out',
  )


# --- for people ---


def with_published(
  suites: Mapping[str, Mapping[str, Any]], published: Mapping[str, float]
) -> dict[str, Any]:
  """Returns results of suites with what others have published beside the scores.

  A published figure that nothing was measured for becomes a note of its suite.

  Args:
    suites: suite -> result.
    published: 'SUITE/CATEGORY' or 'SUITE/CATEGORY/METRIC' -> value.
  """
  shown = {}
  for name, result in suites.items():
    waiting = {key: value for key, value in published.items() if key.partition('/')[0] == name}
    scores = []
    for score in result['scores']:
      for key in (f'{name}/{score["category"]}', f'{name}/{score["category"]}/{score["metric"]}'):
        if key in published:
          score = score | {'published': published[key]}
          waiting.pop(key, None)
      scores.append(score)
    notes = [f'published {key} {value:g}: not measured' for key, value in waiting.items()]
    shown[name] = {**result, 'scores': scores, 'notes': [*result['notes'], *notes]}
  return shown


def format_results(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a table of results for a terminal, and the notes below it."""
  rows = [('suite', 'category', 'metric', 'measured', 'floor', 'published')]
  notes = []
  for name, result in results.items():
    for score in result['scores']:
      figures = [format_estimate(score['estimate'])]
      for field in ('floor', 'published'):
        value = score[field]
        figures.append('' if value is None else f'{value:.3f}')
      rows.append((name, score['category'], score['metric'], *figures))
    notes += [f'{name}: {note}' for note in result['notes']]
    if result['left_out']:
      first = result['left_out'][0]
      count = len(result['left_out'])
      notes.append(f'{name}: {count} without a verdict, the first: {first["reason"]}')
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = []
  for row in rows:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join([*lines, *notes])
