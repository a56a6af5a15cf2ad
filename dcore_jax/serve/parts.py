"""What the bodies of requests are made of: messages, earlier calls, tools.

Every part takes fields that it does not know, so that what other servers and clients put into a
history is no error.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from dcore_jax.chat.python_calls import ToolCallError
from dcore_jax.chat.tagged_calls import read_arguments
from dcore_jax.serve import fields

# Parts of a message by what is in them. Clients of the newer API of OpenAI call a text by its
# direction, and Anthropic's and Mistral's hand thoughts back as parts.
_TEXTS = ('text', 'input_text', 'output_text', 'refusal')
_THOUGHTS = ('thinking', 'reasoning', 'redacted_thinking')


class RequestError(ValueError):
  """A request that cannot be answered as it stands. `param` is the field at fault."""

  def __init__(self, message: str, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.param = param
    self.code = code


def _whole(value: Any) -> Any:
  # JSON has one kind of number: some languages write 4 as 4.0.
  return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, pydantic.BeforeValidator(_whole)]


class Body(pydantic.BaseModel):
  """A part of a request. Fields without a type are kept in `model_extra`.

  `HINTS` are those that have no effect and are not worth a word.
  """

  # Strict: "5" is no number and 1 is no truth value, so that a client's mistake is named and not
  # guessed at. Frozen: several choices read the same request.
  model_config = pydantic.ConfigDict(extra='allow', strict=True, frozen=True)
  HINTS: ClassVar[frozenset[str]] = frozenset()

  @pydantic.model_validator(mode='before')
  @classmethod
  def _without_nulls(cls, record: Any) -> Any:
    # Anything that is no object goes on unchanged to pydantic, which says what is wrong with it.
    if not isinstance(record, dict):
      return record
    # Clients that serialize a data class send null for each field that nobody has set.
    return {name: value for name, value in record.items() if value is not None}

  def ignored(self) -> Iterator[str]:
    """Yields the fields that nothing here reads, by their path without numbers."""
    for name in self.model_extra or ():
      if name not in self.HINTS:
        yield name
    for name in type(self).model_fields:
      value = getattr(self, name)
      # The path has no index, so that the same field of a hundred messages is named once.
      for part in value if isinstance(value, list) else [value]:
        if isinstance(part, Body):
          for inner in part.ignored():
            yield f'{name}.{inner}'


# The content of a message may come in parts (OpenAI's form for text beside images).
class Part(Body):
  """A part of a message's content: text or thoughts. Images and sound are refused."""

  HINTS = frozenset({'annotations', 'cache_control', 'data', 'id', 'index', 'signature', 'summary'})
  type: str
  text: str = ''
  refusal: str = ''
  thinking: 'str | list[Part]' = ''
  reasoning: str = ''

  @pydantic.model_validator(mode='before')
  @classmethod
  def _from_text(cls, given: Any) -> Any:
    return {'type': 'text', 'text': given} if isinstance(given, str) else given

  @pydantic.field_validator('type')
  @classmethod
  def _readable(cls, kind: str) -> str:
    if kind not in _TEXTS + _THOUGHTS:
      raise ValueError(f'{kind!r} cannot be read; this model takes text, in parts of type "text"')
    return kind

  @property
  def is_thought(self) -> bool:
    """Whether it was said before the answer."""
    return self.type in _THOUGHTS

  @property
  def words(self) -> str:
    """What it says."""
    inner = self.thinking
    if isinstance(inner, list):
      inner = '\n'.join(part.words for part in inner)
    return self.text or self.refusal or inner or self.reasoning


class FunctionCall(Body):
  """A call in an earlier answer.

  `arguments` is an object, or JSON text of one. Clients and servers write a call without arguments
  as '', null or nothing, too.
  """

  HINTS = frozenset({'parsed_arguments'})
  name: str
  # OpenAI writes arguments as JSON text; other clients keep the object.
  arguments: str | dict[str, Any] = ''

  def record(self) -> dict[str, Any]:
    """Returns the call as chat templates read it.

    Raises:
      RequestError: the arguments are no JSON object.
    """
    try:
      return {'name': self.name, 'arguments': read_arguments(self.arguments)}
    except ToolCallError as error:
      raise RequestError(
        f'the arguments of a call of {self.name!r} are no JSON object: {error}', 'messages'
      ) from error


