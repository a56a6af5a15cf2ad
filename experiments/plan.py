"""Says whether a run fits: python -m experiments.plan --config=configs/qwen3_14b.py --topology=a100:8 [--json] [--steps=...]

Compiles the run's steps for devices that need not be there (`pip install -e .[aot]`); exit status 1 when one does not fit.
"""

import json
import sys

from absl import app, flags

from dcore_jax.plan import plan
from dcore_jax.run.config import define_config

_CONFIG = define_config('configs/qwen3_8b.py')
_TOPOLOGY = flags.DEFINE_string(
  'topology', 'cpu:8', 'a100:8, a100:16 ..., v5p:2x2x2, v5e:2x4, v6e:2x4, or cpu:8.'
)
_JSON = flags.DEFINE_bool('json', False, 'A JSON object a step, instead of a table.')
_STEPS = flags.DEFINE_list('steps', [], 'Only these steps; default: all.')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  try:
    plans = plan.plan(_CONFIG.value, _TOPOLOGY.value, tuple(_STEPS.value))
  except (ValueError, ModuleNotFoundError) as error:
    sys.exit(f'error: {error}')
  if _JSON.value:
    print('\n'.join(json.dumps(step.to_json()) for step in plans))
  else:
    print(plan.table(plans, _TOPOLOGY.value))
  sys.exit(not all(step.fits for step in plans))


if __name__ == '__main__':
  app.run(main)
