"""What clients may call the model that a server has, and what they are told of it."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dcore_jax.serve.errors import Refusal


class ServedModel:
  """The names of one model.

  Args:
    names: what clients may call it: a name, or several.
    folder: its directory, whose path is one of its names too; None if it has none.
    max_len: tokens of a prompt and its answer together at most.
    created: seconds since 1970, as OpenAI dates models.

  Attributes:
    names: those that clients are shown, without the path.
  """

  def __init__(
    self,
    names: str | Sequence[str],
    folder: pathlib.Path | None,
    max_len: int,
    created: int,
  ):
    self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    self._folder = folder
    self._max_len = max_len
    self._created = created

  def check(self, name: str) -> None:
    """Raises Refusal unless `name` is one of the model's."""
    if name not in self.names and not self._is_folder(name):
      known = ' or '.join(map(repr, self.names))
      raise Refusal(404, f'there is no model {name!r} here, but {known}', 'model_not_found')

  def cards(self) -> list[dict[str, Any]]:
    """Returns the card of each name."""
    return [self.card(name) for name in self.names]

  def card(self, name: str) -> dict[str, Any]:
    """Returns what /v1/models says of the model under a name."""
    return {
      'id': name,
      'object': 'model',
      'created': self._created,
      'owned_by': 'dcore_jax',
      'max_model_len': self._max_len,
    }

  def _is_folder(self, name: str) -> bool:
    """Whether this is a path of the model: harnesses name it by what they were given."""
    if self._folder is None or os.sep not in name:
      return False
    try:
      return pathlib.Path(name).resolve() == self._folder.resolve()
    except (OSError, ValueError):  # too long, or with a NUL
      return False
