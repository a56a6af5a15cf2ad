"""How an endpoint wants to be asked, learned from what it refuses.

OpenAI's reasoning models take `max_completion_tokens` in place of `max_tokens`, and no temperature
but 1; other servers know no `seed` or `top_k`. What has another name is renamed, and what changes
no answer is left out. All else stays refused, with the name of the field.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

# Fields of a request that an endpoint may not know. All others it has to take.
_OPTIONAL = ('max_tokens', 'temperature', 'top_p', 'top_k', 'min_p', 'seed', 'stop')
# How servers say that they do not take a field, or not with this value. That a number is too large
# is another matter.
_REFUSED = re.compile(
  r'unsupported|not support(ed)?\b|unknown|unrecognized|unexpected|only the default'
  r'|not (permitted|allowed|available)|extra (fields|inputs)',
  re.IGNORECASE,
)
_USE_OTHER_NAME = re.compile(r'\buse\b[^.]*\bmax_completion_tokens\b', re.IGNORECASE)
# OpenAI's and pydantic's codes of such refusals.
_CODES = ('unsupported_parameter', 'unsupported_value', 'unknown_parameter', 'extra_forbidden')


@dataclasses.dataclass(frozen=True)
class Dialect:
  """What requests to one endpoint are written like.

  Attributes:
    renamed: whether `max_tokens` is called `max_completion_tokens`.
    left_out: fields that are not sent where they have no effect.
  """

  renamed: bool = False
  left_out: frozenset[str] = frozenset()

  def __or__(self, other: 'Dialect') -> 'Dialect':
    """Returns what either has learned."""
    return Dialect(self.renamed or other.renamed, self.left_out | other.left_out)

  def write(self, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a request as the endpoint takes it.

    A field that has an effect in this request is sent even where it is left out otherwise: the
    endpoint's refusal then names it.
    """
    written = {}
    for name, value in body.items():
      if name == 'extra_body':
        value = {inner: given for inner, given in value.items() if self._sends(body, inner)}
        if not value:
          continue
      if not self._sends(body, name):
        continue
      written['max_completion_tokens' if self.renamed and name == 'max_tokens' else name] = value
    return written

  def after(self, field: str | None, body: Mapping[str, Any]) -> 'Dialect | None':
    """Returns the dialect to try once `field` was refused; None: there is none."""
    learned = self
    if field == 'max_tokens':
      learned = dataclasses.replace(self, renamed=True)
    elif field is not None and without_effect(field, body):
      learned = dataclasses.replace(self, left_out=self.left_out | {field})
    # Refused again although it was not sent any more: there is nothing else to try.
    return None if learned == self else learned

  def _sends(self, body: Mapping[str, Any], name: str) -> bool:
    return name not in self.left_out or not without_effect(name, body)


def without_effect(field: str, body: Mapping[str, Any]) -> bool:
  """Whether the answers to a request are as likely without a field as with it."""
  if field == 'seed':
    # Which of them comes cannot be repeated then; the journal of replies repeats it.
    return True
  greedy = body.get('temperature') == 0
  if field in ('top_p', 'top_k', 'min_p'):
    # Endpoints keep all tokens unless they are told otherwise; greedily the likeliest one stays.
    return greedy or (field == 'top_p' and body.get('top_p') == 1)
  return field == 'temperature' and body.get('temperature') == 1


def refused_field(error: Mapping[str, Any] | Any, message: str) -> str | None:
  """Returns the optional field that an endpoint's refusal says it does not take, if any.

  Args:
    error: the refusal's body, as the client has read it; anything.
    message: its text.
  """
  record = error if isinstance(error, Mapping) else {}
  if _USE_OTHER_NAME.search(message):
    return 'max_tokens'
  known = record.get('code') in _CODES or record.get('type') in _CODES
  if not known and not _REFUSED.search(message):
    return None
  param = record.get('param')
  if param in _OPTIONAL:
    # "max_tokens is too large: this model does not support more" concerns the number.
    return param if param != 'max_tokens' or known else None
  # Only where there is one: of several it cannot be told which one is meant.
  named = [name for name in _OPTIONAL if re.search(rf'\b{name}\b', message)]
  if len(named) != 1 or (named == ['max_tokens'] and re.search(r'too (large|long)', message)):
    return None
  return named[0]
