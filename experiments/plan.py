"""Says whether a run fits its devices, and how long its steps take at least.

    python -m experiments.plan --config=configs/qwen3_14b.py --topology=a100:8

Compiles the steps of the run for devices that need not be there (`pip install -e .[aot]`). The exit
status is 1 when a step does not fit.
"""

import json
import sys

from absl import flags

from dcore_jax.plan import fit
from dcore_jax.run import program
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/qwen3_8b.py')
_TOPOLOGY = flags.DEFINE_string(
  'topology', 'cpu:8', 'a100:8, a100:16 ..., v5p:2x2x2, v5e:2x4, v6e:2x4, or cpu:8.'
)
_JSON = flags.DEFINE_bool('json', False, 'Print a JSON object a step instead of a table.')
_STEPS = flags.DEFINE_list('steps', [], 'Only these steps; default: all.')


def main() -> None:
  """Prints the plan and ends the program with its verdict."""
  try:
    plans = fit.plan(read_config(_CONFIG.value), _TOPOLOGY.value, tuple(_STEPS.value))
  except ModuleNotFoundError as error:  # the compiler of a topology is not installed
    raise ValueError(str(error)) from error
  if _JSON.value:
    for step in plans:
      print(json.dumps(step.to_json()))
  else:
    print(fit.table(plans, _TOPOLOGY.value))
  sys.exit(not all(step.fits for step in plans))


if __name__ == '__main__':
  program.run(main)
