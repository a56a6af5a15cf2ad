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
  """(status, body, headers) of the answer to an error; one that nobody expected says nothing about
  itself.
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
  if isinstance(error, ClientDisconnect):  # nobody reads it, but the count of requests by status
    return 499, _body('the client went away', 'invalid_request_error'), None
  if isinstance(error, HTTPException):  # of the router: no such path, no such method
    return error.status_code, _body(error.detail, 'invalid_request_error'), error.headers
  return 500, _body('the server failed to answer; its log says why', 'server_error'), None


async def respond(_: Request, error: Exception) -> Response:
  """As a Starlette exception handler."""
  status, body, headers = describe(error)
  return Response(
    content=encode(body), status_code=status, headers=headers, media_type='application/json'
  )


def encode(record: dict[str, Any]) -> str:
  """JSON text in ASCII: a model may write halves of surrogate pairs, which no UTF-8 can carry."""
  return json.dumps(record, separators=(',', ':'))


HANDLED = (
  RequestError,
  Refusal,
  Overloaded,
  Stopped,
  ClientDisconnect,
  HTTPException,
  Exception,
)  # which is logged with its traceback too
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
