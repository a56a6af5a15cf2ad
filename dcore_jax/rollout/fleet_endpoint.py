"""One server of a fleet: asked for exact tokens, and given new weights.

The package `openai` is imported where a server is asked, see `rollout.endpoint`.
"""

import asyncio
import hashlib
import math
import pathlib
import shlex
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dcore_jax.config import FleetSection
from dcore_jax.rollout.requests import Completion, Request
from dcore_jax.rollout.sampling import SamplingParams

if TYPE_CHECKING:
  import openai

# Failures in a row after which a server counts as gone; a connection that is refused is enough.
_GONE_AFTER = 3
# Seconds until a server that is gone is looked at again: doubled each time, up to the second.
_FIRST_LOOK, _LAST_LOOK = 0.5, 30.0
_BUSY_SECONDS = 0.5  # until a server that has no room is asked again
_LOOK_SECONDS = 0.5  # between two looks at a server that starts
_LONGEST_REASON = 300  # characters of what a server says
_TOLERANCE = 1e-3  # nats by which rounding may take a log-probability above 0


class Weights(NamedTuple):
  """Published weights: their number, and the directory that holds them."""

  version: int
  folder: pathlib.Path


class Limits(NamedTuple):
  """What a fleet's answers have to keep to.

  Attributes:
    max_len: tokens of a prompt and its completion together.
    max_new: tokens of a completion.
    vocab: ids are below this.
    stop_ids: tokens that end an answer.
  """

  max_len: int
  max_new: int
  vocab: int
  stop_ids: frozenset[int]


class Failed(ConnectionError):
  """A server gave no answer that can be used; another may."""


class Busy(ConnectionError):
  """A server has no room now."""


