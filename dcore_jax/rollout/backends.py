"""Where completions come from: our own engine, or any OpenAI-compatible endpoint, behind one interface.

    backend.stream(source, sampling) -> (tag, Reply) as they finish

`source(free)` is asked for up to `free` more requests whenever there is room, and gives what can be asked now: a request may
depend on earlier replies. The stream ends when it gives nothing and nothing is under way. Distillation and evaluation run
so on one machine's lanes or against a fleet.
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import openai

from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.chat.template import render_prompt
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.rollout.engine import Engine, Request
from dcore_jax.rollout.sampling import SamplingParams

Tag = Any
TOO_LONG = 'prompt too long'
_READY = 1024  # replies known without asking that wait to be taken
_REFUSALS = (400, 413, 422)  # status codes that speak of one request: too long, for example
_LOCKED_OUT = (
  401,
  402,
  403,
  404,
)  # and of the key, the account or the model's name: asking on is of no use
_HOPELESS = 8  # requests in a row that fail: it is the endpoint then, and not they
_ALL_REFUSED = (
  16  # refusals without a single answer: a rule or a limit that the endpoint does not take
)


class _Failed(ConnectionError):
  """One request has no answer, whatever was tried; another may have."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChatRequest:
  """What to ask. `key_id` names the random stream, e.g. (seed number, attempt); max_tokens None: the sampling rule's."""

  messages: tuple[Message, ...]
  key_id: tuple[int, ...]
  tools: tuple[ToolSpec, ...] = ()
  max_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
  """What was answered, thoughts in a `<think>` block and calls as text, as a model writes them.

  Attributes:
    text: '' where there is an error.
    finished: the model ended its turn, or wrote a stop string, which the text then ends before; else its budget was used up.
    prompt_tokens, completion_tokens: as the backend counts them.
    error: why there is no answer and will be none: the request itself is refused. '' otherwise.
    seconds: from when it was asked to when the answer was there.
  """

  text: str
  finished: bool
  prompt_tokens: int
  completion_tokens: int
  error: str = ''
  seconds: float = dataclasses.field(default=0.0, compare=False)


Source = Callable[[int], Sequence[tuple[Tag, ChatRequest]]]


class Backend(Protocol):
  """Anything that answers chat requests, as the model that is called `model`."""

  model: str

  def stream(self, source: Source, sampling: SamplingParams) -> Iterator[tuple[Tag, Reply]]:
    """Answers what `source` gives, in the order of finishing."""


class LocalBackend:
  """Our engine: prompts by the model's own chat template, token in, token out.

  Args:
    engine, tokenizer: the model.
    journal: JSONL file of replies, as for `OpenAIBackend`.
    model: the name that the journal knows the model by.
  """

  def __init__(
    self, engine: Engine, tokenizer: Any, *, journal: pathlib.Path | None = None, model: str = ''
  ):
    self.engine, self.tokenizer, self.model = engine, tokenizer, model
    self.usage = Usage()
    self._journal = Journal(journal) if journal else None

  def stream(self, source: Source, sampling: SamplingParams) -> Iterator[tuple[Tag, Reply]]:
    ready: list[tuple[Tag, Reply]] = []  # without the engine: refused, or known from the journal

    def requests(free: int) -> list[tuple[Tag, Request]]:
      result = []
      while len(result) < free and len(ready) < _READY and (asked := source(free - len(result))):
        for tag, request in asked:
          body = self._body(request, sampling)
          prompt = (
            [] if (known := self._journal and self._journal.find(body)) else self._encode(request)
          )
          if known:
            self.usage.from_journal += 1
            ready.append((tag, known))
          elif len(prompt) >= self.engine.max_len:
            ready.append((tag, Reply('', False, len(prompt), 0, TOO_LONG)))
          else:
            began = time.perf_counter()
            result.append(((tag, body, began), Request(prompt, request.key_id, request.max_tokens)))
      return result

    while True:
      for (tag, body, began), done in self.engine.stream(requests, sampling):
        yield from _drained(ready)
        text = self.tokenizer.decode(done.tokens, skip_special_tokens=True)
        if done.stop is not None:
          text = text.partition(done.stop)[0]
        seconds = time.perf_counter() - began
        reply = Reply(
          text,
          done.finished or done.stop is not None,
          done.prompt_len,
          len(done.tokens),
          seconds=round(seconds, 4),
        )
        self.usage.add(reply)
        if self._journal:
          self._journal.append(body, reply)
        yield tag, reply
      if not ready:
        return
      yield from _drained(ready)  # whoever waited for these may have more to ask

  def _body(self, request: ChatRequest, sampling: SamplingParams) -> dict[str, Any]:
    """Everything that the answer depends on, which is what the journal knows it by."""
    return dataclasses.asdict(request) | {
      'model': self.model,
      'sampling': dataclasses.asdict(sampling),
      'room': [self.engine.max_len, self.engine.max_new],
    }

  def _encode(self, request: ChatRequest) -> list[int]:
    tools = _functions(request.tools) or None
    text = render_prompt(self.tokenizer, list(request.messages), tools)
    return self.tokenizer(text, add_special_tokens=False)['input_ids']


