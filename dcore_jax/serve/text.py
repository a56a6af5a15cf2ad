"""Tokens to text as they come: no character in halves, and nothing of a stop string."""

import functools
import re
from collections.abc import Sequence
from typing import Any

_REPLACEMENT = '\ufffd'  # what a decoder writes for bytes that are no character, or not yet
# A token of one byte, in vocabularies that fall back to bytes (Llama-2's, Gemma's).
_BYTE = re.compile(r'<0x[0-9A-F]{2}>')


class Detokenizer:
  """Text of a growing row of tokens, without special tokens.

  The pieces, joined, are the tokenizer's text of the whole.

  `tokenizers.decoders.DecodeStream` gives the same for vocabularies of byte-level tokens (Qwen3's),
  but for the bytes at the end that never become a character, which it has no call for. Where a
  vocabulary falls back to bytes, bytes that are no character make it raise "Invalid prefix"
  (tokenizers 0.23): what a model writes would end the request.
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self._bytes, self._special = _odd_tokens(tokenizer)
    self._ids: list[int] = []  # from a place on where a character begins
    self._sent = 0  # ids whose text was given out; the others may end inside a character

  def push(self, tokens: Sequence[int]) -> str:
    """The text that is certain now."""
    self._ids += map(int, tokens)
    # Tokens given out before stay in the window once: decoders of some families treat the first
    # token of a text apart.
    # How a run of bytes is decoded depends on its end: bytes that were characters alone are none
    # together with others.
    if self._ends_in_byte():
      return ''
    text = self._decode(self._ids)
    if text.endswith(_REPLACEMENT):
      return ''
    new = text[len(self._decode(self._ids[: self._sent])) :]
    if new:
      self._ids = self._ids[self._sent :]
      self._sent = len(self._ids)
    return new

  def finish(self) -> str:
    """The rest, with U+FFFD for bytes that never became a character."""
    return self._decode(self._ids)[len(self._decode(self._ids[: self._sent])) :]

  def _ends_in_byte(self) -> bool:
    if not self._bytes:
      return False
    # Special tokens are left out before bytes are put together, so that a run goes on behind them.
    text_ids = (token for token in reversed(self._ids) if token not in self._special)
    return next(text_ids, None) in self._bytes

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ''


@functools.lru_cache(maxsize=8)
def _odd_tokens(tokenizer: Any) -> tuple[frozenset[int], frozenset[int]]:
  """Returns (tokens of one byte, special tokens); one look through the vocabulary a tokenizer."""
  found = set()
  for text, token in tokenizer.get_vocab().items():
    if _BYTE.fullmatch(text):
      found.add(token)
  added = tokenizer.added_tokens_decoder.items()
  return frozenset(found), frozenset(token for token, text in added if text.special)


class StopScanner:
  """Lets text pass up to the first stop string, and holds back what may turn out to begin one."""

  def __init__(self, stop: Sequence[str]):
    self.stopped = False
    self._stop = tuple(stop)
    self._held = ''

  def push(self, text: str) -> str:
    """The text that is certain now; '' for ever once a stop string has come."""
    if self.stopped:
      return ''
    text = self._held + text
    found = []
    for stop in self._stop:
      if stop in text:
        begin = text.index(stop)
        found.append((begin + len(stop), begin))
    if found:
      self.stopped = True
      self._held = ''
      # The string that was complete first ends the text, however it came in pieces.
      _, begin = min(found)
      return text[:begin]
    held = 0  # characters at the end that may begin a stop string
    for stop in self._stop:
      for length in range(held + 1, len(stop)):
        if text.endswith(stop[:length]):
          held = length
    self._held = text[len(text) - held :]
    return text[: len(text) - held]

  def finish(self) -> str:
    """What was held back, where it did not become a stop string."""
    held = self._held
    self._held = ''
    return held


class TextReader:
  """Both of them: the visible text of one rollout, in pieces."""

  def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
    self._detokenizer = Detokenizer(tokenizer)
    self._scanner = StopScanner(stop)

  @property
  def stopped(self) -> bool:
    """Whether a stop string has come."""
    return self._scanner.stopped

  def push(self, tokens: Sequence[int], last: bool = False) -> str:
    """The text that is certain with these tokens; all of it where they are the `last` ones."""
    text = self._scanner.push(self._detokenizer.push(tokens))
    if last:
      text += self._scanner.push(self._detokenizer.finish())
      text += self._scanner.finish()
    return text
