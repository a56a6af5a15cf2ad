r"""GSM8K and MATH-500: questions with one short answer.

GSM8K's answers are whole numbers, and are compared as numbers. MATH-500's are expressions, which
math-verify compares in a process of its own (`math_worker`).
"""

import abc
import decimal
import importlib.util
import re
from collections.abc import Sequence

from dcore_jax.chat.messages import Message
from dcore_jax.evaluate.confined.worker import Ended, Worker
from dcore_jax.evaluate.questions.suite import NO_ANSWER, ChatSuite, Question, Verdict
from dcore_jax.evaluate.suites import SuiteSettings, register_suite
from dcore_jax.files import read_rows

_REQUEST = (
  '{question}\n\n'
  'Reason step by step, and put the final answer, and nothing else, within \\boxed{{}}.'
)
_NUMBER = re.compile(r'[-+\u2212]?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)(?:\.\d+)?|[-+\u2212]?\.\d+')
_MOST_CHARACTERS = 2_000  # of an answer that is compared; the longest reference has 56
_PATIENCE = 12  # seconds by the clock for one of processor time, on a machine that is busy
_WORKER = 'dcore_jax.evaluate.questions.math_worker'


class _Problems(ChatSuite):
  """Questions of a file of rows {'question', 'answer'}, whose answer ends in the result."""

  file = ''
  source = ''

  def questions(self) -> list[Question]:
    """Returns the tasks of the data folder."""
    path = self.settings.data / self.file
    if not path.is_file():
      raise ValueError(
        f'suite {self.name!r} needs {str(path)!r} ({self.source}); name the data folder by --data '
        'or DCORE_DATA'
      )
    questions = []
    for number, row in enumerate(read_rows(path), 1):
      where = f'{path.name}, line {number}'
      if not all(isinstance(row.get(name), str) for name in ('question', 'answer')):
        raise ValueError(f'{where}: expected texts question and answer')
      reference = self.reference(row['answer'])
      if not reference:
        raise ValueError(f'{where}: no result in the answer')
      text = _REQUEST.format(question=row['question'])
      task = {'reference': reference}
      questions.append(Question(f'{self.name}_{number - 1}', (Message('user', text),), task))
    return questions

  @abc.abstractmethod
  def reference(self, solution: str) -> str:
    """Returns the result of a reference solution; '' without one."""


@register_suite('gsm8k')
class Gsm8k(_Problems):
  """The 1,319 test questions of GSM8K, without examples.

  The answer is the last number in the last \\boxed{}, or the last number of all.
  """

  version = 'GSM8K test'
  file = 'transfer/gsm8k_test.jsonl'
  source = 'github.com/openai/grade-school-math, MIT'

  def reference(self, solution: str) -> str:
    """Returns what stands behind ####."""
    return solution.rpartition('####')[2].strip() if '####' in solution else ''

  def judge(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Verdict]:
    """Compares numbers."""
    verdicts = []
    for question, answer in zip(questions, answers, strict=True):
      boxed = last_boxed(answer)
      found = last_number(answer if boxed is None else boxed)
      if found is None:
        verdicts.append(Verdict(False, NO_ANSWER))
      else:
        correct = found == last_number(question.task['reference'])
        verdicts.append(Verdict(correct, '' if correct else 'wrong'))
    return verdicts


@register_suite('math500')
class Math500(_Problems):
  """The 500 problems of MATH that PRM800K sets aside, without examples.

  Args:
    settings: see `SuiteSettings`.
    seconds: of processor time that comparing an answer may take; one that takes more is wrong.

  Raises:
    ValueError: no time.
  """

  version = 'MATH-500, math-verify'
  file = 'transfer/math500.jsonl'
  source = 'github.com/openai/prm800k, MIT'

  def __init__(self, settings: SuiteSettings, seconds: float = 20.0):
    super().__init__(settings)
    if not seconds > 0:
      raise ValueError(f'math500.seconds = {seconds} must be above 0')
    self._seconds = seconds

  def prepare(self) -> None:
    """Reads the tasks, and looks for the package that compares answers."""
    lacking = []
    if importlib.util.find_spec('math_verify') is None:
      lacking.append(
        "suite 'math500' needs the package math-verify: pip install 'math-verify>=0.9'"
      )
    try:
      super().prepare()
    except ValueError as error:
      lacking.append(str(error))
    if lacking:
      raise ValueError('; '.join(lacking))

  def reference(self, solution: str) -> str:
    """Returns what is boxed."""
    return last_boxed(solution) or ''

  def judge(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Verdict]:
    """Compares expressions; what is not boxed is no answer."""
    verdicts: list[Verdict | None] = []
    jobs = []
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
      found = last_boxed(answer)
      reference = question.task['reference']
      if not found or not found.strip():
        verdicts.append(Verdict(False, NO_ANSWER))
      elif found.strip() == reference.strip():
        verdicts.append(Verdict(True))
      elif len(found) > _MOST_CHARACTERS:
        verdicts.append(Verdict(False, 'too_long'))
      else:
        verdicts.append(None)
        jobs.append((place, {'answer': found, 'reference': reference}))
    # Most processes judge all that is left; one that ends has judged up to a bad answer.
    while jobs:
      with Worker(_WORKER) as worker:
        while jobs:
          place, job = jobs.pop(0)
          worker.allow(self._seconds, _PATIENCE * self._seconds)
          try:
            correct = worker.ask_json(job)['correct']
          except Ended as ended:
            verdicts[place] = Verdict(False, str(ended))
            break
          verdicts[place] = Verdict(correct, '' if correct else 'wrong')
    return verdicts


def last_boxed(text: str) -> str | None:
  r"""Returns what stands in the last \boxed{} or \fbox{} that is closed; None without one."""
  for match in reversed(list(re.finditer(r'\\(?:boxed|fbox)\s*\{', text))):
    depth = 1
    for place in range(match.end(), len(text)):
      if text[place] in '{}' and text[place - 1] != '\\':
        depth += 1 if text[place] == '{' else -1
      if depth == 0:
        return text[match.end() : place]
  # TeX takes a single token without braces.
  bare = re.findall(r'\\boxed\s+(\w)', text)
  return bare[-1] if bare else None


def last_number(text: str) -> decimal.Decimal | None:
  """Returns the last number of a text, thousands with or without commas; None without one."""
  found = _NUMBER.findall(text.replace('\\!', ''))
  if not found:
    return None
  number = found[-1].replace('{,}', '').replace(',', '').replace('\u2212', '-')
  return decimal.Decimal(number)
