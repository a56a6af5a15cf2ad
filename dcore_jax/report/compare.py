"""Compares what two models made of the same tasks: paired differences, and the verdicts that flip.

A folder is a run's work directory, with W/evaluate_<model>/trajectories.jsonl, or it has a folder
for each suite, or it holds one trajectories.jsonl itself, as `experiments.evaluate` and
`experiments.bfcl_score` write it. A task is the same where kind, id and request are: other seeds
may give another task one id. A record with a `task` is one of several trials of it (tau2-bench):
trials are paired by their ids, and the task is the unit.

compare.html    one page that fetches nothing: figures, and both traces of every flip
compare.json    the figures and the ids of the flips
compare.csv     a row for each task that both have
"""

import collections
import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.evaluate.behaviour.lazy_reasoning import count_reflections
from dcore_jax.evaluate.bfcl.score import SCORES_FILE
from dcore_jax.evaluate.trajectories import find_trajectories, model_folder, read_trajectories
from dcore_jax.files import read_json, replace_text, write_json_atomic
from dcore_jax.pages import render_page
from dcore_jax.progress import SLOW, progress
from dcore_jax.report import figures
from dcore_jax.report import traces as traces_lib
from dcore_jax.statistics import (
  bootstrap_difference,
  change_probability,
  estimate_mean,
  estimate_share,
  paired_difference,
)

ALL = 'all'
_SHARES = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A task as both models acted it out; `a` and `b` are records of `held_out`."""

  a: dict[str, Any]
  b: dict[str, Any]

  @property
  def kind(self) -> str:
    """The kind or category of the task."""
    return self.a['kind']

  @property
  def flip(self) -> str:
    """Returns 'gained' where A is wrong and B right, 'lost' for the reverse, '' otherwise."""
    if self.a['correct'] == self.b['correct']:
      return ''
    return 'gained' if self.b['correct'] else 'lost'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two models on the tasks that both have.

  Attributes:
    models: what the models are called in their folders; '' where a folder holds one.
    pairs: the common tasks.
    only: how many tasks A and B have alone.
  """

  models: tuple[str, str]
  pairs: list[Pair]
  only: tuple[int, int]


