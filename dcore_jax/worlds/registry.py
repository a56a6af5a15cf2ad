"""The worlds by name: the one place in which a world is entered.

A world that is registered here is evaluated, distilled from, trained on, turned into seeds and
chatted with; `config.world.name` chooses it. A world of one's own registers itself where it is
defined, and the config file that names it imports that module:

    @register_world('library')
    class Library(SandboxWorld): ...
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dcore_jax.worlds.bfcl_world import BfclWorld
from dcore_jax.worlds.environment import Sandbox, World
from dcore_jax.worlds.mcpworld.world import McpWorld
from dcore_jax.worlds.toolworld.world import ToolWorld

# Filled by `register_world`, at the end of this module for the package's own worlds.
WORLDS: dict[str, type[World]] = {}


class WorldSection(Protocol):
  """The fields that a config's section `world` has.

  Attributes:
    name: a name of WORLDS.
    max_subtasks: the largest number of subtasks in one request.
    options: further keyword arguments of the world's class.
  """

  name: str
  max_subtasks: int
  options: Mapping[str, Any]


def register_world(name: str) -> Callable[[type[World]], type[World]]:
  """A decorator that enters a world's class under a name.

  Raises:
    ValueError: another class has the name.
  """

  def enter(world: type[World]) -> type[World]:
    # A module that is imported twice registers the same class again, which is no error.
    known = WORLDS.setdefault(name, world)
    if known is not world:
      raise ValueError(f'the world {name!r} is already {known.__module__}.{known.__qualname__}')
    return world

  return enter


def find_world(name: str) -> type[World]:
  """Returns the class of a world.

  Raises:
    ValueError: no world has this name.
  """
  if name not in WORLDS:
    raise ValueError(f'unknown world {name!r}; expected one of {sorted(WORLDS)}')
  return WORLDS[name]


def make_world(section: WorldSection) -> World:
  """Returns the world that a config's section `world` asks for.

  Raises:
    ValueError: an unknown name, an option that the world does not take or whose value is wrong, or
      a world that is not installed.
  """
  world = find_world(section.name)
  options = dict(section.options)
  try:
    # Binding first tells a wrong option from a TypeError that the world itself raises.
    inspect.signature(world).bind(max_subtasks=section.max_subtasks, **options)
  except TypeError as error:
    raise ValueError(f'world.options of {section.name!r}: {error}') from error
  return world(max_subtasks=section.max_subtasks, **options)


def check_kinds(field: str, counts: Mapping[str, int], world: World) -> None:
  """Checks that a config's numbers of tasks are of the kinds of its world, and of all of them.

  Raises:
    ValueError: names `field`, the kinds that the world lacks or that have no number, and those that
      there are.
  """
  kinds = list(world.kinds)
  # A misspelt kind would otherwise be a kind without tasks.
  unknown = [kind for kind in counts if kind not in kinds]
  if unknown:
    raise ValueError(f'{field}: the world has no kind {unknown}; it has {kinds}')
  # 0 has to be written down: a kind that is left out may have been forgotten.
  lacking = [kind for kind in kinds if kind not in counts]
  if lacking:
    raise ValueError(f'{field}: no number of tasks of kind {lacking}; the world has {kinds}')


def named_world(name: str) -> World:
  """Returns a world as a person names it on a command line.

  Args:
    name: a name of WORLDS, for its default options; or NAME:PLACE, where the world's class has a
      method `named` that makes it of PLACE.

  Raises:
    ValueError: an unknown world, one that is not installed, or one that takes no place.
  """
  base, colon, place = name.partition(':')
  world = find_world(base)
  if not colon:
    return world()
  if not hasattr(world, 'named'):
    raise ValueError(f'the world {base!r} takes nothing behind its name, got {place!r}')
  return world.named(place)


def world_and_kind(name: str, kind: str) -> tuple[World | None, str]:
  """Returns a world with its default options and a kind of its tasks, as a person names them.

  Args:
    name: as `named_world` takes it, or 'none'.
    kind: '' is 'sequential', or the first kind that has a held-out task where it has none.

  Returns:
    The world (None for 'none') and the kind.

  Raises:
    ValueError: an unknown world or kind, a world that is not installed, or one without a held-out
      task (of the kind).
  """
  if name == 'none':
    return None, ''
  world = named_world(name)
  if kind and kind not in world.kinds:
    raise ValueError(f'unknown kind {kind!r} of world {name!r}; expected one of {world.kinds}')
  # A false key goes first, and the sort keeps the order of the others.
  kinds = [kind] if kind else sorted(world.kinds, key=lambda one: one != 'sequential')
  # A world whose tasks come from a file may have none of a kind.
  for one in kinds:
    if world.tasks(one, 1, seed=0, split='eval'):
      return world, one
  raise ValueError(f'the world {name!r} has no held-out task of kind {" or ".join(kinds)}')


def open_sandbox(record: Mapping[str, Any]) -> Sandbox:
  """Returns a fresh sandbox of a record {'name': world, ...}, as a seed carries it.

  Raises:
    ValueError: an unknown world, one that is not installed, or a record that lacks an entry.
  """
  name = record.get('name')
  try:
    return find_world(name).open_sandbox(record)
  # Seeds come from files, so that a missing entry is a person's mistake and not a fault of the
  # program.
  except KeyError as error:
    raise ValueError(f'a world {name!r} needs {error}') from error


# Registered here and not where they are defined: a program that imports the registry knows both.
register_world('toolworld')(ToolWorld)
register_world('bfcl')(BfclWorld)
register_world('mcp')(McpWorld)
