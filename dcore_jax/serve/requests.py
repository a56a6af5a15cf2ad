"""What clients may ask: OpenAI's two request bodies, with what vLLM's and other clients add.

A field that would change the answer and is not implemented is refused, with what to do instead
(`fields.py`). A field that has no effect passes, and an unknown one is ignored and named to the
client. null is the same as leaving a field out.
"""

import secrets
from collections.abc import Iterator
from typing import Any, Literal

import pydantic
from pydantic import Field

from dcore_jax.chat.messages import ToolSpec
from dcore_jax.rollout.sampling import TOP, SamplingParams
from dcore_jax.serve import fields
from dcore_jax.serve.parts import Body, ChatMessage, RequestError, Tool, Whole

# Each decode step compares the end of every lane's text with all stop strings, so that their number
# and length are bounded.
_MOST_STOPS = 16
_LONGEST_STOP = 256  # bytes
# All tools are rendered into the prompt, so that their number is bounded too.
_MOST_TOOLS = 512
_GREEDY_BELOW = 1e-5  # temperature, as for vLLM


class StreamOptions(Body):
  """`include_usage` adds a last piece with the token counts; without a stream it says nothing."""

  HINTS = frozenset({'include_obfuscation'})
  include_usage: bool = False


class NamedFunction(Body):
  """A tool by its name."""

  name: str


class ForcedTool(Body):
  """The tool that has to be called."""

  type: Literal['function']
  function: NamedFunction


