"""Tokens to text as they come: no character in halves, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = '\ufffd'  # what a decoder writes for bytes that are no character, or not yet


class Detokenizer:
  """Text of a growing row of tokens, without special tokens.

  The pieces, joined, are the tokenizer's text of the whole.
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self._ids: list[int] = []  # from a place on where a character begins
    self._sent = 0  # ids whose text was given out; the others may end inside a character

  def push(self, tokens: Sequence[int]) -> str:
    """The text that is certain now."""
    self._ids += map(int, tokens)
    # Tokens given out before stay in the window once: decoders of some families treat the first
    # token of a text apart.
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

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ''


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