class CallItem(Body):
  """A call in an earlier answer, with its id."""

  # Clients that join a stream keep `index`; tau2-bench writes the tool's name beside the function.
  HINTS = frozenset({'cache_control', 'index', 'name', 'provider_specific_fields'})
  id: str = ''
  type: Literal['function'] = 'function'
  function: FunctionCall


class ChatMessage(Body):
  """One turn of the conversation.

  `reasoning_content` is what this server sends back beside the content; vLLM calls it `reasoning`.
  `function_call` and the role 'function' are older names of a call and of a tool's result.
  """

  HINTS = frozenset(
    {
      'annotations',
      'cache_control',
      'id',
      'parsed',
      'provider_specific_fields',
      'reasoning_details',
      'thinking_blocks',
    }
  ).union(fields.UNSUPPORTED_IN_MESSAGE)
  role: Literal['system', 'developer', 'user', 'assistant', 'tool', 'function']
  content: str | list[Part] | None = None
  name: str | None = None
  tool_calls: list[CallItem] | None = None
  function_call: FunctionCall | None = None
  tool_call_id: str | None = None
  reasoning_content: str | None = None
  reasoning: str | None = None
  refusal: str | None = None

  def record(self) -> dict[str, Any]:
    """Returns the message as chat templates read it: content as one text, arguments as an object.

    Raises:
      RequestError: something that no template could show.
    """
    for name, known in fields.UNSUPPORTED_IN_MESSAGE.items():
      value = (self.model_extra or {}).get(name)
      problem = '' if value is None else known.problem(name, value)
      if problem:
        raise RequestError(problem, 'messages')
    content = self.content
    inner = ''
    if isinstance(content, list):
      # Templates of text models read one string.
      inner = '\n'.join(part.words for part in content if part.is_thought)
      content = '\n'.join(part.words for part in content if not part.is_thought)
    # A function that returned nothing has null as its result, and an assistant's turn may consist
    # of calls. The other roles have nothing but their content.
    if self.role in ('user', 'system', 'developer') and content is None:
      raise RequestError(f'a message of role {self.role!r} needs content', 'messages')
    calls = self._calls()
    thoughts = self.reasoning if self.reasoning_content is None else self.reasoning_content
    if inner and not thoughts:
      thoughts = inner
    # A template would drop these without a word, and the model would not see them.
    if self.role != 'assistant' and (calls or thoughts):
      raise RequestError(
        f'a message of role {self.role!r} has no tool calls or thoughts', 'messages'
      )
    # Chat templates know four roles. OpenAI's newer and older names of two of them mean the same.
    role = {'developer': 'system', 'function': 'tool'}.get(self.role, self.role)
    record: dict[str, Any] = {'role': role, 'content': content or self.refusal or ''}
    if self.name is not None:
      record['name'] = self.name
    if self.tool_call_id is not None:
      record['tool_call_id'] = self.tool_call_id
    if thoughts is not None:
      record['reasoning_content'] = thoughts
    if calls:
      record['tool_calls'] = calls
    return record

  def _calls(self) -> list[dict[str, Any]]:
    # The older form has one call without an id.
    items = [(call.id, call.function) for call in self.tool_calls or ()]
    if self.function_call:
      items.append(('', self.function_call))
    return [{'id': id_, 'type': 'function', 'function': call.record()} for id_, call in items]


class Function(Body):
  """`parameters` is a JSON schema; it is shown to the model, not enforced.

  `strict` asks for arguments that fit the schema for certain, which is a hint here.
  """

  HINTS = frozenset({'cache_control', 'strict'})
  # A name is printed into prompts and, if the call is forced, into the answer: quotes and line
  # breaks would break the JSON around it.
  name: Annotated[str, Field(pattern=r'^[\w.-]{1,128}$')]
  description: str = ''
  parameters: dict[str, Any] = Field(default_factory=lambda: {'type': 'object', 'properties': {}})

  @pydantic.field_validator('parameters')
  @classmethod
  def _named_parameters(cls, schema: dict[str, Any]) -> dict[str, Any]:
    # `ReplyParser` reads the names of positional arguments off `properties`.
    if not isinstance(schema.get('properties', {}), dict):
      raise ValueError('`properties` is no JSON object')
    return schema


class Tool(Body):
  """A tool that the model may call."""

  HINTS = frozenset({'cache_control', 'strict'})
  type: Literal['function']
  function: Function
