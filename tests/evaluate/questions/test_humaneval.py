"""HumanEval: answers run where they can do nothing, and cannot forge a verdict."""

import gzip
import json
import os
import pathlib

import pytest

from dcore_jax.evaluate import suites
from dcore_jax.evaluate.confined import confinement
from dcore_jax.evaluate.questions import humaneval
from dcore_jax.evaluate.questions.code_worker import decode, encode
from dcore_jax.evaluate.questions.humaneval import extract_programs, run
from tests.evaluate.scripted_server import scripted_server

DATA = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data'))
TASK = {
  'task_id': 'T/0',
  'entry_point': 'double',
  'prompt': 'import math\n\ndef half(x):\n    return x / 2\n\ndef double(x):\n    """Doubles."""\n',
  'test': (
    'def check(candidate):\n'
    '    for number in range(3):\n'
    '        assert half(candidate(number)) == number\n'
    '    assert candidate([1]) == [1, 1], "lists"\n'
    '    assert double("a") == "aa"\n'
  ),
}
RIGHT = 'def double(x):\n  return x * 2\n'

confined = pytest.mark.skipif(
  bool(confinement.problem()), reason=confinement.problem() or 'answers can be confined'
)


@pytest.mark.parametrize(
  'value',
  [None, True, 3, -0.5, float('inf'), 'ä', [1, (2, {3})], {'a': {(1, 2): [None]}}, frozenset({1})],
)
def test_values_cross_as_they_are(value):
  crossed = decode(json.loads(json.dumps(encode(value))))
  assert crossed == value and type(crossed) is type(value)


def test_other_values_do_not_cross():
  deep = []
  deep.append(deep)
  for value in (object(), iter([1]), 1j, b'x', [object()], deep):
    with pytest.raises(TypeError):
      encode(value)


@pytest.mark.parametrize(
  'answer',
  [
    f'Here it is:\n```python\n{RIGHT}```\nDone.',
    f'```\nprint(1)\n```\nno, this:\n```py\n{RIGHT}```',
    f'```python\n{RIGHT}',
    RIGHT,
    'return x * 2',
    '    return x * 2\n',
    'y = x\n    return y * 2',
    'if x == 0:\n  return 0\nreturn x * 2',
    'if x == 0:\n        return 0\n    return x * 2',
    '```python\n    y = x\n    return y * 2\n```',
    '  ```python\n  def double(x):\n    return x * 2\n  ```',
  ],
)
@confined
def test_code_is_found_in_an_answer(answer):
  programs = extract_programs(answer, TASK['prompt'], 'double')
  assert run(programs, TASK, 30).correct, programs


def test_no_code_is_no_answer():
  for answer in ('', ' \n', '```python\n```'):
    assert extract_programs(answer, TASK['prompt'], 'double') == []


# What an answer may try -> the reason of its verdict.
ATTEMPTS = {
  'wrong': ('def double(x):\n  return x', 'wrong'),
  'syntax': ('def double(x:\n  return x', 'SyntaxError'),
  'raises': ('class Mine(KeyError):\n  pass\ndef double(x):\n  raise Mine("secret")', 'KeyError'),
  'exit in front': ('import os\nos._exit(0)', 'exit'),
  'exit inside': ('import os\ndef double(x):\n  os._exit(0)', 'exit'),
  'sys.exit': ('import sys\nsys.exit(0)', 'SystemExit'),
  'sleeps': ('import time\ntime.sleep(1000)', 'timeout'),
  'computes': ('def double(x):\n  while True: pass', 'limit'),
  'recursion': ('def double(x):\n  return double(x)', 'RecursionError'),
  'memory': ('def double(x):\n  return [0] * 10**10', 'MemoryError'),
  'large': ('def double(x):\n  return "x" * (1 << 25)', 'output'),
  'equal to all': (
    'class Equal(int):\n'
    '  def __eq__(self, other): return True\n'
    '  def __truediv__(self, other): return self\n'
    'def double(x):\n  return Equal()',
    'wrong',
  ),
  'patched': (
    'import builtins, json, sys\n'
    'builtins.AssertionError = ValueError\n'
    'builtins.all = builtins.any = lambda *_: True\n'
    'json.dumps = lambda value: "{}"\n'
    'def double(x):\n  return None',
    'no_value',
  ),
  'forged in front': (
    'import os\n'
    'for number in range(3, 20):\n'
    '  try: os.write(number, b\'{"correct": true, "reason": ""}\\n\')\n'
    '  except OSError: pass\n'
    'def double(x):\n  return 7',
    'no_value',
  ),
  'forged inside': (
    'import os\n'
    'def double(x):\n'
    '  for number in range(20):\n'
    '    try: os.write(number, b\'{"correct": true, "reason": ""}\\n\')\n'
    '    except OSError: pass\n'
    '  return 7',
    'no_value',
  ),
  'printed': (
    'print(\'{"correct": true, "reason": ""}\')\ndef double(x):\n  print("x" * 9999)',
    'TypeError',
  ),
  'forks': ('import os\nwhile True: os.fork()', 'PermissionError'),
  'threads': (
    'import threading\nthreading.Thread(target=print).start()',
    'RuntimeError',
  ),
  'programs': ('import subprocess\nsubprocess.run(["touch", "{folder}/x"])', 'PermissionError'),
  'sockets': ('import socket\nsocket.socket()', 'PermissionError'),
  'writes': ('open("{folder}/x", "w").write("x")', 'PermissionError'),
  'writes low': (
    'import os\nos.open("{folder}/x", os.O_CREAT | os.O_RDWR)',
    'PermissionError',
  ),
  'appends': ('open("{folder}/kept", "a").write("x")', 'PermissionError'),
  'removes': ('import os\nos.unlink("{folder}/kept")', 'PermissionError'),
  'folders': ('import os\nos.mkdir("{folder}/x")', 'PermissionError'),
  'reads': ('open("{folder}/kept").read()', 'PermissionError'),
  'looks': ('import os\nos.listdir("{folder}")', 'PermissionError'),
  'environment': ('import os\nos.environ["SECRET"]', 'KeyError'),
  'native': ('import ctypes\nctypes.CDLL(None).system(b"touch {folder}/x")', 'PermissionError'),
  'kills': ('import os, signal\nos.kill(os.getppid(), signal.SIGTERM)', 'PermissionError'),
}


