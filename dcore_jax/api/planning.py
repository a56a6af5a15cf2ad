"""Computes whether a run fits its devices, and the least time of its steps."""

import ml_collections

from dcore_jax.config import RunConfig
from dcore_jax.plan import fit
from dcore_jax.run.config import read_config


def plan_run(
  config: ml_collections.ConfigDict | RunConfig, target: str, steps: tuple[str, ...] = ()
) -> list[fit.StepPlan]:
  """Compiles the steps of a run for devices that need not be there.

  Args:
    config: the run's.
    target: a name such as 'a100:8', 'v5p:2x2x2' or 'cpu:8'.
    steps: names of the steps to compile; default: all.

  Raises:
    ValueError: a config that does not hold, an unknown target or step.
    ModuleNotFoundError: the target's compiler is not installed.
  """
  # Read as a config file is, so that a plan refuses what the run itself would refuse.
  return fit.plan(read_config(config), target, steps)
