"""Looks at a machine: what it has for a run, and what is in the way."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shutil
from typing import Any

import jax

from dcore_jax import distributed
from dcore_jax.config import RunConfig
from dcore_jax.plan import fit, topology

_PACKAGES = ('dcore_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers')
# What is installed only on request: module, and what it is for.
_OPTIONAL = {
  'uvicorn': ('serve', 'the server'),
  'torch': ('test', 'comparisons with transformers'),
  'libtpu': ('aot', 'plans for TPU slices'),
  'jax_cuda12_plugin': ('cuda or aot', 'NVIDIA GPUs, or plans for them'),
}
_GIB = 2**30
_LEAST_DISK = 5 * _GIB  # checkpoints of the smallest run and its programs take less
_LEAST_MEMORY = 4 * _GIB  # a process of the smallest run


def examine(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what there is.

  Args:
    workdir: where results would go; it need not exist.

  Returns:
    {'versions', 'devices', 'memory', 'disk', 'cache', 'optional', 'problems'}: sizes in bytes;
    'problems' are sentences that say what to do.
  """
  problems = []
  devices = [_device(device) for device in jax.local_devices()]
  memory = _memory()
  if memory['free'] < _LEAST_MEMORY:
    problems.append(f'{memory["free"] / _GIB:.1f} GiB of memory are free; end other programs')
  disk = _disk(workdir)
  if not disk['writable']:
    problems.append(f'{workdir} cannot be written; name another folder by --workdir')
  if disk['free'] < _LEAST_DISK:
    problems.append(f'{disk["free"] / _GIB:.1f} GiB are free at {workdir}; name another --workdir')
  gpus = pathlib.Path('/proc/driver/nvidia').exists()
  if gpus and all(device['platform'] == 'cpu' for device in devices):
    problems.append('there is an NVIDIA driver, but jax uses the CPU: pip install -e .[cuda]')
  return {
    'versions': {'python': platform.python_version()} | _versions(),
    'devices': devices,
    'memory': memory,
    'disk': disk,
    'cache': _cache(),
    'optional': _optional(),
    'problems': problems,
  }


def _versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _device(device: jax.Device) -> dict[str, Any]:
  # A CPU keeps no statistics.
  statistics = device.memory_stats() or {}
  return {
    'platform': device.platform,
    'kind': device.device_kind,
    'memory': statistics.get('bytes_limit'),
  }


def _memory() -> dict[str, int]:
  page = os.sysconf('SC_PAGE_SIZE')
  free = page * os.sysconf('SC_AVPHYS_PAGES')
  # Files that Linux keeps in memory make room when it is wanted.
  table = pathlib.Path('/proc/meminfo')
  if table.exists():
    [available] = re.findall(r'^MemAvailable: +(\d+) kB', table.read_text(), re.MULTILINE) or [0]
    free = max(free, 1024 * int(available))
  return {'total': page * os.sysconf('SC_PHYS_PAGES'), 'free': free}


def _disk(workdir: pathlib.Path) -> dict[str, Any]:
  folder = workdir.absolute()
  while not folder.exists():
    folder = folder.parent
  return {
    'folder': str(workdir),
    'free': shutil.disk_usage(folder).free,
    'writable': os.access(folder, os.W_OK),
  }


def _cache() -> dict[str, Any]:
  distributed.keep_programs()
  folder = jax.config.jax_compilation_cache_dir
  if not folder:
    return {'folder': None, 'programs': 0, 'bytes': 0}
  files = [path for path in pathlib.Path(folder).rglob('*') if path.is_file()]
  size = sum(path.stat().st_size for path in files)
  return {'folder': folder, 'programs': len(files), 'bytes': size}


def _optional() -> dict[str, dict[str, Any]]:
  found = {}
  for module, (extra, purpose) in _OPTIONAL.items():
    there = importlib.util.find_spec(module) is not None
    found[module] = {'installed': there, 'extra': extra, 'for': purpose}
  return found


def examine_config(config: RunConfig) -> dict[str, Any]:
  """Compiles the steps of a run for the devices of this machine.

  Returns:
    {'target', 'fits', 'plan'}: the devices by their name in `experiments.plan`, whether every step
    fits, and the plan as a table.

  Raises:
    ValueError: devices that no plan knows; `experiments.plan` has their list.
  """
  target = topology.name_of(jax.devices())
  plans = fit.plan(config, target)
  return {
    'target': target,
    'fits': all(step.fits for step in plans),
    'plan': fit.table(plans, target),
  }


def told(found: dict[str, Any]) -> str:
  """Returns what was found as text for a person."""
  versions = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
  memory = found['memory']
  disk = found['disk']
  cache = found['cache']
  lines = [versions]
  for device in found['devices']:
    size = f', {device["memory"] / _GIB:.1f} GiB' if device['memory'] else ''
    lines.append(f'device: {device["platform"]} {device["kind"]}{size}')
  lines.append(f'memory: {memory["free"] / _GIB:.1f} of {memory["total"] / _GIB:.1f} GiB are free')
  lines.append(f'disk: {disk["free"] / _GIB:.1f} GiB are free at {disk["folder"]}')
  lines.append(
    f'compiled programs: {cache["programs"]} files, {cache["bytes"] / _GIB:.2f} GiB, in '
    f'{cache["folder"] or "no folder: DCORE_CACHE is empty"}'
  )
  for module, entry in found['optional'].items():
    there = 'installed' if entry['installed'] else f'not installed (extra {entry["extra"]})'
    lines.append(f'{module}, for {entry["for"]}: {there}')
  if 'plan' in found:
    verdict = 'fits' if found['fits'] else 'DOES NOT FIT'
    lines += ['', f'on {found["target"]} the config {verdict}', found['plan']]
  lines += [f'problem: {problem}' for problem in found['problems']]
  if not found['problems']:
    lines.append('nothing is in the way')
  return '\n'.join(lines)
