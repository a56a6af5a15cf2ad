"""The HTTP server: OpenAI's chat completions, completions and models on the engine's lanes, with
/health, /metrics and, where the server allows it, /update_weights.

`requests.py` says what is honoured of a request, `replies.py` how thoughts and tool calls are told
apart. What a model wrote is text to be sent; nothing here acts on it.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import pathlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from absl import logging
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dcore_jax.rollout import requests as rollout_requests
from dcore_jax.serve import fields
from dcore_jax.serve.answers import ChatChoice, Choice, ReplyForm, Report, Rollouts, TextChoice
from dcore_jax.serve.delivery import EventStream, Run, while_connected
from dcore_jax.serve.errors import HANDLED, RETRY_AFTER, Refusal, encode, respond
from dcore_jax.serve.parts import RequestError
from dcore_jax.serve.prompts import PromptReader
from dcore_jax.serve.requests import (
  ChatCompletionRequest,
  CompletionRequest,
  SamplingRequest,
)
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.served_model import ServedModel
from dcore_jax.serve.telemetry import Telemetry
from dcore_jax.serve.weights import UPDATE_PATH, WeightUpdates, read_update

# Requests are counted by these paths. Every other path counts as 'other', or a scanner could make
# up as many Prometheus series as it likes.
_PATHS = (
  '/v1/chat/completions',
  '/v1/completions',
  '/v1/models',
  '/health',
  '/metrics',
  UPDATE_PATH,
)
IGNORED_FIELDS = 'x-ignored-fields'
_MOST_LOGGED = 256  # names of ignored fields that the log keeps apart
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one server takes.

  `max_tokens` bounds an answer: more are refused, and who asks for none gets what fits.
  """

  max_tokens: int
  body_bytes: int = 4 * 2**20
  body_seconds: float = 30.0  # for a body to arrive
  # Without a whole head of a request, or for an answer to which nobody listens.
  idle_seconds: float = 60.0
  requests: int = 256  # under way, bodies that are still arriving included
  # The directory below which new weights may lie; None: none are taken.
  weights: pathlib.Path | None = None


