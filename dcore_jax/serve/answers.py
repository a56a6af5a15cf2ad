"""From the engine's progress to OpenAI's answers, whole or in pieces."""

import abc
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from dcore_jax.chat.messages import ToolSpec
from dcore_jax.rollout.engine import Progress, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.serve.replies import Delta, ReplyParser
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.text import TextReader


class Rollouts:
  """The rollouts of one request, as an asynchronous iterator of (which one, its progress).

  `close` frees what has not ended; whoever makes one closes it.

  Raises:
    Overloaded, Stopped: from the scheduler; the latter also while iterating.
  """

  def __init__(self, scheduler: Scheduler, requests: Sequence[Request], sampling: SamplingParams):
    loop = asyncio.get_running_loop()
    self._events = asyncio.Queue()
    self._scheduler = scheduler
    self._open = set(range(len(requests)))

    def deliver(place: int, event: Progress | Exception) -> None:
      # The loop is closed where the server was stopped in the middle of the answer.
      with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

    self._job = scheduler.submit(requests, sampling, deliver)

  async def __aiter__(self) -> AsyncIterator[tuple[int, Progress]]:
    while self._open:
      place, event = await self._events.get()
      if place not in self._open:
        continue
      if isinstance(event, Exception):
        raise event
      if event.completion is not None:
        self._open.discard(place)
      yield place, event

  def drop(self, place: int) -> None:
    """Frees the lane of one of them, of which nothing more is wanted."""
    self._open.discard(place)
    self._scheduler.cancel(self._job, place)

  def close(self) -> None:
    """Frees the lanes of all that have not ended."""
    if self._open:
      self._open = set()
      self._scheduler.cancel(self._job)


class Scored(NamedTuple):
  """A sampled token as text, and the likeliest tokens in its place with log-probabilities."""

  text: str
  logprob: float
  top: list[tuple[str, float]]


@functools.lru_cache(maxsize=1 << 18)
def _token_text(tokenizer: Any, token: int) -> str:
  """Returns a token's text, from a cache.

  With 20 alternatives, 32 streams ask for tens of thousands a second, on the thread that serves
  everything.
  """
  return tokenizer.decode([token])


class Choice(abc.ABC):
  """One of a request's answers as it grows. A subclass says what becomes of its text."""

  def __init__(self, index: int, tokenizer: Any, stop: Sequence[str], logprobs: bool):
    self.index = index
    self.tokens = 0
    self.finish_reason: str | None = None
    self._tokenizer = tokenizer
    self._reader = TextReader(tokenizer, stop)
    self._logprobs: list[Scored] | None = [] if logprobs else None
    self._streamed = 0  # log-probabilities that a piece of the stream has carried

  def take(self, part: Progress) -> list[dict[str, Any]]:
    """What is new, as entries for `choices` of a stream's pieces; it is kept for `whole` too."""
    done = part.completion
    self.tokens += len(part.tokens)
    if self._logprobs is not None:
      self._logprobs += self._scored(part)
    turn_ended = done is not None and done.finished
    text = self._reader.push(part.tokens[:-1] if turn_ended else part.tokens, last=done is not None)
    # The engine ends a rollout at a stop string, but for those that special tokens interrupt.
    stopped = self._reader.stopped or (done is not None and done.stop is not None)
    ended = stopped or done is not None
    pieces = self._more(text, last=ended, cut=ended and not (turn_ended or stopped))
    if ended:
      self.finish_reason = self._reason('stop' if turn_ended or stopped else 'length')
      pieces.append(self._piece({}))
    if pieces and self._logprobs is not None:
      pieces[0]['logprobs'] = self._show_logprobs(self._streamed)
      self._streamed = len(self._logprobs)
    return pieces

  def _scored(self, part: Progress) -> list[Scored]:
    tokens = part.tokens.tolist()
    logprobs = part.logprobs.tolist()
    scored = []
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
      text = _token_text(self._tokenizer, token)
      scored.append(Scored(text=text, logprob=logprob, top=self._alternatives(part, place)))
    return scored

  def _alternatives(self, part: Progress, place: int) -> list[tuple[str, float]]:
    """Returns the likeliest tokens at one place, but for those that truncation left out.

    Their log-probability is minus infinity, which JSON does not know.
    """
    if part.top is None:
      return []
    tokens = part.top.token_BJ[place].tolist()
    logprobs = part.top.logprob_BJ[place].tolist()
    found = []
    for token, logprob in zip(tokens, logprobs, strict=True):
      if logprob > -math.inf:
        found.append((_token_text(self._tokenizer, token), logprob))
    return found

  def opening(self) -> list[dict[str, Any]]:
    """Entries of a stream's first piece."""
    return []

  @abc.abstractmethod
  def whole(self) -> dict[str, Any]:
    """The entry of an answer that is not streamed, once it has ended."""

  @abc.abstractmethod
  def _more(self, text: str, last: bool, cut: bool) -> list[dict[str, Any]]:
    """Entries for a further piece of text; `cut` says that the budget ended with it."""

  def _reason(self, reason: str) -> str:
    return reason

  @abc.abstractmethod
  def _piece(self, content: dict[str, Any]) -> dict[str, Any]:
    """An entry of a stream's piece with this content."""

  @abc.abstractmethod
  def _show_logprobs(self, start: int) -> dict[str, Any]:
    """Log-probabilities of the tokens from `start` on, in the form of the request's kind."""


