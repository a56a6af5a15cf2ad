"""Where arrays live: logical axes, named by parameters and activations, and the mesh axes (data,
fsdp, tensor) that split them.

`data` replicates parameters and splits the batch, `fsdp` splits parameters and the batch, `tensor`
splits heads, ffn and vocabulary. Training runs under a mesh in context (`jax.set_mesh`); without
one, everything here is the one-device case.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'fsdp', 'tensor')

# None: the axis is kept whole. A tuple: split over the product of several mesh axes.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  'batch': ('data', 'fsdp'),
  'embed': 'fsdp',
  'vocab': 'tensor',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'head_dim': None,
  'layers': None,
  'norm': None,
  'length': None,
  'micro_batch': None,
  'hidden': None,  # the width of activations, of which `embed` is the side in parameters
  'lanes': None,  # rows of the rollout engine
  'shared_batch': 'data',  # rows of which every device of fsdp holds its own columns
}


def mesh_axes(axis: str) -> tuple[str, ...]:
  """The mesh axes that a logical axis is split over; ValueError for an unknown one."""
  if axis not in RULES:
    raise ValueError(f'unknown logical axis {axis!r}; known are {sorted(RULES)}')
  target = RULES[axis]
  return (target,) if isinstance(target, str) else target or ()


def make_mesh(
  data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh of data * fsdp * tensor devices, GSPMD style; one size may be -1, for what the others
  leave.

  Raises:
    ValueError: sizes that do not give the number of devices, or more than one of them open.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    sizes[sizes.index(-1)] = len(devices) // max(1, -math.prod(sizes))
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f'data={data} * fsdp={fsdp} * tensor={tensor} does not give the {len(devices)} devices'
    )
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(axes: Sequence[str], shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """One array's partition; ValueError: an unknown axis, two axes on one mesh axis, a size that does
  not divide.

  Mesh axes of one device are left out, and so are trailing axes that are whole: this is how jax
  describes what a step returns, and a state that comes back described otherwise would be compiled
  for anew.
  """
  owner = {}
  entries = []
  for axis, size in zip(axes, shape, strict=True):
    names = mesh_axes(axis)
    ways = 1
    for name in names:
      if name in owner:
        raise ValueError(
          f'logical axes {owner[name]!r} and {axis!r} both map to mesh axis {name!r}'
        )
      owner[name] = axis
      ways *= mesh.shape[name]
    if size % ways:
      raise ValueError(
        f'logical axis {axis!r} of size {size} does not divide over '
        f'mesh axes {names} of size {ways}'
      )
    split = tuple(name for name in names if mesh.shape[name] > 1)
    entries.append(split if len(split) > 1 else split[0] if split else None)
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def shardings(abstract_tree: Any, mesh: Mesh, memory_kind: str | None = None) -> Any:
  """The tree of NamedShardings for a tree of specs with `.axes` and `.shape`
  (models.decoder.abstract_params).
  """
  return jax.tree.map(
    lambda spec: NamedSharding(
      mesh, partition_spec(spec.axes, spec.shape, mesh), memory_kind=memory_kind
    ),
    abstract_tree,
  )


def abstract(specs: Any, mesh: Mesh) -> Any:
  """Arrays that are not there, for compiling: a tree of ShapeDtypeStructs split over the mesh."""
  return jax.tree.map(
    lambda spec, place: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place),
    specs,
    shardings(specs, mesh),
  )


def constrain(array: jax.Array, *axes: str) -> jax.Array:
  """The array, split over the mesh in context as its axes say; inside of jit.

  Without a mesh it is returned as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return (
    array
    if mesh.empty
    else jax.lax.with_sharding_constraint(array, partition_spec(axes, array.shape, mesh))
  )


def constrain_tree(tree: Any, specs: Any) -> Any:
  """`constrain` for a tree of arrays with a tree of specs beside it."""
  return jax.tree.map(lambda spec, array: constrain(array, *spec.axes), specs, tree)


def on_shards(
  function: Callable[..., jax.Array], arrays: Sequence[Any], axes: Sequence[Sequence[str]]
) -> jax.Array:
  """function(*arrays), under a mesh by each device on its part of them; for what XLA cannot split,
  or would gather first.

  `axes` names the axes of each of the first arrays, the others are whole everywhere; the result is
  like the first array.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(*arrays)
  specs = []
  # Not strict: only the first arrays have names.
  for names, array in zip(axes, arrays, strict=False):
    specs.append(partition_spec(names, array.shape, mesh))
  whole = [PartitionSpec()] * (len(arrays) - len(specs))
  return jax.shard_map(function, in_specs=(*specs, *whole), out_specs=specs[0], check_vma=False)(
    *arrays
  )


def shards(axis: str = 'batch') -> int:
  """Parts that the mesh in context splits a logical axis into; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays [A, R or M, ...] with rows or loss tokens along their second axis."""
  spec = partition_spec(
    ('batch',), (math.prod(mesh.shape[name] for name in mesh_axes('batch')),), mesh
  )
  return NamedSharding(mesh, PartitionSpec(None, *spec))


def place_batch(batch: Any, *, whole: bool = False) -> Any:
  """Host arrays [A, R or M, ...] as arrays split along their second axis over the mesh in context,
  which spans all hosts.

  Each host gives its own part of the rows, or with `whole` all of them. Without a mesh the batch is
  returned as it is.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return batch
  rows = batch_sharding(mesh)

  def place(leaf):
    leaf = np.asarray(leaf)
    return jax.make_array_from_process_local_data(rows, leaf, leaf.shape if whole else None)

  return jax.tree.map(place, batch)


def platform(mesh: Mesh | None = None) -> str:
  """What a program is compiled for: 'cpu', 'gpu' or 'tpu'.

  The devices are those of `mesh`, else of the mesh in context, else of the process.
  """
  context = jax.sharding.get_abstract_mesh()
  if mesh is not None:
    name = mesh.devices.flat[0].platform
  elif not context.empty and context.abstract_device:
    name = context.abstract_device.platform
  else:
    name = jax.default_backend()
  return 'gpu' if name == 'cuda' else name