def compare(
  a: pathlib.Path,
  b: pathlib.Path,
  out: pathlib.Path,
  note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Compares two folders and writes page, JSON and CSV.

  Args:
    a, b: the folders; B is what changed, so that differences are B - A.
    out: the folder that is written.
    note: takes a text on what is left out.

  Returns:
    the content of compare.json: {'a', 'b', 'notes', 'comparisons': [{'models', 'common', 'only_a',
    'only_b', 'kinds': {kind: figures}, 'gained': [id], 'lost': [id]}]}, see `_figures`.

  Raises:
    ValueError: a folder without trajectories, an unreadable record, or nothing in common.
  """
  described = [_describe(folder) for folder in (a, b)]
  notes = described[0].pop('notes') + described[1].pop('notes')
  models_a = _models(a)
  models_b = _models(b)
  comparisons = []
  for names in _matched(models_a, models_b, (a, b), notes):
    found = _pair(names, models_a[names[0]], models_b[names[1]])
    comparisons.append(found)
    for folder, name, count in zip((a, b), names, found.only, strict=True):
      if count:
        notes.append(f'{count} tasks are in {model_folder(folder, name)} alone and are left out')
  if not any(comparison.pairs for comparison in comparisons):
    raise ValueError(f'{a} and {b} have no task in common')
  for text in notes:
    note(text)
  shown = [_compared(comparison) for comparison in comparisons if comparison.pairs]
  found = {'a': described[0], 'b': described[1], 'notes': notes, 'comparisons': shown}
  replace_text(out / 'compare.html', _page(found, comparisons))
  replace_text(out / 'compare.csv', _table(comparisons))
  write_json_atomic(out / 'compare.json', found)
  return found


# --- files ---


def _describe(folder: pathlib.Path) -> dict[str, Any]:
  """Returns {'folder', 'run': {name: value}, 'notes': [text]} from the files beside the tasks."""
  if not folder.is_dir():
    raise ValueError(f'no folder {folder}')
  run: dict[str, Any] = {}
  notes = []
  # A run that was not finished has no summary, and is compared all the same.
  if (folder / 'summary.json').exists():
    summary = read_json(folder / 'summary.json')
    run = summary.get('run') or {} if isinstance(summary, dict) else {}
  if (folder / SCORES_FILE).exists():
    scores = read_json(folder / SCORES_FILE)
    run = {'checker': scores['checker']}
    for category, counts in scores['categories'].items():
      if counts['left_out']:
        notes.append(f'{len(counts["left_out"])} items of {category} in {folder} were not scored')
  return {'folder': str(folder), 'run': run, 'notes': notes}


def _models(folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Reads the records of each model of a folder, by its name."""
  return {name: read_trajectories(path) for name, path in find_trajectories(folder).items()}


# --- pairs ---


def _matched(
  models_a: dict[str, Any],
  models_b: dict[str, Any],
  folders: tuple[pathlib.Path, pathlib.Path],
  notes: list[str],
) -> list[tuple[str, str]]:
  """Returns the models that are compared, as pairs of names; the others are noted.

  Raises:
    ValueError: it is not clear which models belong together.
  """
  pairs = [(name, name) for name in models_a if name in models_b]
  rest_a = [name for name in models_a if name not in models_b]
  rest_b = [name for name in models_b if name not in models_a]
  # The last stage is named after its estimator, which may be what differs between two runs.
  if len(rest_a) == len(rest_b) == 1:
    pairs.append((rest_a.pop(), rest_b.pop()))
  if not pairs:
    raise ValueError(
      f'{folders[0]} holds {_listed(models_a)} and {folders[1]} {_listed(models_b)}: '
      f'name one, such as {model_folder(folders[0], next(iter(models_a)))}'
    )
  for folder, rest in zip(folders, (rest_a, rest_b), strict=True):
    notes += [f'the model {name} is in {folder} alone and is left out' for name in rest]
  return pairs


def _listed(models: dict[str, Any]) -> str:
  return ', '.join(name or 'one model' for name in models)


def _pair(
  names: tuple[str, str], first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]
) -> Comparison:
  by_key = dict(zip(_keys(second), second, strict=True))
  pairs = []
  for key, record in zip(_keys(first), first, strict=True):
    if key in by_key:
      pairs.append(Pair(record, by_key[key]))
  return Comparison(names, pairs, (len(first) - len(pairs), len(second) - len(pairs)))


def _keys(records: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, int]]:
  """Returns what names the task of each record; BFCL v3 has one id twice."""
  seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
  keys = []
  for record in records:
    # A simulated user words the request of a task anew in each trial.
    request = str(record.get('task') or record.get('query', ''))
    task = (record['kind'], record['id'], request)
    keys.append((*task, seen[task]))
    seen[task] += 1
  return keys


# --- figures ---


def _compared(comparison: Comparison) -> dict[str, Any]:
  kinds: dict[str, list[Pair]] = {}
  for pair in comparison.pairs:
    kinds.setdefault(pair.kind, []).append(pair)
  # One kind alone is all there is.
  groups = kinds | ({ALL: comparison.pairs} if len(kinds) > 1 else {})
  flips: dict[str, list[str]] = {'gained': [], 'lost': []}
  for pair in comparison.pairs:
    if pair.flip:
      flips[pair.flip].append(pair.a['id'])
  return {
    'models': list(comparison.models),
    'common': len(comparison.pairs),
    'only_a': comparison.only[0],
    'only_b': comparison.only[1],
    'kinds': _all_figures(groups),
    **flips,
  }


