"""Runs a candidate function, or the tests of a task, in a process of its own; see `humaneval`.

    python -S -m dcore_jax.evaluate.questions.code_worker candidate|tests

The two halves never share a process. `candidate` runs what a model wrote, and knows no tests: it is
sent arguments and sends back values. `tests` runs the tests of the data set, calls the candidate
through its parent, and compares. What the candidate does to its own process is no verdict.

Values cross as JSON, containers with their type in front. Others do not cross.
"""

import builtins
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from dcore_jax.evaluate.confined.confinement import confine

_SECONDS = 60  # of processor time of a process; its parent ends it after less, by the clock
_BYTES = 1 << 30
_MOST_LEVELS = 100
_CONTAINERS = {'list': list, 'tuple': tuple, 'set': set, 'frozenset': frozenset}

Send = Callable[[Any], None]


class CandidateError(Exception):
  """The candidate raised, or returned what does not cross; says what."""


def encode(value: Any, levels: int = _MOST_LEVELS) -> Any:
  """Returns a value as JSON.

  Raises:
    TypeError: it is, or holds, what does not cross.
  """
  if levels == 0:
    raise TypeError('too many levels')
  if value is None or isinstance(value, bool):
    return value
  # Subclasses compare equal to the plain value, by default.
  for kind in (int, float, str):
    if isinstance(value, kind):
      return kind(value)
  for name, kind in _CONTAINERS.items():
    if isinstance(value, kind):
      return {name: [encode(item, levels - 1) for item in value]}
  if isinstance(value, dict):
    pairs = [[encode(key, levels - 1), encode(item, levels - 1)] for key, item in value.items()]
    return {'dict': pairs}
  raise TypeError(f'no plain value: {type(value).__name__}')


def decode(value: Any) -> Any:
  """Returns the value that `encode` was given; raises ValueError where it was given none."""
  if not isinstance(value, (dict, list)):
    return value
  if isinstance(value, dict) and len(value) == 1:
    [(name, items)] = value.items()
    if name in _CONTAINERS and isinstance(items, list):
      return _CONTAINERS[name]([decode(item) for item in items])
    if name == 'dict' and isinstance(items, list):
      return dict([[decode(key), decode(item)] for key, item in items])
  raise ValueError('no value')


def run_candidate(lines: BinaryIO, send: Send) -> None:
  """Defines what a model wrote, then answers calls of it."""
  job = json.loads(lines.readline())
  names: dict[str, Any] = {'__name__': 'candidate'}
  # Exactly the task, and in a process that can do nothing else.
  try:
    exec(_compiled(job['programs']), names)
    function = names[job['entry']]
  except BaseException as error:
    send({'error': _kind(error)})
    return
  send({'ready': True})
  for line in lines:
    try:
      value = {'value': encode(function(*decode(json.loads(line))))}
    except BaseException as error:
      value = {'error': _kind(error)}
    send(value)


def _compiled(programs: Sequence[str]) -> Any:
  """Compiles the first program that has Python's syntax."""
  for program in programs[:-1]:
    with contextlib.suppress(SyntaxError):
      return compile(program, 'candidate', 'exec')
  return compile(programs[-1], 'candidate', 'exec')


def run_tests(lines: BinaryIO, send: Send) -> None:
  """Runs the tests; sends {'call': arguments} or at the end {'correct', 'reason'}."""
  job = json.loads(lines.readline())

  def candidate(*arguments: Any) -> Any:
    send({'call': encode(arguments)})
    return _returned(lines.readline())

  reason = ''
  try:
    # Tests may call what the prompt defines in front of the function.
    names: dict[str, Any] = {'__name__': 'tests'}
    exec(compile(job['prompt'], 'prompt', 'exec'), names)
    names[job['entry']] = candidate
    exec(compile(job['tests'], 'tests', 'exec'), names)
    names['check'](candidate)
  except AssertionError:
    reason = 'wrong'
  except CandidateError as error:
    reason = str(error)
  # Comparing what the candidate returned may raise, e.g. the difference of a text and a number.
  except Exception as error:
    reason = _kind(error)
  send({'correct': not reason, 'reason': reason})


def _returned(line: bytes) -> Any:
  """Returns the value of a candidate's line, which may be anything."""
  try:
    record = json.loads(line)
    if set(record) == {'value'}:
      return decode(record['value'])
    reason = record['error']
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    reason = 'no_value'
  raise CandidateError(reason if isinstance(reason, str) and _is_kind(reason) else 'no_value')


def _kind(error: BaseException) -> str:
  """Returns the kind of an error: a builtin name, and no text that a model wrote."""
  for kind in type(error).__mro__:
    if _is_kind(kind.__name__):
      return kind.__name__
  return 'Exception'


def _is_kind(name: str) -> bool:
  kind = getattr(builtins, name, None)
  return isinstance(kind, type) and issubclass(kind, BaseException)


def main(part: str) -> None:
  """Runs one of the halves."""
  answers = os.fdopen(os.dup(1), 'wb', buffering=0)
  nothing = os.open(os.devnull, os.O_RDWR)
  # What is printed goes nowhere.
  os.dup2(nothing, 1)
  lines = os.fdopen(os.dup(0), 'rb')
  os.dup2(nothing, 0)
  # Modules of this package are of no use to an answer.
  del sys.path[0]
  os.environ.clear()
  confine(seconds=_SECONDS, memory=_BYTES)

  def send(value: Any) -> None:
    answers.write(json.dumps(value).encode() + b'\n')

  send({'ready': True})
  {'candidate': run_candidate, 'tests': run_tests}[part](lines, send)


if __name__ == '__main__':
  main(sys.argv[1])
