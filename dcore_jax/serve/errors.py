"""What can go wrong with a request, as OpenAI's clients read it: {"error": {"message", "type",
"param", "code"}}.
"""

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dcore_jax.serve.parts import RequestError
from dcore_jax.serve.scheduler import Overloaded, Stopped

RETRY_AFTER = {'Retry-After': '1'}  # seconds; lanes come free all the time


class Refusal(Exception):
  """A request that is not answered, with its HTTP status."""

  def __init__(
    self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
  ):
    super().__init__(message)
    self.status = status
    self.code = code
    self.headers = headers


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str] | None]:
  """Returns the answer to an error as (status, body, headers).

  The text of an unexpected error goes to the log alone.
  """
  if isinstance(error, RequestError):
    return 400, _body(error, 'invalid_request_error', error.code, error.param), None
  if isinstance(error, Refusal):
    return (
      error.status,
      _body(error, _TYPES.get(error.status, 'invalid_request_error'), error.code),
      error.headers,
    )
  if isinstance(error, Overloaded):
    return 429, _body(error, _TYPES[429], 'rate_limit_exceeded'), RETRY_AFTER
  if isinstance(error, Stopped):
    return 503, _body(error, _TYPES[503], 'stopped'), RETRY_AFTER
  # Nobody reads this answer, but requests are counted by its status (499 as in nginx).
  if isinstance(error, ClientDisconnect):
    return 499, _body('the client went away', 'invalid_request_error'), None
  # The router raises these: there is no such path, or it has no such method.
  if isinstance(error, HTTPException):
    return error.status_code, _body(error.detail, 'invalid_request_error'), error.headers
  # A traceback may name paths and other clients' texts, which no client should see.
  return 500, _body('the server failed to answer; its log says why', 'server_error'), None


async def respond(_: Request, error: Exception) -> Response:
  """Answers an error; this is a Starlette exception handler."""
  status, body, headers = describe(error)
  return Response(
    content=encode(body), status_code=status, headers=headers, media_type='application/json'
  )


def encode(record: dict[str, Any]) -> str:
  """Returns a record as JSON text in ASCII."""
  # A model may write halves of surrogate pairs. UTF-8 cannot carry them, but JSON's escapes can.
  return json.dumps(record, separators=(',', ':'))


# Starlette raises an error that only `Exception` covers again once it is answered, so that the log
# has its traceback.
HANDLED = (
  RequestError,
  Refusal,
  Overloaded,
  Stopped,
  ClientDisconnect,
  HTTPException,
  Exception,
)
# OpenAI's clients choose their exception class by the status, and show this type to people.
_TYPES = {
  401: 'authentication_error',
  429: 'rate_limit_error',
  500: 'server_error',
  503: 'server_error',
}


def _body(
  message: Exception | str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
  return {'error': {'message': str(message), 'type': kind, 'param': param, 'code': code}}