@dataclasses.dataclass(frozen=True)
class ReplyForm:
  """How the text of a chat answer is read.

  Attributes:
    specs: the tools that may be called.
    thinking: whether the prompt has opened a block of thoughts.
    begun: text of the message that the prompt ends with.
    most_calls: calls that are reported at most; None is all.
  """

  specs: Sequence[ToolSpec]
  thinking: bool
  begun: str
  most_calls: int | None


class ChatChoice(Choice):
  """An assistant's message: thoughts, content, calls."""

  def __init__(
    self, index: int, tokenizer: Any, stop: Sequence[str], logprobs: bool, form: ReplyForm
  ):
    super().__init__(index, tokenizer, stop, logprobs)
    self._parser = ReplyParser(form.specs, thinking=form.thinking, most_calls=form.most_calls)
    self._begun = form.begun  # goes to the parser before the first sampled text
    self._all = Delta()
    self._calls = []

  def opening(self) -> list[dict[str, Any]]:
    """Entries of a stream's first piece: the role."""
    return [self._piece({'role': 'assistant', 'content': ''})]

  def whole(self) -> dict[str, Any]:
    """The entry of an answer that is not streamed, once it has ended."""
    message: dict[str, Any] = {'role': 'assistant', 'content': self._all.content}
    if not self._all.content and (self._calls or not self._parser.answering):
      # Where the budget ended inside the thoughts, there is no content, not even an empty one.
      message['content'] = None
    if self._all.reasoning:
      message['reasoning_content'] = self._all.reasoning
    if self._calls:
      message['tool_calls'] = self._calls
    logprobs = None if self._logprobs is None else self._show_logprobs(0)
    return {
      'index': self.index,
      'message': message,
      'finish_reason': self.finish_reason,
      'logprobs': logprobs,
    }

  def _more(self, text: str, last: bool, cut: bool) -> list[dict[str, Any]]:
    delta = self._parser.push(self._begun + text, last, cut=cut)
    self._begun = ''
    self._all.reasoning += delta.reasoning
    self._all.content += delta.content
    calls = [
      {
        'id': f'call_{secrets.token_hex(12)}',
        'type': 'function',
        'function': {'name': name, 'arguments': arguments},
      }
      for name, arguments in delta.calls
    ]
    numbered = [{'index': number, **call} for number, call in enumerate(calls, len(self._calls))]
    self._calls += calls
    parts = {'reasoning_content': delta.reasoning, 'content': delta.content, 'tool_calls': numbered}
    return [self._piece({name: value}) for name, value in parts.items() if value]

  def _reason(self, reason: str) -> str:
    return 'tool_calls' if self._calls and reason == 'stop' else reason

  def _piece(self, content: dict[str, Any]) -> dict[str, Any]:
    return {
      'index': self.index,
      'delta': content,
      'finish_reason': self.finish_reason,
      'logprobs': None,
    }

  def _show_logprobs(self, start: int) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
      # The bytes of a token that holds a part of a character are not known here.
      return {
        'token': text,
        'logprob': logprob,
        'bytes': None if '\ufffd' in text else list(text.encode()),
      }

    content = []
    for text, logprob, top in self._logprobs[start:]:
      alternatives = [entry(*one) for one in top]
      content.append(entry(text, logprob) | {'top_logprobs': alternatives})
    return {'content': content, 'refusal': None}


class TextChoice(Choice):
  """Plain text, whatever is in it."""

  def __init__(self, index: int, tokenizer: Any, stop: Sequence[str], logprobs: bool):
    super().__init__(index, tokenizer, stop, logprobs)
    self._text = ''

  def whole(self) -> dict[str, Any]:
    """The entry of an answer that is not streamed, once it has ended."""
    logprobs = None if self._logprobs is None else self._show_logprobs(0)
    return self._piece(self._text) | {'logprobs': logprobs}

  def _more(self, text: str, last: bool, cut: bool) -> list[dict[str, Any]]:
    del last, cut  # plain text is the same wherever it ends
    self._text += text
    return [self._piece(text)] if text else []

  def _piece(self, content: Any) -> dict[str, Any]:
    return {
      'index': self.index,
      'text': content or '',
      'finish_reason': self.finish_reason,
      'logprobs': None,
    }

  def _show_logprobs(self, start: int) -> dict[str, Any]:
    lengths = [len(one.text) for one in self._logprobs]
    offsets = list(itertools.accumulate(lengths, initial=0))[:-1]  # where each token begins
    shown = self._logprobs[start:]
    return {
      'tokens': [one.text for one in shown],
      'token_logprobs': [one.logprob for one in shown],
      'top_logprobs': [_by_text(one) for one in shown] if shown[0].top else None,
      'text_offset': offsets[start:],
    }


def _by_text(one: Scored) -> dict[str, float]:
  """Returns the alternatives and the sampled token, as completions show them.

  Tokens that are parts of characters share a text; the likeliest of them is shown.
  """
  shown: dict[str, float] = {}
  for text, logprob in (*one.top, (one.text, one.logprob)):
    shown.setdefault(text, logprob)
  return shown
