"""The devices of a run: many hosts as one program, meshes, and where compiled programs are kept.

Hosts run the same program on the same data and share the work directory; the first one writes what
is not a checkpoint.
"""

import atexit
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dcore_jax import host_watch, sharding
from dcore_jax.config import RunConfig

_WATCH_KEY = 'dcore_jax/watch'


def join(hosts: str, patience: float = host_watch.PATIENCE) -> None:
  """Joins this process with others that run the same program, each on a host with its own devices.

  It must run before jax is asked for a device. From here on the process ends, with the name of the
  host, when another one is missing (`host_watch`).

  Args:
    hosts: '' for a process by itself; 'auto' to take the others from the cluster's environment
      (Slurm, Open MPI, Kubernetes, Cloud TPU); or 'ADDRESS:PORT,COUNT,INDEX' with the address of
      the first process.
    patience: seconds without a word from a host until it counts as gone.

  Raises:
    ValueError: anything else, an environment that names no cluster, or hosts that did not come.
  """
  # A process by itself needs no coordinator, and must not wait for one.
  if not hosts:
    return
  place = {'local_device_ids': _all_devices(os.environ)}
  if hosts != 'auto':
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
    place = {
      'coordinator_address': address,
      'num_processes': int(numbers[0]),
      'process_id': int(numbers[1]),
      # All that the process sees; without this, jax asks Slurm and Open MPI here as well.
      'local_device_ids': [],
    }
  _keep_stdout()
  try:
    jax.distributed.initialize(
      **place,
      # The watch is quicker and says more. This is for the case that somebody kills it.
      heartbeat_timeout_seconds=int(2 * patience) + 60,
    )
  except (RuntimeError, ValueError) as error:
    raise ValueError(f'--hosts = {hosts!r}: {error}') from error
  _start_watch(patience)
  _meet()


def _keep_stdout() -> None:
  """Leaves stdout to Python: what a library writes there by itself goes to stderr.

  Gloo, by which CPUs of several hosts exchange arrays, writes a line to stdout for each group of
  devices that meets. Programs print JSON there.
  """
  sys.stdout.flush()
  # A line at a time where it was so, as on a terminal.
  lines = sys.stdout.line_buffering
  kept = os.dup(1)
  os.dup2(2, 1)
  sys.stdout = open(kept, 'w', encoding=sys.stdout.encoding, buffering=1 if lines else -1)


def _meet() -> None:
  """Exchanges something over all hosts and all devices, while all hosts are here.

  Between CPUs the first exchange of a group of devices fails where a host comes 30 s late, which
  compiling takes. Later exchanges wait.
  """
  everywhere(True)
  mesh = Mesh(np.array(jax.devices()), ('all',))
  split, whole = jax.NamedSharding(mesh, jax.P('all')), jax.NamedSharding(mesh, jax.P())
  ones = jax.make_array_from_callback((mesh.size,), split, lambda index: np.ones(mesh.size)[index])
  jax.block_until_ready(jax.jit(lambda x: x.sum(), out_shardings=whole)(ones))


def _all_devices(environment: Mapping[str, str]) -> list[int] | None:
  """Returns [] where this process is to have all devices of its machine, None where jax decides.

  Under Slurm and Open MPI jax gives each process one GPU, also where there is one process a host.
  """
  # Slurm's number of a step begins with that of its first node: '8', '1(x4)', '8(x2),4'.
  tasks = environment.get('SLURM_STEP_TASKS_PER_NODE') or environment.get(
    'OMPI_COMM_WORLD_LOCAL_SIZE'
  )
  alone = tasks is not None and re.match(r'\d+', tasks)
  return [] if alone and int(alone.group()) == 1 else None


