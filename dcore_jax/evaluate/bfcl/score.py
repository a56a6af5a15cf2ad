"""Scores BFCL v3 result files with the checker of bfcl-eval 2025.6.16.

A result file holds one item a line: {'id', 'result', 'reasoning_content'}. What cannot be scored is
left out and listed with its reason; the other items are scored. Folder OUT gets

bfcl_scores.json      {category: {'correct', 'total', 'accuracy', 'published', ...}}, see `score`
trajectories.jsonl    every scored item, in the form of `held_out`

Answers are judged in another process, see `checker`, which has no network, writes no files and
is ended where an answer takes too much time or memory.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.chat.call_text import CLOSE_THOUGHTS, OPEN_THOUGHTS
from dcore_jax.evaluate.behaviour.lazy_reasoning import (
  find_category,
  inference_failed,
  parse_row,
  read_failures,
)
from dcore_jax.evaluate.confined.worker import Ended, Worker
from dcore_jax.files import decode_utf8, read_json_lines, replace_text, write_json_atomic
from dcore_jax.progress import SLOW, progress
from dcore_jax.worlds.bfcl import package_folder

SCORES_FILE = 'bfcl_scores.json'
TRAJECTORIES_FILE = 'trajectories.jsonl'
VERSION = '2025.6.16'
CATEGORIES = (
  'simple',
  'multiple',
  'parallel',
  'parallel_multiple',
  'java',
  'javascript',
  'irrelevance',
  'live_simple',
  'live_multiple',
  'live_parallel',
  'live_parallel_multiple',
  'live_irrelevance',
  'live_relevance',
  'multi_turn_base',
  'multi_turn_miss_func',
  'multi_turn_miss_param',
  'multi_turn_long_context',
)
# Published result files are older than this release, which has given one item another id.
_RENAMED = {'live_multiple_1052-79-0': 'live_multiple_1052-279-0'}
_CHECKER = 'dcore_jax.evaluate.bfcl.checker'
_SECONDS = 10.0  # processor time of one item; the slowest right answers take a tenth of a second
_PATIENCE = 12  # how much longer it may take by the clock, on a busy machine
_MAX_DEPTH = 64  # levels of lists in a result: turns, steps, calls and their values need a dozen
_RESULT_FILE = re.compile(r'BFCL_v(\d+)_(\w+)_result\.json')


@dataclasses.dataclass(frozen=True)
class Item:
  """An answer with its task.

  Attributes:
    row: the line of the result file.
    task: the line of the category's file of questions.
    answer: the reference; None in categories that ask only whether there is a call.
  """

  row: dict[str, Any]
  task: dict[str, Any]
  answer: Any


def score(
  results: pathlib.Path,
  scores: pathlib.Path | None,
  out: pathlib.Path,
  note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Scores the result files of one model.

  Args:
    results: where the files are, also in folders below.
    scores: where the score files are that were published with them, if any.
    out: the folder that is written.
    note: takes a text on what is left out or differs.

  Returns:
    {'checker', 'categories', 'left_out': [{'file', 'reason'}]}. A category has the counts 'correct'
    and 'total' of scored items, their 'accuracy' (None without any), 'published' ({'correct',
    'total', 'accuracy'} or None), 'left_out' ([{'id', 'line', 'reason'}]), 'refused' ([{'id',
    'reason'}]: judged, although something in the answer was not evaluated), and 'differs', the ids
    whose published verdict was another one ({'right', 'wrong'} as found here; None without scores).

  Raises:
    ValueError: no result files, two of one category, an unreadable score file, or no package.
  """
  for folder in filter(None, (results, scores)):
    if not folder.is_dir():
      raise ValueError(f'no folder {folder}')
  package = package_folder()
  _check_version(package)
  present, left_out = _find_categories(results)
  categories = {}
  lines = []
  for category in progress(present, description='score', unit='category', delay=SLOW):
    items, missing = read_items(find_category(results, category, 'result'), category, package)
    verdicts = judge(items, category, package)
    records = []
    for item, verdict in zip(items, verdicts, strict=True):
      if verdict['correct'] is None:
        missing.append({'id': item.row['id'], 'line': None, 'reason': verdict['reason']})
      else:
        records.append(make_record(category, item, verdict))
    lines += [json.dumps(record) + '\n' for record in records]
    published = find_category(scores, category, 'score') if scores else None
    categories[category] = _summary(records, missing, published)
    _tell(category, categories[category], note)
  for entry in left_out:
    note(f'{entry["file"]} left out: {entry["reason"]}')
  found = {'checker': f'bfcl-eval {VERSION}', 'categories': categories, 'left_out': left_out}
  replace_text(out / TRAJECTORIES_FILE, ''.join(lines))
  write_json_atomic(out / SCORES_FILE, found)
  return found


def count_left_out(found: dict[str, Any]) -> int:
  """Counts the items and files that `score` has left out."""
  items = sum(len(category['left_out']) for category in found['categories'].values())
  return items + len(found['left_out'])


