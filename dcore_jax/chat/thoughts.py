"""The block of thoughts where it meets the prompt.

Some chat templates (Qwen3-Thinking, QwQ, the R1 distillations) end a prompt with `<think>`. What is
sampled then begins inside the thoughts. Readers of whole responses are given the opening and the
response together; training is given the response without the opening, which its prompt holds.
"""

import os.path
import re

from dcore_jax.chat.call_text import CLOSE_THOUGHTS, OPEN_THOUGHTS, closing_tags, split_answer

# `\Z` and not `$`: the latter would also match in front of a last newline.
_OPENED = re.compile(OPEN_THOUGHTS + r'\s*\Z')
_BLOCK_AT_END = re.compile(OPEN_THOUGHTS + r'\s*(?:' + CLOSE_THOUGHTS + r'\s*)?\Z')


def opened_thoughts(prompt: str) -> str:
  """Returns the tag, and the white space behind it, with which a prompt ends; '' without one."""
  found = _OPENED.search(prompt)
  return found[0] if found else ''


def with_opening(response: str, opening: str) -> str:
  """Returns a response together with the tag by which its prompt has opened the thoughts.

  A response that opens its thoughts itself stays as it is, so that no tag stands there twice.
  """
  # Some models repeat the tag although their prompt ends with it.
  return response if response.lstrip().startswith(OPEN_THOUGHTS) else opening + response


def without_opening(text: str, prompt: str) -> str:
  """Returns what is left to say of an assistant's text behind a prompt that may begin it.

  Behind a prompt that does not end in a block of thoughts that is the whole text. A text without
  thoughts closes the block that the prompt has opened, as templates write such an answer.
  """
  found = _BLOCK_AT_END.search(prompt)
  if not found:
    return text
  begun = found[0]
  # White space in front of the thoughts is no part of them.
  body = text.lstrip()
  if body.startswith(begun):
    return body[len(begun) :]
  # Behind an empty block that is closed the model may think anew; the text says whether it does.
  if CLOSE_THOUGHTS in begun:
    return text
  if body.startswith(OPEN_THOUGHTS):
    # The white space behind the two tags differs: what the prompt has of it is not said again.
    spaces = begun.removeprefix(OPEN_THOUGHTS)
    body = body.removeprefix(OPEN_THOUGHTS)
    return body.removeprefix(os.path.commonprefix([spaces, body]))
  return text if closing_tags(text) else f'\n{CLOSE_THOUGHTS}\n\n{text}'


def taken_as_opened(response: str) -> str:
  """Returns a response as a whole one whose prompt is not known.

  A single closing tag without an opening one says that the prompt has opened the thoughts.
  """
  # Two closing tags without an opening one do not tell which of them ends the thoughts.
  if OPEN_THOUGHTS in response or len(closing_tags(response)) != 1:
    return response
  return f'{OPEN_THOUGHTS}\n{response}'


def holds_tag(text: str) -> bool:
  """Tells whether a text holds a tag that a reader would take for an end of thoughts."""
  return OPEN_THOUGHTS in text or CLOSE_THOUGHTS in text


def bare_thoughts(text: str) -> str:
  """Returns thoughts without the tags around them, and without the newlines at either end."""
  if not holds_tag(text):
    return text.strip('\n')
  return text.strip().removeprefix(OPEN_THOUGHTS).removesuffix(CLOSE_THOUGHTS).strip('\n')


def take_thoughts(text: str) -> tuple[str, str]:
  """Splits a text that begins with its thoughts into (thoughts without tags, what is said).

  The opening tag may be missing, where the prompt has it.

  Raises:
    ValueError: tags that make up anything else than one block in front.
  """
  block, said = split_answer(text)
  thoughts = bare_thoughts(block)
  if holds_tag(thoughts) or OPEN_THOUGHTS in said:
    raise ValueError('holds tags of thoughts that are not one block in front')
  return thoughts, said
