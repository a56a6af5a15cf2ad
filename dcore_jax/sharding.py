"""Where arrays live: logical axes, and the mesh axes (data, fsdp, tensor) that split them.

Parameters and activations name their logical axes. `data` replicates parameters and splits the
batch, `fsdp` splits parameters and the batch, `tensor` splits heads, feed-forward layer and
vocabulary. Training runs under a mesh in context (`jax.set_mesh`); without one, everything here is
the one-device case.
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
  # The inner dimension of LoRA's two factors.
  'rank': None,
  'length': None,
  'micro_batch': None,
  # The width of activations. It is the same dimension as `embed`, which parameters split over fsdp;
  # activations keep it whole, since fsdp already splits their rows.
  'hidden': None,
  # Rows of the rollout engine, which holds them whole on every device.
  'lanes': None,
  # The batch where every device of fsdp holds its own columns of all rows.
  'shared_batch': 'data',
}


def mesh_axes(axis: str) -> tuple[str, ...]:
  """Returns the mesh axes that split a logical axis; ValueError for an unknown one."""
  if axis not in RULES:
    raise ValueError(f'unknown logical axis {axis!r}; known are {sorted(RULES)}')
  # One form for all three kinds of rule: a tuple, empty where the axis is whole.
  target = RULES[axis]
  return (target,) if isinstance(target, str) else target or ()


def make_mesh(
  data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Makes a mesh of data * fsdp * tensor devices; one size may be -1, for what the others leave.

  Raises:
    ValueError: sizes that do not give the number of devices, or more than one size of -1.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    # The product with -1 is minus the product of the others; 0 is caught below.
    sizes[sizes.index(-1)] = len(devices) // max(1, -math.prod(sizes))
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f'data={data} * fsdp={fsdp} * tensor={tensor} does not give the {len(devices)} devices'
    )
  # Auto: the compiler propagates shardings from parameters and `constrain` (GSPMD).
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(axes: Sequence[str], shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Returns the partition of one array.

  Raises:
    ValueError: an unknown axis, two logical axes on one mesh axis, or a size that does not divide.
  """
  owner = {}
  entries = []
  for axis, size in zip(axes, shape, strict=True):
    names = mesh_axes(axis)
    ways = 1
    for name in names:
      # An array cannot be split twice over the same devices.
      if name in owner:
        raise ValueError(
          f'logical axes {owner[name]!r} and {axis!r} both map to mesh axis {name!r}'
        )
      owner[name] = axis
      ways *= mesh.shape[name]
    # `shard_map` cannot split unevenly, and elsewhere XLA would compute with padding.
    if size % ways:
      raise ValueError(
        f'logical axis {axis!r} of size {size} does not divide over '
        f'mesh axes {names} of size {ways}'
      )
    # Mesh axes of one device are left out, and so are trailing axes that are whole. jax describes
    # what a step returns in this way; a state that comes back described otherwise would be compiled
    # for anew.
    split = tuple(name for name in names if mesh.shape[name] > 1)
    entries.append(split if len(split) > 1 else split[0] if split else None)
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def shardings(abstract_tree: Any, mesh: Mesh, memory_kind: str | None = None) -> Any:
  """Makes a tree of NamedShardings from a tree of specs with `.axes` and `.shape`.

  `models.decoder.abstract_params` is such a tree.
  """
  return jax.tree.map(
    lambda spec: NamedSharding(
      mesh, partition_spec(spec.axes, spec.shape, mesh), memory_kind=memory_kind
    ),
    abstract_tree,
  )


def abstract(specs: Any, mesh: Mesh) -> Any:
  """Makes ShapeDtypeStructs split over the mesh: arrays that do not exist, to compile with."""
  return jax.tree.map(
    lambda spec, place: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place),
    specs,
    shardings(specs, mesh),
  )


def constrain(array: jax.Array, *axes: str) -> jax.Array:
  """Splits an array over the mesh in context as its axes say; inside of jit.

  Without a mesh it is returned as it is.
  """
  # The abstract mesh is known while a function is traced, also for devices that are not there.
  mesh = jax.sharding.get_abstract_mesh()
  return (
    array
    if mesh.empty
    else jax.lax.with_sharding_constraint(array, partition_spec(axes, array.shape, mesh))
  )


def constrain_tree(tree: Any, specs: Any) -> Any:
  """Applies `constrain` to a tree of arrays, with a tree of specs beside it."""
  return jax.tree.map(lambda spec, array: constrain(array, *spec.axes), specs, tree)


def on_shards(
  function: Callable[..., jax.Array], arrays: Sequence[Any], axes: Sequence[Sequence[str]]
) -> jax.Array:
  """Computes function(*arrays); under a mesh, each device on its part of them.

  It serves what XLA cannot split, or would gather first. `axes` names the axes of each of the first
  arrays; the others are whole everywhere. The result is split like the first array.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(*arrays)
  specs = []
  # Not strict: only the first arrays have names.
  for names, array in zip(axes, arrays, strict=False):
    specs.append(partition_spec(names, array.shape, mesh))
  whole = [PartitionSpec()] * (len(arrays) - len(specs))
  # Unchecked: jax cannot follow a kernel, whose result varies by device as its inputs do.
  return jax.shard_map(function, in_specs=(*specs, *whole), out_specs=specs[0], check_vma=False)(
    *arrays
  )


def shards(axis: str = 'batch') -> int:
  """Returns the number of parts that the mesh in context splits a logical axis into; else 1."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays [A, R or M, ...], split along their second axis."""
  # A size that divides in any case: only the axis names matter here.
  spec = partition_spec(
    ('batch',), (math.prod(mesh.shape[name] for name in mesh_axes('batch')),), mesh
  )
  # Axis A is a loop over micro-batches, and stays whole.
  return NamedSharding(mesh, PartitionSpec(None, *spec))


def place_batch(batch: Any, *, whole: bool = False) -> Any:
  """Places host arrays [A, R or M, ...], split along their second axis, on the mesh in context.

  The mesh spans all hosts. Each host gives its own part of the rows, or with `whole` all of them.
  Without a mesh the batch is returned as it is.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return batch
  rows = batch_sharding(mesh)

  def place(leaf):
    """Places one array, of which this host has its part or the whole."""
    leaf = np.asarray(leaf)
    # The global shape follows from the hosts' parts, unless each host has the whole.
    return jax.make_array_from_process_local_data(rows, leaf, leaf.shape if whole else None)

  return jax.tree.map(place, batch)


def platform(mesh: Mesh | None = None) -> str:
  """What a program is compiled for: 'cpu', 'gpu' or 'tpu'.

  The devices are those of `mesh`, else of the mesh in context, else of the process.
  """
  # A plan's mesh has no real devices, so that its platform is asked first.
  context = jax.sharding.get_abstract_mesh()
  if mesh is not None:
    name = mesh.devices.flat[0].platform
  elif not context.empty and context.abstract_device:
    name = context.abstract_device.platform
  else:
    name = jax.default_backend()
  return 'gpu' if name == 'cuda' else name