def _functions(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
  """Tool specs as endpoints and chat templates take them."""
  return [{'type': 'function', 'function': tool.to_json()} for tool in tools]


def _drained(waiting: list) -> Iterator:
  while waiting:
    yield waiting.pop(0)


@dataclasses.dataclass
class Usage:
  """Counts since the backend was made; replies from the journal cost nothing and are counted apart.

  Prices are of a million tokens, in any unit; 0: not known.
  """

  requests: int = 0
  from_journal: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  prompt_price: float = 0.0
  completion_price: float = 0.0

  def add(self, reply: Reply) -> None:
    """Counts an answer that was made now."""
    self.requests += 1
    self.prompt_tokens += reply.prompt_tokens
    self.completion_tokens += reply.completion_tokens

  def record(self) -> dict[str, float]:
    """The counts and, where prices are known, the cost in their unit."""
    counts = {
      name: getattr(self, name)
      for name in ('requests', 'from_journal', 'prompt_tokens', 'completion_tokens')
    }
    if not self.prompt_price and not self.completion_price:
      return counts
    cost = (
      self.prompt_tokens * self.prompt_price + self.completion_tokens * self.completion_price
    ) / 1e6
    return counts | {'cost': round(cost, 6)}


class OpenAIBackend:
  """An OpenAI-compatible endpoint (vLLM, SGLang, ours, a provider's).

  Args:
    base_url: ends in /v1 for most servers.
    model: its name there.
    api_key: '' reads the environment variable OPENAI_API_KEY, and where that is unset sends a placeholder.
    concurrency: requests under way at most.
    timeout: seconds that one attempt may take.
    retries: further attempts after a failed connection, a timeout, 408, 409, 429, 5xx or an answer without content; waits
      grow exponentially, or are what the server asks for (Retry-After).
    journal: JSONL file of replies. A reply is appended when it arrives; asked the same again, also by a later process, the
      backend answers from there.
    prices: of a million prompt and a million completion tokens, for `usage`; 0: not known.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key: str = '',
    concurrency: int = 64,
    timeout: float = 600,
    retries: int = 5,
    journal: pathlib.Path | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
  ):
    if concurrency < 1 or retries < 0 or not timeout > 0:
      raise ValueError(
        f'concurrency = {concurrency}, retries = {retries} and timeout = {timeout} cannot be'
      )
    if not all(0 <= price < math.inf for price in prices):
      raise ValueError(f'prices = {prices} cannot be')
    self.base_url, self.model, self.concurrency, self.retries = (
      base_url,
      model,
      concurrency,
      retries,
    )
    self.usage = Usage(prompt_price=prices[0], completion_price=prices[1])
    self._options = dict(
      base_url=base_url,
      api_key=api_key or os.environ.get('OPENAI_API_KEY') or 'none',
      timeout=timeout,
      max_retries=retries,
    )
    self._journal = Journal(journal) if journal else None

  def stream(self, source: Source, sampling: SamplingParams) -> Iterator[tuple[Tag, Reply]]:
    """As `Backend.stream`.

    A request that fails while others are answered is put aside, tried again when all else is done, and then has a reply with
    an error, which the journal does not keep.

    Raises:
      ConnectionError: the endpoint stayed unreachable, refused us (key, model name) or every request. What was answered until
        then is in the journal.
    """
    finished: queue.Queue = queue.Queue()
    aside: collections.deque[tuple[Tag, ChatRequest]] = collections.deque()
    answered = refused = failures = 0
    with _EventLoop() as loop:
      client = openai.AsyncOpenAI(**self._options)
      under_way: set = set()
      try:
        while True:
          for tag, request in (
            source(self.concurrency - len(under_way)) if len(under_way) < self.concurrency else ()
          ):
            future = loop.submit(self._answer(client, request, sampling))
            under_way.add(future)
            future.add_done_callback(
              lambda future, asked=(tag, request): finished.put((*asked, future))
            )
          if not under_way:
            if not aside:
              return
            tag, request = aside.popleft()
            yield tag, loop.submit(self._last_try(client, request, sampling)).result()
            continue
          tag, request, future = finished.get()
          under_way.discard(future)
          try:
            reply = future.result()
          except _Failed:
            failures += 1
            if failures == _HOPELESS:
              raise
            aside.append((tag, request))
            continue
          failures, answered, refused = 0, answered + (not reply.error), refused + bool(reply.error)
          if refused == _ALL_REFUSED and not answered:
            raise ConnectionError(
              f'{self.base_url}, model {self.model!r} takes no request: {reply.error}'
            )
          yield tag, reply
      finally:
        for future in under_way:
          future.cancel()
        loop.submit(client.close()).result()

  async def _answer(
    self, client: openai.AsyncOpenAI, request: ChatRequest, sampling: SamplingParams
  ) -> Reply:
    body = self._body(request, sampling)
    if self._journal and (known := self._journal.find(body)):
      self.usage.from_journal += 1
      return known
    began = time.perf_counter()
    try:
      reply = await self._ask(client, body)
    except openai.APIError as error:
      status = getattr(error, 'status_code', None)
      if status not in _REFUSALS:
        kind = ConnectionError if status in _LOCKED_OUT else _Failed
        raise kind(f'{self.base_url}, model {self.model!r}: {error}') from error
      reply = Reply(
        '', False, 0, 0, f'refused with status {error.status_code}: {error.message}'[:500]
      )
    reply = dataclasses.replace(reply, seconds=round(time.perf_counter() - began, 4))
    self.usage.add(reply)
    if (
      self._journal and not reply.error
    ):  # what was refused may be taken when the server has been set up anew
      self._journal.append(body, reply)
    return reply

  async def _last_try(
    self, client: openai.AsyncOpenAI, request: ChatRequest, sampling: SamplingParams
  ) -> Reply:
    try:
      return await self._answer(client, request, sampling)
    except _Failed as error:
      try:
        await client.models.list()
      except openai.APIError:
        raise error from None  # it is the endpoint that is gone
      return Reply('', False, 0, 0, f'no answer: {error}'[:500])

  def _body(self, request: ChatRequest, sampling: SamplingParams) -> dict[str, Any]:
    """Everything that the answer depends on, which is what the journal knows it by."""
    # A 31-bit seed from (seed, key_id): servers take no lists, and some no large numbers.
    digest = hashlib.sha256(repr((sampling.seed, request.key_id)).encode()).digest()
    body: dict[str, Any] = {
      'model': self.model,
      'messages': [message.to_json() for message in request.messages],
      'temperature': sampling.temperature,
      'top_p': sampling.top_p,
      'max_tokens': request.max_tokens or sampling.max_tokens,
      'seed': int.from_bytes(digest[:4], 'big') >> 1,
    }
    if request.tools:
      body['tools'] = _functions(request.tools)
    if sampling.stop:
      body['stop'] = list(sampling.stop)
    # Not OpenAI's own; vLLM, SGLang and our server take them.
    extra = {
      name: getattr(sampling, name) for name in ('top_k', 'min_p') if getattr(sampling, name)
    }
    return body | {'extra_body': extra} if extra else body

  async def _ask(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> Reply:
    for attempt in range(self.retries + 1):
      try:
        completion = await client.chat.completions.create(**body)
        choice, usage = completion.choices[0], completion.usage
        count = lambda name: int(getattr(usage, name, None) or 0)
        finished = choice.finish_reason != 'length'
        return Reply(
          _text(choice.message, finished),
          finished,
          count('prompt_tokens'),
          count('completion_tokens'),
        )
      # The client does not check what a server sends: any part may be missing, or be something else.
      except (AttributeError, IndexError, TypeError, ValueError) as error:
        malformed = error
      await asyncio.sleep(min(8, 0.5 * 2**attempt))
    raise _Failed(f'{self.base_url} answers without a message: {malformed!r}') from malformed


def _text(message: Any, finished: bool) -> str:
  """Thoughts, content and calls of an endpoint's message as one text."""
  thoughts = (
    getattr(message, 'reasoning_content', None) or getattr(message, 'reasoning', None) or ''
  )
  if thoughts and not finished and message.content is None and not message.tool_calls:
    return f'<think>\n{thoughts}'  # the budget ended inside them
  text = f'<think>\n{thoughts.strip()}\n</think>\n\n' if thoughts else ''
  text += message.content or ''
  asked = [call.function for call in message.tool_calls or ()]
  try:
    calls = [ToolCall(call.name, dict(json.loads(call.arguments or '{}'))) for call in asked]
    return text + (print_calls(calls, 'hermes') if calls else '')
  except (
    ValueError,
    TypeError,
    RecursionError,
  ):  # nothing that can be called; the text shows what it was
    return text + '\n'.join(f'{call.name}{call.arguments}' for call in asked)


class Journal:
  """Replies by what was asked, one JSON object a line; a line that was cut short by a kill is taken off on opening.

  Only the place of each line is kept in memory: 100,000 replies of a reasoning model are half a gigabyte of text.
  """

  def __init__(self, path: pathlib.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    self._places: dict[str, int] = {}  # bytes from the start of the file
    self._file = path.open('a+b')
    self._file.seek(0)
    end = 0
    for number, line in enumerate(self._file, 1):
      if not line.endswith(b'\n'):
        break
      try:
        record = json.loads(line)
        key = record.pop('key')
        Reply(**record)
      except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path}, line {number} is no reply: {line[:80]!r}') from error
      self._places[key] = end
      end += len(line)
    self._file.truncate(end)

  @staticmethod
  def _key(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

  def find(self, body: dict[str, Any]) -> Reply | None:
    """The reply to the same request, if there was one."""
    key = self._key(body)
    place = self._places.get(key)
    if place is None:
      return None
    self._file.seek(place)
    try:
      record = json.loads(self._file.readline())
    except ValueError:
      return None  # another process writes to the file, too, and the line is not where it was put
    return Reply(**record) if record.pop('key', None) == key else None

  def append(self, body: dict[str, Any], reply: Reply) -> None:
    """Remembers a reply, in the file before anything is made of it."""
    key = self._key(body)
    self._places[key] = self._file.seek(0, os.SEEK_END)
    self._file.write(
      json.dumps({'key': key, **dataclasses.asdict(reply)}, ensure_ascii=False).encode(
        'utf-8', 'surrogatepass'
      )
      + b'\n'
    )
    self._file.flush()


class _EventLoop:
  """An asyncio loop on a thread of its own, so that a plain generator can wait for it; a context manager."""

  def __enter__(self) -> '_EventLoop':
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    return self

  def submit(self, coroutine: Any) -> Any:
    """Starts the coroutine -> a `concurrent.futures.Future`."""
    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

  def __exit__(self, *_) -> None:
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()
