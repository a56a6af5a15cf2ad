"""BFCL as an evaluation: version 3 as the paper reports it, and version 4 without web search.

The official harness asks the model, in an environment of its own, see `environment`. It
renders prompts itself and wants text completions, so that `Served.tokenizer` must be there.

FOLDER/harness/result/        the harness's own files of answers
FOLDER/generate.log           what it printed
"""

import abc
import dataclasses
import json
import pathlib
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dcore_jax.evaluate.bfcl import process
from dcore_jax.evaluate.bfcl.columns import (
  CATEGORIES_V3,
  CATEGORIES_V4,
  Weights,
  columns_v3,
  columns_v4,
  floor_of,
  score_columns,
)
from dcore_jax.evaluate.bfcl.environment import V3, V4, Environment, Release, find_environment
from dcore_jax.evaluate.bfcl.results import (
  Plan,
  ResultFiles,
  Row,
  is_failed,
  is_too_long,
  read_plan,
)
from dcore_jax.evaluate.bfcl.runner import Job
from dcore_jax.evaluate.bfcl.score import Item, judge, make_record, read_tasks
from dcore_jax.evaluate.suites import (
  Served,
  Suite,
  SuiteResult,
  SuiteSettings,
  accuracy,
  register_suite,
)
from dcore_jax.files import read_json_lines, write_json_atomic

_MODES = ('prompt', 'fc')
_SERVER_SECONDS = 120.0  # that the server may take to list its models
_FAILED = 'its inference failed'  # begins the reason
_TOO_LONG = 'prompt_too_long'
_INTERVALS = (
  "Intervals hold the true value in 95 % of the cases. A column's is made of the Wilson intervals "
  'of its categories (method of variance estimates recovery). Their units are tasks.'
)


