"""Our Qwen3 template against the official one, and examples for training."""
import json
import random

import numpy as np
import pytest
import transformers

from dcore_jax.chat import template
from dcore_jax.chat.messages import Message

TEXTS = ['Hello.', '', '\n\nlead', 'trail\n\n', '<think>\nwhy\n</think>\n\nBecause.', '<think>\n\n</think>\n\n',
         'a</think>b</think>\nc', '<think>x<think>\n\ny\n\n</think>\n\n\nz', 'open <think> only',
         '<tool_response>\n1\n</tool_response>', '<tool_response> half',
         '北京 "quoted" <b>&amp;</b>', '[f(a=1)]', '</think>', '<think>\n</think>']
TOOLS = [
    {'type': 'function', 'function': {'name': 'f', 'description': "It's <b> & 'c'", 'parameters': {
        'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'required': ['a']}}},
    {'name': 'größe', 'parameters': {}},
]
CALLS = [{'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1, 'b': ['<x>', None, 'é']}}},
         {'name': 'g.h', 'arguments': '{"raw": true}'}, {'function': {'name': 'i', 'arguments': {}}}]


@pytest.fixture(scope='module')
def tokenizer(data_dir):
  return transformers.AutoTokenizer.from_pretrained(data_dir / 'qwen3-tokenizer')


def random_conversation(rng: random.Random) -> list[dict]:
  messages = [{'role': 'system', 'content': rng.choice(TEXTS)}] if rng.random() < 0.5 else []
  for _ in range(rng.randint(1, 7)):
    role = rng.choices(['user', 'assistant', 'tool', 'system'], [4, 5, 3, 0.5])[0]
    message = {'role': role, 'content': rng.choice(TEXTS)}
    if role == 'assistant':
      if rng.random() < 0.3:
        message['tool_calls'] = rng.sample(CALLS, rng.randint(0, 3))
      if rng.random() < 0.25:
        message['reasoning_content'] = rng.choice(['', '\n', '\nthoughts\n\n', 'more', None])
    if role != 'system' and rng.random() < 0.05:
      message['content'] = None
    messages.append(message)
  return messages


def test_renders_what_the_official_template_renders(tokenizer, data_dir):
  official = json.loads((data_dir / 'qwen3-tokenizer' / 'tokenizer_config.json').read_text())['chat_template']
  ours = template.qwen3_template()
  assert ours != official
  rng = random.Random(0)
  for _ in range(1500):
    messages = random_conversation(rng)
    options = {'tools': rng.choice([None, None, TOOLS, TOOLS[:1]]), 'add_generation_prompt': rng.random() < 0.5}
    options |= rng.choice([{}, {'enable_thinking': False}, {'enable_thinking': True}])
    want, got = [tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **options)
                 for text in (official, ours)]
    assert got == want, (messages, options)


CHAT = [Message('system', 'Be brief.'), Message('user', 'Weather?'),
        Message('assistant', "<think>\nold thoughts\n</think>\n\n[weather(city='Rome')]"),
        Message('user', '<tool_response>\nsunny\n</tool_response>'), Message('user', 'So?'),
        Message('assistant', '<think>\n\nIt said sunny.</think>\n\nSunny.')]


def test_prompt_ends_where_the_assistant_speaks(tokenizer):
  prompt = template.render_prompt(tokenizer, CHAT[:-1])
  assert prompt.endswith('<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n')
  assert 'old thoughts' not in prompt and "[weather(city='Rome')]" in prompt


def test_example_is_prompt_then_content_verbatim(tokenizer):
  tokens, target_start = template.encode_example(tokenizer, CHAT)
  assert tokens.dtype == np.int32 and tokens.ndim == 1
  assert tokenizer.decode(tokens[:target_start]) == template.render_prompt(tokenizer, CHAT[:-1])
  assert tokenizer.decode(tokens[target_start:]) == CHAT[-1].content + '<|im_end|>'
  assert tokens[-1] == tokenizer.eos_token_id
  # The prompt's tokens are those that generation starts from.
  assert tokens[:target_start].tolist() == tokenizer.encode(template.render_prompt(tokenizer, CHAT[:-1]))


@pytest.mark.parametrize('messages, reason', [
    ([], 'got none'), (CHAT[:-1], "role 'user'"), (CHAT[-1:], 'a message before'),
    ([CHAT[1], Message('assistant', 'ab<|im_end|>c')], 'at character 2')])
def test_bad_examples(tokenizer, messages, reason):
  with pytest.raises(ValueError, match=reason):
    template.encode_example(tokenizer, messages)


def test_bad_tokenizers():
  class Bare:
    chat_template = None

    def get_vocab(self):
      return {}

  with pytest.raises(ValueError, match='at least one message'):
    template.render_prompt(Bare(), [])
  with pytest.raises(ValueError, match='no chat template'):
    template.render_prompt(Bare(), CHAT)
  with pytest.raises(ValueError, match=r'no token <\|im_end\|>'):
    template.encode_example(Bare(), CHAT)
