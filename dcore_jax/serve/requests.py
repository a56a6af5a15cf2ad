"""What clients may ask: OpenAI's two request bodies as far as they are honoured, and nothing else.

A field that would change the answer and is not implemented is refused, and so is an unknown one.
null is the same as leaving a field out. `user`, `metadata`, `safety_identifier` and
`prompt_cache_key` are accepted and ignored: no answer depends on them.
"""

import secrets
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from dcore_jax.chat.messages import ToolSpec
from dcore_jax.chat.python_calls import ToolCallError
from dcore_jax.chat.tagged_calls import read_arguments
from dcore_jax.rollout.sampling import TOP, SamplingParams

# OpenAI's number; bytes, since each step looks through as many tokens
_MOST_STOPS = 4
_LONGEST_STOP = 256
_MOST_TOOLS = 512
_MOST_LOGPROBS = 5  # of a completion, OpenAI's number
_GREEDY_BELOW = 1e-5  # temperature, as for vLLM


class RequestError(ValueError):
  """A request that cannot be answered as it stands. `param` is the field at fault."""

  def __init__(self, message: str, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.param = param
    self.code = code


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid', strict=True, frozen=True)

  @pydantic.model_validator(mode='before')
  @classmethod
  def _without_nulls(cls, record: Any) -> Any:
    return (
      {name: value for name, value in record.items() if value is not None}
      if isinstance(record, dict)
      else record
    )


class TextPart(_Strict):
  """A part of a message's content; images and sound are refused."""

  type: Literal['text']
  text: str


class FunctionCall(_Strict):
  """`arguments` is JSON text of an object, or '' for none."""

  name: str
  arguments: str = '{}'


class CallItem(_Strict):
  """A call in an earlier answer."""

  id: str = ''
  type: Literal['function'] = 'function'
  function: FunctionCall


class ChatMessage(_Strict):
  """One turn of the conversation, `reasoning_content` being what this server sends back beside the
  content.
  """

  role: Literal['system', 'developer', 'user', 'assistant', 'tool']
  content: str | list[TextPart] | None = None
  name: str | None = None
  tool_calls: list[CallItem] | None = None
  tool_call_id: str | None = None
  reasoning_content: str | None = None

  def record(self) -> dict[str, Any]:
    """As chat templates read it: content as one text, arguments as an object.

    RequestError for what no template could show.
    """
    content = (
      self.content
      if isinstance(self.content, str)
      else '\n'.join(part.text for part in self.content or ())
    )
    if self.role != 'assistant' and self.content is None:
      raise RequestError(f'a message of role {self.role!r} needs content', 'messages')
    if self.role != 'assistant' and (self.tool_calls or self.reasoning_content):
      raise RequestError(
        f'a message of role {self.role!r} has no tool calls or thoughts', 'messages'
      )
    record = {'role': 'system' if self.role == 'developer' else self.role, 'content': content}
    for name in ('name', 'tool_call_id', 'reasoning_content'):
      if (value := getattr(self, name)) is not None:
        record[name] = value
    if self.tool_calls:
      record['tool_calls'] = [
        {
          'id': call.id,
          'type': 'function',
          'function': {'name': call.function.name, 'arguments': _arguments(call.function)},
        }
        for call in self.tool_calls
      ]
    return record


def _arguments(function: FunctionCall) -> dict[str, Any]:
  try:
    return read_arguments(function.arguments)
  except ToolCallError as error:
    raise RequestError(
      f'the arguments of a call of {function.name!r} are no JSON object: {error}', 'messages'
    ) from error


class Function(_Strict):
  """`parameters` is a JSON schema; it is shown to the model, not enforced."""

  name: Annotated[str, Field(pattern=r'^[\w.-]{1,128}$')]
  description: str = ''
  parameters: dict[str, Any] = Field(default_factory=lambda: {'type': 'object', 'properties': {}})
  strict: Literal[False] | None = None

  @pydantic.field_validator('parameters')
  @classmethod
  def _named_parameters(cls, schema: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(schema.get('properties', {}), dict):
      raise ValueError('`properties` is no JSON object')
    return schema


class Tool(_Strict):
  """A tool that the model may call."""

  type: Literal['function']
  function: Function


class StreamOptions(_Strict):
  """`include_usage` adds a last piece with the token counts."""

  include_usage: bool = False


class ResponseFormat(_Strict):
  """Free text only: nothing forces an answer into JSON."""

  type: Literal['text']


class TemplateOptions(_Strict):
  """Given to the chat template; Qwen3's knows this one."""

  enable_thinking: bool


class NamedFunction(_Strict):
  """A tool by its name."""

  name: str


class ForcedTool(_Strict):
  """The tool that has to be called."""

  type: Literal['function']
  function: NamedFunction


class _Request(_Strict):
  """What both kinds of request have in common.

  `seed` fixes the random numbers, whatever else runs, and so the answer up to rounding: in
  bfloat16, tokens that are nearly as likely may change places beside other requests. Without one
  every request has its own. `top_k` and `min_p` are not OpenAI's.
  """

  model: str
  max_tokens: int | None = Field(None, ge=1)
  temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
  top_p: float = Field(1.0, gt=0, le=1)
  top_k: int = Field(0, ge=0, lt=2**31)
  min_p: float = Field(0.0, ge=0, le=1)
  n: int = Field(1, ge=1)
  seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=-(2**63), lt=2**64)
  stop: str | list[str] = ()
  stream: bool = False
  stream_options: StreamOptions | None = None
  # Honoured at the value that changes nothing.
  frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
  presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0.0
  logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
  # Ignored.
  user: str | None = None
  metadata: dict[str, str] | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None

  @pydantic.field_validator('stop')
  @classmethod
  def _few_short_stops(cls, stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > _MOST_STOPS or not all(
      0 < len(text.encode()) <= _LONGEST_STOP for text in stops
    ):
      raise ValueError(f'at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} bytes')
    return stops

  @pydantic.field_validator('stream_options')
  @classmethod
  def _of_a_stream(
    cls, options: StreamOptions | None, info: pydantic.ValidationInfo
  ) -> StreamOptions | None:
    if options is not None and not info.data.get('stream'):
      raise ValueError('there is no stream')
    return options

  @property
  def usage_wanted(self) -> bool:
    """Whether a stream ends with the token counts."""
    return self.stream_options is not None and self.stream_options.include_usage

  @property
  def budget(self) -> tuple[str, int | None]:
    """The field that bounds the answer, and its tokens; None: as many as fit."""
    return 'max_tokens', self.max_tokens

  def sampling(self, max_tokens: int) -> SamplingParams:
    """The rule; `max_tokens` for a client that does not say how many."""
    _, budget = self.budget
    wanted = max_tokens if budget is None else budget
    # Logits divided by less overflow, and 0/0 in one lane would end the engine.
    temperature = 0.0 if self.temperature < _GREEDY_BELOW else self.temperature
    return SamplingParams(
      temperature=temperature,
      top_p=self.top_p,
      top_k=self.top_k,
      max_tokens=wanted,
      seed=self.seed % 2**64,
      min_p=self.min_p,
      stop=self.stop,
    )


class ChatRequest(_Request):
  """The body of POST /v1/chat/completions.

  tool_choice: 'auto' (the model decides), 'none' (the tools are not shown, nothing is read as a
  call), 'required' or a tool by name: the answer then begins, as a part of the prompt and without
  thoughts, with a call as the chat template writes it, up to the arguments of the tool (of the only
  one, where 'required' leaves no choice) or up to its name.
  Nothing constrains what is sampled behind that: what is no call that can be read comes back as
  content, as it would otherwise. `logprobs` are those of every sampled token (thoughts, calls and
  the stop token too) under the policy that sampled it, after temperature and truncation, and so are
  `top_logprobs`: what truncation leaves out is not listed. At temperature 0 both are of the
  distribution whose most likely token is taken.
  """

  messages: list[ChatMessage] = Field(min_length=1)
  max_completion_tokens: int | None = Field(None, ge=1)
  tools: list[Tool] = Field(default_factory=list, max_length=_MOST_TOOLS)
  tool_choice: Literal['auto', 'none', 'required'] | ForcedTool | None = None
  parallel_tool_calls: bool = True
  logprobs: bool = False
  top_logprobs: int = Field(0, ge=0, le=TOP)
  response_format: ResponseFormat | None = None
  chat_template_kwargs: TemplateOptions | None = None

  @pydantic.field_validator('tool_choice')
  @classmethod
  def _of_the_tools(cls, choice: Any, info: pydantic.ValidationInfo) -> Any:
    names = [tool.function.name for tool in info.data.get('tools', ())]
    if choice == 'required' and not names:
      raise ValueError('there are no tools to be called')
    if isinstance(choice, ForcedTool) and choice.function.name not in names:
      raise ValueError(f'there is no tool {choice.function.name!r}')
    return choice

  @pydantic.field_validator('top_logprobs')
  @classmethod
  def _beside_logprobs(cls, top: int, info: pydantic.ValidationInfo) -> int:
    if top and not info.data.get('logprobs'):
      raise ValueError('logprobs is not true')
    return top

  @property
  def alternatives(self) -> int:
    """How many to report of each token."""
    return self.top_logprobs

  @property
  def call_forced(self) -> bool:
    """Whether the answer has to be a call."""
    return self.tool_choice == 'required' or isinstance(self.tool_choice, ForcedTool)

  @property
  def forced_name(self) -> str | None:
    """The tool that a forced call calls; None leaves the model a choice."""
    if isinstance(self.tool_choice, ForcedTool):
      return self.tool_choice.function.name
    return self.tools[0].function.name if len(self.tools) == 1 else None

  @property
  def budget(self) -> tuple[str, int | None]:
    """The field that bounds the answer, and its tokens: the lesser of the two that clients use."""
    limits = {'max_completion_tokens': self.max_completion_tokens, 'max_tokens': self.max_tokens}
    given = [(name, limit) for name, limit in limits.items() if limit is not None]
    return min(given, key=lambda one: one[1], default=('max_completion_tokens', None))

  @property
  def specs(self) -> list[ToolSpec]:
    """The tools that may be called in this answer."""
    if self.tool_choice == 'none':
      return []
    return [
      ToolSpec(tool.function.name, tool.function.description, tool.function.parameters)
      for tool in self.tools
    ]


class CompletionRequest(_Request):
  """The body of POST /v1/completions.

  `logprobs` 0 gives those of the sampled tokens, more as many alternatives beside them.
  """

  prompt: str | list[str] | list[int] | list[list[int]]
  logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
  echo: Literal[False] | None = None

  @property
  def alternatives(self) -> int:
    """How many to report of each token."""
    return self.logprobs or 0

  @property
  def prompts(self) -> list[str | list[int]]:
    """One or more prompts, as texts or token ids."""
    one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
    return [self.prompt] if one else list(self.prompt)


_TYPES = ('str', 'int', 'ForcedTool')  # what pydantic calls the members of a union
_REASONS = {
  'response_format': '; the form of an answer would need constrained sampling, '
  'which this server does not have',
  'frequency_penalty': '; penalties are not supported',
  'presence_penalty': '; penalties are not supported',
}


def read_request(kind: type[_Request], body: bytes) -> Any:
  """The body as a `ChatRequest` or `CompletionRequest`; RequestError names the first field that is
  wrong.
  """
  try:
    return kind.model_validate_json(body)
  except pydantic.ValidationError as error:
    problem = max(
      error.errors(include_url=False), key=lambda one: len(one['loc'])
    )  # of a union, the member that came furthest
    if problem['type'] == 'json_invalid':
      raise RequestError(f'the body is not JSON: {problem["msg"]}') from error
    place = '.'.join(
      str(part)
      for part in problem['loc']
      if isinstance(part, int) or part.isidentifier() and part not in _TYPES
    )
    what = (
      'is not supported'
      if problem['type'] == 'extra_forbidden'
      else problem['msg'].removeprefix('Value error, ')
    )
    reason = _REASONS.get(place.partition('.')[0], '')
    raise RequestError(
      f'{place or "the body"}: {what[:1].lower() + what[1:]}{reason}', place or None
    ) from error
