r"""Writes made-up files in the schemas of the recipe's data sets, to try the paper's run on.

    python -m experiments.made_up --out=runs/made_up
    DCORE_DATA=runs/made_up python -m experiments.train --config=configs/qwen3_8b.py:dry \
      --workdir=runs/dry

Prints the number of records of each file as JSON.
"""

import json
import pathlib

from absl import app, flags

from dcore_jax.data.made_up import write_made_up
from dcore_jax.run import program

_OUT = flags.DEFINE_string('out', None, 'Data folder to write into.')
_COUNT = flags.DEFINE_integer('count', 12, 'Tasks of each kind.', lower_bound=2)


def main() -> None:
  """Writes the files."""
  if not _OUT.value:
    raise app.UsageError('needs --out')
  print(json.dumps(write_made_up(pathlib.Path(_OUT.value), _COUNT.value)))


if __name__ == '__main__':
  program.run(main)