def _all_figures(groups: dict[str, list[Pair]]) -> dict[str, dict[str, Any]]:
  found = {}
  total = len(groups) * len(_MEASURES)
  # Each interval takes thousands of samples of the tasks.
  with progress(total=total, description='compare', unit='figure', delay=SLOW) as bar:
    for kind, pairs in groups.items():
      found[kind] = _figures(pairs, bar.update)
  return found


@dataclasses.dataclass(frozen=True)
class _Units:
  """A measurement of both models, one value a unit.

  Attributes:
    before, after: of A and of B; of a task with several trials, the mean over them.
    names: tell units apart, except that an id that occurs twice names two of them.
    trials: whether some unit has several.
  """

  before: list[float]
  after: list[float]
  names: list[str]
  trials: bool

  @classmethod
  def of(cls, pairs: Sequence[Pair], measure: Callable[[dict[str, Any]], float]) -> '_Units':
    groups: dict[Any, list[Pair]] = {}
    for place, pair in enumerate(pairs):
      # An id is unique within its kind alone.
      key = (pair.kind, pair.a['task']) if 'task' in pair.a else place
      groups.setdefault(key, []).append(pair)
    means = []
    for side in ('a', 'b'):
      values = [[measure(getattr(pair, side)) for pair in group] for group in groups.values()]
      means.append([sum(found) / len(found) for found in values])
    firsts = [group[0] for group in groups.values()]
    names = [f'{pair.kind} {pair.a.get("task", pair.a["id"])}' for pair in firsts]
    return cls(*means, names, len(groups) < len(pairs))


def _figures(pairs: Sequence[Pair], advance: Callable[[int], Any]) -> dict[str, Any]:
  """Returns the figures of some tasks.

  'n' counts tasks. 'accuracy' and 'lazy' (shares of tasks) have 'a', 'b', 'difference', 'gained',
  'lost' and the 'p_value' of McNemar's exact test. 'reflections' (a response), 'reasoning_tokens'
  (a task), and 'format' and 'reward' of prompts that RL sets aside have the means 'a' and 'b' and a
  'difference' with a bootstrap interval. What the records of either side lack is absent. A task
  with several trials counts by its mean over them: it was gained where that rose, and the test is
  the sign test. `advance` is called after each measure with 1.
  """
  accuracy = _Units.of(pairs, lambda record: record['correct'])
  found = {'n': len(accuracy.names), 'accuracy': _verdicts(accuracy)}
  if all(isinstance(side.get('lazy'), bool) for pair in pairs for side in (pair.a, pair.b)):
    found['lazy'] = _verdicts(_Units.of(pairs, lambda record: record['lazy']))
  for name, measure in _MEASURES.items():
    if not any(measure(side) is None for pair in pairs for side in (pair.a, pair.b)):
      units = _Units.of(pairs, measure)
      found[name] = {
        'a': sum(units.before) / len(units.before),
        'b': sum(units.after) / len(units.after),
        'difference': bootstrap_difference(units.before, units.after, clusters=units.names),
      }
    advance(1)
  return found


def _verdicts(units: _Units) -> dict[str, Any]:
  gained = sum(second > first for first, second in zip(units.before, units.after, strict=True))
  lost = sum(second < first for first, second in zip(units.before, units.after, strict=True))
  return {
    'a': _share(units, units.before),
    'b': _share(units, units.after),
    'difference': paired_difference(
      units.before, units.after, clusters=units.names, bounds=_SHARES
    ),
    'gained': gained,
    'lost': lost,
    'p_value': change_probability(gained, lost),
  }


def _share(units: _Units, values: Sequence[float]) -> dict[str, Any]:
  if units.trials:
    return estimate_mean(values, bounds=_SHARES)
  return estimate_share(sum(values) / len(values), len(values))


def _reflections(record: dict[str, Any]) -> float | None:
  texts = [str(item['content']) for item in record['messages'] if item['role'] == 'assistant']
  return sum(map(count_reflections, texts)) / len(texts) if texts else None


