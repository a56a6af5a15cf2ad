"""The decomposition prompt, its tolerant reader, and the composed traces' exact form."""
import pytest

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.distill import compose, prompts
from dcore_jax.distill.compose import Solved
from dcore_jax.learn.rewards import toolrl_reward

A = Solved('find a', 'i need f.', "[f(x='a')]")
B = Solved('find b', '<think>\ni need g.\n', "[g(y=2)]")


def test_decomposition_round_trip():
  subtasks = ['find the order of Karo', 'say "hi" \\ there']
  assert prompts.parse_subtasks('text before ' + prompts.print_subtasks(subtasks) + ' and after') == [(s, [i]) for i, s in enumerate(subtasks)]
  assert prompts.parse_subtasks(prompts.print_subtasks(['all'], [[0, 1, 2]])) == [('all', [0, 1, 2])]
  assert prompts.parse_subtasks(prompts.print_subtasks(['a']) + ' or [{"x": 1}]') == [('a', [0])]  # the first array counts


@pytest.mark.parametrize('text', [
    '', 'no list', '[1, 2]', '[{"step": 1}]', '[{"step": 1, "description": 3, "index": [0]}]', '[{"description": "a", "index": [true]}]',
    '[{"description": "a", "index": 0}]', '[{"description": "a", "index": [0]', '[{' * 5000,
    '[{"description": "a", "index": [' + '9' * 5000 + ']}]'])
def test_what_is_no_decomposition(text):
  assert prompts.parse_subtasks(text) is None


def test_decomposition_prompt_shows_reference_and_context():
  context = [Message('system', 's'), Message('user', 'before'), Message('assistant', 'ok')]
  messages = prompts.decompose_messages(context, 'do it', [ToolCall('f', {'x': 'a'})])
  assert messages[:-1] == context
  assert 'do it' in messages[-1].content and "[f(x='a')]" in messages[-1].content


def test_sequential_form():
  first = compose.sequential('q', ['find a', 'find b'], 0, A)
  assert first == ('<think>\n\nthe request is: q\n i split it into subtasks:\n1. find a\n2. find b\nnow subtask 1: find a\ni need f.\n'
                   "</think>\n\n[f(x='a')]")
  second = compose.sequential('q', ['find a', 'find b'], 1, B)
  assert 'these subtasks are solved:\n1. find a\nnow subtask 2: find b\ni need g.\n</think>' in second
  assert '1. find a\n2. find b\n' in second  # the plan stands on every step


@pytest.mark.parametrize(('newline', 'expected'), [(True, 1), (False, 0)])
def test_parallel_form_and_its_format_reward(newline, expected):
  text = compose.parallel('q', [A, B], newline_before_close=newline)
  reasoning, answer = split_reasoning(text)
  assert answer == "[f(x='a'), g(y=2)]"
  assert reasoning.endswith(compose.DEFAULT.close + answer) and compose.DEFAULT.reflect in reasoning
  reward = toolrl_reward(text, answer)
  assert (reward.format, reward.correctness) == (expected, 3)


def test_other_forms_pass_the_format_reward():
  for text in (compose.irrelevant('q', 'a is missing.', 'please give the a.'), compose.finished('q', 'done: a b.'),
               compose.single('i need f.', "[f(x='a')]"), compose.sequential('q', ['find a'], 0, A)):
    assert toolrl_reward(text, split_reasoning(text)[1]).format == 1, text