class BfclSuite(Suite):
  """What both versions share.

  Args:
    settings: see `SuiteSettings`.
    mode: 'prompt' puts functions into BFCL's system prompt, and reads [f(a=1)]. 'fc' gives them as
      data in Qwen3's format, and reads calls between tags.
    categories: names with commas between them; '' takes all.
    environment: the folder of the environment; '' takes the one in .suites.

  Raises:
    ValueError: an unknown mode or category.
  """

  release: Release
  known: Sequence[str]  # categories
  more_notes: Sequence[str] = ()

  def __init__(
    self, settings: SuiteSettings, mode: str = 'prompt', categories: str = '', environment: str = ''
  ):
    super().__init__(settings)
    if mode not in _MODES:
      raise ValueError(f'unknown mode {mode!r}; expected one of {list(_MODES)}')
    names = [name.strip() for name in categories.split(',') if name.strip()]
    if unknown := sorted(set(names) - set(self.known)):
      raise ValueError(f'unknown categories {unknown}; expected some of {list(self.known)}')
    self.mode = mode
    # In the order of the benchmark, each once.
    self.categories = [name for name in self.known if name in names or not names]
    self.environment: Environment = find_environment(self.release, environment)

  def prepare(self) -> None:
    """Makes the environment where it is absent; that downloads 100 MB."""
    self.environment.make()

  def answer(self, served: Served, folder: pathlib.Path, told: Callable[[int, int], None]) -> None:
    """Runs `bfcl generate`. Failed inferences of an earlier call are asked again."""
    if served.tokenizer is None:
      raise ValueError(f'{self.name} renders prompts itself, and needs the folder of a tokenizer')
    plan = self._plan()
    root = folder / 'harness'
    root.mkdir(parents=True, exist_ok=True)
    files = self._files(folder)
    files.tidy(plan)
    finished = files.count_finished(plan)
    told(finished, plan.total)
    if finished == plan.total:
      return

    def look() -> None:
      nonlocal finished
      # An answer that was counted may have failed; the last count knows.
      if (found := min(files.count(), plan.total)) != finished:
        finished = found
        told(finished, plan.total)

    seconds = min(_SERVER_SECONDS, self.settings.timeout)
    context = process.wait_for_server(served, seconds)
    write_json_atomic(root / 'test_case_ids_to_generate.json', plan.ids())
    try:
      process.generate(
        self.environment,
        self._job('generate', root, self._generate_arguments(served), served)
        | {'context': context},
        folder / 'generate.log',
        look,
      )
    finally:
      told(files.count_finished(plan), plan.total)

  def score(self, folder: pathlib.Path) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Judges what was answered, in a process without network."""
    plan = self._plan()
    files = self._files(folder)
    records: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    answers: dict[str, list[Item]] = {}
    for category in self.categories:
      answers[category], beyond, missing = sort_answers(files, plan.tasks[category], category)
      records += [_without_room(category, item) for item in beyond]
      left_out += missing
    if not records and not any(answers.values()):
      raise ValueError(f'no answers in {files.folder}')
    records += self._judge(answers)
    notes = self._notes(plan, records, left_out)
    scores, missing_columns = self._scores(plan, records)
    title = self.release.title
    return SuiteResult(self.name, title, scores, [*notes, *missing_columns], left_out), records

  @abc.abstractmethod
  def _judge(self, answers: Mapping[str, Sequence[Item]]) -> list[dict[str, Any]]:
    """Returns the judged answers of all categories as trajectories."""

  @abc.abstractmethod
  def _columns(self, sizes: Mapping[str, int]) -> dict[str, Weights]:
    """Returns the columns of the version."""

  def _plan(self) -> Plan:
    package = self.environment.package()
    return read_plan(package, self.release, self.categories, self.settings.limit)

  def _model(self) -> str:
    return 'dcore-FC' if self.mode == 'fc' else 'dcore'

  def _files(self, folder: pathlib.Path) -> ResultFiles:
    return ResultFiles(folder / 'harness' / 'result' / self._model(), self.release)

  def _generate_arguments(self, served: Served) -> list[str]:
    """Returns what `bfcl generate` is called with."""
    return [
      '--skip-server-setup',
      '--local-model-path',
      str(pathlib.Path(served.tokenizer).absolute()),
      '--temperature',
      str(self.settings.temperature),
      # The state of all APIs behind each turn is a hundred times as long as the answers.
      '--exclude-state-log',
      '--num-threads',
      str(self.settings.concurrency),
      # The file of ids also says which conversations come before tasks of memory.
      '--run-ids',
    ]

  def _job(
    self, command: str, root: pathlib.Path, arguments: list[str], served: Served | None = None
  ) -> Job:
    settings = self.settings
    return Job(
      command=command,
      arguments=arguments,
      name=self._model(),
      fc=self.mode == 'fc',
      root=str(root.absolute()),
      base_url=served.base_url if served else '',
      model=served.model if served else '',
      key=served.key if served else '',
      temperature=settings.temperature,
      max_tokens=settings.max_tokens,
      seed=settings.seed,
      timeout=settings.timeout,
      concurrency=settings.concurrency,
    )

  def _scores(
    self, plan: Plan, records: Sequence[Mapping[str, Any]]
  ) -> tuple[list[Any], list[str]]:
    """Returns the figures, and sentences on columns that have none."""
    verdicts: dict[str, list[bool]] = {category: [] for category in self.categories}
    for record in records:
      verdicts[record['kind']].append(record['correct'])
    counts = {name: (sum(found), len(found)) for name, found in verdicts.items()}
    all_sizes = dict.fromkeys(self.known, 1) | dict(plan.sizes)
    columns = self._columns(all_sizes)
    scores = score_columns(columns, counts)
    if missing := sorted(set(columns) - {score.category for score in scores}):
      missing = [f'No {", ".join(missing)}: some of their categories have no judged task.']
    for name, found in verdicts.items():
      if found:
        scores.append(accuracy(name, found, floor=floor_of(name)))
    return scores, missing

  def _notes(
    self,
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    left_out: Sequence[Mapping[str, Any]],
  ) -> list[str]:
    settings = self.settings
    functions = 'as data (fc)' if self.mode == 'fc' else "in BFCL's system prompt"
    notes = [
      f'Functions {functions}; temperature {settings.temperature:g} (the harness takes 0.001 of '
      f'itself), at most {settings.max_tokens} tokens a response.',
      _INTERVALS,
    ]
    if settings.limit:
      notes.append(f'All figures are of the first {settings.limit} tasks of each category.')
    if set(self.categories) != set(self.known):
      notes.append(f'Only {", ".join(self.categories)}.')
    failed = sum(entry['reason'].startswith(_FAILED) for entry in left_out)
    if failed:
      notes.append(f'{failed} inferences failed and are in no figure; they are asked again.')
    if len(left_out) > failed:
      notes.append(f'{len(left_out) - failed} of {plan.total} tasks have no answer yet.')
    beyond = sum(record['reason'] == _TOO_LONG for record in records)
    if beyond:
      notes.append(f'{beyond} tasks do not fit into the context of the model and count as wrong.')
    refused = sum(bool(record['refused']) for record in records)
    if refused:
      notes.append(f'{refused} answers held text that was not evaluated, see their trajectories.')
    return [*notes, *self.more_notes]


@register_suite('bfcl')
class Bfcl(BfclSuite):
  """BFCL v3: 17 categories, as the paper reports it."""

  release = V3
  known = CATEGORIES_V3

  def _judge(self, answers: Mapping[str, Sequence[Item]]) -> list[dict[str, Any]]:
    package = self.environment.package()
    records = []
    for category, found in answers.items():
      # Of an id that occurs twice, either has the reference.
      references = read_tasks(category, package)
      items = []
      for item in found:
        reference = references[item.task['id']][0][1]
        items.append(dataclasses.replace(item, answer=reference))
      verdicts = judge(items, category, package, self.mode == 'fc')
      for item, verdict in zip(items, verdicts, strict=True):
        if verdict['correct'] is None:
          raise ValueError(f'{category} cannot be judged: {verdict["reason"]}')
        records.append(make_record(category, item, verdict))
    return records

  def _columns(self, sizes: Mapping[str, int]) -> dict[str, Weights]:
    return columns_v3(sizes)


@register_suite('bfcl4')
class Bfcl4(BfclSuite):
  """BFCL v4 without web search, which needs a paid service, and without memory_vector."""

  release = V4
  known = CATEGORIES_V4
  more_notes = (
    "'overall' lacks web search, 20 % of the official one; the other parts keep their weights, "
    'made to add up to 1. Memory is memory_kv and memory_rec_sum, without memory_vector, which '
    'needs faiss and a model of embeddings. Format sensitivity is not run and has no weight.',
  )

  def _judge(self, answers: Mapping[str, Sequence[Item]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
      verdicts = self._evaluate(answers, pathlib.Path(folder))
    records = []
    for category, items in answers.items():
      for item in items:
        reason = verdicts[category].get(item.row['id'], '')
        verdict = {'correct': not reason, 'reason': reason, 'refused': []}
        records.append(make_record(category, item, verdict))
    return records

  def _columns(self, sizes: Mapping[str, int]) -> dict[str, Weights]:
    return columns_v4(sizes)

  def _evaluate(
    self, answers: Mapping[str, Sequence[Item]], root: pathlib.Path
  ) -> dict[str, dict[str, str]]:
    """Runs `bfcl evaluate`; returns for each category why which answer is wrong."""
    verdicts: dict[str, dict[str, str]] = {category: {} for category in answers}
    results = root / 'result' / self._model()
    results.mkdir(parents=True)
    judged = [category for category, items in answers.items() if items]
    arguments = ['--test-category', ','.join(judged), '--partial-eval']
    while judged:
      for category in judged:
        rows = [item.row for item in answers[category]]
        lines = [json.dumps(row) for row in rows if row['id'] not in verdicts[category]]
        path = results / f'{V4.prefix}_{category}_result.json'
        path.write_text('\n'.join(lines), encoding='utf-8')
      code, begun, printed = process.evaluate(
        self.environment, self._job('evaluate', root, arguments)
      )
      if not code:
        break
      # A negative status is a signal, by which the kernel keeps the limits.
      if code >= 0 or not begun:
        last = (printed.strip().splitlines() or ['no message'])[-1]
        raise ValueError(f'bfcl evaluate ended with status {code}: {last}')
      category = begun[-1].rpartition('_')[0]
      name = signal.Signals(-code).name
      verdicts[category][begun[-1]] = f'limit: ended by {name}'
    for category in judged:
      for path in root.glob(f'score/**/{V4.prefix}_{category}_score.json'):
        # The first line is the summary.
        for row in read_json_lines(path)[1:]:
          verdicts[category][row['id']] = read_reason(row)
    return verdicts


def sort_answers(
  files: ResultFiles, tasks: Sequence[Row], category: str
) -> tuple[list[Item], list[Item], list[dict[str, Any]]]:
  """Reads the answers to tasks -> (to be judged, without room in the context, left out)."""
  answered: dict[str, list[Row]] = {}
  for row in files.rows(category):
    answered.setdefault(row['id'], []).append(row)
  judged = []
  beyond = []
  left_out = []
  for task in tasks:
    rows = answered.get(task['id'])
    if not rows:
      left_out.append({'id': task['id'], 'reason': 'not answered yet'})
      continue
    row = rows.pop(0)
    if is_failed(row):
      left_out.append({'id': task['id'], 'reason': f'{_FAILED}: {str(row.get("result"))[:200]}'})
    elif is_too_long(row):
      beyond.append(Item(row | {'result': ''}, task, None))
    else:
      judged.append(Item(row, task, None))
  return judged, beyond, left_out


def read_reason(row: Mapping[str, Any]) -> str:
  """Returns the kind of error of a line of a score file."""
  error = row.get('error')
  kind = row.get('error_type') or (error.get('error_type') if isinstance(error, dict) else None)
  return str(kind or 'wrong')


def _without_room(category: str, item: Item) -> dict[str, Any]:
  """Returns a task that the model could not be asked as a trajectory with a wrong answer."""
  verdict = {'correct': False, 'reason': _TOO_LONG, 'refused': []}
  return make_record(category, item, verdict)