def _check_version(package: pathlib.Path) -> None:
  """Raises ValueError if the package is another release, whose tasks and references differ."""
  # pip writes it beside the package.
  installed = [
    path.name.removeprefix('bfcl_eval-').removesuffix('.dist-info')
    for path in package.parent.glob('bfcl_eval-*.dist-info')
  ]
  if installed and VERSION not in installed:
    raise ValueError(f'bfcl-eval {installed[0]} in {package.parent}: scores need {VERSION}')


def _find_categories(results: pathlib.Path) -> tuple[list[str], list[dict[str, str]]]:
  """Returns the categories that have a file, and the files of other benchmarks or versions."""
  found = set()
  left_out = []
  for path in sorted(results.rglob('BFCL_v*_result.json')):
    match = _RESULT_FILE.fullmatch(path.name)
    category = match[2] if match else path.name
    if not match or match[1] != '3':
      left_out.append({'file': str(path), 'reason': 'not of BFCL v3'})
    elif category not in CATEGORIES:
      left_out.append({'file': str(path), 'reason': f'no category {category!r} in BFCL v3'})
    else:
      found.add(category)
  if not found:
    raise ValueError(f'no result files BFCL_v3_<category>_result.json in {results}')
  return [category for category in CATEGORIES if category in found], left_out


# --- items ---


def read_items(
  path: pathlib.Path, category: str, package: pathlib.Path
) -> tuple[list[Item], list[dict[str, Any]]]:
  """Reads a result file -> (answers with tasks, what is left out as {'id', 'line', 'reason'}).

  Args:
    path: the file.
    category: BFCL's name.
    package: the folder of bfcl_eval.
  """
  tasks = read_tasks(category, package)
  answered: collections.Counter[str] = collections.Counter()
  items = []
  left_out = []

  def leave_out(number: int | None, name: str | None, reason: str) -> None:
    left_out.append({'id': name, 'line': number, 'reason': reason})

  # Lines are decoded alone: a file that was cut off may end inside of a letter.
  for number, line in enumerate(path.read_bytes().split(b'\n'), 1):
    if not line.strip():
      continue
    try:
      row = parse_row(decode_utf8(line, path.name), path.name)
    except ValueError as error:
      leave_out(number, None, _clean(f'not a whole line: {error}'))
      continue
    name = row.get('id')
    # Whatever is no text is no id either, and could not be looked up.
    name = _RENAMED.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in tasks:
      leave_out(number, _clean(str(name)), f'no such item in {category}')
    elif answered[name] == len(tasks[name]):
      leave_out(number, name, 'answered more than once; the first answer is scored')
    else:
      # An id that BFCL itself has twice is two items, in the order of the file.
      task, answer = tasks[name][answered[name]]
      answered[name] += 1
      if inference_failed(row):
        leave_out(number, name, 'its inference failed')
      elif not isinstance(row.get('result'), (str, list)):
        leave_out(number, name, 'its result is neither text nor a list')
      elif _too_deep(row['result'], _MAX_DEPTH):
        leave_out(number, name, f'its result has more than {_MAX_DEPTH} levels of lists')
      else:
        items.append(Item(row, task, answer))
  for name, places in tasks.items():
    # A share of some items is not the share of the category.
    for _ in range(len(places) - answered[name]):
      leave_out(None, name, 'not in the result file')
  return items, left_out


def _too_deep(value: Any, levels: int) -> bool:
  if not isinstance(value, (list, dict)):
    return False
  inner = value.values() if isinstance(value, dict) else value
  return levels == 0 or any(_too_deep(item, levels - 1) for item in inner)


def _clean(text: str) -> str:
  """Returns the beginning of a text of a file, without halves of letters, which UTF-8 lacks."""
  return text[:200].encode('utf-8', 'backslashreplace').decode()


def read_tasks(category: str, package: pathlib.Path) -> dict[str, list[tuple[dict[str, Any], Any]]]:
  """Returns the tasks of a category with their references, by id; v3 has one id twice."""
  questions = read_json_lines(package / 'data' / f'BFCL_v3_{category}.json')
  path = package / 'data' / 'possible_answer' / f'BFCL_v3_{category}.json'
  answers = {}
  # There is no right call where none is wanted, nor where any will do.
  if path.exists():
    answers = {row['id']: row['ground_truth'] for row in read_json_lines(path)}
  tasks: dict[str, list[tuple[dict[str, Any], Any]]] = {}
  for question in questions:
    tasks.setdefault(question['id'], []).append((question, answers.get(question['id'])))
  return tasks


# --- judging ---


