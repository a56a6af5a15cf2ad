"""Says whether a run fits its devices, and how long its steps take at least.

    python -m experiments.plan --config=configs/qwen3_14b.py --topology=a100:8

Compares what `rl.capacity` may be, then compiles the steps of the run for devices that need not be
there (`pip install -e .[aot]`), and says how long they took to compile. `--capacity=auto` plans the
run with the best capacity instead of the config's. The exit status is 1 when a step does not fit.
"""

import json
import sys

import jax
from absl import flags

from dcore_jax.config import RunConfig
from dcore_jax.plan import capacity, compile_times, fit
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/qwen3_8b.py')
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  'cpu:8',
  'a100:8, h100:16, h200:8, b200:8, rtx4090:1, v5p:2x2x2, v5e:2x4, v6e:2x4, or cpu:8.',
)
_JSON = flags.DEFINE_bool(
  'json',
  False,
  'Print JSON instead of tables: a line of capacities, one a step, one of compile times.',
)
_STEPS = flags.DEFINE_list('steps', [], 'Only these steps; default: all.')
_CAPACITY = flags.DEFINE_enum(
  'capacity', 'config', ['config', 'auto'], 'Plan rl.capacity as in the config, or the best one.'
)

help_lib.group('what is planned', _TOPOLOGY, _STEPS, _CAPACITY)
help_lib.group('what is printed', _JSON)


def main() -> None:
  """Prints the plan and ends the program with its verdict."""
  # A program from the cache of another process would take no time to compile.
  jax.config.update('jax_enable_compilation_cache', False)
  config = read_config(_CONFIG.value)
  try:
    fits = _plan(config)
  except ModuleNotFoundError as error:  # the compiler of a topology is not installed
    raise ValueError(str(error)) from error
  sys.exit(not fits)


def _plan(config: RunConfig) -> bool:
  """Prints all there is to say of the run -> whether its steps fit."""
  target = _TOPOLOGY.value
  steps = tuple(_STEPS.value)
  auto = _CAPACITY.value == 'auto'
  # Rows of episodes hold several responses of a rollout, of which none has its full length.
  rollouts = 'rl' in config.stages and not config.rl.episodes
  if auto and not rollouts:
    raise ValueError('--capacity=auto: the config has no RL on single responses')
  if auto or (rollouts and not steps):
    choices = fit.capacities(config, target)
    # Printed at once: it takes a second, and what follows takes minutes.
    _print(capacity.to_json(choices, config), capacity.table(choices, config, target))
    if auto:
      config = capacity.with_best(config, choices)
  plans = fit.plan(config, target, steps)
  if _JSON.value:
    for step in plans:
      print(json.dumps(step.to_json()))
  else:
    print(fit.table(plans, target))
  # A whole run waits for the sum of all its programs; some steps alone have no sum.
  if not steps:
    times = [step.compile_time for step in plans]
    times += fit.more_compile_times(config, target)
    _print({'compile_times': [each._asdict() for each in times]}, compile_times.table(times))
  return all(step.fits for step in plans)


def _print(fields: dict, text: str) -> None:
  print(json.dumps(fields) if _JSON.value else text + '\n', flush=True)


if __name__ == '__main__':
  program.run(main)