class Endpoint:
  """One server, as the fleet sees it.

  All methods that are coroutines run on the fleet's event loop.

  Args:
    url: its address, '/v1' included.
    section: config section `rl.fleet`.
    api_key: what it asks for.
    limits: of answers.

  Attributes:
    version: of the weights that it has; 0 where they are not known to be ours.
    ready: whether it may be asked.
    under_way: requests that it works on.
    reason: what went wrong last; '' where nothing has.
    syncing: whether somebody is bringing its weights up to date.
  """

  def __init__(self, url: str, section: FleetSection, api_key: str, limits: Limits):
    self.url = url.rstrip('/')
    self.version = 0
    self.ready = False
    self.under_way = 0
    self.reason = ''
    self.syncing = False
    self._section = section
    self._api_key = api_key
    self._limits = limits
    self._model = section.model
    self._client: openai.AsyncOpenAI | None = None
    self._failures = 0
    self._wait = _FIRST_LOOK
    self._not_before = 0.0  # by the monotonic clock

  @property
  def due(self) -> bool:
    """Whether the time has come to ask it again."""
    return time.monotonic() >= self._not_before

  def free(self) -> bool:
    """Whether it may be asked for one more answer."""
    return self.ready and self.due and self.under_way < self._section.concurrency

  # --- what was noticed ---------------------------------------------------------------------------

  def answered(self) -> None:
    """Notes an answer."""
    self._failures = 0
    self._wait = _FIRST_LOOK

  def busy(self) -> None:
    """Notes that it has no room."""
    self._not_before = time.monotonic() + _BUSY_SECONDS

  def failed(self, error: Exception) -> None:
    """Notes a failure; after some in a row the server counts as gone, and its weights as lost."""
    self.reason = ' '.join(str(error).split())[:_LONGEST_REASON]
    self._failures += 1
    if self._failures >= _GONE_AFTER or not self.ready or _refused(error):
      self.lose()
      self._not_before = time.monotonic() + self._wait
      self._wait = min(2 * self._wait, _LAST_LOOK)

  def lose(self) -> None:
    """Notes that nothing is known of its weights: it may have been started anew."""
    self.ready = False
    self.version = 0

  # --- what it is asked ---------------------------------------------------------------------------

  async def ask(self, request: Request, sampling: SamplingParams) -> Completion:
    """Returns what was sampled, token by token.

    Raises:
      Busy: it has no room now.
      Failed: it gives no answer, or one that cannot be what was sampled.
    """
    import openai

    limit = sampling.max_tokens if request.max_tokens is None else request.max_tokens
    prompt = np.asarray(request.prompt).tolist()
    limit = min(limit, self._limits.max_new, self._limits.max_len - len(prompt))
    # The weights can only become newer while it answers.
    version = self.version
    try:
      answer = await self._opened().completions.create(
        model=self._model,
        prompt=prompt,
        max_tokens=limit,
        temperature=sampling.temperature,
        # Said even where they keep all tokens: servers take others from a generation_config.json.
        top_p=sampling.top_p,
        seed=request_seed(sampling, request),
        # The sampled tokens' own, and no alternatives.
        logprobs=0,
        extra_body={
          'top_k': sampling.top_k or -1,
          'min_p': sampling.min_p,
          'return_token_ids': True,
        },
      )
      return read_answer(answer, prompt, limit, self._limits, version)
    except openai.APIStatusError as error:
      kind = Busy if error.status_code in (429, 503) else Failed
      raise kind(f'status {error.status_code}: {error.message}') from error
    except openai.APIError as error:
      raise Failed(str(error)) from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
      raise Failed(f'answers with something else: {error}') from error

  async def sync(self, weights: Weights, turn: asyncio.Lock) -> None:
    """Sees that the server is there and has these weights.

    Args:
      weights: what was published last.
      turn: is held while a server is restarted, so that the others go on answering.

    Raises:
      Failed: it is not there, does not fit, or does not take them.
    """
    import openai

    try:
      if self._section.restart:
        async with turn:
          await self._restart(weights)
      else:
        await self._check()
        # Beside the API, as for other servers that can do this.
        client = self._opened().with_options(base_url=self.url.removesuffix('/v1'))
        body = {'path': weights.folder.name, 'version': weights.version}
        await client.post('/update_weights', cast_to=object, body=body)
    except openai.APIStatusError as error:
      raise Failed(f'status {error.status_code}: {error.message}') from error
    except openai.APIError as error:
      raise Failed(str(error)) from error
    self.version = weights.version
    self.ready = True
    # The wait stays long until it answers: it would be given its weights again and again.
    self._failures = 0

  async def close(self) -> None:
    """Closes the connections."""
    if self._client is not None:
      await self._client.close()

  # --- how ----------------------------------------------------------------------------------------

  def _opened(self) -> 'openai.AsyncOpenAI':
    import openai

    if self._client is None:
      self._client = openai.AsyncOpenAI(
        base_url=self.url,
        api_key=self._api_key,
        timeout=self._section.timeout,
        # A request that fails is asked of another server, and not of this one again.
        max_retries=0,
      )
    return self._client

  async def _check(self) -> None:
    """Raises Failed where the server has another model's name, or too few places for a text."""
    found = [card async for card in self._opened().models.list()]
    if not found:
      raise Failed('lists no model')
    names = [card.id for card in found]
    self._model = self._section.model or names[0]
    if self._model not in names:
      raise Failed(f'has no model {self._model!r}, but {names}')
    room = getattr(found[names.index(self._model)], 'max_model_len', None)
    if isinstance(room, int) and room < self._limits.max_len:
      raise Failed(
        f'has room for {room} tokens of prompt and answer, and engine.max_len = '
        f'{self._limits.max_len} asks for more'
      )

  async def _restart(self, weights: Weights) -> None:
    """Lets its requests end, runs the command, and waits until the server is back."""
    self.ready = False
    deadline = time.monotonic() + self._section.timeout
    while self.under_way and time.monotonic() < deadline:
      await asyncio.sleep(_LOOK_SECONDS)
    facts = {'path': weights.folder, 'version': weights.version, 'endpoint': self.url}
    # Split before anything is filled in, and without a shell: a path is one word.
    words = [word.format(**facts) for word in shlex.split(self._section.restart)]
    process = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.DEVNULL)
    status = await process.wait()
    if status:
      raise Failed(f'rl.fleet.restart ended with status {status}')
    deadline = time.monotonic() + self._section.timeout
    while True:
      try:
        await self._check()
        return
      except Exception:
        if time.monotonic() > deadline:
          raise
      await asyncio.sleep(_LOOK_SECONDS)


