"""The devices that are here: their memory, and their rates beside those of the data sheet."""

import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import rows
from benchmarks.device.rows import Row
from benchmarks.device.setting import Machine, Setting
from benchmarks.measure import interleaved
from dcore_jax import sharding
from dcore_jax.plan import fit, roofline, topology

_PART = 'machine'
# Rows of the square matrices, and numbers of the array that is read and written.
_SIZES = {'cpu': (1024, 2**24), 'other': (8192, 2**29)}
_HOST_BYTES = {'cpu': 2**24, 'other': 2**28}


def examine() -> Machine:
  """Returns the devices of this process, with the peaks of their data sheet, or measured ones."""
  devices = jax.devices()
  platform = sharding.platform()
  try:
    name = topology.name_of(devices)
  except ValueError:
    name = ''
  facts = dict(platform=platform, kind=devices[0].device_kind, count=len(devices))
  if platform != 'cpu' and name:
    source = roofline.of_target(name)
    peaks = roofline.ACCELERATORS[source]
    return Machine(
      **facts,
      memory=topology.known_bytes(name),
      flops=peaks.flops,
      memory_rate=peaks.memory_rate,
      link_rate=peaks.link_rate,
      source=source,
    )
  return Machine(
    **facts,
    memory=_memory(devices[0], len(devices)),
    flops=product_rate('float32' if platform == 'cpu' else 'bfloat16'),
    memory_rate=copy_rate(),
    link_rate=0.0,
    source='measured',
  )


def _memory(device: jax.Device, count: int) -> int:
  statistics = device.memory_stats() or {}
  if 'bytes_limit' in statistics:
    return statistics['bytes_limit']
  # Devices of a CPU share the host's memory, and keep no statistics.
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // count


def product_rate(dtype: str) -> float:
  """Operations a second of a large product of random matrices on one device."""
  size, _ = _SIZES.get(sharding.platform(), _SIZES['other'])
  # Random numbers: products of ones take less power, and run faster than any real ones.
  a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
  product = jax.jit(lambda a, b: a @ b)
  seconds = interleaved({'product': functools.partial(product, a, b)}, rounds=5)['product']
  return 2 * size**3 / seconds


def copy_rate() -> float:
  """Bytes a second of an array that is read and written once, on one device."""
  _, count = _SIZES.get(sharding.platform(), _SIZES['other'])
  array = jnp.ones(count, jnp.float32)
  moved = jax.jit(lambda array: array * 1.5)
  seconds = interleaved({'copy': functools.partial(moved, array)}, rounds=5)['copy']
  return 2 * array.nbytes / seconds


def measure(setting: Setting) -> Iterator[Row]:
  """Yields the memory that jax may use, and the rates of products, memory and the host's link."""
  machine = setting.machine
  gib = 2**30
  yield rows.fact(_PART, f'memory of each {machine.kind}', machine.memory / gib, 'GiB')
  statistics = jax.devices()[0].memory_stats() or {}
  if machine.published and 'bytes_limit' in statistics:
    usable = statistics['bytes_limit'] / machine.memory
    yield rows.claim(
      _PART,
      'memory that jax takes',
      usable >= fit.HEAD_ROOM,
      f'{usable:.0%} of the device, where the plan counts on {fit.HEAD_ROOM:.0%}: set '
      'XLA_PYTHON_CLIENT_MEM_FRACTION',
      usable=usable,
    )
  for dtype in dict.fromkeys((setting.dtype, 'float32')):
    row = rows.fact(_PART, f'product of matrices, {dtype}', product_rate(dtype), 'FLOP/s')
    # The data sheet's rate is that of 16 bits.
    if dtype == 'bfloat16':
      row = rows.against_bound(row, machine.flops, setting.least('product'))
    yield row
  row = rows.fact(_PART, 'memory read and written', copy_rate(), 'B/s')
  yield rows.against_bound(row, machine.memory_rate, setting.least('memory'))
  size = _HOST_BYTES.get(machine.platform, _HOST_BYTES['other'])
  numbers = np.ones(size, np.int8)
  to_device = functools.partial(jax.device_put, numbers, jax.devices()[0])
  seconds = interleaved({'put': to_device}, rounds=3)['put']
  yield rows.fact(_PART, 'host to device', size / seconds, 'B/s')
  if machine.count > 1:
    yield _exchange(setting)


def _exchange(setting: Setting) -> Row:
  """Times a sum over all devices."""
  machine = setting.machine
  mesh = sharding.make_mesh(fsdp=machine.count)
  entries = _SIZES.get(machine.platform, _SIZES['other'])[1] // 8
  place = jax.NamedSharding(mesh, jax.P('fsdp'))
  array = jax.device_put(jnp.ones((machine.count, entries), jnp.float32), place)
  total = jax.jit(
    jax.shard_map(
      lambda part: jax.lax.psum(part, 'fsdp'),
      mesh=mesh,
      in_specs=jax.P('fsdp'),
      out_specs=jax.P(),
      check_vma=False,
    )
  )
  seconds = interleaved({'sum': functools.partial(total, array)}, rounds=3)['sum']
  # A ring sends each device's part on twice, less what stays.
  sent = 2 * (machine.count - 1) / machine.count * entries * 4
  row = rows.fact(_PART, f'sum over {machine.count} devices, sent by each', sent / seconds, 'B/s')
  if not machine.link_rate:
    return row
  return rows.against_bound(row, machine.link_rate, None)
