r"""Distillation, fine-tuning and DA-GRPO on the tools of an MCP server (docs/your_tools.md).

Command:   python -m experiments.train --config=configs/mcp_world.py:server.json \
             --config.model.path=DIR --workdir=runs/mine
Variants:  the JSON file with the world's options; `tasks` is one of them. FILE.json,tiny takes the
           packaged organism and the sizes of minutes, for a server whose words it knows.

Sizes are those of the paper as `config.py` has them, with all tasks of the file. Episodes are acted
out on the server. `--config.stages="('distill','sft','evaluate_sft')"` leaves RL out.
"""

import ml_collections

from configs import nano
from dcore_jax.run.config import default_config
from dcore_jax.worlds.mcpworld.tasks import KINDS
from dcore_jax.worlds.mcpworld.world import read_options

# More tasks than a file has are all of them.
_ALL = 100_000


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config for the server whose options a JSON file holds."""
  name, _, size = variant.partition(',')
  if not name or size not in ('', 'tiny'):
    raise ValueError(
      f'configs/mcp_world.py needs the JSON file of a server behind a colon, got {variant!r}'
    )
  c = nano.get_config('tiny') if size else default_config()
  c.name = f'configs/mcp_world.py:{variant}'
  c.world.name = 'mcp'
  c.world.options = ml_collections.ConfigDict(read_options(name))
  for section in (c.distill, c.rl):
    section.tasks.update(dict.fromkeys(KINDS, _ALL))
  c.rl.episodes = True
  return c
