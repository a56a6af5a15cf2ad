"""Says what this machine has, what is missing, and whether a config fits here.

    python -m experiments.doctor
    python -m experiments.doctor --config=configs/qwen3_8b.py

It looks at versions, devices, memory, disk, the cache of compiled programs and optional packages.
With a config it also compiles the steps of the run for the devices of this machine, which takes a
minute or more, and says what would make it fit. Prints JSON on stdout and tells a person on stderr;
the exit status is 1 where something is wrong.
"""

import json
import pathlib
import sys

from absl import flags

from dcore_jax.run import doctor, program
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string('workdir', 'runs', 'Where results would go.')


def main() -> None:
  """Prints what was found."""
  found = doctor.examine(pathlib.Path(_WORKDIR.value))
  if _CONFIG.value is not None:
    found = found | doctor.examine_config(read_config(_CONFIG.value))
  print(json.dumps(found))
  print(doctor.told(found), file=sys.stderr)
  sys.exit(bool(found['problems']) or not found.get('fits', True))


if __name__ == '__main__':
  program.run(main)
