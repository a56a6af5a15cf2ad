r"""GSM8K and MATH-500: answers are found, compared within limits, and asked for once."""

import importlib.util
import json
import os
import pathlib
import threading
from decimal import Decimal

import pytest

from dcore_jax.evaluate import suites
from dcore_jax.evaluate.questions import math as math_suites
from dcore_jax.evaluate.questions.math import last_boxed, last_number
from dcore_jax.evaluate.questions.suite import Question, said
from tests.evaluate.scripted_server import scripted_server

DATA = pathlib.Path(os.environ.get('DCORE_DATA', '../shared/data'))
published = pytest.mark.skipif(
  not (DATA / 'transfer').is_dir(), reason='the questions are not in DCORE_DATA'
)
verifying = pytest.mark.skipif(
  importlib.util.find_spec('math_verify') is None, reason='math-verify is not installed'
)


def quiet(done, total):
  """Tells nobody."""


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ('It is 18.', 18),
    ('$1,234,567 in all', 1234567),
    ('1{,}234', 1234),
    ('from 3 to -4.50 dollars', Decimal('-4.5')),
    ('x = \u22127', -7),
    ('half is .5', Decimal('0.5')),
    ('1, 2, 3', 3),
    ('12,34', 34),
    ('none', None),
  ],
)
def test_the_last_number_is_found(text, number):
  assert last_number(text) == number


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    ('\\boxed{1} and then \\boxed{\\frac{1}{2}}.', '\\frac{1}{2}'),
    ('\\boxed{a \\} b}', 'a \\} b'),
    ('\\fbox{7} and \\boxed{cut', '7'),
    ('\\boxed 9', '9'),
    ('nothing', None),
  ],
)
def test_the_last_box_that_is_closed_is_found(text, found):
  assert last_boxed(text) == found


def test_thoughts_are_no_answer():
  assert said('<think>\nmaybe 5\n</think>\n\nIt is 4.') == 'It is 4.'
  assert said('<think>\nmaybe 5') == ''


def a_gsm8k(folder, count, **settings):
  (folder / 'transfer').mkdir(parents=True)
  rows = [{'question': f'What is {n}?', 'answer': f'It is\n#### {n:,}'} for n in range(count)]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'transfer' / 'gsm8k_test.jsonl').write_text(text)
  return suites.make_suite('gsm8k', suites.SuiteSettings(data=folder, **settings), {})


def test_the_form_of_an_answer_does_not_matter(tmp_path):
  suite = a_gsm8k(tmp_path, 1)
  question = Question('1', (), {'reference': '1,800'})
  answers = {
    '\\boxed{1800}': '',
    'So \\boxed{\\$1,800.00}': '',
    '5 more make 1800 of them.': '',
    '\\boxed{1801}, not 1800': 'wrong',
    'I do not know': 'no_answer',
    '': 'no_answer',
  }
  verdicts = suite.judge([question] * len(answers), list(answers))
  assert [verdict.reason for verdict in verdicts] == list(answers.values())
  assert [verdict.correct for verdict in verdicts] == [not each for each in answers.values()]


def test_an_interrupted_evaluation_goes_on_and_asks_nothing_twice(tmp_path):
  suite = a_gsm8k(tmp_path / 'data', 12, concurrency=3, timeout=20, temperature=0)
  asked = []
  lock = threading.Lock()
  dead = threading.Event()

  class Killed(Exception):
    """Stands for whatever ends the process."""

  def told(done, total):
    assert total == 12
    if done == 5 and not dead.is_set():
      dead.set()
      raise Killed

  def answer(body):
    with lock:
      asked.append(body['messages'][-1]['content'])
    return str(last_number(asked[-1].partition('?')[0]))

  folder = tmp_path / 'out'
  with scripted_server(answer) as url:
    served = suites.Served(url, 'scripted')
    with pytest.raises(Killed):
      suite.answer(served, folder, told)
    with pytest.raises(ValueError, match='no answers'):
      suite.score(folder)
    kept = (folder / 'replies.jsonl').read_text().count('\n')
    before = len(asked)
    assert 5 <= kept <= before
    suite.answer(served, folder, quiet)
    # Those whose answers were not there yet are asked again, and no other.
    assert len(asked) == before + 12 - kept
    suite.answer(served, folder, quiet)
    assert len(asked) == before + 12 - kept
  result, _ = suite.score(folder)
  assert result.scores[0].estimate['mean'] == 1


