"""An OpenAI-compatible endpoint as a backend.

The package `openai` is imported where an endpoint is asked: its import takes 1.2 s of CPU time, and
most programs of this package ask none.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import hashlib
import math
import os
import pathlib
import queue
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anyio.from_thread
from absl import logging

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tagged_calls import read_arguments
from dcore_jax.chat.thoughts import taken_as_opened
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.rollout.backends import ChatRequest, ChatSource, Reply, Tag, Usage, function_specs
from dcore_jax.rollout.dialect import Dialect, refused_field
from dcore_jax.rollout.reply_journal import ReplyJournal
from dcore_jax.rollout.sampling import SamplingParams

if TYPE_CHECKING:
  import openai

# Status codes that concern one request (too long, for example) ...
_REFUSALS = (400, 413, 422)
# ... and those that concern the key, the account or the model's name: asking on is of no use.
_LOCKED_OUT = (401, 402, 403, 404)
# Requests in a row that fail. After so many it is the endpoint that fails, and not the requests.
_HOPELESS = 8
# Refusals without a single answer. After so many there is a rule or a limit in all requests that
# the endpoint does not take.
_ALL_REFUSED = 16
_ERROR_LENGTH = 500  # characters of an error that a reply keeps


class _Failed(ConnectionError):
  """One request has no answer, whatever was tried; another may have."""


@dataclasses.dataclass(frozen=True)
class EndpointLimits:
  """How much an endpoint is asked at once, and how long.

  Attributes:
    concurrency: requests under way at most.
    timeout: seconds that one attempt may take.
    retries: further attempts after a failed connection, a timeout, 408, 409, 429, 5xx or an answer
      without content. The waits between them grow exponentially, or are what the server asks for
      (Retry-After).

  Raises:
    ValueError: a number out of its range.
  """

  concurrency: int = 64
  timeout: float = 600.0
  retries: int = 5

  def __post_init__(self):
    if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0:
      raise ValueError(
        f'concurrency = {self.concurrency}, retries = {self.retries} and '
        f'timeout = {self.timeout} cannot be'
      )


class OpenAIBackend:
  """An OpenAI-compatible endpoint (vLLM, SGLang, ours, a provider's).

  Args:
    base_url: ends in /v1 for most servers.
    model: the model's name at the endpoint.
    api_key: '' reads the environment variable OPENAI_API_KEY, and if that is unset sends a
      placeholder.
    limits: the limits of requests, seconds and attempts.
    journal: JSONL file of replies. A reply is appended when it arrives. If the same is asked again,
      also by a later process, the backend answers from this file.
    prices: the prices of a million prompt and a million completion tokens, for `usage`; 0 if they
      are not known.

  Raises:
    ValueError: a price below 0, or a damaged journal.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key: str = '',
    limits: EndpointLimits = EndpointLimits(),
    journal: pathlib.Path | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
  ):
    if not all(0 <= price < math.inf for price in prices):
      raise ValueError(f'prices = {prices} cannot be')
    self.base_url = base_url
    self.model = model
    self.limits = limits
    prompt_price, completion_price = prices
    self.usage = Usage(prompt_price=prompt_price, completion_price=completion_price)
    # The client does not start without a key, and servers of one's own ask for none.
    self._api_key = api_key or os.environ.get('OPENAI_API_KEY') or 'none'
    self._journal = ReplyJournal(journal) if journal else None
    self._dialect = Dialect()
    # Of answers; the first of another name is told.
    self._models = {model}

  def stream(self, source: ChatSource, sampling: SamplingParams) -> Iterator[tuple[Tag, Reply]]:
    """Answers as `Backend.stream` says.

    A request that fails while others are answered is put aside and tried again when all else is
    done. If it fails then, too, its reply has an error, which the journal does not keep.

    Raises:
      ConnectionError: the endpoint stayed unreachable, refused us (key, model name) or every
        request. What was answered until then is in the journal.
    """
    # The client is asynchronous, and the callers of this package are not: an event loop on a thread
    # of its own serves them.
    with anyio.from_thread.start_blocking_portal() as portal:
      client = self._client()
      try:
        yield from self._stream(portal, client, source, sampling)
      finally:
        portal.call(client.close)

  def _client(self) -> 'openai.AsyncOpenAI':
    import openai

    return openai.AsyncOpenAI(
      base_url=self.base_url,
      api_key=self._api_key,
      timeout=self.limits.timeout,
      # The client itself waits and asks again.
      max_retries=self.limits.retries,
    )

  def _stream(
    self,
    portal: anyio.from_thread.BlockingPortal,
    client: 'openai.AsyncOpenAI',
    source: ChatSource,
    sampling: SamplingParams,
  ) -> Iterator[tuple[Tag, Reply]]:
    # Futures of requests that are done, each with what was asked.
    finished: queue.Queue[tuple[Tag, ChatRequest, concurrent.futures.Future]] = queue.Queue()
    under_way: set[concurrent.futures.Future] = set()
    aside: collections.deque[tuple[Tag, ChatRequest]] = collections.deque()
    answered = 0
    refused = 0
    failures = 0

    def ask(tag: Tag, request: ChatRequest) -> None:
      future = portal.start_task_soon(self._answer, client, request, sampling)
      under_way.add(future)
      # Called on the event loop's thread; the queue hands it over to the consumer's.
      future.add_done_callback(lambda future: finished.put((tag, request, future)))

    try:
      while True:
        free = self.limits.concurrency - len(under_way)
        # The source may have more to ask after each answer, since conversations go on.
        for tag, request in source(free) if free > 0 else ():
          ask(tag, request)
        if not under_way:
          # Nothing else is under way: now those that failed while others were answered.
          if not aside:
            return
          tag, request = aside.popleft()
          yield tag, portal.call(self._last_try, client, request, sampling)
          continue
        tag, request, future = finished.get()
        under_way.discard(future)
        try:
          reply = future.result()
        except _Failed:
          failures += 1
          # Failures in a row: an answer in between shows that the endpoint works.
          if failures == _HOPELESS:
            raise
          aside.append((tag, request))
          continue
        failures = 0
        if reply.error:
          refused += 1
        else:
          answered += 1
        if refused == _ALL_REFUSED and not answered:
          raise ConnectionError(
            f'{self.base_url}, model {self.model!r} takes no request: {reply.error}'
          )
        yield tag, reply
    finally:
      for future in under_way:
        # Nobody takes their replies any more.
        future.cancel()

  async def _answer(
    self, client: 'openai.AsyncOpenAI', request: ChatRequest, sampling: SamplingParams
  ) -> Reply:
    """Answers one request, from the journal where it is known.

    Raises:
      ConnectionError: the endpoint refuses us.
      _Failed: there is no answer to this request.
    """
    import openai

    body = self._body(request, sampling)
    known = self._journal.find(body) if self._journal else None
    if known:
      self.usage.from_journal += 1
      return known
    began = time.perf_counter()
    try:
      reply = await self._ask_in_dialect(client, body)
    except openai.APIError as error:
      status = getattr(error, 'status_code', None)
      # A connection that fails has no status, and counts as a failed request.
      if status not in _REFUSALS:
        kind = ConnectionError if status in _LOCKED_OUT else _Failed
        raise kind(f'{self.base_url}, model {self.model!r}: {error}') from error
      reply = _without_text(
        f'refused with status {error.status_code}: {error.message}{_in_vain(error, body)}'
      )
    reply = dataclasses.replace(reply, seconds=round(time.perf_counter() - began, 4))
    self.usage.add(reply)
    # A refusal is not kept: the request may be taken when the server has been set up anew.
    if self._journal and not reply.error:
      self._journal.append(body, reply)
    return reply

  async def _last_try(
    self, client: 'openai.AsyncOpenAI', request: ChatRequest, sampling: SamplingParams
  ) -> Reply:
    """Answers one request, with an error where only this request fails."""
    import openai

    try:
      return await self._answer(client, request, sampling)
    except _Failed as error:
      try:
        # The cheapest request there is tells a dead endpoint from a request that it cannot answer.
        await client.models.list()
      except openai.APIError:
        # The endpoint is gone, and not this request alone at fault.
        raise error from None
      return _without_text(f'no answer: {error}')

  def _body(self, request: ChatRequest, sampling: SamplingParams) -> dict[str, Any]:
    """Returns all that the answer depends on, which is what the journal knows it by."""
    # A 31-bit seed from (seed, key_id): servers take no lists, and some no large numbers.
    digest = hashlib.sha256(repr((sampling.seed, request.key_id)).encode()).digest()
    body: dict[str, Any] = {
      'model': self.model,
      'messages': [message.to_json() for message in request.messages],
      'temperature': sampling.temperature,
      'top_p': sampling.top_p,
      # The older name of the field, which every compatible server takes; `_dialect` knows others.
      'max_tokens': request.max_tokens or sampling.max_tokens,
      'seed': int.from_bytes(digest[:4], 'big') >> 1,
    }
    if request.tools:
      body['tools'] = function_specs(request.tools)
    if sampling.stop:
      body['stop'] = list(sampling.stop)
    # These two are not OpenAI's own; vLLM, SGLang and our server take them.
    extra = {}
    if sampling.top_k:
      extra['top_k'] = sampling.top_k
    if sampling.min_p:
      extra['min_p'] = sampling.min_p
    if extra:
      body['extra_body'] = extra
    return body

  async def _ask_in_dialect(self, client: 'openai.AsyncOpenAI', body: dict[str, Any]) -> Reply:
    """Asks, and once more for each field that the endpoint does not take and that is not needed.

    Raises:
      openai.APIError, _Failed: as `_ask`.
    """
    import openai

    dialect = self._dialect
    while True:
      try:
        reply = await self._ask(client, dialect.write(body))
      except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        dialect = dialect.after(refused_field(error.body, error.message), body)
        if dialect is None:
          raise
        continue
      # Only now: the answer has shown that this is how the endpoint wants to be asked. Requests
      # that were under way meanwhile may have learned something else.
      known = self._dialect
      self._dialect = known | dialect
      if 'seed' in self._dialect.left_out - known.left_out:
        logging.warning(
          '%s takes no seed: an answer can be repeated from the journal alone', self.base_url
        )
      return reply

  async def _ask(self, client: 'openai.AsyncOpenAI', body: dict[str, Any]) -> Reply:
    """Asks until there is a message.

    Raises:
      openai.APIError: what the endpoint or the connection to it answers.
      _Failed: every attempt gave an answer without a message.
    """
    for attempt in range(self.limits.retries + 1):
      # The client does not check what a server sends: any part may be missing, or something else.
      try:
        completion = await client.chat.completions.create(**body)
        reply = _reply(completion)
        self._note_model(getattr(completion, 'model', None))
        return reply
      except (AttributeError, IndexError, TypeError, ValueError) as error:
        malformed = error
      # Seconds. As long as the client waits after a failure that it recognises by itself.
      await asyncio.sleep(min(8, 0.5 * 2**attempt))
    raise _Failed(f'{self.base_url} answers without a message: {malformed!r}') from malformed

  def _note_model(self, name: Any) -> None:
    """Tells of an answer of another model than was asked: a server may serve what it likes."""
    # Providers answer with the full name of a version, so that it is no error.
    if not isinstance(name, str) or not name or len(self._models) > 1 or name in self._models:
      return
    self._models.add(name)
    logging.warning(
      '%s was asked for the model %r, and answers as %r', self.base_url, self.model, name[:100]
    )


