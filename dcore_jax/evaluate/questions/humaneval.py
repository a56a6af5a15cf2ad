"""HumanEval: functions to write, judged by running their tests.

An answer runs in a process that can do nothing but compute (`confinement`), and its tests run in
another one (`code_worker`). The verdict comes from the second, which the answer cannot reach: it
gets arguments and gives values. So a verdict cannot be forged, but two things differ from running
all in one process. A function that changes its arguments changes copies. And a value that is no
number, text, list, tuple, set or dict, or holds another, is wrong.
"""

import concurrent.futures
import gzip
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import Message
from dcore_jax.evaluate.confined import confinement
from dcore_jax.evaluate.confined.worker import Ended, Worker
from dcore_jax.evaluate.questions.suite import NO_ANSWER, ChatSuite, Question, Verdict
from dcore_jax.evaluate.suites import SuiteSettings, register_suite
from dcore_jax.files import decode_utf8, parse_json

_FILE = 'transfer/HumanEval.jsonl.gz'
_FIELDS = ('task_id', 'prompt', 'entry_point', 'test')
_MODULE = 'dcore_jax.evaluate.questions.code_worker'
_PATIENCE = 12  # seconds by the clock for one of processor time, on a machine that is busy
_REQUEST = (
  'Complete this Python function, using the standard library alone. Answer with the whole function '
  'in one code block.\n\n```python\n{prompt}\n```'
)
_BLOCK = re.compile(
  r'^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)', re.DOTALL | re.MULTILINE
)


@register_suite('humaneval')
class HumanEval(ChatSuite):
  """The 164 functions of HumanEval, one try each.

  Args:
    settings: see `SuiteSettings`.
    seconds: of processor time that an answer may take, its tests included; by the clock 12 times
      as many.

  Raises:
    ValueError: no time.
  """

  version = 'HumanEval v2, tests in a process of their own'

  def __init__(self, settings: SuiteSettings, seconds: float = 10.0):
    super().__init__(settings)
    if not seconds > 0:
      raise ValueError(f'humaneval.seconds = {seconds} must be above 0')
    self._seconds = seconds

  def prepare(self) -> None:
    """Reads the tasks, and tries whether answers can be confined here."""
    if reason := confinement.problem():
      raise ValueError(f"suite 'humaneval' {reason}")
    super().prepare()
    with Worker(_MODULE, ['candidate'], alone=True):
      pass

  def questions(self) -> list[Question]:
    """Returns the tasks of the data folder."""
    path = self.settings.data / _FILE
    if not path.is_file():
      raise ValueError(
        f"suite 'humaneval' needs {str(path)!r} (github.com/openai/human-eval, MIT); name the data "
        'folder by --data or DCORE_DATA'
      )
    questions = []
    with gzip.open(path) as file:
      lines = decode_utf8(file.read(), path.name).splitlines()
    for number, line in enumerate(lines, 1):
      row = parse_json(line, f'{path.name}, line {number}')
      if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in _FIELDS):
        raise ValueError(f'{path.name}, line {number}: expected texts {list(_FIELDS)}')
      text = _REQUEST.format(prompt=row['prompt'].strip('\n'))
      questions.append(Question(row['task_id'], (Message('user', text),), row))
    return questions

  def judge(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Verdict]:
    """Runs the tests of each answer."""
    # Processes compute, and these threads wait for them.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
      return list(pool.map(self._judge, questions, answers))

  def _judge(self, question: Question, answer: str) -> Verdict:
    task = question.task
    programs = extract_programs(answer, task['prompt'], task['entry_point'])
    if not programs:
      return Verdict(False, NO_ANSWER)
    return run(programs, task, self._seconds, _PATIENCE * self._seconds)


def extract_programs(answer: str, prompt: str, entry: str) -> list[str]:
  """Returns what may be the program of an answer, the likeliest first; [] without code.

  It begins with the prompt, whose imports and helpers an answer may leave out. The last code block
  that defines the function is taken, or else the last block. Without a block the whole answer is
  taken, as the function or as what follows the prompt.

  Args:
    answer: without thoughts.
    prompt: of the task; ends with the function's description.
    entry: the function's name.
  """
  definition = re.compile(rf'^(?:async )?def {re.escape(entry)}\b', re.MULTILINE)
  blocks = [textwrap.dedent(match[2]) for match in _BLOCK.finditer(answer)]
  whole = [block for block in blocks if definition.search(block)]
  code = (whole or blocks or [answer])[-1]
  if not code.strip():
    return []
  if definition.search(code):
    return [f'{prompt}\n{code}']
  # What follows the prompt is the body of its function, of which the first line may have lost its
  # indentation, or every line. One of these has Python's syntax.
  body = code.strip('\n')
  return [f'{prompt}    {body.lstrip()}\n', prompt + textwrap.indent(body, '    ') + '\n']


def run(
  programs: Sequence[str], task: Mapping[str, Any], seconds: float, patience: float = 120.0
) -> Verdict:
  """Runs the tests of a task on a program.

  Args:
    programs: what a model wrote; the first one with Python's syntax counts.
    task: a row of the data set.
    seconds: of processor time that each of the two processes may take, their start left out.
    patience: seconds by the clock that both may take.

  Returns:
    the verdict. Its reason is 'wrong' where a test fails, the name of the error that was raised,
    'no_value' where what came back is none, or why a process ended (`Worker.ask`).
  """
  entry = task['entry_point']
  job = {'prompt': task['prompt'], 'tests': task['test'], 'entry': entry}
  with Worker(_MODULE, ['candidate'], alone=True) as candidate:
    with Worker(_MODULE, ['tests'], alone=True) as tests:
      candidate.allow(seconds, patience)
      tests.allow(seconds, patience)
      try:
        code = json.dumps({'programs': list(programs), 'entry': entry})
        begun = candidate.ask(code.encode())
        # An answer that fails here gets no calls. One that says it is ready says nothing by that.
        if begun != b'{"ready": true}':
          return Verdict(False, _failure(begun))
        message = tests.ask_json(job)
        while 'call' in message:
          # What the candidate sends is read by the process of the tests alone.
          value = candidate.ask(json.dumps(message['call']).encode())
          message = json.loads(tests.ask(value))
      except Ended as ended:
        return Verdict(False, str(ended))
  return Verdict(message['correct'] is True, message['reason'])


def _failure(line: bytes) -> str:
  """Returns why a candidate could not be defined, in words of ours."""
  match = re.fullmatch(rb'\{"error": "([A-Za-z]{1,40})"\}', line)
  return match[1].decode() if match else 'no_value'
