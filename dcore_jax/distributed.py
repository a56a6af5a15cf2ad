"""The devices of a run: many hosts as one program, meshes, and where compiled programs are kept.

Hosts run the same program on the same data and share the work directory; the first one writes what
is not a checkpoint.
"""

import hashlib
import os
import pathlib
import platform

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
  """Keeps compiled programs on disk, so that the next process need not compile them.

  They go to a folder of their own (`programs_folder`) below DCORE_CACHE, by default
  $XDG_CACHE_HOME/dcore_jax or ~/.cache/dcore_jax; where DCORE_CACHE is empty they are not kept.
  JAX_COMPILATION_CACHE_DIR goes before all of it. It must run before anything is compiled.
  """
  root = os.environ.get('DCORE_CACHE')
  if root is None:
    # The standard's default, also where the variable is empty.
    shared = os.environ.get('XDG_CACHE_HOME') or pathlib.Path('~/.cache').expanduser()
    root = str(pathlib.Path(shared) / 'dcore_jax')
  # Whoever has told jax where to keep them has chosen what is kept, too.
  if jax.config.jax_compilation_cache_dir is not None or not root:
    return
  jax.config.update('jax_compilation_cache_dir', str(programs_folder(pathlib.Path(root))))
  # jax keeps what takes 1 s or more. A start has a dozen programs that take less, and each of them
  # is 10 to 100 kB.
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def programs_folder(root: pathlib.Path) -> pathlib.Path:
  """Returns the folder for the programs of this version of jax on this kind of processor.

  jax may load a CPU's program on a machine that lacks its instructions (openxla/xla#44565), and a
  home directory may be shared by machines of several kinds.
  """
  processor = hashlib.sha256(_processor().encode()).hexdigest()[:8]
  return root / f'programs-{jax.__version__}-{jax.lib.__version__}-{processor}'


# Lines of /proc/cpuinfo that say which instructions there are, on x86 and on ARM. Others change
# from start to start (MHz) or from core to core.
_PROCESSOR_LINES = (
  'vendor_id',
  'cpu family',
  'model',
  'model name',
  'stepping',
  'flags',
  'Features',
  'CPU implementer',
  'CPU architecture',
  'CPU variant',
  'CPU part',
)


def _processor() -> str:
  """Returns what distinguishes this kind of processor from others."""
  found = [platform.machine(), platform.processor()]
  listed = pathlib.Path('/proc/cpuinfo')
  # Other systems than Linux have no such file; their homes are hardly ever shared.
  if listed.is_file():
    # Lines are sorted and counted once: a machine may have cores of several kinds.
    lines = listed.read_text(encoding='utf-8', errors='replace').splitlines()
    kept = {line for line in lines if line.partition(':')[0].strip() in _PROCESSOR_LINES}
    found += sorted(kept)
  return '\n'.join(found)


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
