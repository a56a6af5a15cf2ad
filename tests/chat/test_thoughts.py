"""Thoughts that a prompt opens, and closing tags that close none."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.chat.call_text import JsonScan, Scan, closing_tags, split_answer
from dcore_jax.chat.encoding import encode_rendered, shown
from dcore_jax.chat.examples import encode_example
from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.template import qwen3_template, render_prompt
from dcore_jax.chat.thoughts import (
  opened_thoughts,
  taken_as_opened,
  with_opening,
  without_opening,
)
from dcore_jax.chat.tool_calls import parse_calls, print_calls
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts

OPENING = "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"
ASKED = [Message('user', 'who wrote </think> and <think>?')]


@pytest.fixture(scope='module', params=['<think>\n', '<think>', '<think>\n\n'])
def opening(request):
  return request.param


@pytest.fixture(scope='module')
def tokenizer(opening):
  """Its template ends a prompt as that of Qwen3-Thinking does."""
  tokenizer = build_tokenizer(sample_texts(), 640)
  tokenizer.chat_template = qwen3_template() + OPENING.replace('<think>\\n', repr(opening)[1:-1])
  return tokenizer


@pytest.mark.parametrize(
  'said, response',
  [
    ('<think>\nhm\n</think>\n\n[f()]', 'hm\n</think>\n\n[f()]'),
    ('<think>hm</think>\n\n[f()]', 'hm</think>\n\n[f()]'),
    ('\n<think>\n\nhm\n</think>\n\n[f()]', 'hm\n</think>\n\n[f()]'),
    ('hm\n</think>\n\n[f()]', 'hm\n</think>\n\n[f()]'),
    ('[f()]', '</think>\n\n[f()]'),
    ('<think>\nhm', 'hm'),
  ],
)
@pytest.mark.parametrize('loss_mask', ['final', 'all_assistant', 'final+structure'])
def test_one_tag_is_trained_and_the_prompt_has_it(tokenizer, opening, said, response, loss_mask):
  tokens, weights = encode_example(tokenizer, [*ASKED, Message('assistant', said)], loss_mask)
  prompt = render_prompt(tokenizer, ASKED)
  assert prompt.endswith('assistant\n' + opening) and opened_thoughts(prompt) == opening
  prompt_ids = encode_rendered(tokenizer, prompt)
  assert tokens[: len(prompt_ids)].tolist() == prompt_ids
  answer = tokens[len(prompt_ids) :]
  text = tokenizer.decode(answer)
  assert text.strip().removesuffix('<|im_end|>').lstrip('\n') == response
  assert '<think>' not in text and text.count('</think>') == response.count('</think>')
  # Everything behind the prompt is trained, and nothing of the prompt but its structure.
  assert weights[len(prompt_ids) :].all()
  if loss_mask != 'final+structure':
    assert not weights[: len(prompt_ids)].any()
  # What is trained is what readers of whole responses are shown later.
  whole = with_opening(text.partition('<|im_end|>')[0], opening)
  assert whole.count('<think>') == 1
  if '</think>' in said:
    assert split_reasoning(whole)[1] == split_reasoning(said)[1]


def test_earlier_answers_are_trained_behind_the_tag():
  """With a template that shows earlier thoughts as they are."""
  tokenizer = build_tokenizer(sample_texts(), 640)
  tokenizer.chat_template = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}{{- '<|im_start|>assistant\n<think>\n' if add_generation_prompt -}}"
  )
  answer = Message('assistant', '<think>\nhm\n</think>\n\nso')
  tokens, weights = encode_example(tokenizer, [*ASKED, answer] * 2, 'all_assistant')
  turn = shown(render_prompt(tokenizer, ASKED)) + 'hm\n</think>\n\nso<|im_end|>'
  assert tokenizer.decode(tokens) == f'{turn}\n{turn}'
  cuts = np.flatnonzero(np.diff(weights)) + 1
  parts = zip(np.split(tokens, cuts), np.split(weights, cuts), strict=True)
  assert [tokenizer.decode(part) for part, weight in parts if weight[0]] == [
    'hm\n</think>\n\nso<|im_end|>'
  ] * 2


@pytest.mark.parametrize(
  'prompt, opening',
  [
    ('a<think>\n', '<think>\n'),
    ('a<think>', '<think>'),
    ('a<think>\n\n</think>\n\n', ''),
    ('<think>\na', ''),
    ('', ''),
  ],
)
def test_prompts_that_open_thoughts(prompt, opening):
  assert opened_thoughts(prompt) == opening
  if not opening:
    assert with_opening('hm', opening) == 'hm'


def test_a_closed_block_is_not_said_again():
  closed = 'a<think>\n\n</think>\n\n'
  assert without_opening('<think>\n\n</think>\n\nfine', closed) == 'fine'
  for text in ('fine', '<think>\nhm\n</think>\n\nfine', 'hm</think>fine'):
    assert without_opening(text, closed) == text
    assert without_opening(text, 'a') == text


def test_never_twice():
  assert with_opening('<think>\nhm', '<think>\n') == '<think>\nhm'
  assert with_opening('hm', '<think>\n') == '<think>\nhm'
  assert taken_as_opened('hm\n</think>\n\nso') == '<think>\nhm\n</think>\n\nso'
  for text in ('so', '<think>\nhm\n</think>\n\nso', 'a</think>b</think>c', '<think>hm'):
    assert taken_as_opened(text) == text


TAGS = 'a</think>b<think>\n\n'


@pytest.mark.parametrize('style', ['python', 'hermes'])
@pytest.mark.parametrize('escaped', [True, False])
def test_a_tag_in_an_argument_closes_nothing(style, escaped):
  calls = [ToolCall('f', {'a': TAGS, 'b': ['</think>', '"\'</think>']})]
  answer = print_calls(calls, style)
  if not escaped:
    # As a model may write them.
    answer = answer.replace('\\u003e', '>').replace('\\x3c', '<')
    assert '</think>' in answer
  for thoughts in ('', '<think>\nhm\n</think>\n\n', '<think>\na</think>\nb</think>\n\n'):
    text = thoughts + answer
    if thoughts:
      assert split_reasoning(text)[1] == answer
      assert split_answer(text)[1].strip() == answer
    assert parse_calls(split_answer(text)[1] if thoughts else text) == calls


@pytest.mark.parametrize(
  'text, count',
  [
    ('a</think>b</think>c', 2),
    ('a</think><tool_call> b</think>c', 2),
    ('a</think><tool_call>{"name": "f</think>', 2),
    ('a</think>[f(a="</think>")', 2),
    ('a</think>[f(a="</think>")]', 1),
    ('a</think>[</think>]', 2),
    ("a</think>[it's </think>]", 2),
    ('a</think><tool_call>{"a": "</think>"}</think>c', 2),
    ('none', 0),
  ],
)
def test_closing_tags(text, count):
  assert len(closing_tags(text)) == count


def test_many_tags_do_not_take_minutes():
  for part in (
    '</think>[',
    '</think>["\\"',
    '</think><tool_call>{"',
    '</think>[f(a="',
    '<tool_call>{"</think>',
  ):
    text = part * (60_000 // len(part)) + ']'
    assert closing_tags(text)


@given(
  st.lists(st.sampled_from(['{', '}', '[', ']', '"', '\\', 'a', '1,', '<', ' '])).map(''.join),
  st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_a_scan_does_not_depend_on_the_cuts(text, sizes):
  whole = JsonScan(0)
  scan = JsonScan(0)
  whole.read('{' + text)
  end = 1
  for size in itertools.cycle(sizes):
    scan.read('{' + text[: end - 1])
    if end > len(text):
      break
    end += size
  assert (scan.state, scan.place) == (whole.state, whole.place)
  if whole.state is not Scan.OPEN:
    assert whole.place <= len(text) + 1