def _reasoning_tokens(record: dict[str, Any]) -> float | None:
  lengths = record.get('reasoning_tokens')
  if not isinstance(lengths, list) or any(figures.number(length) is None for length in lengths):
    return None
  return float(sum(lengths))


def _scored(field: str) -> Callable[[dict[str, Any]], float | None]:
  """Returns a reader of what prompts that RL sets aside are scored by."""
  return lambda record: figures.number(record.get(field))


_MEASURES = {
  'reflections': _reflections,
  'reasoning_tokens': _reasoning_tokens,
  'format': _scored('format'),
  'reward': _scored('reward'),
}


# --- page and table ---


def _page(found: dict[str, Any], comparisons: Sequence[Comparison]) -> str:
  sections = []
  for shown, comparison in zip(
    found['comparisons'], [item for item in comparisons if item.pairs], strict=True
  ):
    flips = []
    # What was lost comes first: it is what a reader has to explain.
    for flip in ('lost', 'gained'):
      flips += [_trace(pair) for pair in comparison.pairs if pair.flip == flip]
    rows, means = _rows(shown['kinds'])
    sections.append({'shown': shown, 'rows': rows, 'means': means, 'flips': flips})
  return render_page(
    pathlib.Path(__file__).with_name('compare.html.jinja'),
    a=found['a'],
    b=found['b'],
    notes=found['notes'],
    sections=sections,
  )


def _rows(kinds: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
  """Returns the rows of verdicts and those of means."""
  rows = []
  means = []
  for kind, found in kinds.items():
    for name, label in (('accuracy', 'right'), ('lazy', 'lazy')):
      if name in found:
        counts = found[name]
        rows.append(
          {
            'label': f'{figures.kind_label(kind)}, {label}',
            'a': figures.percent(counts['a']['mean']),
            'b': figures.percent(counts['b']['mean']),
            'difference': figures.shown(counts['difference'], 1, 100),
            'changes': f'+{counts["gained"]} −{counts["lost"]}',
            'p': f'{counts["p_value"]:.3f}',
          }
        )
    for name in _MEASURES:
      if name in found:
        means.append(
          {
            'label': f'{figures.kind_label(kind)}, {name.replace("_", " ")}',
            'a': figures.plain(found[name]['a'], 2),
            'b': figures.plain(found[name]['b'], 2),
            'difference': figures.shown(found[name]['difference'], 2),
          }
        )
  return rows, means


def _trace(pair: Pair) -> dict[str, Any]:
  columns = []
  for side, record in (('a', pair.a), ('b', pair.b)):
    shown = {field: record.get(field) for field in ('messages', 'correct', 'lazy')}
    columns.append({'stage': side} | shown)
  shown = {'query': pair.a.get('query', ''), 'kind': pair.kind, 'columns': columns}
  reasons = [str(record.get('reason') or '') for record in (pair.a, pair.b)]
  return traces_lib.trace(shown) | {'id': pair.a['id'], 'flip': pair.flip, 'reasons': reasons}


def _table(comparisons: Sequence[Comparison]) -> str:
  """Returns the tasks as CSV; a figure that a record lacks is empty."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  fields = ['correct', 'lazy', *_MEASURES]
  header = ['model_a', 'model_b', 'kind', 'id', 'flip']
  for field in fields:
    header += [f'{field}_a', f'{field}_b']
  writer.writerow(header)
  for comparison in comparisons:
    for pair in comparison.pairs:
      row: list[Any] = [*comparison.models, pair.kind, pair.a['id'], pair.flip]
      for field in fields:
        for record in (pair.a, pair.b):
          value = _MEASURES[field](record) if field in _MEASURES else record.get(field)
          # Spreadsheets read 0 and 1 as numbers that can be summed.
          row.append(int(value) if isinstance(value, bool) else value)
      writer.writerow(row)
  return text.getvalue()
