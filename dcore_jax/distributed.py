"""The devices of a run: many hosts as one program, and the meshes for training and for rollouts.

Hosts run the same program on the same data and share the work directory; the first one writes what
is not a checkpoint.
"""

import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dcore_jax import sharding
from dcore_jax.config import RunConfig


def join(hosts: str) -> None:
  """Makes this process one of several that run the same program, each on its own host with its own
  devices.

  To be called before jax is asked for a device.

  Args:
    hosts: '' for a process by itself; 'auto' to take the others from the cluster's environment
      (Slurm, Open MPI, Kubernetes, Cloud TPU); or 'ADDRESS:PORT,COUNT,INDEX' with the address of
      the first process.

  Raises:
    ValueError: anything else, or an environment that names no cluster.
  """
  if not hosts:
    return
  if hosts == 'auto':
    jax.distributed.initialize()
    return
  address, *numbers = hosts.split(',')
  if (
    len(numbers) != 2
    or not all(number.isdecimal() for number in numbers)
    or int(numbers[1]) >= int(numbers[0])
  ):
    raise ValueError(
      f"--hosts = {hosts!r}; expected 'auto' or ADDRESS:PORT,COUNT,INDEX "
      'with an index below the count'
    )
  jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))


def keep_programs() -> None:
  """Lets compiled programs outlive the process: in JAX_COMPILATION_CACHE_DIR, or else, on
  accelerators, in ~/.cache/dcore_jax.

  To be called before anything is compiled. An engine meets dozens of decode programs, 20 to 150 s
  each for Qwen3-8B. Those of a CPU take 1 to 2 s, and jax may load them on a machine that lacks
  their instructions (openxla/xla#44565): asked for alone.
  """
  if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != 'cpu':
    jax.config.update(
      'jax_compilation_cache_dir', str(pathlib.Path('~/.cache/dcore_jax').expanduser())
    )


def writes() -> bool:
  """Whether this host is the one that writes results."""
  return jax.process_index() == 0


def wait_for_others(name: str) -> None:
  """Returns when every host has come here, so that what the first one wrote before can be read."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def everywhere(holds: bool) -> bool:
  """Whether something holds on every host, so that all go the same way."""
  return (
    holds
    if jax.process_count() == 1
    else bool(multihost_utils.process_allgather(np.array(holds)).all())
  )


def training_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh | None:
  """The mesh of section `mesh`; None where there is one device, which needs none.

  Raises:
    ValueError: sizes that do not give the number of devices.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
  return mesh if mesh.size > 1 else None


def engine_mesh(config: RunConfig, mesh: Mesh | None) -> Mesh | None:
  """The mesh of rollouts over the devices of training:

  `engine.tensor` ways for heads, or training's own where that is 0.
  """
  if mesh is None or not config.engine.tensor:
    return mesh
  return sharding.make_mesh(1, -1, config.engine.tensor, mesh.devices.flatten().tolist())
