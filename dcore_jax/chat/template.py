"""From conversations to the text and tokens that a model sees.

A tokenizer brings its own chat template; `qwen3_template` is ours for tokenizers that have none, equal to Qwen3's own.
An assistant's text (thoughts and answer) is never passed through a template where it is to be learned: templates drop
and rearrange thoughts, and training must see the tokens that sampling produced.
"""
import functools
import importlib.resources
from typing import Any, Sequence

import numpy as np

from dcore_jax.chat.messages import Message

END_OF_TURN = '<|im_end|>'


@functools.cache
def qwen3_template() -> str:
  """Jinja text of Qwen3's conversation format; renders what the official template does, tools and thoughts included."""
  return importlib.resources.files('dcore_jax.chat').joinpath('qwen3.jinja').read_text(encoding='utf-8')


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
  """Text of a conversation up to where the assistant speaks next, by the template of a transformers tokenizer."""
  if not messages:
    raise ValueError('a prompt needs at least one message')
  if not tokenizer.chat_template:
    raise ValueError('the tokenizer has no chat template; set tokenizer.chat_template = qwen3_template()')
  records = [message.to_json() for message in messages]
  return tokenizer.apply_chat_template(records, tokenize=False, add_generation_prompt=True)


def encode_example(tokenizer: Any, messages: Sequence[Message]) -> tuple[np.ndarray, int]:
  """Tokens of a conversation whose last message is to be learned, and where that message begins.

  The prompt is what `render_prompt` makes of all messages but the last; then come the last one's content, verbatim, and
  the end-of-turn token. Prompt and target are tokenized apart, as they are when the model is sampled.

  Returns:
    (tokens int32[T], target_start): the loss is on tokens[target_start:], the end-of-turn token included.

  Raises:
    ValueError: no messages, nothing to answer, a last message that is not the assistant's, or one that holds the
      end-of-turn token.
  """
  if not messages:
    raise ValueError('an example needs messages, got none')
  *context, last = messages
  if last.role != 'assistant':
    raise ValueError(f'the last message of an example must be the assistant\'s, got one of role {last.role!r}')
  if not context:
    raise ValueError('an example needs a message before the assistant\'s')
  if END_OF_TURN in last.content:
    raise ValueError(f'the text to learn holds {END_OF_TURN} at character {last.content.index(END_OF_TURN)}')
  if END_OF_TURN not in tokenizer.get_vocab():
    raise ValueError(f'the tokenizer has no token {END_OF_TURN}')
  prompt = tokenizer.encode(render_prompt(tokenizer, context), add_special_tokens=False)
  target = tokenizer.encode(last.content, add_special_tokens=False)
  tokens = [*prompt, *target, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
  return np.array(tokens, np.int32), len(prompt)