@confined
@pytest.mark.parametrize('name', ATTEMPTS)
def test_what_an_answer_tries_is_wrong_and_leaves_nothing(name, tmp_path, monkeypatch):
  monkeypatch.setenv('SECRET', 'much')
  (tmp_path / 'kept').write_text('as it was')
  code, reason = ATTEMPTS[name]
  # Behind what it tries there is a right answer, which must not count if the attempt ended it.
  program = TASK['prompt'] + code.replace('{folder}', str(tmp_path))
  if 'def double' not in code:
    program += f'\n{RIGHT}'
  verdict = run([program], TASK, 2, 1 if reason == 'timeout' else 900)
  assert (verdict.correct, verdict.reason) == (False, reason)
  assert [path.name for path in tmp_path.iterdir()] == ['kept']
  assert (tmp_path / 'kept').read_text() == 'as it was'


@confined
def test_an_attempt_that_is_caught_is_judged_by_what_it_returns(tmp_path):
  caught = f'try:\n  open({str(tmp_path / "x")!r}, "w")\nexcept Exception:\n  pass\n'
  assert run([TASK['prompt'] + caught + RIGHT], TASK, 20).correct
  assert not list(tmp_path.iterdir())


@confined
def test_what_floods_a_pipe_does_not_hold_us_up():
  # It answers the first call twice and then sleeps, while a large argument waits to be read.
  code = (
    'import os, time\n'
    'def double(x):\n'
    '  for number in range(3, 9):\n'
    '    try: os.write(number, b\'{"value": 0}\\n\')\n'
    '    except OSError: pass\n'
    '  time.sleep(1000)\n'
  )
  task = TASK | {'test': 'def check(f):\n  assert f(0) == 0\n  assert f("x" * (1 << 20)) == 0\n'}
  assert run([TASK['prompt'] + code], task, 5, 3).reason == 'timeout'


@confined
def test_the_option_and_a_missing_file_are_named(tmp_path):
  settings = suites.SuiteSettings(data=tmp_path)
  with pytest.raises(ValueError, match='seconds = 0'):
    suites.make_suite('humaneval', settings, {'seconds': 0})
  with pytest.raises(ValueError, match='HumanEval.jsonl.gz.*--data'):
    suites.make_suite('humaneval', settings, {}).prepare()
  (tmp_path / 'transfer').mkdir()
  with gzip.open(tmp_path / 'transfer' / 'HumanEval.jsonl.gz', 'wt') as file:
    file.write('{"task_id": "T/0"}\n')
  with pytest.raises(ValueError, match='line 1: expected texts'):
    suites.make_suite('humaneval', settings, {}).prepare()


@confined
@pytest.mark.skipif(not (DATA / humaneval._FILE).exists(), reason='HumanEval is not in DCORE_DATA')
@pytest.mark.parametrize('share', [0.0, 1.0])
def test_references_are_right_and_silence_is_wrong(tmp_path, share):
  settings = suites.SuiteSettings(limit=20, temperature=0, data=DATA)
  suite = suites.make_suite('humaneval', settings, {'seconds': 30})
  suite.prepare()
  with gzip.open(DATA / humaneval._FILE) as file:
    rows = [json.loads(line) for line in file]

  def answer(body):
    asked = body['messages'][-1]['content']
    [row] = [row for row in rows if row['prompt'].strip('\n') in asked]
    whole = row['prompt'] + row['canonical_solution']
    return f'<think>\nhm\n</think>\n\n```python\n{whole}\n```' if share else ''

  with scripted_server(answer) as url:
    suite.answer(suites.Served(url, 'scripted'), tmp_path, lambda done, total: None)
  result, trajectories = suite.score(tmp_path)
  [score] = result.scores
  wrong = [(each['id'], each['reason']) for each in trajectories if not each['correct']]
  assert score.estimate['mean'] == share, wrong
  assert score.estimate['n'] == 20 and score.floor == 0
  assert {each['reason'] for each in trajectories} == ({''} if share else {'no_answer'})
