"""Prompts that open the thoughts: what is scored, written down and acted on begins with the tag."""

import functools

import numpy as np
import pytest

from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import qwen3_template
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.rollout.backends import ChatRequest
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.requests import Completion
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.train.sources import Episodes, Questions, encode_prompts
from dcore_jax.worlds.rollouts import act
from dcore_jax.worlds.toolworld.world import ToolWorld

OPENS = "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"
SAID = 'hm\n</think>\n\n'


class Script:
  """An engine that answers every prompt with a text, whose turn may have ended."""

  max_len = 1024
  max_new = 256

  def __init__(self, tokenizer, answer, finished=True):
    self.prompts = []
    self._tokenizer = tokenizer
    self._answer = answer
    self._finished = finished

  def _completion(self, prompt):
    self.prompts.append(self._tokenizer.decode(prompt))
    text = self._answer + '<|im_end|>' * self._finished
    tokens = np.array(self._tokenizer(text, add_special_tokens=False)['input_ids'], np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    return Completion(
      tokens=tokens,
      logprobs=zeros,
      full_logprobs=zeros,
      entropies=zeros,
      finished=self._finished,
      stop=None,
      prompt_len=len(prompt),
    )

  def generate(self, requests, sampling):
    return [self._completion(request.prompt) for request in requests]

  def stream(self, source, sampling):
    while arrivals := source(4):
      for tag, request in arrivals:
        yield tag, self._completion(request.prompt)


@functools.cache
def tokenizer_of(opens):
  tokenizer = build_tokenizer(sample_texts(), 640)
  tokenizer.chat_template = qwen3_template() + (OPENS if opens else '')
  return tokenizer


# Whether the prompt opens the thoughts, what is said, the whole response, and its format.
CASES = [
  (True, SAID + '[f()]', '<think>\n' + SAID + '[f()]', 1),
  (True, '<think>\n' + SAID + '[f()]', '<think>\n' + SAID + '[f()]', 1),
  (True, '\n</think>\n\n[f()]', '<think>\n\n</think>\n\n[f()]', 1),
  (True, '[f()]', '<think>\n[f()]', 0),
  (False, '<think>\n' + SAID + '[f()]', '<think>\n' + SAID + '[f()]', 1),
  (False, SAID + '[f()]', SAID + '[f()]', 0),
]


@pytest.mark.parametrize('opens, said, whole, form', CASES)
@pytest.mark.parametrize('reward', ['toolrl', 'paper', 'corrected'])
def test_answers_to_decision_points(opens, said, whole, form, reward):
  tokenizer = tokenizer_of(opens)
  # A user's tag opens nothing.
  point = DecisionPoint('p', 'single', (Message('user', 'what is <think>'),), '[f()]')
  prompts, _ = encode_prompts(tokenizer, [point], 200)
  source = Questions(tokenizer, prompts, reward)
  engine = Script(tokenizer, said)
  rollouts = source.sample(engine, [0, 0], [(0,), (1,)], SamplingParams())
  assert engine.prompts[0].endswith('<think>\n') == opens
  assert [rollout.texts for rollout in rollouts] == [[whole]] * 2
  assert source.judge([0], rollouts).format_PG.tolist() == [[form] * 2]


@pytest.mark.parametrize('opens, said, whole, form', CASES)
def test_replies_of_our_engine(opens, said, whole, form):
  del form
  tokenizer = tokenizer_of(opens)
  backend = LocalBackend(Script(tokenizer, said), tokenizer)
  asked = [[(0, ChatRequest((Message('user', 'f?'),), (0,)))]]
  [(_, reply)] = backend.stream(lambda _: asked.pop() if asked else [], SamplingParams())
  assert reply.text == whole


@pytest.mark.parametrize('opens', [True, False])
def test_episodes(opens):
  tokenizer = tokenizer_of(opens)
  world = ToolWorld()
  task = world.tasks('single', 1, seed=0, split='train')[0]
  answer = print_calls(list(task.turns[0].calls))
  opening = '' if opens else '<think>\n'
  said = opening + SAID + answer
  [acted] = act(Script(tokenizer, said), tokenizer, world, [task], SamplingParams())
  assert acted.texts[0] == '<think>\n' + SAID + answer and acted.reasonings[0] == 'hm'
  # Between the tags, line breaks included; with the opening tag its own break is in the prompt.
  inside = ('' if opens else '\n') + 'hm\n'
  assert acted.reasoning_tokens[0] == len(tokenizer(inside)['input_ids'])
  source = Episodes(tokenizer, world, [task])
  rollouts = source.sample(Script(tokenizer, said), [0], [(0,)], SamplingParams())
  batch = source.judge([0], rollouts)
  assert batch.format_PG.tolist() == [[1]]


def test_thoughts_that_never_end_are_no_answer():
  tokenizer = tokenizer_of(True)
  world = ToolWorld()
  task = world.tasks('irrelevant', 1, seed=0, split='train')[0]
  for finished in (True, False):
    script = Script(tokenizer, 'hm, which tool', finished)
    [acted] = act(script, tokenizer, world, [task], SamplingParams())
    assert acted.outcome.reason == 'no answer' and not acted.outcome.correct
    assert acted.reasonings == ['<think>\nhm, which tool']
    assert acted.reasoning_tokens == [len(tokenizer('hm, which tool')['input_ids'])]
