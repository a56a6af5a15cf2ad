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
  """Joins this process with others that run the same program, each on a host with its own devices.

  It must run before jax is asked for a device.
  Args:
    hosts: '' for a process by itself; 'auto' to take the others from the cluster's environment
      (Slurm, Open MPI, Kubernetes, Cloud TPU); or 'ADDRESS:PORT,COUNT,INDEX' with the address of
      the first process.

  Raises:
    ValueError: anything else, or an environment that names no cluster.
  """
  # A process by itself needs no coordinator, and must not wait for one.
  if not hosts:
    return
  if hosts == 'auto':
    jax.distributed.initialize()
    return
  # Checked here, before any process waits for the others.
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
  # The first process listens at this address, and the others connect to it.
  jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))


def keep_programs() -> None:
  """Keeps compiled programs on disk, so that they outlive the process.

  They go to JAX_COMPILATION_CACHE_DIR, or else, on accelerators, to ~/.cache/dcore_jax. It must run
  before anything is compiled.
  """
  # An engine has dozens of decode programs, 20 to 150 s each for Qwen3-8B. Those of a CPU take 1 to
  # 2 s, and jax may load them on a machine that lacks their instructions (openxla/xla#44565): so a
  # CPU keeps them only where the variable asks for it.
  if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != 'cpu':
    jax.config.update(
      'jax_compilation_cache_dir', str(pathlib.Path('~/.cache/dcore_jax').expanduser())
    )


def writes() -> bool:
  """Whether this host writes the results: two writers of one file would corrupt it."""
  return jax.process_index() == 0


def wait_for_others(name: str) -> None:
  """Returns when every host has called it, so that files of the first host can be read."""
  # One process has nobody to wait for.
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def everywhere(holds: bool) -> bool:
  """Whether something holds on every host, so that all hosts take the same branch."""
  # Hosts that branch differently wait for each other's collectives without end.
  return (
    holds
    if jax.process_count() == 1
    else bool(multihost_utils.process_allgather(np.array(holds)).all())
  )


def training_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh | None:
  """Returns the mesh of section `mesh`; None where there is one device, which needs none.

  Raises:
    ValueError: sizes that do not give the number of devices.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
  # Without a mesh in context, everything in `sharding` is the case of one device.
  return mesh if mesh.size > 1 else None


def engine_mesh(config: RunConfig, mesh: Mesh | None) -> Mesh | None:
  """Returns the mesh of rollouts, over the devices of training.

  It splits heads over `engine.tensor` devices. Where that is 0, it is training's own mesh.
  """
  if mesh is None or not config.engine.tensor:
    return mesh
  # -1: the remaining factor is fsdp, which splits parameters that a rollout reads in every step.
  return sharding.make_mesh(1, -1, config.engine.tensor, mesh.devices.flatten().tolist())