class Service:
  """The state of one server; `app` is the ASGI application.

  Args:
    scheduler: runs the engine.
    tokenizer: a transformers tokenizer with a chat template.
    names: what clients may call the model: a name, or several.
    limits: what is refused.
    api_key: what clients must send as bearer token; '' asks for none.
    folder: the directory of the model, whose path is one of its names too; None if it has none.
  """

  def __init__(
    self,
    scheduler: Scheduler,
    tokenizer: Any,
    names: str | Sequence[str],
    limits: Limits,
    api_key: str = '',
    folder: pathlib.Path | None = None,
  ):
    self.scheduler = scheduler
    self.tokenizer = tokenizer
    # time.time(), since clients are shown a date.
    self.model = ServedModel(names, folder, scheduler.engine.max_len, created=int(time.time()))
    self.limits = limits
    engine = scheduler.engine
    self._prompts = PromptReader(
      tokenizer, engine.config.vocab_size, self.model.check, engine.max_len
    )
    self._updates = WeightUpdates(scheduler, limits.weights)
    self._logged: set[str] = set()
    self.telemetry = Telemetry(scheduler)
    self.draining = False  # refuse what comes from now on
    self.under_way = 0  # requests of the API
    self._api_key = api_key.encode()
    # Templates and tokenizers take a second for megabytes of text, which would hold up every stream
    # of the event loop. There is one thread, since tokenizers are not made for several.
    self._encoder = concurrent.futures.ThreadPoolExecutor(1, 'encoder')
    routes = [
      Route('/v1/chat/completions', self._chat, methods=['POST']),
      Route('/v1/completions', self._complete, methods=['POST']),
      Route('/v1/models', self._models),
      Route('/v1/models/{name:path}', self._one_model),
      Route('/health', self._health),
      Route('/metrics', self._metrics),
      Route(UPDATE_PATH, self._update_weights, methods=['POST']),
    ]
    self.app = Starlette(
      routes=routes,
      middleware=[Middleware(_Gate, self)],
      lifespan=self._lifespan,
      exception_handlers={**dict.fromkeys(HANDLED, respond), 404: self._nowhere},
    )

  @contextlib.asynccontextmanager
  async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
    yield
    # Closing waits for the engine's present step, during which the loop still sends answers.
    await asyncio.to_thread(self.scheduler.close)
    self._encoder.shutdown()

  def refusal(self, scope: Scope) -> Refusal | None:
    """Returns why a request of the API is not even read; None if it is."""
    # The key comes first, so that a client without it does not learn how busy the server is.
    given = dict(scope['headers']).get(b'authorization', b'')
    scheme, _, key = given.partition(b' ')
    if self._api_key and not (
      # compare_digest takes the same time for every wrong key, so that none can be guessed byte by
      # byte.
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
    # The count includes this request: `_Gate` has added it before it asks.
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
    # 503 tells a load balancer to send no more requests here.
    if self.scheduler.failure is not None:
      return JSONResponse({'status': 'failed'}, 503)
    if self.draining:
      return JSONResponse({'status': 'draining'}, 503)
    if not self.scheduler.ready:
      ready, total = self.scheduler.programs
      programs = {'ready': ready, 'total': total}
      # Before the engine has counted its programs, there are none to divide by.
      starting = {'status': 'starting', 'programs': programs, 'share': ready / max(total, 1)}
      return JSONResponse(starting, 503, RETRY_AFTER)
    return JSONResponse({'status': 'ok', 'weights_version': self.scheduler.version})

  async def _update_weights(self, request: Request) -> Response:
    # Whoever may change the weights says what all other clients are told.
    if not self._api_key:
      raise Refusal(403, 'weights are taken only by a server that asks for a key (--api_key_env)')
    update = read_update(await self._body(request))
    return JSONResponse(await self._updates.take(update))

  async def _metrics(self, _: Request) -> Response:
    return Response(self.telemetry.text(), media_type='text/plain; version=0.0.4')

  async def _models(self, _: Request) -> Response:
    return JSONResponse({'object': 'list', 'data': self.model.cards()})

  async def _one_model(self, request: Request) -> Response:
    name = request.path_params['name']
    self.model.check(name)
    return JSONResponse(self.model.card(name))

  async def _nowhere(self, request: Request, _: Exception) -> Response:
    # A client whose base URL lacks /v1 learns it from here.
    paths = ', '.join(_PATHS)
    path = request.url.path
    return await respond(request, Refusal(404, f'there is no {path} here, but {paths}'))

  def _ignored(self, asked: SamplingRequest) -> dict[str, str]:
    """Returns the header that names what is ignored of a request; the log names each once."""
    names = list(dict.fromkeys(asked.ignored()))
    if not names:
      return {}
    shown = fields.header_value(names)
    # Bounded: names are what clients make up.
    new = set(shown.split(', ')) - self._logged
    if new and len(self._logged) < _MOST_LOGGED:
      self._logged |= new
      logging.warning('fields of requests that are ignored: %s', ', '.join(sorted(new)))
    return {IGNORED_FIELDS: shown}

  # --- completions --------------------------------------------------------------------------------

  async def _chat(self, request: Request) -> Response:
    body = await self._body(request)
    asked, prompt, thinking, begun = await self._off_loop(self._prompts.read_chat, body)
    form = ReplyForm(
      specs=asked.specs,
      thinking=thinking,
      begun=begun,
      most_calls=None if asked.parallel_tool_calls else 1,
    )
    report = _report(asked, logprobs=asked.logprobs)

    def choice(index: int) -> ChatChoice:
      return ChatChoice(index, self.tokenizer, prompt, report, form)

    return await self._answer(
      request, asked, [prompt], choice, 'chatcmpl', ('chat.completion', 'chat.completion.chunk')
    )

  async def _complete(self, request: Request) -> Response:
    asked, prompts, texts = await self._off_loop(
      self._prompts.read_completion, await self._body(request)
    )
    report = _report(asked, logprobs=asked.logprobs is not None)

    def choice(index: int) -> TextChoice:
      # Choices are numbered through: `n` of the first prompt, then `n` of the second, as OpenAI
      # does.
      number = index // asked.n
      return TextChoice(index, self.tokenizer, prompts[number], report, texts[number])

    return await self._answer(
      request, asked, prompts, choice, 'cmpl', ('text_completion', 'text_completion')
    )

  async def _body(self, request: Request) -> bytes:
    limits = self.limits
    # A browser asks the server before it sends this type to another origin, and no answer permits
    # it. So a page from elsewhere cannot use a server on this machine.
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
    # The declared length spares reading the body. It may be absent or wrong, so that the bytes that
    # come are counted too.
    declared = request.headers.get('content-length', '0')
    if declared.isdigit() and int(declared) > limits.body_bytes:
      raise too_large
    body = bytearray()
    try:
      # A client that sends a byte a minute would hold its place among the requests for ever.
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

  async def _answer(
    self,
    request: Request,
    asked: SamplingRequest,
    prompts: list[list[int]],
    make_choice: Callable[[int], Choice],
    prefix: str,
    objects: tuple[str, str],
  ) -> Response:
    """Runs the choices, `n` of each prompt in turn, and answers whole or in pieces."""
    longest = max(map(len, prompts), default=0)
    count = asked.n * len(prompts)
    capacity = self.scheduler.capacity
    # Everything that can be refused is refused here, before any rollout takes a lane.
    self._check_room(asked, longest, 'messages' if prefix == 'chatcmpl' else 'prompt')
    self._check_stop_ids(asked)
    ignored = self._ignored(asked)
    if not 1 <= count <= capacity:
      field = 'n' if len(prompts) == 1 else 'prompt'
      raise RequestError(
        f'{count} answers are asked for; the server takes 1 to {capacity} at a time', field
      )
    rows = []
    for number, prompt in enumerate(prompts):
      for sample in range(asked.n):
        rows.append(
          # The random stream of a choice depends on the seed and its own two numbers, so that the
          # same request is answered alike whatever else runs.
          rollout_requests.Request(
            prompt,
            (number, sample),
            max_tokens=asked.budget[1],
            top=asked.alternatives,
            prompt_top=asked.scores,
          )
        )
    head = {
      'id': f'{prefix}-{secrets.token_hex(12)}',
      'object': objects[asked.stream],
      'created': int(time.time()),
      'model': asked.model,
    }
    choices = list(map(make_choice, range(count)))
    # From here on the rollouts run, and somebody has to close them.
    rollouts = Rollouts(self.scheduler, rows, asked.sampling(self.limits.max_tokens))
    run = Run(self.telemetry, rollouts, choices, head, sum(map(len, prompts)))
    if asked.stream:
      return EventStream(run, asked.usage_wanted, ignored)
    try:
      # Without this, a client that gave up would occupy its lanes to the end of the answer.
      answer = await while_connected(request.receive, run.whole())
      return Response(encode(answer), headers=ignored, media_type='application/json')
    except ClientDisconnect:
      self.telemetry.cancelled.inc()
      raise
    finally:
      run.close()

  def _check_stop_ids(self, asked: SamplingRequest) -> None:
    # Clients send the model's own end tokens here, which need nothing. The engine stops at no
    # others, and an answer that ran on would break the client's assumption without a word.
    others = set(asked.stop_token_ids) - set(self.scheduler.engine.stop_ids.tolist())
    if others:
      raise RequestError(
        f'stop_token_ids {sorted(others)} do not end an answer here; use stop, with their text',
        'stop_token_ids',
      )

  def _check_room(self, asked: SamplingRequest, longest: int, prompt_field: str) -> None:
    """Refuses a budget that does not fit.

    A budget that was cut to what fits would end answers early for a reason that no client sees.
    """
    (field, budget) = asked.budget
    room = self.scheduler.engine.max_len
    bound = self.limits.max_tokens
    if budget is not None and budget > bound:
      raise RequestError(f'{field} = {budget}; an answer may have {bound} tokens', field)
    # Even an answer without a budget needs room for one token.
    if longest + max(budget or 0, 1) > room:
      wanted = f' and {field} = {budget}' if budget else ''
      # Also where nothing is sampled: the engine sets a place aside.
      least = '' if budget else ', one of them for the answer'
      raise RequestError(
        f'the prompt has {longest} tokens{wanted}; '
        f'prompt and answer together may have {room} tokens{least}',
        # The field at fault is the prompt if no budget would fit beside it.
        prompt_field if longest >= room else field,
        'context_length_exceeded',
      )


def _report(asked: ChatCompletionRequest | CompletionRequest, logprobs: bool) -> Report:
  return Report(
    stop=asked.stop,
    logprobs=logprobs,
    alternatives=asked.alternatives,
    prompt_logprobs=asked.prompt_logprobs,
    token_ids=asked.return_token_ids,
    ids_as_tokens=asked.return_tokens_as_token_ids,
  )


# A plain ASGI middleware passes the pieces of a stream, and the client's disconnect, straight on.
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
    # An application that fails before it sends a status has answered 500 or nothing.
    status = 500

    async def watch(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    # Health and metrics are answered in every state, also while the server drains.
    api = scope['path'].startswith('/v1/') or scope['path'] == UPDATE_PATH
    service.under_way += api
    try:
      refusal = service.refusal(scope) if api else None
      app = self._app if refusal is None else await respond(Request(scope), refusal)
      await app(scope, receive, watch)
    finally:
      service.under_way -= api
      path = scope['path'] if scope['path'] in _PATHS else 'other'
      service.telemetry.requests.labels(path, str(status)).inc()
