"""Labels of thoughts by rules and by a judge, and how far the two agree."""

import json

import pytest

from dcore_jax.evaluate.behaviour.judge import Thought, agreement, draw_thoughts, judge, read_label
from dcore_jax.evaluate.behaviour.labels import LABELS, label_thought, split_thoughts
from dcore_jax.rollout.endpoint import OpenAIBackend
from dcore_jax.statistics import cohens_kappa
from tests.evaluate.scripted_server import scripted_server


def test_thoughts_are_sentences_and_lines():
  text = (
    '<think>\nIt costs 2.5 dollars. Wait! f(a). Next (as said). So?\n1. Use f.\n\n---\n</think>'
  )
  assert split_thoughts(text) == [
    'It costs 2.5 dollars.',
    'Wait!',
    'f(a).',
    'Next (as said).',
    'So?',
    '1. Use f.',
  ]
  assert split_thoughts('') == []


@pytest.mark.parametrize(
  'thought, label',
  [
    ('12. Use the tool f to do it.', 'decomposition'),
    ('12.5 is enough', 'other'),
    ('An attribute of the button.', 'other'),
    ('Wait, therefore it holds.', 'reflection'),
    ('Therefore wait.', 'deduction'),
    ('However, let me check and verify it.', 'verification'),
  ],
)
def test_a_thought_has_the_label_of_most_markers(thought, label):
  assert label_thought(thought) == label
  assert label in LABELS


@pytest.mark.parametrize(
  'answer, label',
  [
    ('deduction', 'deduction'),
    ('<think>\nreflection?\n</think>\n\nother\n', 'other'),
    ('Deduction.', None),
    ('deduction, since it concludes', None),
    ('<think>\ndeduction', None),
    ('', None),
  ],
)
def test_an_answer_is_one_word_or_nothing(answer, label):
  assert read_label(answer) == label


def test_a_judge_answers_once(tmp_path):
  asked = []

  def answer(body):
    thought = body['messages'][-1]['content']
    asked.append(thought)
    return {'role': 'assistant', 'content': 'I think so' if 'odd' in thought else 'deduction'}

  thoughts = [Thought('a', 'so it is'), Thought('b', 'odd'), Thought('b', 'thus')]
  with scripted_server(answer) as address:
    for _ in range(2):
      backend = OpenAIBackend(address, 'scripted', journal=tmp_path / 'judge.jsonl')
      assert judge(backend, thoughts) == ['deduction', None, 'deduction']
  assert sorted(asked) == ['odd', 'so it is', 'thus']
  assert len((tmp_path / 'judge.jsonl').read_text().splitlines()) == 3


def test_agreement_leaves_out_what_has_no_label():
  rules = ['deduction', 'other', 'reflection', 'other']
  judged = ['deduction', 'other', None, 'deduction']
  found = agreement(rules, judged, ['a', 'b', 'c', 'd'])
  assert (found['asked'], found['out_of_form']) == (4, 1)
  assert found['agreement']['mean'] == pytest.approx(2 / 3)
  # By hand: p = 2/3; shares 1/3 and 2/3 of deduction, 2/3 and 1/3 of other: e = 4/9.
  assert found['kappa']['kappa'] == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
  assert found['table']['other'] == dict.fromkeys(LABELS, 0) | {'other': 1, 'deduction': 1}
  none = agreement(rules, [None] * 4, list('abcd'))
  assert (none['out_of_form'], none['agreement'], none['kappa']) == (4, None, None)


def test_kappa():
  # 50 things: both yes 20, both no 15, and 5 and 10 that they part on. p = 0.7, e = 0.5.
  first = ['yes'] * 25 + ['no'] * 25
  second = ['yes'] * 20 + ['no'] * 5 + ['yes'] * 10 + ['no'] * 15
  found = cohens_kappa(first, second, clusters=list(map(str, range(50))))
  assert found['kappa'] == pytest.approx(0.4) and found['n'] == 50
  low, high = found['interval']
  # The large-sample standard error, sqrt(p (1 - p) / n) / (1 - e), is 0.13.
  assert low == pytest.approx(0.4 - 1.96 * 0.13, abs=0.04)
  assert high == pytest.approx(0.4 + 1.96 * 0.13, abs=0.04)
  # One unit says nothing of others, and one label nothing of agreement.
  assert cohens_kappa(first, second, clusters=['a'] * 50)['interval'] is None
  assert cohens_kappa(['a'], ['a'], clusters=['x'])['kappa'] is None
  assert cohens_kappa(first, first, clusters=list(map(str, range(50))))['kappa'] == 1
  with pytest.raises(ValueError, match='1 and 2 labels of 1 units'):
    cohens_kappa(['a'], ['a', 'b'], clusters=['x'])


def test_the_sample_follows_from_the_seed():
  thoughts = [Thought(str(place), 'text') for place in range(50)]
  drawn = draw_thoughts(thoughts, 10)
  assert drawn == draw_thoughts(thoughts, 10) and len(set(drawn)) == 10
  assert drawn != thoughts[:10]
  assert draw_thoughts(thoughts, 99) == thoughts
  assert json.dumps(drawn)