def _start_watch(patience: float) -> None:
  """Starts the watch; the first host tells the others where its own one listens."""
  # jax keeps what it knows of the cluster, and its store of keys and values, to itself.
  state = jax_distributed.global_state
  if state.num_processes == 1:
    return
  address = state.coordinator_address.rpartition(':')[0]
  server = None
  if state.process_id == 0:
    server = host_watch.listen(address)
    port = server.getsockname()[1]
    token = secrets.token_hex(16)
    state.client.key_value_set(_WATCH_KEY, f'{port} {token}')
  else:
    found = state.client.blocking_key_value_get(_WATCH_KEY, int(1000 * patience))
    port, token = found.split()
  host_watch.start(
    state.process_id,
    state.num_processes,
    address=(address.strip('[]'), int(port)),
    token=token,
    patience=patience,
    server=server,
  )
  # Runs before jax's own, which waits for the other hosts.
  atexit.register(host_watch.done)


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
  """Returns the mesh of section `mesh`; None where there is one device and nothing is offloaded.

  Raises:
    ValueError: sizes that do not give the number of devices.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
  # Without a mesh in context, everything in `sharding` is the case of one device. Host memory alone
  # is named by a mesh, also that of one device.
  return mesh if mesh.size > 1 or config.execution.offload else None


def engine_mesh(config: RunConfig, mesh: Mesh | None) -> Mesh | None:
  """Returns the mesh of rollouts, over the devices of training or this host's part of them.

  It splits heads over `engine.tensor` devices. Where that is 0, over as many as in training.

  Raises:
    ValueError: sizes that do not give the number of devices.
  """
  if mesh is None:
    return None
  if jax.process_count() > 1 and config.engine.apart:
    return _host_meshes(1, -1, config.engine.tensor or config.mesh.tensor)[jax.process_index()]
  if not config.engine.tensor:
    return mesh
  # -1: the remaining factor is fsdp, which splits parameters that a rollout reads in every step.
  return sharding.make_mesh(1, -1, config.engine.tensor, mesh.devices.flatten().tolist())


# Asked for each parameter of each update.
@functools.lru_cache(maxsize=4)
def _host_meshes(data: int, fsdp: int, tensor: int) -> tuple[Mesh, ...]:
  """Returns for each host a mesh of these sizes over its own devices."""
  meshes = []
  for host in range(jax.process_count()):
    own = [device for device in jax.devices() if device.process_index == host]
    try:
      meshes.append(sharding.make_mesh(data, fsdp, tensor, own))
    except ValueError as error:
      raise ValueError(
        f'the engine of a host: {error} of a host; set engine.tensor, or engine.apart=False for '
        'one engine over the devices of all hosts'
      ) from error
  return tuple(meshes)


def moved(array: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
  """Returns an array at a place, which may be this host's part of the devices that it is on.

  All hosts call it together, each with its own place.
  """
  if array.is_fully_addressable or not place.is_fully_addressable:
    return jax.device_put(array, place)
  # jax moves arrays between shardings of the same devices: first each host gets a whole copy, split
  # over its own devices as `place` says. Then the parts that are here are the array.
  sizes = [place.mesh.shape[axis] for axis in sharding.MESH_AXES]
  hosts = np.stack([mesh.devices for mesh in _host_meshes(*sizes)])
  copies = jax.device_put(
    array, jax.NamedSharding(Mesh(hosts, ('hosts', *sharding.MESH_AXES)), place.spec)
  )
  parts = [shard.data for shard in copies.addressable_shards]
  return jax.make_array_from_single_device_arrays(array.shape, place, parts)


def on_host(array: jax.Array) -> np.ndarray:
  """Returns an array whose parts may be on several hosts; then all call it together."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def gather_bytes(data: bytes) -> list[bytes]:
  """Returns what each host has given, in the order of the hosts; all call it together."""
  if jax.process_count() == 1:
    return [data]
  # Without a mesh: hosts exchange arrays over one device of each.
  with jax.set_mesh(None):
    lengths = multihost_utils.process_allgather(np.array(len(data))).tolist()
    # Of one length, as collectives want them.
    padded = np.zeros(max(1, *lengths), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
  return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def gather_json(value: Any) -> list[Any]:
  """Returns what each host has given, as JSON holds it; all call it together."""
  return [json.loads(data) for data in gather_bytes(json.dumps(value).encode())]


def of_first(value: Any) -> Any:
  """Returns what the first host has given, so that all go on with the same."""
  return value if jax.process_count() == 1 else gather_json(value)[0]


def own_file(path: pathlib.Path) -> pathlib.Path:
  """Returns this host's file of those that each host writes; that of the first is `path` itself."""
  host = jax.process_index()
  return path.with_name(f'{path.stem}.host{host}{path.suffix}') if host else path


def share(count: int) -> range:
  """Returns the numbers below `count` that are this host's; each is some host's."""
  host, hosts = jax.process_index(), jax.process_count()
  # What stands side by side stays together, such as the rollouts of a prompt.
  return range(count * host // hosts, count * (host + 1) // hosts)