def read_answer(
  answer: Any, prompt: list[int], limit: int, limits: Limits, version: int
) -> Completion:
  """Returns what a server says that it has sampled.

  Args:
    answer: of /v1/completions, as the client has read it: any part may be missing.
    prompt: what was asked.
    limit: tokens that were asked for at most.
    limits: of the fleet.
    version: of the weights, where the answer does not say it for each token.

  Raises:
    ValueError: it cannot be what was sampled. (And AttributeError, IndexError or TypeError.)
  """
  (choice,) = answer.choices
  shown = getattr(choice, 'prompt_token_ids', None) or getattr(answer, 'prompt_token_ids', None)
  if shown is not None and list(shown) != prompt:
    raise ValueError('it has read another prompt')
  ids = getattr(choice, 'token_ids', None)
  if ids is None or choice.logprobs is None:
    raise ValueError('it has no token_ids or logprobs; exact tokens need return_token_ids')
  if not all(type(token) is int and 0 <= token < limits.vocab for token in ids):
    raise ValueError('its token_ids are not all in the vocabulary')
  logprobs = choice.logprobs.token_logprobs
  if not 1 <= len(ids) <= limit or len(logprobs) != len(ids):
    raise ValueError(f'it has {len(ids)} tokens of {limit}, and {len(logprobs)} logprobs')
  if not all(-math.inf < logprob <= _TOLERANCE for logprob in logprobs):
    raise ValueError('its logprobs are not all those of tokens that can be drawn')
  versions = getattr(choice, 'weight_versions', None)
  if versions is None:
    versions = [version] * len(ids)
  if len(versions) != len(ids) or not all(type(one) is int for one in versions):
    raise ValueError('its weight_versions are not one for each token')
  if choice.finish_reason not in ('stop', 'length'):
    raise ValueError(f'it ended for the reason {choice.finish_reason!r}')
  finished = choice.finish_reason == 'stop'
  if finished and ids[-1] not in limits.stop_ids:
    raise ValueError(f'it ended with the token {ids[-1]}, which ends no answer of this model')
  drawn = np.array(logprobs, np.float32)
  return Completion(
    tokens=np.array(ids, np.int32),
    # Nothing is truncated in training, so that both policies are one.
    logprobs=drawn,
    full_logprobs=drawn,
    # Servers do not tell them; the trainer computes its own.
    entropies=np.full(len(ids), np.nan, np.float32),
    finished=finished,
    stop=None,
    prompt_len=len(prompt),
    versions=np.array(versions, np.int32),
  )


def request_seed(sampling: SamplingParams, request: Request) -> int:
  """Returns a seed of 31 bits from (seed, key_id), as `OpenAIBackend` does."""
  digest = hashlib.sha256(repr((sampling.seed, request.key_id)).encode()).digest()
  return int.from_bytes(digest[:4], 'big') >> 1


def _refused(error: Exception) -> bool:
  """Whether nobody listened, or the key is wrong: asking on is of no use."""
  import openai

  cause = error.__cause__
  if isinstance(cause, openai.APIStatusError):
    return cause.status_code in (401, 403, 404)
  # A timeout is a connection error to the client, and may concern one long answer alone.
  return isinstance(cause, openai.APIConnectionError) and not isinstance(
    cause, openai.APITimeoutError
  )
