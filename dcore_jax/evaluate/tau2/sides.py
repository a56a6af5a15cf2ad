"""The agent and the user of a simulation, and what is wrong when one of them has no message.

Imports the standard library alone, as all that `worker` imports.
"""

from collections.abc import Callable
from typing import Any

# Errors of litellm that every other request would meet as well.
_REFUSED = ('AuthenticationError', 'PermissionDeniedError', 'NotFoundError')
_CONTEXT = ('context length', 'context_length', 'contextwindow', 'maximum context')


class Fault(Exception):
  """Something that ends a simulation.

  Args:
    side: 'agent', 'user', or 'harness' for neither of them.
    reason: a word that faults are counted by.
    detail: for a person.
    final: no other simulation would fare better.
  """

  def __init__(self, side: str, reason: str, detail: str = '', final: bool = False):
    super().__init__(detail)
    self.side = side
    self.reason = reason
    self.detail = detail[:500]
    self.final = final


class Side:
  """The agent or the user, whose turns are told to the parent and whose errors get a reason.

  Args:
    name: 'agent' or 'user'.
    inner: of tau2.
    tell: takes what the parent shall know.
  """

  def __init__(self, name: str, inner: Any, tell: Callable[[dict[str, Any]], None]):
    self._name = name
    self._inner = inner
    self._tell = tell

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)

  def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
    """Asks the side for its next message.

    Raises:
      Fault: it has none.
    """
    self._tell({'turn': self._name})
    try:
      answer, state = self._inner.generate_next_message(message, state)
    # litellm, its HTTP client and the parsing of arguments raise errors of many kinds.
    except Exception as error:  # pylint: disable=broad-except
      raise fault_of(self._name, error) from error
    self._tell({'message': message_record(answer)})
    if not (answer.has_text_content() or answer.is_tool_call()):
      cut = (answer.raw_data or {}).get('finish_reason') == 'length'
      raise Fault(self._name, 'empty_reply', 'its tokens ran out' if cut else '')
    return answer, state


def fault_of(side: str, error: BaseException) -> Fault:
  """Returns the fault that an error of a side's request is."""
  kinds = {kind.__name__ for kind in type(error).__mro__}
  text = f'{type(error).__name__}: {error}'
  causes = _causes(error)
  if 'ValidationError' in kinds:
    return Fault(side, 'arguments_not_an_object', text)
  # Also numbers of thousands of digits, and objects that are nested too deeply.
  if isinstance(error, (ValueError, RecursionError)):
    return Fault(side, 'arguments_not_json', text)
  # litellm's own text leaves out the code that a server gives, and which the causes hold.
  said = ' '.join(f'{type(cause).__name__} {cause}' for cause in causes).lower()
  if any(word in said for word in _CONTEXT):
    return Fault(side, 'context', text)
  if 'Timeout' in kinds:
    return Fault(side, 'timeout', text)
  # litellm gives a server that is not there the class of one that failed.
  if any(_is_away(cause) for cause in causes):
    return Fault(side, 'unreachable', text, final=True)
  if kinds.intersection(_REFUSED):
    return Fault(side, 'refused', text, final=True)
  return Fault(side, 'bad_request' if 'BadRequestError' in kinds else 'server_error', text)


def _causes(error: BaseException) -> list[BaseException]:
  """Returns an error and what is behind it, the last first."""
  causes: list[BaseException] = []
  cause: BaseException | None = error
  # Causes may form a circle.
  while cause is not None and cause not in causes:
    causes.append(cause)
    cause = cause.__cause__ or cause.__context__
  return causes


def _is_away(error: BaseException) -> bool:
  """Whether OpenAI's client, or what it stands on, did not reach its server."""
  package = type(error).__module__.split('.')[0]
  name = type(error).__name__
  return name in ('APIConnectionError', 'ConnectError') and package in ('openai', 'httpx')


def message_record(answer: Any) -> dict[str, Any]:
  """Returns a message of tau2 as JSON."""
  record = {'role': answer.role, 'content': answer.content}
  if answer.role == 'tool':
    return record | {'requestor': answer.requestor, 'error': answer.error}
  if answer.tool_calls:
    record['tool_calls'] = [
      {'name': call.name, 'arguments': call.arguments} for call in answer.tool_calls
    ]
  raw = answer.raw_data or {}
  reasoning = (raw.get('message') or {}).get('reasoning_content')
  if reasoning:
    record['reasoning'] = reasoning
  if raw.get('finish_reason') == 'length':
    record['cut'] = True
  if answer.usage:
    record['usage'] = answer.usage
  return record