def judge(
  items: Sequence[Item], category: str, package: pathlib.Path, fc: bool = False
) -> list[dict[str, Any]]:
  """Returns the verdict of `checker` on each item.

  An answer over which the process ends is wrong, and the next process goes on behind it.

  Args:
    items: answers.
    category: BFCL's name.
    package: the folder of bfcl_eval.
    fc: results that are text have calls between tags, as Qwen3 writes them.

  Raises:
    ValueError: the process cannot begin to judge, or ends by itself.
  """
  verdicts: list[dict[str, Any]] = []
  while len(verdicts) < len(items):
    # Most processes judge all that is left; one that ends has judged up to a bad answer.
    with Worker(_CHECKER, [str(package.parent)]) as worker:
      for item in items[len(verdicts) :]:
        job = {'category': category, 'result': item.row['result'], 'task': item.task, 'fc': fc}
        worker.allow(_SECONDS, _PATIENCE * _SECONDS)
        try:
          verdicts.append(worker.ask_json(job | {'answer': item.answer}))
        except Ended as ended:
          if str(ended) == 'exit':
            name = item.task.get('id')
            raise ValueError(f'the checker of BFCL ended over {name} of {category}') from ended
          reason = f'the checker was ended: {ended}'
          verdicts.append({'correct': False, 'reason': 'limit', 'refused': [reason]})
          break
  return verdicts


# --- results ---


def make_record(category: str, item: Item, verdict: dict[str, Any]) -> dict[str, Any]:
  """Returns an item with its verdict as a trajectory of `held_out`, for `report.compare`."""
  messages = []
  given = item.row['result']
  reasoning = item.row.get('reasoning_content')
  if not category.startswith(('multi_turn', 'memory')):
    given = [[given]]
    reasoning = [[reasoning]]
  # A model that was ended early has fewer turns than the task.
  for place in range(max(len(item.task['question']), len(given))):
    messages += item.task['question'][place] if place < len(item.task['question']) else []
    thoughts = _at(reasoning, place)
    steps = given[place] if place < len(given) else []
    for number, step in enumerate(steps if isinstance(steps, list) else [steps]):
      text = step if isinstance(step, str) else json.dumps(step, ensure_ascii=False)
      messages.append({'role': 'assistant', 'content': _with_thoughts(text, _at(thoughts, number))})
  requests = [message['content'] for message in messages if message['role'] == 'user']
  return {
    'id': item.row['id'],
    'kind': category,
    'query': requests[0] if requests else '',
    'correct': verdict['correct'],
    'reason': verdict['reason'],
    'refused': verdict['refused'],
    'messages': messages,
  }


def _at(values: Any, place: int) -> Any:
  return values[place] if isinstance(values, list) and place < len(values) else None


def _with_thoughts(text: str, thoughts: Any) -> str:
  if not isinstance(thoughts, str) or not thoughts.strip():
    return text
  # Some result files keep the tags with the thoughts.
  inner = thoughts.strip().removeprefix(OPEN_THOUGHTS).removesuffix(CLOSE_THOUGHTS).strip('\n')
  return f'{OPEN_THOUGHTS}\n{inner}\n{CLOSE_THOUGHTS}\n\n{text.lstrip()}'


def _summary(
  records: Sequence[dict[str, Any]],
  left_out: list[dict[str, Any]],
  published: pathlib.Path | None,
) -> dict[str, Any]:
  correct = sum(record['correct'] for record in records)
  refused = []
  for record in records:
    refused += [{'id': record['id'], 'reason': _clean(reason)} for reason in record['refused']]
  return {
    'correct': correct,
    'total': len(records),
    'accuracy': correct / len(records) if records else None,
    'published': _published(published) if published else None,
    'left_out': left_out,
    'refused': refused,
    'differs': _differences(records, read_failures(published)) if published else None,
  }


def _published(path: pathlib.Path) -> dict[str, Any]:
  """Returns the first line of a score file as {'correct', 'total', 'accuracy'}."""
  first = parse_row(decode_utf8(path.read_bytes().split(b'\n')[0], path.name), f'{path}:1')
  counts = [first.get('correct_count'), first.get('total_count'), first.get('accuracy')]
  # Later programs rely on them being numbers.
  if not all(isinstance(value, (int, float)) for value in counts):
    raise ValueError(
      f'{path}:1: needs accuracy, correct_count and total_count, has {sorted(first)}'
    )
  return dict(zip(('correct', 'total', 'accuracy'), counts, strict=True))


def _differences(records: Sequence[dict[str, Any]], failures: set[str]) -> dict[str, list[str]]:
  """Returns the ids that are right or wrong here, and the other in the score file."""
  # Equal counts may hide verdicts that changed in both directions.
  wrong = {record['id'] for record in records if not record['correct']}
  known = {record['id'] for record in records}
  return {'right': sorted((known - wrong) & failures), 'wrong': sorted(wrong - failures)}


def _tell(category: str, found: dict[str, Any], note: Callable[[str], None]) -> None:
  """Notes what a reader of the counts must know."""
  reasons = collections.Counter(entry['reason'] for entry in found['left_out'])
  for reason, count in reasons.items():
    note(f'{category}: {count} left out: {reason}')
  for entry in found['refused']:
    note(f'{category}: {entry["id"]}: {entry["reason"]}')
  published = found['published']
  if published and (published['correct'], published['total']) != (found['correct'], found['total']):
    note(
      f'{category}: {found["correct"]} of {found["total"]} right, '
      f'published {published["correct"]} of {published["total"]}'
    )
