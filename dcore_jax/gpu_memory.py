"""How much of a GPU's memory a program takes. Nothing here imports jax, which reads it later."""

import os

# Of a GPU's memory. The plan lets a step use 0.9 of it (plan/fit.py), and jax would take 0.75.
_GPU_SHARE = '0.92'


def take_memory() -> None:
  """Lets jax take as much of a GPU's memory as the plan counts on.

  XLA_PYTHON_CLIENT_MEM_FRACTION goes before it. It must run before jax is asked for a device.
  """
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', _GPU_SHARE)
