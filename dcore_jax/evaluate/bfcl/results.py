"""Tasks of BFCL and the files in which its harness keeps answers.

The harness appends an answer as a line {'id', 'result', ...} to the file of its category, and skips
what is in the file. Memory tasks of version 4 have conversations before them in which the model
fills its memory; these have a file of their own, and the memory goes on from one to the next.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dcore_jax.evaluate.behaviour.lazy_reasoning import inference_failed, parse_row
from dcore_jax.evaluate.bfcl.environment import V4, Release
from dcore_jax.evaluate.bfcl.runner import TOO_LONG
from dcore_jax.files import decode_utf8, read_json_lines, replace_text

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which tasks are asked.

  Attributes:
    tasks: of each category, in the order of the benchmark. An id may occur twice.
    sizes: tasks that each category has, asked or not.
    earlier: of each category of memory, the conversations that come before the tasks.
  """

  tasks: Mapping[str, Sequence[Row]]
  sizes: Mapping[str, int]
  earlier: Mapping[str, Sequence[Row]]

  @property
  def total(self) -> int:
    """The number of tasks."""
    return sum(len(tasks) for tasks in self.tasks.values())

  def ids(self) -> dict[str, list[str]]:
    """Returns what the harness is to ask: category -> ids, with earlier conversations."""
    found = {}
    for category, tasks in self.tasks.items():
      entries = [*self.earlier.get(category, ()), *tasks]
      found[category] = list(dict.fromkeys(entry['id'] for entry in entries))
    return found


def read_plan(
  package: pathlib.Path, release: Release, categories: Sequence[str], limit: int
) -> Plan:
  """Reads the tasks of a release.

  Args:
    package: its folder bfcl_eval.
    release: which one it is.
    categories: names of categories.
    limit: takes the first so many tasks of each; 0 takes all.
  """
  tasks = {}
  sizes = {}
  earlier = {}
  for category in categories:
    is_memory = category.startswith('memory')
    name = 'memory' if is_memory else category
    rows = read_json_lines(package / 'data' / f'{release.prefix}_{name}.json')
    sizes[category] = len(rows)
    # The harness takes ids, and thus all tasks of one that occurs twice.
    first = {row['id'] for row in rows[: limit or None]}
    rows = [row for row in rows if row['id'] in first]
    if is_memory:
      scenarios = dict.fromkeys(row['scenario'] for row in rows)
      folder = package / 'data' / 'memory_prereq_conversation'
      before = []
      for scenario in scenarios:
        for row in read_json_lines(folder / f'memory_{scenario}.json'):
          before.append(row | {'scenario': scenario})
      earlier[category] = [_renamed(row, category) for row in before]
      rows = [_renamed(row, category) for row in rows]
    tasks[category] = rows
  return Plan(tasks, sizes, earlier)


def _renamed(row: Row, category: str) -> Row:
  """Returns a task of memory under the name that it has with one kind of memory."""
  return row | {'id': row['id'].replace('memory', category, 1)}


@dataclasses.dataclass(frozen=True)
class ResultFiles:
  """The files of results of one model.

  Attributes:
    folder: holds them, also in folders below.
    release: whose harness writes them.
  """

  folder: pathlib.Path
  release: Release

  def path(self, category: str) -> pathlib.Path:
    """Returns the file of a category, which need not exist."""
    name = f'{self.release.prefix}_{category}_result.json'
    found = next(self.folder.rglob(name), None)
    return found or self.folder / name

  def rows(self, category: str) -> list[Row]:
    """Returns the whole lines of a category."""
    path = self.path(category)
    return [row for row in _lines(path) if row is not None] if path.exists() else []

  def count(self) -> int:
    """Counts the answers to tasks, also failed ones, without parsing them."""
    answers = 0
    for path in self.folder.rglob(f'{self.release.prefix}_*_result.json'):
      if not path.name.endswith('_prereq_result.json'):
        answers += path.read_bytes().count(b'\n')
    return answers

  def count_finished(self, plan: Plan) -> int:
    """Counts the tasks of a plan that need not be asked again."""
    finished = 0
    for category, tasks in plan.tasks.items():
      rows = collections.Counter(row['id'] for row in self.rows(category) if not is_failed(row))
      asked = collections.Counter(task['id'] for task in tasks)
      finished += (rows & asked).total()
    return finished

  def tidy(self, plan: Plan) -> int:
    """Drops what the harness could not read or would not ask again.

    These are lines that were not written whole, failed inferences, answers to only one of two tasks
    with one id, and what came behind a conversation that failed to fill the memory.

    Returns:
      The number of failed inferences.
    """
    failures = 0
    for category, tasks in plan.tasks.items():
      again = self._failed_scenarios(category, plan.earlier.get(category, ()))
      wanted = collections.Counter(task['id'] for task in tasks)
      scenarios = {task['id']: task.get('scenario') for task in tasks}
      rows = self.rows(category)
      failed = {row['id'] for row in rows if is_failed(row)}
      failures += len(failed)
      answered = collections.Counter(row['id'] for row in rows)
      kept = []
      for row in rows:
        name = row['id']
        if name in failed or answered[name] < wanted[name] or scenarios.get(name) in again:
          continue
        kept.append(row)
      self._replace(category, kept)
      if self.release is V4 and category in plan.earlier:
        earlier = {row['id']: row['scenario'] for row in plan.earlier[category]}
        name = f'{category}_prereq'
        self._replace(name, [row for row in self.rows(name) if earlier.get(row['id']) not in again])
    return failures

  def _failed_scenarios(self, category: str, earlier: Sequence[Row]) -> set[str]:
    """Returns the scenarios whose memory was not filled as it should be."""
    scenarios = {row['id']: row['scenario'] for row in earlier}
    failed = set()
    for row in self.rows(f'{category}_prereq') if earlier else ():
      if is_failed(row) and row['id'] in scenarios:
        failed.add(scenarios[row['id']])
    return failed

  def _replace(self, category: str, rows: Sequence[Row]) -> None:
    path = self.path(category)
    if path.exists():
      replace_text(path, ''.join(json.dumps(row) + '\n' for row in rows))


def is_failed(row: Row) -> bool:
  """Whether the inference failed, and could go better another time."""
  return inference_failed(row) and not is_too_long(row)


def is_too_long(row: Row) -> bool:
  """Whether the model has no room for the task."""
  return inference_failed(row) and TOO_LONG in str(row.get('result'))


def _lines(path: pathlib.Path) -> Iterator[Row | None]:
  """Reads a file of results; None stands for a line that holds no answer."""
  # Lines are decoded alone: a file that was cut off may end inside of a letter.
  for line in path.read_bytes().split(b'\n'):
    if not line.strip():
      continue
    try:
      row = parse_row(decode_utf8(line, path.name), path.name)
    except ValueError:
      row = {}
    yield row if isinstance(row.get('id'), str) else None
