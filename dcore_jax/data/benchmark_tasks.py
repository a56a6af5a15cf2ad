"""Reads the test tasks of BFCL v3 and tau2-bench, which are kept out of training.

The data files of these packages are read; their code is not imported.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import ToolCallError, parse_reference
from dcore_jax.data import tau2_tasks
from dcore_jax.data.overlap import TestTask
from dcore_jax.files import read_json_lines
from dcore_jax.worlds import bfcl


def bfcl_tests() -> Iterator[TestTask]:
  """Yields every user turn of BFCL v3 with its reference calls.

  Raises:
    ValueError: BFCL is not installed.
  """
  data = bfcl.package_folder() / 'data'
  for path in sorted(data.glob('BFCL_v3_*.json')):
    answers_path = data / 'possible_answer' / path.name
    # Some categories, such as irrelevance, have no reference calls and no file of answers.
    answers = {}
    if answers_path.exists():
      answers = {answer['id']: answer['ground_truth'] for answer in read_json_lines(answers_path)}
    for entry in read_json_lines(path):
      # Without a reference the words of the request alone are compared.
      truth = answers.get(entry['id'], [])
      # Multi-turn entries hold the call strings of every turn, others {name: accepted values}.
      by_turn = truth and isinstance(truth[0], list)
      for number, turn in enumerate(entry['question']):
        calls = _string_calls(truth[number]) if by_turn else _accepted_calls(truth)
        # Only the user's words are the request: several tasks may share a system message.
        query = ' '.join(message['content'] for message in turn if message['role'] == 'user')
        yield TestTask(id=f'{entry["id"]}/{number}', query=query, calls=calls)


def _string_calls(texts: list[str]) -> tuple[ToolCall, ...]:
  try:
    return tuple(parse_reference(texts))
  except ToolCallError:
    # One of BFCL's own references is no literal call. Its words are compared all the same.
    return ()


def _accepted_calls(truth: list[dict[str, dict[str, list[Any]]]]) -> tuple[ToolCall, ...]:
  """Makes calls with the first accepted value of each parameter.

  '' in first place means that the parameter may be left out.
  """
  calls = []
  for call in truth:
    for name, parameters in call.items():
      arguments = {}
      for parameter, values in parameters.items():
        # Any accepted value would do. Seeds are most likely to repeat the first one.
        if values and values[0] != '':
          arguments[parameter] = values[0]
      calls.append(ToolCall(name, arguments))
  return tuple(calls)


def tau2_tests() -> Iterator[TestTask]:
  """Yields the tasks of tau2-bench's test splits.

  A task holds the instructions of its user, the reference actions, and the user's id. The tasks
  come from tau-bench's own airline and retail domains, so a dialogue with the user of a test task
  is refused.

  Raises:
    ValueError: tau2 is not installed.
  """
  for domain in tau2_tasks.DOMAINS:
    for task in tau2_tasks.read_tasks(domain, 'test'):
      calls = tau2_tasks.reference_calls(task)
      # A dialogue with the same user has the same orders and flights, even if it asks for something
      # else.
      users = {str(call.arguments['user_id']) for call in calls if 'user_id' in call.arguments}
      yield TestTask(
        id=f'tau2-{domain}-{task["id"]}',
        query=tau2_tasks.told(task, ('reason_for_call', 'task_instructions')),
        calls=calls,
        names=tuple(sorted(users)),
      )


TESTS: dict[str, Callable[[], Iterator[TestTask]]] = {'bfcl': bfcl_tests, 'tau2': tau2_tests}