class SamplingRequest(Body):
  """What both kinds of request have in common.

  `seed` fixes the random numbers, whatever else runs, and so the answer up to rounding: in
  bfloat16, tokens that are nearly as likely may change places beside other requests. Without one
  every request has its own. These are not OpenAI's: `top_k` (0 and -1 keep all tokens), `min_p`,
  `stop_token_ids` (of those that end an answer anyway), `prompt_logprobs` (of every token of the
  prompt, with as many alternatives), `return_token_ids` (of prompt and answer, as they were read
  and sampled; beside them `weight_versions`, one for each token of the answer) and
  `return_tokens_as_token_ids` (in log-probabilities: 'token_id:5').
  `max_completion_tokens` goes before `max_tokens`.
  """

  HINTS = fields.HINTS

  # Bounds stand with the fields, so that pydantic names the field in its error.
  model: str
  max_completion_tokens: Whole | None = Field(None, ge=0)
  max_tokens: Whole | None = Field(None, ge=0)
  temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
  top_p: float = Field(1.0, gt=0, le=1)
  top_k: Whole = Field(0, ge=-1, lt=2**31)
  min_p: float = Field(0.0, ge=0, le=1)
  n: Whole = Field(1, ge=1)
  # Declared after `n`: a validator sees only the fields that stand before its own.
  best_of: Whole | None = None
  # Clients send signed or unsigned 64-bit seeds; `sampling` folds both to the same range.
  seed: Whole = Field(default_factory=lambda: secrets.randbits(63), ge=-(2**63), lt=2**64)
  stop: str | list[str] = ()
  stop_token_ids: list[Whole] = ()
  stream: bool = False
  stream_options: StreamOptions | None = None
  prompt_logprobs: Whole | None = Field(None, ge=0, le=TOP)
  return_token_ids: bool = False
  return_tokens_as_token_ids: bool = False

  @pydantic.field_validator('stop')
  @classmethod
  def _few_short_stops(cls, stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    # An empty stop string would end every answer before its first token.
    if len(stops) > _MOST_STOPS or not all(
      0 < len(text.encode()) <= _LONGEST_STOP for text in stops
    ):
      raise ValueError(f'at most {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} bytes')
    return stops

  @pydantic.field_validator('best_of')
  @classmethod
  def _all_of_them(cls, best_of: int | None, info: pydantic.ValidationInfo) -> int | None:
    # Clients may send `best_of` equal to `n`, which asks for nothing more than `n` does.
    if best_of not in (None, info.data.get('n')):
      raise ValueError('answers are not ranked; ask for n and choose yourself')
    return best_of

  @pydantic.field_validator('prompt_logprobs')
  @classmethod
  def _without_stream(cls, top: int | None, info: pydantic.ValidationInfo) -> int | None:
    if top is not None and info.data.get('stream'):
      raise ValueError('the prompt is scored as a whole; ask without stream')
    return top

  @property
  def usage_wanted(self) -> bool:
    """Whether a stream ends with the token counts."""
    return self.stream_options is not None and self.stream_options.include_usage

  @property
  def budget(self) -> tuple[str, int | None]:
    """The field that bounds the answer, and its tokens; None: as many as fit."""
    # OpenAI replaced `max_tokens` by this field, and newer clients may send both.
    if self.max_completion_tokens is not None:
      return 'max_completion_tokens', self.max_completion_tokens
    return 'max_tokens', self.max_tokens

  @property
  def scores(self) -> int | None:
    """Alternatives to be reported with each token of the prompt; None: it is not scored."""
    return self.prompt_logprobs

  def sampling(self, max_tokens: int) -> SamplingParams:
    """The rule; `max_tokens` for a client that does not say how many."""
    _, budget = self.budget
    wanted = max_tokens if budget is None else budget
    # Logits divided by less overflow, and 0/0 in one lane would end the engine.
    temperature = 0.0 if self.temperature < _GREEDY_BELOW else self.temperature
    return SamplingParams(
      temperature=temperature,
      top_p=self.top_p,
      # vLLM, SGLang and verl write "all tokens" as -1.
      top_k=max(self.top_k, 0),
      # A request for no tokens has the number in its `rollout.Request`.
      max_tokens=max(wanted, 1),
      seed=self.seed % 2**64,
      min_p=self.min_p,
      stop=self.stop,
    )

  def check(self) -> None:
    """Refuses what is known and not implemented.

    Raises:
      RequestError: with the field and what to do instead.
    """
    # No type has these fields, so that pydantic keeps them as extra ones.
    for name, value in (self.model_extra or {}).items():
      known = self._unsupported(name)
      problem = known.problem(name, value) if known else ''
      if problem:
        raise RequestError(problem, name)
    field, budget = self.budget
    if budget == 0 and self.scores is None and not self._shows_prompt:
      raise RequestError(f'{field} = 0 asks for nothing; set prompt_logprobs, too', field)

  def ignored(self) -> Iterator[str]:
    """Yields the fields that nothing here reads, by their path without numbers."""
    for path in super().ignored():
      if not self._unsupported(path):
        yield path

  @property
  def _shows_prompt(self) -> bool:
    return False

  @staticmethod
  def _unsupported(name: str) -> fields.Unsupported | None:
    return fields.UNSUPPORTED.get(name)


class ChatCompletionRequest(SamplingRequest):
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

  `chat_template_kwargs` go to the chat template, which has to know their names; `enable_thinking`
  beside the other fields is how Qwen's own service has it.
  """

  messages: list[ChatMessage] = Field(min_length=1)
  tools: list[Tool] = Field(default_factory=list, max_length=_MOST_TOOLS)
  tool_choice: Literal['auto', 'none', 'required'] | ForcedTool | None = None
  parallel_tool_calls: bool = True
  logprobs: bool = False
  top_logprobs: Whole = Field(0, ge=0, le=TOP)
  chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
  enable_thinking: bool | None = None

  @pydantic.field_validator('tool_choice')
  @classmethod
  def _of_the_tools(cls, choice: Any, info: pydantic.ValidationInfo) -> Any:
    names = [tool.function.name for tool in info.data.get('tools', ())]
    # Pydantic has validated `tools` before, which is declared above this field.
    if choice == 'required' and not names:
      raise ValueError('there are no tools to be called')
    if isinstance(choice, ForcedTool) and choice.function.name not in names:
      raise ValueError(f'there is no tool {choice.function.name!r}')
    return choice

  @pydantic.field_validator('top_logprobs')
  @classmethod
  def _beside_logprobs(cls, top: int, info: pydantic.ValidationInfo) -> int:
    # OpenAI refuses this too. Without an error the client would wait for a list that never comes.
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
    # With one tool 'required' is as much as its name, and the answer can begin with its arguments.
    return self.tools[0].function.name if len(self.tools) == 1 else None

  @property
  def template_options(self) -> dict[str, Any]:
    """What goes to the chat template beside messages and tools."""
    # An option that is absent leaves the decision to the template's own default.
    beside = {} if self.enable_thinking is None else {'enable_thinking': self.enable_thinking}
    return beside | self.chat_template_kwargs

  @property
  def specs(self) -> list[ToolSpec]:
    """The tools that may be called in this answer."""
    # Neither the prompt nor the parser of the answer gets to know the tools.
    if self.tool_choice == 'none':
      return []
    return [
      ToolSpec(tool.function.name, tool.function.description, tool.function.parameters)
      for tool in self.tools
    ]

  @staticmethod
  def _unsupported(name: str) -> fields.Unsupported | None:
    return fields.UNSUPPORTED_IN_CHAT.get(name) or fields.UNSUPPORTED.get(name)


class CompletionRequest(SamplingRequest):
  """The body of POST /v1/completions.

  `logprobs` 0 gives those of the sampled tokens, more as many alternatives beside them. `echo` puts
  the prompt before the answer, its tokens among the log-probabilities: each under the model itself,
  after the tokens before it, so that the first one has none. `add_special_tokens` is for prompts of
  text: they begin with the tokenizer's beginning-of-text token, where it puts one in front.
  """

  prompt: str | list[str] | list[int] | list[list[int]]
  logprobs: Whole | None = Field(None, ge=0, le=TOP)
  echo: bool = False
  add_special_tokens: bool = True

  @property
  def alternatives(self) -> int:
    """How many to report of each token."""
    return self.logprobs or 0

  @property
  def scores(self) -> int | None:
    """Alternatives to be reported with each token of the prompt; None: it is not scored."""
    # One pass scores the prompt for both fields; the larger number of alternatives serves both.
    echoed = self.logprobs if self.echo else None
    wanted = [top for top in (self.prompt_logprobs, echoed) if top is not None]
    return max(wanted, default=None)

  @property
  def prompts(self) -> list[str | list[int]]:
    """One or more prompts, as texts or token ids."""
    # A list of numbers is one prompt of token ids, and a list of anything else holds several
    # prompts.
    one = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
    return [self.prompt] if one else list(self.prompt)

  @property
  def _shows_prompt(self) -> bool:
    return self.echo or self.return_token_ids

  @staticmethod
  def _unsupported(name: str) -> fields.Unsupported | None:
    return fields.UNSUPPORTED_IN_TEXT.get(name) or fields.UNSUPPORTED.get(name)


_TYPES = ('str', 'int', 'ForcedTool')  # what pydantic calls the members of a union


def read_request(kind: type[SamplingRequest], body: bytes) -> Any:
  """Returns the body as a `ChatCompletionRequest` or `CompletionRequest`.

  Raises:
    RequestError: with the first field that is wrong, or cannot be honoured.
  """
  try:
    asked = kind.model_validate_json(body)
  except pydantic.ValidationError as error:
    # For a union pydantic reports a problem for each of its types. The type that was read deepest
    # is the one that the client most likely meant.
    problem = max(error.errors(include_url=False), key=lambda one: len(one['loc']))
    if problem['type'] == 'json_invalid':
      raise RequestError(f'the body is not JSON: {problem["msg"]}') from error
    # The place names fields and indexes as the client wrote them, without pydantic's names of
    # types.
    place = '.'.join(
      str(part)
      for part in problem['loc']
      if isinstance(part, int) or part.isidentifier() and part not in _TYPES
    )
    what = problem['msg'].removeprefix('Value error, ')
    raise RequestError(
      f'{place or "the body"}: {what[:1].lower() + what[1:]}', place or None
    ) from error
  asked.check()
  return asked
