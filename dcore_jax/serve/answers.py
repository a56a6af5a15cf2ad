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
from dcore_jax.rollout.requests import Progress, PromptScores, Request
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
    # The queue crosses from the engine's thread to this event loop. It has no bound, because the
    # engine must never wait for a slow client.
    self._events = asyncio.Queue()
    self._scheduler = scheduler
    self._open = set(range(len(requests)))

    def deliver(place: int, event: Progress | Exception) -> None:
      # The loop is closed if the server was stopped in the middle of the answer.
      with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

    self._job = scheduler.submit(requests, sampling, deliver)

  async def __aiter__(self) -> AsyncIterator[tuple[int, Progress]]:
    while self._open:
      place, event = await self._events.get()
      # Progress that was delivered before the engine saw the cancellation is still in the queue.
      if place not in self._open:
        continue
      # One failed rollout fails the whole request: an answer with fewer choices than `n` would
      # mislead.
      if isinstance(event, Exception):
        raise event
      if event.completion is not None:
        self._open.discard(place)
      yield place, event

  def drop(self, place: int) -> None:
    """Frees the lane of one rollout whose answer is complete."""
    self._open.discard(place)
    self._scheduler.cancel(self._job, place)

  def close(self) -> None:
    """Frees the lanes of all rollouts that have not ended."""
    # Cancelling a job that has ended would only put a useless command on the engine's thread.
    if self._open:
      self._open = set()
      self._scheduler.cancel(self._job)


class Scored(NamedTuple):
  """A token with its log-probability, and the likeliest tokens in its place with theirs.

  The first token of a prompt has no log-probability.
  """

  token: int
  logprob: float | None
  top: list[tuple[int, float]]


@functools.lru_cache(maxsize=1 << 18)
def _token_text(tokenizer: Any, token: int) -> str:
  """Returns a token's text, from a cache.

  With 20 alternatives, 32 streams ask for tens of thousands a second, on the thread that serves
  everything.
  """
  return tokenizer.decode([token])


@dataclasses.dataclass(frozen=True)
class Report:
  """What a request wants to know beside the text.

  Attributes:
    stop: strings before which the text ends.
    logprobs: whether the answer lists the log-probabilities of the sampled tokens.
    alternatives: how many likely tokens are listed beside each sampled token.
    prompt_logprobs: how many are listed beside each token of the prompt; None: the prompt has no
      log-probabilities in the answer.
    token_ids: whether the answer lists the ids of prompt and answer, and for each token of the
      answer the version of the weights that drew it.
    ids_as_tokens: whether log-probabilities name tokens by their ids.
  """

  stop: Sequence[str]
  logprobs: bool
  alternatives: int
  prompt_logprobs: int | None
  token_ids: bool
  ids_as_tokens: bool


