"""The HTTP server: OpenAI's chat completions, completions and models on the engine's lanes, with
/health and /metrics.

`requests.py` says what is honoured of a request, `replies.py` how thoughts and tool calls are told
apart. What a model wrote is text to be sent; nothing here acts on it.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import jinja2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dcore_jax.chat.template import (
  encode_raw,
  render_begun_call,
  render_records,
  template_text,
)
from dcore_jax.chat.thoughts import opened_thoughts
from dcore_jax.rollout import requests as rollout_requests
from dcore_jax.serve.answers import ChatChoice, Choice, ReplyForm, Rollouts, TextChoice
from dcore_jax.serve.errors import HANDLED, RETRY_AFTER, Refusal, describe, encode, respond
from dcore_jax.serve.requests import ChatRequest, CompletionRequest, RequestError, read_request
from dcore_jax.serve.scheduler import Scheduler, Stopped
from dcore_jax.serve.telemetry import Telemetry

_PATHS = ('/v1/chat/completions', '/v1/completions', '/v1/models', '/health', '/metrics')
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one server takes.

  `max_tokens` bounds an answer: more are refused, and who asks for none gets what fits.
  """

  max_tokens: int
  body_bytes: int = 4 * 2**20
  body_seconds: float = 30.0  # for a body to arrive
  requests: int = 256  # under way, bodies that are still arriving included


