"""Where arrays live: logical axes, which parameters name, and the mesh axes (data, fsdp, tensor) that split them.

`data` replicates parameters and splits the batch, `fsdp` splits parameters and the batch, `tensor` splits heads, ffn
and vocabulary.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'fsdp', 'tensor')

# None: the axis is kept whole. A tuple: split over the product of several mesh axes.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    'batch': ('data', 'fsdp'), 'embed': 'fsdp',
    'vocab': 'tensor', 'heads': 'tensor', 'kv_heads': 'tensor', 'mlp': 'tensor',
    'head_dim': None, 'layers': None, 'norm': None, 'length': None,
}


def mesh_axes(axis: str) -> tuple[str, ...]:
  """The mesh axes that a logical axis is split over; ValueError for an unknown one."""
  if axis not in RULES:
    raise ValueError(f'unknown logical axis {axis!r}; known are {sorted(RULES)}')
  target = RULES[axis]
  return (target,) if isinstance(target, str) else target or ()


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of data * fsdp * tensor devices, GSPMD style; ValueError where the number of devices differs."""
  devices = jax.devices() if devices is None else devices
  if data * fsdp * tensor != len(devices):
    raise ValueError(f'data={data} * fsdp={fsdp} * tensor={tensor} does not give the {len(devices)} devices')
  return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """One array's partition; ValueError: an unknown axis, two axes on one mesh axis, a size that does not divide."""
  owner, entries = {}, []
  for axis, size in zip(axes, shape, strict=True):
    names = mesh_axes(axis)
    ways = 1
    for name in names:
      if name in owner:
        raise ValueError(f'logical axes {owner[name]!r} and {axis!r} both map to mesh axis {name!r}')
      owner[name] = axis
      ways *= mesh.shape[name]
    if size % ways:
      raise ValueError(f'logical axis {axis!r} of size {size} does not divide over mesh axes {names} of size {ways}')
    entries.append(RULES[axis])
  return PartitionSpec(*entries)


def shardings(abstract_tree: Any, mesh: Mesh) -> Any:
  """The tree of NamedShardings for a tree of specs with `.axes` and `.shape` (models.decoder.abstract_params)."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, partition_spec(spec.axes, spec.shape, mesh)), abstract_tree)