class Choice(abc.ABC):
  """One of a request's answers as it grows. A subclass says what becomes of its text.

  Args:
    index: its place among the choices.
    tokenizer: a transformers tokenizer.
    prompt: token ids.
    report: what the answer says beside its text.
  """

  def __init__(self, index: int, tokenizer: Any, prompt: Sequence[int], report: Report):
    self.index = index
    self.finish_reason: str | None = None
    self._tokenizer = tokenizer
    self._prompt = prompt
    self._report = report
    self._reader = TextReader(tokenizer, report.stop)
    self._token_ids: list[int] = []
    self._versions: list[int] = []  # of the weights that drew each token
    self._prompt_scores: PromptScores | None = None
    self._scored: list[Scored] = []
    # How much earlier pieces of the stream have carried, so that no piece repeats it.
    self._streamed_scores = 0
    self._streamed_ids = 0

  @property
  def tokens(self) -> int:
    """Tokens sampled so far."""
    return len(self._token_ids)

  def take(self, part: Progress) -> list[dict[str, Any]]:
    """Returns entries for `choices` of a stream's pieces, and keeps what they say for `whole`."""
    done = part.completion
    self._token_ids += part.tokens.tolist()
    self._versions += [part.version] * len(part.tokens)
    if part.prompt is not None:
      self._prompt_scores = part.prompt
    if self._report.logprobs:
      # An echoed prompt is listed before the first sampled token, and its scores come but once.
      self._scored += self._opening_scores() if part.prompt is not None else []
      self._scored += _scored(part)
    # The stop token that ends the turn is sampled and scored like any other, but is no text.
    turn_ended = done is not None and done.finished
    text = self._reader.push(part.tokens[:-1] if turn_ended else part.tokens, last=done is not None)
    # The engine ends a rollout at a stop string, unless special tokens stand inside of it: the
    # reader leaves those out, and so finds the string in the text.
    stopped = self._reader.stopped or (done is not None and done.stop is not None)
    ended = stopped or done is not None
    # The last text goes to the subclass before the reason is set, because the calls in it decide
    # whether the reason is 'stop' or 'tool_calls'.
    pieces = self._more(text, last=ended, cut=ended and not (turn_ended or stopped))
    if ended:
      self.finish_reason = self._reason('stop' if turn_ended or stopped else 'length')
      # OpenAI's streams carry the reason in a piece of its own, without content.
      pieces.append(self._piece({}))
    # Text may wait for the rest of a character or of a tag. The scores of its tokens wait with it,
    # and the next piece that is sent carries them all.
    if pieces and self._report.logprobs:
      pieces[0]['logprobs'] = self._show_logprobs(self._streamed_scores)
      self._streamed_scores = len(self._scored)
    if pieces and self._report.token_ids:
      pieces[0]['token_ids'] = self._token_ids[self._streamed_ids :]
      pieces[0]['weight_versions'] = self._versions[self._streamed_ids :]
      self._streamed_ids = len(self._token_ids)
    return pieces

  def opening(self) -> list[dict[str, Any]]:
    """Returns the entries of a stream's first piece."""
    # The request asks for no alternatives.
    return []

  def beside(self) -> dict[str, Any]:
    """Returns the fields that the whole answer has beside its choices."""
    return {}

  @abc.abstractmethod
  def whole(self) -> dict[str, Any]:
    """Returns the entry of an answer that is not streamed, once it has ended."""

  @abc.abstractmethod
  def _more(self, text: str, last: bool, cut: bool) -> list[dict[str, Any]]:
    """Returns entries for a further piece of text; `cut` says that the budget ended with it."""

  def _reason(self, reason: str) -> str:
    return reason

  @abc.abstractmethod
  def _piece(self, content: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of a stream's piece with this content."""

  @abc.abstractmethod
  def _show_logprobs(self, start: int) -> dict[str, Any]:
    """Returns log-probabilities of the tokens from `start` on, as the request's kind has them."""

  def _opening_scores(self) -> list[Scored]:
    """Returns the scores that are listed before the first sampled token."""
    return []

  def _text(self, token: int) -> str:
    return _token_text(self._tokenizer, token)

  def _name(self, token: int) -> str:
    return f'token_id:{token}' if self._report.ids_as_tokens else self._text(token)

  def _about_answer(self) -> dict[str, Any]:
    """Returns the fields that the entry of a whole answer has beside its text."""
    found: dict[str, Any] = {'finish_reason': self.finish_reason}
    found['logprobs'] = self._show_logprobs(0) if self._report.logprobs else None
    if self._report.token_ids:
      found['token_ids'] = self._token_ids
      found['weight_versions'] = self._versions
    return found

  def _about_prompt(self) -> dict[str, Any]:
    """Returns the prompt's token ids and log-probabilities in vLLM's fields, if they are wanted."""
    found: dict[str, Any] = {}
    if self._report.token_ids:
      found['prompt_token_ids'] = list(self._prompt)
    if self._report.prompt_logprobs is not None and self._prompt_scores is not None:
      found['prompt_logprobs'] = self._prompt_logprobs(self._report.prompt_logprobs)
    return found

  def _prompt_logprobs(self, count: int) -> list[dict[str, Any] | None]:
    """Returns a table by token id for each token of the prompt, None for the first one."""
    # Nothing predicts the first token of a prompt. vLLM lists it as null, and clients rely on that.
    tables: list[dict[str, Any] | None] = [None]
    ranks = self._prompt_scores.ranks.tolist()
    for one, rank in zip(self._scored_prompt(count)[1:], ranks, strict=True):
      table = {}
      # Alternatives come in order of probability, so that their rank is their place, counted from
      # 1.
      for place, (token, logprob) in enumerate(one.top, 1):
        # JSON has text keys only.
        table[str(token)] = self._prompt_entry(token, logprob, place)
      # The token itself is listed even if it is not among the likeliest.
      table[str(one.token)] = self._prompt_entry(one.token, one.logprob, rank)
      tables.append(table)
    return tables

  def _prompt_entry(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
    return {'logprob': logprob, 'rank': rank, 'decoded_token': self._text(token)}

  def _scored_prompt(self, count: int) -> list[Scored]:
    """Returns the prompt's tokens with `count` alternatives each."""
    scores = self._prompt_scores
    # A request without alternatives has an empty list for each token: `Scored` is then the same
    # type.
    tops: list[list[tuple[int, float]]] = [[] for _ in scores.logprobs]
    if scores.top is not None and count:
      # Completions with `echo` may ask for fewer alternatives than prompt_logprobs does. The engine
      # reports the greater number for both.
      tops = [
        list(zip(tokens[:count], logprobs[:count], strict=True))
        for tokens, logprobs in zip(
          scores.top.token_BJ.tolist(), scores.top.logprob_BJ.tolist(), strict=True
        )
      ]
    scored = [Scored(int(self._prompt[0]), None, [])]
    for token, logprob, top in zip(self._prompt[1:], scores.logprobs.tolist(), tops, strict=True):
      scored.append(Scored(int(token), logprob, top))
    return scored


def _scored(part: Progress) -> list[Scored]:
  """Returns the tokens that one step drew."""
  tokens = part.tokens.tolist()
  logprobs = part.logprobs.tolist()
  scored = []
  for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
    scored.append(Scored(token, logprob, _alternatives(part, place)))
  return scored


def _alternatives(part: Progress, place: int) -> list[tuple[int, float]]:
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
      found.append((token, logprob))
  return found


@dataclasses.dataclass(frozen=True)
class ReplyForm:
  """How the text of a chat answer is read.

  Attributes:
    specs: the tools that may be called.
    thinking: whether the prompt has opened a block of thoughts.
    begun: the beginning of the message (a forced call) that the prompt ends with.
    most_calls: the most calls that are reported; None reports all.
  """

  specs: Sequence[ToolSpec]
  thinking: bool
  begun: str
  most_calls: int | None


class ChatChoice(Choice):
  """An assistant's message: thoughts, content, calls."""

  def __init__(
    self,
    index: int,
    tokenizer: Any,
    prompt: Sequence[int],
    report: Report,
    form: ReplyForm,
  ):
    super().__init__(index, tokenizer, prompt, report)
    self._parser = ReplyParser(form.specs, thinking=form.thinking, most_calls=form.most_calls)
    self._begun = form.begun  # goes to the parser before the first sampled text
    self._all = Delta()
    self._calls = []

  def opening(self) -> list[dict[str, Any]]:
    """Returns the entries of a stream's first piece: the role."""
    return [self._piece({'role': 'assistant', 'content': ''})]

  def whole(self) -> dict[str, Any]:
    """Returns the entry of an answer that is not streamed, once it has ended."""
    message: dict[str, Any] = {'role': 'assistant', 'content': self._all.content}
    if not self._all.content and (self._calls or not self._parser.answering):
      # OpenAI's message has null as its content if it consists of calls. If the budget ended inside
      # the thoughts, there is no content either, not even an empty one.
      message['content'] = None
    if self._all.reasoning:
      message['reasoning_content'] = self._all.reasoning
    if self._calls:
      message['tool_calls'] = self._calls
    return {'index': self.index, 'message': message, **self._about_answer()}

  def beside(self) -> dict[str, Any]:
    """Returns the prompt's fields, which stand beside the choices because all share the prompt."""
    return self._about_prompt()

  def _more(self, text: str, last: bool, cut: bool) -> list[dict[str, Any]]:
    # A forced call begins in the prompt, where nothing is sampled. The parser needs that beginning
    # to see the whole call.
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
    # A stream numbers its calls from 0 on, so that clients can join the pieces of one call. The
    # whole answer has them without numbers.
    numbered = [{'index': number, **call} for number, call in enumerate(calls, len(self._calls))]
    self._calls += calls
    parts = {'reasoning_content': delta.reasoning, 'content': delta.content, 'tool_calls': numbered}
    # Thoughts, content and calls go out in pieces of their own, in the order in which a reply has
    # them.
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
    def entry(token: int, logprob: float) -> dict[str, Any]:
      text = self._text(token)
      # A token that holds a part of a character decodes to U+FFFD, which hides its bytes.
      return {
        'token': self._name(token),
        'logprob': logprob,
        'bytes': None if '\ufffd' in text else list(text.encode()),
      }

    content = []
    for token, logprob, top in self._scored[start:]:
      alternatives = [entry(*one) for one in top]
      content.append(entry(token, logprob) | {'top_logprobs': alternatives})
    return {'content': content, 'refusal': None}


class TextChoice(Choice):
  """Plain text, whatever is in it.

  Args:
    index: its place among the choices.
    tokenizer: a transformers tokenizer.
    prompt: token ids.
    report: what the answer says beside its text.
    echo: the text of the prompt if the answer begins with it; None if it does not.
  """

  def __init__(
    self,
    index: int,
    tokenizer: Any,
    prompt: Sequence[int],
    report: Report,
    echo: str | None,
  ):
    super().__init__(index, tokenizer, prompt, report)
    self._echo = echo
    self._said = ''
    self._begun = False

  def take(self, part: Progress) -> list[dict[str, Any]]:
    """Returns what is new; the first piece carries the prompt's fields too."""
    pieces = super().take(part)
    if pieces and not self._begun:
      self._begun = True
      # A completion's choices may have different prompts, so that these fields stand in the choice.
      pieces[0] |= self._about_prompt()
    return pieces

  def whole(self) -> dict[str, Any]:
    """Returns the entry of an answer that is not streamed, once it has ended."""
    return self._piece(self._said) | self._about_answer() | self._about_prompt()

  def _more(self, text: str, last: bool, cut: bool) -> list[dict[str, Any]]:
    del last, cut  # plain text is the same wherever it ends
    # The prompt's text goes out with the first piece, before anything that was sampled.
    if self._echo is not None and not self._said:
      text = self._echo + text
    self._said += text
    return [self._piece(text)] if text else []

  def _piece(self, content: Any) -> dict[str, Any]:
    return {
      'index': self.index,
      'text': content or '',
      'finish_reason': self.finish_reason,
      'logprobs': None,
    }

  def _opening_scores(self) -> list[Scored]:
    if self._echo is None:
      return []
    return self._scored_prompt(self._report.alternatives)

  def _show_logprobs(self, start: int) -> dict[str, Any]:
    # Offsets count characters from the beginning of the text, over all tokens: a stream's piece
    # does not begin at 0.
    lengths = [len(self._text(one.token)) for one in self._scored]
    offsets = list(itertools.accumulate(lengths, initial=0))[:-1]  # where each token begins
    shown = self._scored[start:]
    return {
      'tokens': [self._name(one.token) for one in shown],
      'token_logprobs': [one.logprob for one in shown],
      'top_logprobs': list(map(self._by_name, shown)) if self._report.alternatives else None,
      'text_offset': offsets[start:],
    }

  def _by_name(self, one: Scored) -> dict[str, float] | None:
    """Returns the alternatives and the token itself, as completions show them.

    Tokens that are parts of characters share a text; the likeliest of them is shown.
    """
    if one.logprob is None:
      return None
    shown: dict[str, float] = {}
    for token, logprob in (*one.top, (one.token, one.logprob)):
      shown.setdefault(self._name(token), logprob)
    return shown