def _in_vain(error: Any, body: dict[str, Any]) -> str:
  """Returns what is to be said of a refused field that a request cannot do without."""
  field = refused_field(getattr(error, 'body', None), error.message)
  sent = body | body.get('extra_body', {})
  if field is None or field not in sent or field == 'max_tokens':
    return ''
  return f' ({field} = {sent[field]!r} changes the answers, so that it is not left out)'


def _without_text(error: str) -> Reply:
  return Reply(
    text='',
    finished=False,
    prompt_tokens=0,
    completion_tokens=0,
    error=error[:_ERROR_LENGTH],
  )


def _reply(completion: Any) -> Reply:
  choice = completion.choices[0]
  usage = completion.usage
  # Servers have many other reasons ('stop', 'tool_calls', ...); each of them is an end of the turn.
  finished = choice.finish_reason != 'length'
  return Reply(
    text=_text(choice.message, finished),
    finished=finished,
    # Servers may leave the counts out, which then count as 0.
    prompt_tokens=int(getattr(usage, 'prompt_tokens', None) or 0),
    completion_tokens=int(getattr(usage, 'completion_tokens', None) or 0),
  )


def _text(message: Any, finished: bool) -> str:
  """Returns thoughts, content and calls of an endpoint's message as one text."""
  # Servers use either name; the type of OpenAI's own client has neither.
  reasoning = getattr(message, 'reasoning_content', None) or getattr(message, 'reasoning', None)
  thoughts = reasoning or ''
  if thoughts and not finished and message.content is None and not message.tool_calls:
    # The budget ended inside the thoughts, so that their block stays open.
    return f'<think>\n{thoughts}'
  text = f'<think>\n{thoughts.strip()}\n</think>\n\n' if thoughts else ''
  content = message.content or ''
  # Servers that do not part the thoughts send what was sampled behind a prompt that opens them.
  text += content if thoughts else taken_as_opened(content)
  asked = [call.function for call in message.tool_calls or ()]
  try:
    calls = [ToolCall(call.name, read_arguments(call.arguments)) for call in asked]
    return text + (print_calls(calls, 'hermes') if calls else '')
  except (ValueError, TypeError, RecursionError):
    # Nothing that can be called. The text then shows what was written.
    return text + '\n'.join(f'{call.name}{call.arguments}' for call in asked)
