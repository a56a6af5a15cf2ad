"""Our own engine as a backend."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from dcore_jax.chat.encoding import encode_rendered
from dcore_jax.chat.template import render_prompt
from dcore_jax.chat.thoughts import opened_thoughts, with_opening
from dcore_jax.rollout.backends import (
  TOO_LONG,
  ChatRequest,
  ChatSource,
  Reply,
  Tag,
  Usage,
  function_specs,
)
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.reply_journal import ReplyJournal
from dcore_jax.rollout.requests import Completion, Request
from dcore_jax.rollout.sampling import SamplingParams

# Replies that need no engine (refused, or known from the journal) and wait to be taken. Beyond so
# many the source is not asked on: a finished run that is read again would else be held in memory.
_READY = 1024


class _Asked(NamedTuple):
  """A request that the engine works on."""

  tag: Tag
  body: dict[str, Any]
  began: float  # seconds, by time.perf_counter
  opening: str  # by which the prompt has opened the thoughts


class LocalBackend:
  """Our engine: prompts by the model's own chat template, token in, token out.

  Args:
    engine: the engine.
    tokenizer: of its model.
    journal: JSONL file of replies, as for `OpenAIBackend`.
    model: the name that the journal knows the model by.
  """

  def __init__(
    self, engine: Engine, tokenizer: Any, *, journal: pathlib.Path | None = None, model: str = ''
  ):
    self.engine = engine
    self.tokenizer = tokenizer
    self.model = model
    self.usage = Usage()
    self._journal = ReplyJournal(journal) if journal else None

  def stream(self, source: ChatSource, sampling: SamplingParams) -> Iterator[tuple[Tag, Reply]]:
    """Answers as `Backend.stream` says; a prompt that is too long for the engine gets an error."""
    ready: list[tuple[Tag, Reply]] = []  # without the engine: refused, or known from the journal

    def ask(free: int) -> list[tuple[_Asked, Request]]:
      """Fills the engine's free lanes, and puts what needs none into `ready`."""
      result: list[tuple[_Asked, Request]] = []
      while len(result) < free and len(ready) < _READY:
        # Known replies take no lane, so that the source is asked until the lanes are full.
        arrivals = source(free - len(result))
        if not arrivals:
          break
        for tag, request in arrivals:
          # The body is what the journal knows the request by, and is made before the prompt is
          # rendered: rendering is most of the host's work, and a known reply needs none.
          body = self._body(request, sampling)
          reply = self._without_engine(body)
          text = '' if reply else self._render(request)
          prompt = encode_rendered(self.tokenizer, text) if text else []
          # The same test as the engine's own, which would end the stream with an error.
          if len(prompt) >= self.engine.max_len:
            reply = _too_long(prompt)
          if reply:
            ready.append((tag, reply))
            continue
          began = time.perf_counter()
          asked = _Asked(tag=tag, body=body, began=began, opening=opened_thoughts(text))
          result.append((asked, Request(prompt, request.key_id, request.max_tokens)))
      return result

    while True:
      # The stream ends when the source has nothing to ask now; who takes `ready` may have more.
      for asked, completion in self.engine.stream(ask, sampling):
        yield from _drained(ready)
        reply = self._reply(completion, asked.opening, time.perf_counter() - asked.began)
        self.usage.add(reply)
        if self._journal:
          self._journal.append(asked.body, reply)
        yield asked.tag, reply
      if not ready:
        return
      yield from _drained(ready)  # whoever waited for these may have more to ask

  def _without_engine(self, body: dict[str, Any]) -> Reply | None:
    """Returns the journal's reply, if it has one."""
    known = self._journal.find(body) if self._journal else None
    if known:
      self.usage.from_journal += 1
    return known

  def _reply(self, completion: Completion, opening: str, seconds: float) -> Reply:
    # The end of the turn is a special token; thoughts and calls are text.
    text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
    if completion.stop is not None:
      # As endpoints do: the stop string is no part of the answer.
      text = text.partition(completion.stop)[0]
    return Reply(
      text=with_opening(text, opening),
      finished=completion.finished or completion.stop is not None,
      prompt_tokens=completion.prompt_len,
      completion_tokens=len(completion.tokens),
      seconds=round(seconds, 4),
    )

  def _body(self, request: ChatRequest, sampling: SamplingParams) -> dict[str, Any]:
    """Returns all that the answer depends on, which is what the journal knows it by."""
    return dataclasses.asdict(request) | {
      'model': self.model,
      'sampling': dataclasses.asdict(sampling),
      'room': [self.engine.max_len, self.engine.max_new],
    }

  def _render(self, request: ChatRequest) -> str:
    # None, not an empty list: templates differ in how they test for tools.
    tools = function_specs(request.tools) or None
    return render_prompt(self.tokenizer, list(request.messages), tools)


def _too_long(prompt: list[int]) -> Reply:
  return Reply(
    text='', finished=False, prompt_tokens=len(prompt), completion_tokens=0, error=TOO_LONG
  )


def _drained(waiting: list[tuple[Tag, Reply]]) -> Iterator[tuple[Tag, Reply]]:
  """Yields and removes the first entry until there is none; the list may grow meanwhile."""
  while waiting:
    yield waiting.pop(0)
