"""Prompts that cannot fit are refused before anything is made of them."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.chat.template import qwen3_template
from dcore_jax.serve.parts import RequestError
from dcore_jax.serve.prompts import PromptReader

ROOM = 20


@pytest.fixture(scope='module')
def tokenizers_by_name(tokenizer):
  """The words' own tokenizer, and one that composes letters and accents first."""
  made = {}
  for name in ('plain', 'composing'):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if name == 'composing':
      backend.normalizer = tokenizers.normalizers.NFC()
    made[name] = type(tokenizer)(
      tokenizer_object=backend, eos_token='<|im_end|>', chat_template=qwen3_template()
    )
  return made


def read(tokenizer, text, path='prompt', room=ROOM):
  reader = PromptReader(tokenizer, len(tokenizer), lambda name: None, room)
  if path == 'prompt':
    body = {'model': 'm', 'prompt': text, 'max_tokens': 1}
    return reader.read_completion(json.dumps(body).encode())[1][0]
  body = {'model': 'm', 'messages': [{'role': 'user', 'content': text}]}
  return reader.read_chat(json.dumps(body).encode())[1]


@pytest.mark.parametrize('path', ['prompt', 'messages'])
@pytest.mark.parametrize('text', ['\u202e\u200b' * 40_000, '<|im_start|>' * 9_000])
def test_a_text_without_room_is_refused_and_never_encoded(
  tokenizers_by_name, monkeypatch, path, text
):
  tokenizer = tokenizers_by_name['composing']
  monkeypatch.setattr(type(tokenizer), '__call__', lambda *_, **__: pytest.fail('it is encoded'))
  with pytest.raises(RequestError, match=rf'at least [\d]+ tokens.* {ROOM} tokens') as caught:
    read(tokenizer, text, path)
  assert (caught.value.param, caught.value.code) == (path, 'context_length_exceeded')


@given(
  st.lists(
    st.sampled_from(['find', ' ', 'the order', '<|im_end|>', 'e\u0301', 'x']), max_size=80
  ).map(''.join)
)
def test_what_may_fit_is_never_refused(tokenizers_by_name, text):
  for tokenizer in tokenizers_by_name.values():
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    if ids:
      assert read(tokenizer, text, room=len(ids)) == ids


def test_characters_that_a_tokenizer_composes_count_once(tokenizers_by_name):
  tokenizer = tokenizers_by_name['composing']
  longest = max(map(len, tokenizer.get_vocab()))
  # Twice as many characters as the room has, half of them accents.
  text = 'e\u0301' * (ROOM * longest)
  assert len(read(tokenizer, text)) >= ROOM
  with pytest.raises(RequestError, match=f'at least {2 * ROOM} tokens'):
    read(tokenizers_by_name['plain'], text)