def test_what_is_refused_has_no_verdict_and_cut_answers_are_told(tmp_path):
  suite = a_gsm8k(tmp_path, 4, limit=3)
  replies = [
    {'id': 'gsm8k_0', 'text': '0', 'finished': True, 'error': ''},
    {'id': 'gsm8k_1', 'text': '<think>\n1', 'finished': False, 'error': ''},
    {'id': 'gsm8k_2', 'text': '', 'finished': False, 'error': 'refused with status 400: long'},
  ]
  counts = {'prompt_tokens': 1, 'completion_tokens': 4}
  lines = [json.dumps(reply | counts) + '\n' for reply in replies]
  (tmp_path / 'answers.jsonl').write_text(''.join(lines))
  result, trajectories = suite.score(tmp_path)
  assert result.scores[0].estimate['n'] == 2 and result.scores[0].estimate['mean'] == 0.5
  assert result.left_out == [{'id': 'gsm8k_2', 'reason': 'refused with status 400: long'}]
  assert 'first 3 tasks' in result.notes[0] and '1 of 2 answers were cut off' in result.notes[1]
  assert [each['reason'] for each in trajectories] == ['', 'unfinished']
  assert [each['kind'] for each in trajectories] == ['gsm8k', 'gsm8k']
  # 1 of 9 characters is thought; the tags are the rest.
  assert [each['reasoning_tokens'] for each in trajectories] == [[0], [round(4 / 9)]]
  suites.write_result(tmp_path, result, trajectories)
  assert json.loads((tmp_path / 'result.json').read_text())['suite'] == 'gsm8k'


def test_what_is_missing_is_named(tmp_path, monkeypatch):
  settings = suites.SuiteSettings(data=tmp_path)
  with pytest.raises(ValueError, match='gsm8k_test.jsonl.*--data'):
    suites.make_suite('gsm8k', settings, {}).prepare()
  monkeypatch.setattr(math_suites.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install .math-verify.*math500.jsonl'):
    suites.make_suite('math500', settings, {}).prepare()
  with pytest.raises(ValueError, match='seconds = -1'):
    suites.make_suite('math500', settings, {'seconds': -1})


@published
@pytest.mark.parametrize('share', [0.0, 1.0])
@pytest.mark.parametrize('name', ['gsm8k', pytest.param('math500', marks=verifying)])
def test_references_are_right_and_silence_is_wrong(name, share, tmp_path):
  settings = suites.SuiteSettings(limit=20, temperature=0, data=DATA)
  suite = suites.make_suite(name, settings, {})
  suite.prepare()
  references = {
    question.messages[-1].content: question.task['reference'] for question in suite.questions()
  }

  def answer(body):
    # Written otherwise than in the reference, so that comparing has something to do.
    found = references[body['messages'][-1]['content']]
    return f'<think>\n9\n</think>\n\nSo \\boxed{{ {found} }}.' if share else ''

  with scripted_server(answer) as url:
    suite.answer(suites.Served(url, 'scripted'), tmp_path, quiet)
  result, trajectories = suite.score(tmp_path)
  [score] = result.scores
  assert (score.estimate['mean'], score.estimate['n'], score.floor) == (share, 20, 0)
  assert {each['reason'] for each in trajectories} == ({''} if share else {'no_answer'})


@verifying
def test_expressions_are_compared_within_limits(tmp_path):
  suite = suites.make_suite('math500', suites.SuiteSettings(data=tmp_path), {'seconds': 5})
  cases = [
    ('\\frac{1}{2}', '0.5', ''),
    ('\\dfrac12', '\\frac{1}{2}', ''),
    ('(2x+1)(x-1)', '2x^2 - x - 1', ''),
    ('\\{1, 3\\}', '\\{3,1\\}', ''),
    ('\\text{even}', '\\text{odd}', 'wrong'),
    ('\\frac{1}{3}', '\\frac{1}{2}', 'wrong'),
    # Ended, and what stands behind it is still judged.
    ('9^{9^{9^{9^{9}}}}', '4', None),
    ('(((((', '4', 'wrong'),
    ('__import__("os").system("touch ' + str(tmp_path) + '/x")', '4', 'wrong'),
    ('x' * 3000, '4', 'too_long'),
    ('', '4', 'no_answer'),
    ('2+2', '4', ''),
  ]
  questions = [Question('q', (), {'reference': reference}) for _, reference, _ in cases]
  verdicts = suite.judge(questions, [f'It is \\boxed{{{given}}}.' for given, _, _ in cases])
  for (given, _, reason), verdict in zip(cases, verdicts, strict=True):
    assert verdict.correct == (reason == ''), given
    if reason is not None:
      assert verdict.reason == reason, given
  assert not list(tmp_path.iterdir())
