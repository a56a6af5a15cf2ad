"""The test tasks of BFCL v3 and tau2-bench, to be kept out of training: data of their packages, which are not imported."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import ToolCallError, parse_reference
from dcore_jax.data import tau2_tasks
from dcore_jax.data.overlap import TestTask
from dcore_jax.worlds import bfcl


def bfcl_tests() -> Iterator[TestTask]:
  """Every user turn of BFCL v3 with its reference calls. ValueError where BFCL is not installed."""
  data = bfcl.package_folder() / 'data'
  for path in sorted(data.glob('BFCL_v3_*.json')):
    answers_path = data / 'possible_answer' / path.name
    answers = (
      {a['id']: a['ground_truth'] for a in _lines(answers_path)} if answers_path.exists() else {}
    )
    for entry in _lines(path):
      truth = answers.get(entry['id'], [])
      by_turn = truth and isinstance(
        truth[0], list
      )  # multi-turn: call strings of every turn; else {name: accepted values}
      for number, turn in enumerate(entry['question']):
        calls = _call_strings(truth[number]) if by_turn else _accepted(truth)
        query = ' '.join(message['content'] for message in turn if message['role'] == 'user')
        yield TestTask(f'{entry["id"]}/{number}', query, calls)


def _call_strings(texts: list[str]) -> tuple[ToolCall, ...]:
  try:
    return tuple(parse_reference(texts))
  except ToolCallError:  # one of BFCL's own references is no literal call
    return ()


def _accepted(truth: list[dict[str, dict[str, list[Any]]]]) -> tuple[ToolCall, ...]:
  """Calls with the first accepted value of each parameter; '' among the values means that it may be left out."""
  return tuple(
    ToolCall(name, {p: values[0] for p, values in parameters.items() if values and values[0] != ''})
    for call in truth
    for name, parameters in call.items()
  )


def tau2_tests() -> Iterator[TestTask]:
  """The tasks of tau2-bench's test splits: what their user is told, the reference actions, and who the user is.

  tau-bench's own airline and retail tasks are where they come from: a dialogue with the user of a test task is refused.
  ValueError where tau2 is not installed.
  """
  for domain in tau2_tasks.DOMAINS:
    for task in tau2_tasks.read_tasks(domain, 'test'):
      calls = tau2_tasks.reference_calls(task)
      users = {
        str(value) for call in calls for name, value in call.arguments.items() if name == 'user_id'
      }
      query = tau2_tasks.told(task, ('reason_for_call', 'task_instructions'))
      yield TestTask(f'tau2-{domain}-{task["id"]}', query, calls, tuple(sorted(users)))


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [
    json.loads(line) for line in path.read_text(encoding='utf-8').splitlines() if line.strip()
  ]


TESTS: dict[str, Callable[[], Iterator[TestTask]]] = {'bfcl': bfcl_tests, 'tau2': tau2_tests}
