"""Accelerators that this host need not have: what a step needs on an A100 or a TPU slice.

The step is compiled for them.

    accelerators = topology.target('a100:8')    # or 'h100:16', 'v5p:2x2x2', 'v5e:2x4' ..., 'cpu:8'
    mesh = sharding.make_mesh(fsdp=8, devices=accelerators.devices)
    with jax.set_mesh(mesh):    # kernels ask the mesh in context what they are compiled for
      compiled = jax.jit(step).lower(*shapes).compile()    # shapes carry NamedShardings on the mesh
    topology.footprint(compiled).peak <= accelerators.device_bytes

The compiler is the real one: XLA for CUDA with Triton, or libtpu with Mosaic. It comes with `pip
install -e .[aot]` and needs no drivers or CUDA libraries; only running is impossible. It works on
any host, and JAX_PLATFORMS=cpu keeps it quiet. The TPU compiler refuses a step that is too large,
and `refusal` reads its error. The GPU compiler does not: compare the footprint.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

# A DGX or HGX board; more GPUs are whole hosts, linked by the network.
_GPUS_PER_HOST = 8

# Hardware numbers by the field names of XLA's GpuDeviceInfoProto, in bytes and GHz. A core is a
# streaming multiprocessor.
_ANY_GPU = {
  'threads_per_warp': 32,
  'threads_per_block_limit': 1024,
  'threads_per_core_limit': 2048,
  'registers_per_block_limit': 65536,
  'registers_per_core_limit': 65536,
  'shared_memory_per_block': 48 << 10,
  'block_dim_limit_x': 2**31 - 1,
  'block_dim_limit_y': 65535,
  'block_dim_limit_z': 65535,
  'driver_version': '"12.9.0"',
  'runtime_version': '"12.9.0"',
  'compile_time_toolkit_version': '"12.9.0"',
  'dnn_version': '"9.10.0"',
}
# What the two generations behind the A100 share, unless an entry says something else.
_HOPPER = _ANY_GPU | {
  'cuda_compute_capability': '{ major: 9 minor: 0 }',
  'core_count': 132,
  'fpus_per_core': 128,
  'clock_rate_ghz': 1.98,
  'l2_cache_size': 50 << 20,
  'shared_memory_per_core': 228 << 10,
  'shared_memory_per_block_optin': 227 << 10,
}
_GPUS = {
  'a100': (
    'NVIDIA A100-SXM4-80GB',
    _ANY_GPU
    | {
      'cuda_compute_capability': '{ major: 8 minor: 0 }',
      'core_count': 108,
      'fpus_per_core': 64,
      'clock_rate_ghz': 1.41,
      'device_memory_size': 85_100_068_864,
      'memory_bandwidth': 2_039_000_000_000,
      'l2_cache_size': 40 << 20,
      'shared_memory_per_core': 164 << 10,
      'shared_memory_per_block_optin': 163 << 10,
    },
  ),
  # A consumer's GPU. Its blocks have 99 KiB of shared memory, the least of these.
  'rtx4090': (
    'NVIDIA GeForce RTX 4090',
    _ANY_GPU
    | {
      'cuda_compute_capability': '{ major: 8 minor: 9 }',
      'core_count': 128,
      'fpus_per_core': 128,
      'clock_rate_ghz': 2.52,
      'threads_per_core_limit': 1536,
      'device_memory_size': 25_393_692_672,
      'memory_bandwidth': 1_008_000_000_000,
      'l2_cache_size': 72 << 20,
      'shared_memory_per_core': 100 << 10,
      'shared_memory_per_block_optin': 99 << 10,
    },
  ),
  'h100': (
    'NVIDIA H100 80GB HBM3',
    _HOPPER | {'device_memory_size': 84_978_434_048, 'memory_bandwidth': 3_352_320_000_000},
  ),
  'h200': (
    'NVIDIA H200',
    _HOPPER | {'device_memory_size': 151_397_597_184, 'memory_bandwidth': 4_800_000_000_000},
  ),
  'b200': (
    'NVIDIA B200',
    _HOPPER
    | {
      'cuda_compute_capability': '{ major: 10 minor: 0 }',
      'core_count': 148,
      'clock_rate_ghz': 1.965,
      'device_memory_size': 191_514_411_008,
      'memory_bandwidth': 7_672_320_000_000,
      'l2_cache_size': 132_644_864,
    },
  ),
}
_TPU_BYTES = {'v5e': 16 << 30, 'v5p': 95 << 30, 'v6e': 32 << 30}  # high-bandwidth memory of a chip
# What jax calls a chip.
_TPU_KINDS = {
  'TPU v5 lite': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
}
# How libtpu says that a program is too large, before or after it has laid the program out; and the
# arrays that it lists in the second case.
_SIZE = r'([\d.]+)([KMGT])'
_NEEDED = re.compile(_SIZE + r'(?: of [\d.]+[KMGT] hbm|, has |\) exceeds available HBM)')
_ALLOCATION = re.compile(
  r'Size: ' + _SIZE + r'\n(?:\s+Operator: op_name="([^"]*)"[^\n]*\n)?\s+Shape: (\w+\[[\d,]*\])'
)
# Without these, libtpu would ask a metadata server for the slice that this host is part of.
_NO_TPU_HERE = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


class Target(NamedTuple):
  """What programs are compiled for.

  Attributes:
    devices: on which nothing runs.
    device_bytes: memory of each.
  """

  devices: list[jax.Device]
  device_bytes: int


class Footprint(NamedTuple):
  """Bytes on each device.

  Attributes:
    arguments: of a call.
    outputs: of a call.
    temporary: of a call.
    peak: the most that is in use at once, arguments included. Communication buffers are not, and
      neither is what lies in host memory.
  """

  arguments: int
  outputs: int
  temporary: int
  peak: int


def target(name: str) -> Target:
  """Returns devices by name.

  It sets environment variables that tell the compilers to look for no hardware: for a process that
  plans, not one that trains.

  Args:
    name: 'a100:COUNT' (up to 8, or whole hosts of 8), and so with h100, h200, b200 and rtx4090; a
      TPU slice 'v5p:2x2x2', 'v5e:2x4', 'v6e:2x4'; or 'cpu:COUNT', this host's processor as so many
      devices, which are real and share its memory.

  Raises:
    ValueError: no accelerator of that name, or jax has begun with another number of CPU devices.
    ModuleNotFoundError: its compiler is not installed.
  """
  # A count for GPUs and CPUs, a shape for TPUs: a slice is a grid, and how it is wired depends on
  # all sides.
  kind, _, shape = name.partition(':')
  count = int(shape) if shape.isdecimal() else 0
  if kind in _GPUS and count and (count <= _GPUS_PER_HOST or count % _GPUS_PER_HOST == 0):
    return _gpu(kind, count, name)
  if kind == 'cpu' and count:
    return _cpu(count)
  if kind in _TPU_BYTES and shape:
    return _tpu(kind, name)
  raise ValueError(
    f'unknown accelerators {name!r}; cpu and {sorted(_GPUS)} take a count, up to '
    f'{_GPUS_PER_HOST} or whole hosts (a100:8), {sorted(_TPU_BYTES)} a shape (v5p:2x2x2)'
  )


def name_of(devices: Sequence[jax.Device]) -> str:
  """Returns the name by which `target` knows the devices that are here.

  Raises:
    ValueError: no name stands for them.
  """
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    return f'cpu:{len(devices)}'
  for name, (described, _) in _GPUS.items():
    if kind == described:
      return f'{name}:{len(devices)}'
  if kind in _TPU_KINDS:
    name = _TPU_KINDS[kind]
    # A slice is known by its shape, which its chips tell by where they are.
    sides = [max(places) + 1 for places in zip(*(chip.coords for chip in devices), strict=True)]
    # Where there is no third dimension, it is 1.
    grid = sides if name == 'v5p' else sides[:2]
    return f'{name}:{"x".join(map(str, grid))}'
  raise ValueError(
    f'no plan for {len(devices)} x {kind}; experiments.plan knows {sorted(_GPUS)} and '
    f'{sorted(_TPU_BYTES)}'
  )


def known_bytes(name: str) -> int:
  """Returns the memory of each device of a target of GPUs or TPUs, whose compiler may be absent."""
  kind = name.partition(':')[0]
  return _GPUS[kind][1]['device_memory_size'] if kind in _GPUS else _TPU_BYTES[kind]


def footprint(compiled: jax.stages.Compiled, host_arguments: int = 0) -> Footprint:
  """Returns what the compiler says that one call needs on each device.

  Args:
    compiled: the program.
    host_arguments: bytes of its arguments that lie in host memory. The compiler for GPUs takes them
      to be on the device.
  """
  # Sizes are those of one device.
  analysis = compiled.memory_analysis()
  arguments = analysis.argument_size_in_bytes
  outputs = analysis.output_size_in_bytes
  temporary = analysis.temp_size_in_bytes
  peak = analysis.peak_memory_in_bytes
  [first, *_] = jax.tree.leaves(compiled.input_shardings)
  device = next(iter(first.device_set))
  if device.platform == 'cpu':
    # The peak of the CPU's compiler leaves temporaries out.
    peak = arguments + outputs - analysis.alias_size_in_bytes + temporary
  # The compiler for TPUs counts arguments in host memory apart.
  elsewhere = 0 if analysis.host_argument_size_in_bytes else host_arguments
  return Footprint(
    arguments=arguments - elsewhere,
    outputs=outputs,
    temporary=temporary,
    peak=peak - elsewhere,
  )


def refusal(message: str) -> tuple[int, dict[str, int]] | None:
  """Reads from a compiler's error how much memory the program would need.

  Returns:
    (bytes that a device would need, the largest arrays by name, where the compiler had laid them
    out); None for any other error.
  """
  # There is no other way to ask libtpu: the numbers stand in the text of its error alone.
  needed = _NEEDED.search(message)
  if needed is None:
    return None
  arrays = {}
  for number, unit, source, shape in _ALLOCATION.findall(message):
    arrays[f'{shape} of {source or "no operation"}'] = _bytes(number, unit)
  return _bytes(*needed.groups()), arrays


def _bytes(number: str, unit: str) -> int:
  # Binary units: the blank stands for 2^0, K for 2^10.
  return int(float(number) * 2 ** (10 * (' KMGT'.index(unit))))


def _gpu(kind: str, count: int, name: str) -> Target:
  # A topology is hosts x GPUs: those of one host are linked to each other.
  hosts = max(1, count // _GPUS_PER_HOST)
  gpus = min(count, _GPUS_PER_HOST)
  _require('jax_cuda12_plugin', 'jax-cuda12-plugin', name)
  # The plugin looks for a driver when it is first loaded, and planning needs none on this host.
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  description = topologies.get_topology_desc(
    '', 'cuda', target_config=_gpu_config(kind), topology=f'1x{hosts}x{gpus}'
  )
  return Target(description.devices, _GPUS[kind][1]['device_memory_size'])


def _tpu(kind: str, name: str) -> Target:
  _require('libtpu', 'libtpu', name)
  # What the environment says already takes precedence.
  for variable, value in _NO_TPU_HERE.items():
    os.environ.setdefault(variable, value)
  try:
    return Target(topologies.get_topology_desc(name, 'tpu').devices, _TPU_BYTES[kind])
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'no TPU slice {name!r}: {error}') from error


def _cpu(count: int) -> Target:
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:
    pass  # jax has begun: then its devices must be as many already
  devices = jax.devices('cpu')
  if len(devices) != count:
    raise ValueError(f'cpu:{count}: jax has begun with {len(devices)} CPU devices')
  # They share the host's memory: each may use its part of it.
  return Target(devices, os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // count)


def _gpu_config(kind: str) -> str:
  """Returns a GpuTargetConfigProto as text."""
  name, numbers = _GPUS[kind]
  fields = '\n'.join(f'  {field}: {value}' for field, value in numbers.items())
  return (
    f'platform_name: "CUDA"\ndevice_description_str: "{name}"\ngpu_device_info {{\n{fields}\n}}\n'
  )


def _require(module: str, package: str, name: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise ModuleNotFoundError(
      f'compiling for {name} needs the package {package}: pip install -e .[aot]', name=module
    )
