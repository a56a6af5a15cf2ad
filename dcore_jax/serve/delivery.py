"""An answer on its way to its client, whole or as server-sent events."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dcore_jax.serve.answers import Choice, Rollouts
from dcore_jax.serve.errors import describe, encode
from dcore_jax.serve.scheduler import Stopped
from dcore_jax.serve.telemetry import Telemetry

T = TypeVar('T')


class Run:
  """A request on its way: takes progress in and gives the answer out.

  `close` frees the lanes of rollouts that have not ended.

  Args:
    telemetry: counts tokens and seconds of the request.
    rollouts: the rollouts of all choices.
    choices: at least one choice.
    head: the fields that the answer, or every piece of it, begins with.
    prompt_tokens: the number of tokens of all prompts.
  """

  def __init__(
    self,
    telemetry: Telemetry,
    rollouts: Rollouts,
    choices: list[Choice],
    head: dict[str, Any],
    prompt_tokens: int,
  ):
    self.telemetry = telemetry
    self.head = head
    self.choices = choices
    self._rollouts = rollouts
    self._prompt_tokens = prompt_tokens
    # Seconds count from here, where the scheduler has taken the request, and not from its arrival.
    self._began = time.perf_counter()
    self.close = rollouts.close

  async def whole(self) -> dict[str, Any]:
    """Waits for the end and returns the answer."""
    # Each choice keeps what its pieces say, so that a whole answer is made of the same text as a
    # stream.
    async for _ in self.pieces():
      pass
    return {
      **self.head,
      'choices': [choice.whole() for choice in self.choices],
      'usage': self.usage(),
      **self.choices[0].beside(),
    }

  async def pieces(self) -> AsyncIterator[list[dict[str, Any]]]:
    """Yields the entries of `choices` as they come."""
    # Choices of one prompt share its prefill: the prompt counts once, not `n` times.
    self.telemetry.prompt_tokens.inc(self._prompt_tokens)
    first = True
    async for place, part in self._rollouts:
      if first:
        self.telemetry.first_token_seconds.observe(time.perf_counter() - self._began)
        first = False
      self.telemetry.completion_tokens.inc(len(part.tokens))
      choice = self.choices[place]
      yield choice.take(part)
      # The text reader may find a stop string that the engine does not see. The rollout would go on
      # sampling tokens that no client reads.
      if choice.finish_reason and part.completion is None:
        self._rollouts.drop(place)
    self.telemetry.request_seconds.observe(time.perf_counter() - self._began)

  def usage(self) -> dict[str, int]:
    """Returns the token counts."""
    sampled = sum(choice.tokens for choice in self.choices)
    return {
      'prompt_tokens': self._prompt_tokens,
      'completion_tokens': sampled,
      'total_tokens': self._prompt_tokens + sampled,
    }


class EventStream(Response):
  """The answer in pieces, as server-sent events."""

  media_type = 'text/event-stream'

  def __init__(self, run: Run, usage_wanted: bool, headers: Mapping[str, str]):
    # A proxy that buffers or caches would hold the pieces back until the answer is complete; nginx
    # reads X-Accel-Buffering.
    super().__init__(headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no', **headers})
    # Starlette has set the length of an empty body, and the length of a stream is not known.
    del self.headers['content-length']
    self._run = run
    self._usage_wanted = usage_wanted

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the pieces as they come."""
    try:
      # Only the receiving side tells that a client has gone.
      await while_connected(receive, self._send(send))
    except ClientDisconnect:
      self._run.telemetry.cancelled.inc()
    finally:
      # Whatever ended the stream, its lanes are free for other requests at once.
      self._run.close()

  async def _send(self, send: Send) -> None:
    await send({'type': 'http.response.start', 'status': 200, 'headers': self.raw_headers})
    try:
      opening = []
      for choice in self._run.choices:
        opening += choice.opening()
      # Clients learn the role, and the prompt's fields if they are wanted, before the first token
      # comes.
      await self._send_events(send, opening, self._run.choices[0].beside())
      async for entries in self._run.pieces():
        await self._send_events(send, entries)
      # OpenAI's clients expect the token counts in a last piece without choices, then the word
      # [DONE].
      last = (
        _event({**self._run.head, 'choices': [], 'usage': self._run.usage()})
        if self._usage_wanted
        else ''
      )
      await _send_text(send, f'{last}data: [DONE]\n\n')
    except Exception as error:  # pylint: disable=broad-exception-caught
      # The status line is sent by now. An error can only come as an event, which OpenAI's clients
      # raise.
      await _send_text(send, _event(describe(error)[1]))
      # A stopped scheduler is no fault of this request; everything else belongs in the server's
      # log.
      if not isinstance(error, Stopped):
        raise
    finally:
      await send({'type': 'http.response.body', 'body': b'', 'more_body': False})

  async def _send_events(
    self, send: Send, entries: list[dict[str, Any]], beside: Mapping[str, Any] | None = None
  ) -> None:
    # OpenAI's pieces have a null `usage` where the last one will have the counts.
    usage = {'usage': None} if self._usage_wanted else {}
    text = ''
    for entry in entries:
      text += _event({**self._run.head, 'choices': [entry], **usage, **(beside or {})})
    if text:
      await _send_text(send, text)


def _event(record: dict[str, Any]) -> str:
  return f'data: {encode(record)}\n\n'


async def _send_text(send: Send, text: str) -> None:
  await send({'type': 'http.response.body', 'body': text.encode(), 'more_body': True})


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
  """Returns the result of the work, and cancels the work if the client goes away first.

  Raises:
    ClientDisconnect: the client went away first.
  """
  task = asyncio.ensure_future(work)
  gone = asyncio.ensure_future(_disconnected(receive))
  try:
    await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    # If both have ended, the result counts: it is complete.
    if not task.done():
      raise ClientDisconnect()
    return task.result()
  finally:
    task.cancel()
    gone.cancel()
    # Waiting for both lets their own `finally` blocks run before the caller frees the lanes.
    await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
  # Rests of the body may still come before the message that says that the client has gone.
  while (await receive())['type'] != 'http.disconnect':
    pass