class Service:
  """The state of one server; `app` is the ASGI application.

  Args:
    scheduler: the engine's.
    tokenizer: a transformers tokenizer with a chat template.
    model: the name that clients ask for.
    limits: what is refused.
    api_key: what clients must send as bearer token; '' asks for none.
  """

  def __init__(
    self, scheduler: Scheduler, tokenizer: Any, model: str, limits: Limits, api_key: str = ''
  ):
    self.scheduler = scheduler
    self.tokenizer = tokenizer
    self.model = model
    self.limits = limits
    self.telemetry = Telemetry(scheduler)
    self.draining = False  # refuse what comes from now on
    self.under_way = 0  # requests of the API
    self._api_key = api_key.encode()
    self._started = int(time.time())
    # Templates and tokenizers take a second for megabytes of text; one thread, since tokenizers are
    # not made for several.
    self._encoder = concurrent.futures.ThreadPoolExecutor(1, 'encoder')
    routes = [
      Route('/v1/chat/completions', self._chat, methods=['POST']),
      Route('/v1/completions', self._complete, methods=['POST']),
      Route('/v1/models', self._models),
      Route('/v1/models/{name:path}', self._one_model),
      Route('/health', self._health),
      Route('/metrics', self._metrics),
    ]
    self.app = Starlette(
      routes=routes,
      middleware=[Middleware(_Gate, self)],
      lifespan=self._lifespan,
      exception_handlers=dict.fromkeys(HANDLED, respond),
    )

  @contextlib.asynccontextmanager
  async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(self.scheduler.close)
    self._encoder.shutdown()

  def refusal(self, scope: Scope) -> Refusal | None:
    """Why a request of the API is not even read."""
    given = dict(scope['headers']).get(b'authorization', b'')
    scheme, _, key = given.partition(b' ')
    if self._api_key and not (
      scheme.lower() == b'bearer' and hmac.compare_digest(key.strip(), self._api_key)
    ):
      return Refusal(
        status=401,
        message='the API key is missing or wrong',
        code='invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )
    if self.draining:
      return Refusal(
        status=503,
        message='the server is shutting down',
        code='draining',
        headers={**RETRY_AFTER, 'Connection': 'close'},
      )
    if self.under_way > self.limits.requests:
      return Refusal(
        status=429,
        message=f'{self.limits.requests} requests are under way',
        code='rate_limit_exceeded',
        headers=RETRY_AFTER,
      )
    return None

  # --- what needs no engine -----------------------------------------------------------------------

  async def _health(self, _: Request) -> Response:
    if self.scheduler.failure is not None:
      return JSONResponse({'status': 'failed'}, 503)
    return (
      JSONResponse({'status': 'draining'}, 503) if self.draining else JSONResponse({'status': 'ok'})
    )

  async def _metrics(self, _: Request) -> Response:
    return Response(self.telemetry.text(), media_type='text/plain; version=0.0.4')

  async def _models(self, _: Request) -> Response:
    return JSONResponse({'object': 'list', 'data': [self._card()]})

  async def _one_model(self, request: Request) -> Response:
    self._check_model(request.path_params['name'])
    return JSONResponse(self._card())

  def _card(self) -> dict[str, Any]:
    return {
      'id': self.model,
      'object': 'model',
      'created': self._started,
      'owned_by': 'dcore_jax',
      'max_model_len': self.scheduler.engine.max_len,
    }

  def _check_model(self, name: str) -> None:
    if name != self.model:
      raise Refusal(404, f'there is no model {name!r} here, but {self.model!r}', 'model_not_found')

  # --- completions --------------------------------------------------------------------------------

  async def _chat(self, request: Request) -> Response:
    body = await self._body(request)
    asked, prompt, thinking, begun = await self._off_loop(self._read_chat, body)
    form = ReplyForm(
      specs=asked.specs,
      thinking=thinking,
      begun=begun,
      most_calls=None if asked.parallel_tool_calls else 1,
    )

    def choice(index: int) -> ChatChoice:
      return ChatChoice(
        index=index,
        tokenizer=self.tokenizer,
        stop=asked.stop,
        logprobs=asked.logprobs,
        form=form,
      )

    return await self._answer(
      request, asked, [prompt], choice, 'chatcmpl', ('chat.completion', 'chat.completion.chunk')
    )

  async def _complete(self, request: Request) -> Response:
    asked, prompts = await self._off_loop(self._read_completion, await self._body(request))

    def choice(index: int) -> TextChoice:
      return TextChoice(
        index=index,
        tokenizer=self.tokenizer,
        stop=asked.stop,
        logprobs=asked.logprobs is not None,
      )

    return await self._answer(
      request, asked, prompts, choice, 'cmpl', ('text_completion', 'text_completion')
    )

  async def _body(self, request: Request) -> bytes:
    limits = self.limits
    # Only what a browser asks permission for: pages of other origins cannot use a server on this
    # machine.
    if (
      request.headers.get('content-type', '').partition(';')[0].strip().lower()
      != 'application/json'
    ):
      raise Refusal(415, 'the body must be of type application/json')
    too_large = Refusal(
      status=413,
      message=f'the body exceeds {limits.body_bytes} bytes',
      code='request_too_large',
      headers={'Connection': 'close'},
    )
    declared = request.headers.get('content-length', '0')
    if declared.isdigit() and int(declared) > limits.body_bytes:
      raise too_large
    body = bytearray()
    try:
      async with asyncio.timeout(limits.body_seconds):
        async for chunk in request.stream():
          body += chunk
          if len(body) > limits.body_bytes:
            raise too_large
    except TimeoutError as error:
      raise Refusal(
        408, f'the body took more than {limits.body_seconds} s', headers={'Connection': 'close'}
      ) from error
    return bytes(body)

  async def _off_loop(self, function: Callable[[bytes], T], body: bytes) -> T:
    return await asyncio.get_running_loop().run_in_executor(self._encoder, function, body)

  def _read_chat(self, body: bytes) -> tuple[ChatRequest, list[int], bool, str]:
    """(what is asked, its prompt, whether that has opened the thoughts, what it has begun the
    answer with).
    """
    asked: ChatRequest = read_request(ChatRequest, body)
    self._check_model(asked.model)
    records = [message.record() for message in asked.messages]
    tools = [{'type': 'function', 'function': spec.to_json()} for spec in asked.specs] or None
    options = {} if asked.chat_template_kwargs is None else asked.chat_template_kwargs.model_dump()
    for name in options:
      if name not in template_text(self.tokenizer, tools):
        raise RequestError(
          f'the chat template of {self.model!r} knows no {name}', 'chat_template_kwargs'
        )
    begun = ''
    try:
      if asked.call_forced:
        text, begun = self._begin_call(asked, records, tools)
      else:
        text = render_records(self.tokenizer, records, tools, **options)
      text.encode()
    except (jinja2.TemplateError, UnicodeError, TypeError) as error:
      raise RequestError(
        f'the chat template cannot show this conversation: {error}', 'messages'
      ) from error
    return asked, self._encode(text), bool(opened_thoughts(text)), begun

  def _begin_call(
    self, asked: ChatRequest, records: list[dict[str, Any]], tools: list[dict[str, Any]]
  ) -> tuple[str, str]:
    try:
      return render_begun_call(self.tokenizer, records, tools, asked.forced_name)
    except ValueError as error:
      raise RequestError(
        f'no call can be forced from {self.model!r}: {error}', 'tool_choice'
      ) from error

  def _read_completion(self, body: bytes) -> tuple[CompletionRequest, list[list[int]]]:
    """(what is asked, its prompts)."""
    asked: CompletionRequest = read_request(CompletionRequest, body)
    self._check_model(asked.model)
    vocabulary = self.scheduler.engine.config.vocab_size
    for prompt in asked.prompts:
      if (
        not prompt
        or not isinstance(prompt, str)
        and not all(0 <= token < vocabulary for token in prompt)
      ):
        raise RequestError(f'a prompt needs text, or token ids below {vocabulary}', 'prompt')
    return asked, [
      encode_raw(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
      for prompt in asked.prompts
    ]

  def _encode(self, text: str) -> list[int]:
    return self.tokenizer(text, add_special_tokens=False)['input_ids']

  async def _answer(
    self,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    prompts: list[list[int]],
    make_choice: Callable[[int], Choice],
    prefix: str,
    objects: tuple[str, str],
  ) -> Response:
    """Runs the choices, `n` of each prompt in turn, and answers whole or in pieces."""
    longest = max(map(len, prompts), default=0)
    count = asked.n * len(prompts)
    capacity = self.scheduler.capacity
    self._check_room(asked, longest, 'messages' if prefix == 'chatcmpl' else 'prompt')
    if not 1 <= count <= capacity:
      raise RequestError(
        f'{count} answers are asked for; the server takes 1 to {capacity} at a time', 'n'
      )
    rows = []
    for number, prompt in enumerate(prompts):
      for sample in range(asked.n):
        rows.append(rollout_requests.Request(prompt, (number, sample), top=asked.alternatives))
    head = {
      'id': f'{prefix}-{secrets.token_hex(12)}',
      'object': objects[asked.stream],
      'created': int(time.time()),
      'model': self.model,
    }
    choices = list(map(make_choice, range(count)))
    rollouts = Rollouts(
      self.scheduler, rows, asked.sampling(self.limits.max_tokens)
    )  # from here on they run
    run = _Run(self.telemetry, rollouts, choices, head, sum(map(len, prompts)))
    if asked.stream:
      return _EventStream(run, asked.usage_wanted)
    try:
      return Response(
        encode(await _while_connected(request.receive, run.whole())), media_type='application/json'
      )
    except ClientDisconnect:
      self.telemetry.cancelled.inc()
      raise
    finally:
      run.close()

  def _check_room(
    self, asked: ChatRequest | CompletionRequest, longest: int, prompt_field: str
  ) -> None:
    """A budget that does not fit is refused: cut, it would end answers early for a reason that no
    client sees.
    """
    (field, budget) = asked.budget
    room = self.scheduler.engine.max_len
    bound = self.limits.max_tokens
    if budget is not None and budget > bound:
      raise RequestError(f'{field} = {budget}; an answer may have {bound} tokens', field)
    if longest + (budget or 1) > room:
      wanted = f' and {field} = {budget}' if budget else ''
      raise RequestError(
        f'the prompt has {longest} tokens{wanted}; '
        f'prompt and answer together may have {room} tokens',
        prompt_field if longest >= room else field,
        'context_length_exceeded',
      )


class _Run:
  """A request on its way: takes progress in and gives the answer out; `close` frees what has not
  ended.
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
    async for _ in self.pieces():
      pass
    return {
      **self.head,
      'choices': [choice.whole() for choice in self.choices],
      'usage': self.usage(),
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
    sampled = sum(choice.tokens for choice in self.choices)
    return {
      'prompt_tokens': self._prompt_tokens,
      'completion_tokens': sampled,
      'total_tokens': self._prompt_tokens + sampled,
    }


class _EventStream(Response):
  """The answer in pieces, as server-sent events."""

  media_type = 'text/event-stream'

  def __init__(self, run: _Run, usage_wanted: bool):
    super().__init__(headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'})
    del self.headers['content-length']
    self._run = run
    self._usage_wanted = usage_wanted

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await _while_connected(receive, self._send(send))
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
      await self._send_events(send, opening)
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

  async def _send_events(self, send: Send, entries: list[dict[str, Any]]) -> None:
    usage = {'usage': None} if self._usage_wanted else {}
    if entries:
      await _send_text(
        send, ''.join(_event({**self._run.head, 'choices': [entry], **usage}) for entry in entries)
      )


def _event(record: dict[str, Any]) -> str:
  return f'data: {encode(record)}\n\n'


async def _send_text(send: Send, text: str) -> None:
  await send({'type': 'http.response.body', 'body': text.encode(), 'more_body': True})


async def _while_connected(receive: Receive, work: Awaitable[T]) -> T:
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


class _Gate:
  """The door of the application: who is let in, and how many; counts what is answered."""

  def __init__(self, app: ASGIApp, service: Service):
    self._app = app
    self._service = service

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    service = self._service
    status = 500

    async def watch(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    api = scope['path'].startswith('/v1/')
    service.under_way += api
    try:
      refusal = service.refusal(scope) if api else None
      app = self._app if refusal is None else await respond(Request(scope), refusal)
      await app(scope, receive, watch)
    finally:
      service.under_way -= api
      path = scope['path'] if scope['path'] in _PATHS else 'other'
      service.telemetry.requests.labels(path, str(status)).inc()
