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

  `close` frees what has not ended.

  Args:
    telemetry: which counts it.
    rollouts: of all choices.
    choices: at least one.
    head: what the answer, or every piece of it, begins with.
    prompt_tokens: of all prompts.
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
    self._began = time.perf_counter()
    self.close = rollouts.close

  async def whole(self) -> dict[str, Any]:
    """Waits for the end and returns the answer."""
    async for _ in self.pieces():
      pass
    return {
      **self.head,
      'choices': [choice.whole() for choice in self.choices],
      'usage': self.usage(),
      **self.choices[0].beside(),
    }

  async def pieces(self) -> AsyncIterator[list[dict[str, Any]]]:
    """Entries of `choices` as they come."""
    self.telemetry.prompt_tokens.inc(self._prompt_tokens)
    first = True
    async for place, part in self._rollouts:
      if first:
        self.telemetry.first_token_seconds.observe(time.perf_counter() - self._began)
        first = False
      self.telemetry.completion_tokens.inc(len(part.tokens))
      choice = self.choices[place]
      yield choice.take(part)
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
    super().__init__(headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no', **headers})
    del self.headers['content-length']
    self._run = run
    self._usage_wanted = usage_wanted

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the pieces as they come."""
    try:
      await while_connected(receive, self._send(send))
    except ClientDisconnect:
      self._run.telemetry.cancelled.inc()
    finally:
      self._run.close()

  async def _send(self, send: Send) -> None:
    await send({'type': 'http.response.start', 'status': 200, 'headers': self.raw_headers})
    try:
      opening = []
      for choice in self._run.choices:
        opening += choice.opening()
      await self._send_events(send, opening, self._run.choices[0].beside())
      async for entries in self._run.pieces():
        await self._send_events(send, entries)
      last = (
        _event({**self._run.head, 'choices': [], 'usage': self._run.usage()})
        if self._usage_wanted
        else ''
      )
      await _send_text(send, f'{last}data: [DONE]\n\n')
    except Exception as error:  # pylint: disable=broad-exception-caught
      await _send_text(send, _event(describe(error)[1]))
      if not isinstance(error, Stopped):
        raise
    finally:
      await send({'type': 'http.response.body', 'body': b'', 'more_body': False})

  async def _send_events(
    self, send: Send, entries: list[dict[str, Any]], beside: Mapping[str, Any] | None = None
  ) -> None:
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
  """The result of the work, which is cancelled where the client goes away first:

  ClientDisconnect.
  """
  task = asyncio.ensure_future(work)
  gone = asyncio.ensure_future(_disconnected(receive))
  try:
    await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientDisconnect()
    return task.result()
  finally:
    task.cancel()
    gone.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass
