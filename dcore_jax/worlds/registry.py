"""Worlds by name, each with the system messages that its seeds have."""

from collections.abc import Callable

from dcore_jax.chat.tool_specs import read_tools, system_text
from dcore_jax.worlds.bfcl_tasks import BfclTask
from dcore_jax.worlds.bfcl_world import BfclWorld
from dcore_jax.worlds.environment import World
from dcore_jax.worlds.toolworld.world import ToolWorld


def bfcl_system_text(task: BfclTask) -> str:
  """Policy, the listed functions as JSON, and how to call them."""
  return system_text(task.policy, read_tools(task.functions))


WORLDS: dict[str, Callable[[], World]] = {  # one that is not installed is a ValueError
  'toolworld': ToolWorld,
  'bfcl': lambda: BfclWorld(bfcl_system_text),
}
