"""Worlds by name: executes calls for whoever holds only a seed's record of its world."""

from collections.abc import Mapping
from typing import Any

from dcore_jax.worlds.bfcl import BfclSandbox
from dcore_jax.worlds.environment import Sandbox
from dcore_jax.worlds.toolworld.world import ToolWorldSandbox


def open_sandbox(record: Mapping[str, Any]) -> Sandbox:
  """A fresh sandbox of {'name': world, ...}.

  Raises:
    ValueError: an unknown world, one that is not installed, or a record that lacks what its world needs.
  """
  name = record.get('name')
  try:
    if name == 'toolworld':
      return ToolWorldSandbox(record['tools'], record['state'])
    if name == 'bfcl':
      return BfclSandbox(record['classes'], record['config'], record['done'])
  except KeyError as error:
    raise ValueError(f'a world {name!r} needs {error}') from error
  raise ValueError(f'unknown world {name!r}; expected bfcl or toolworld')
