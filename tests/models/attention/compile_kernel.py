"""Compiles a tree attention kernel, forward and backward, for accelerators that are not there.

    python compile_kernel.py gpu a100:8 4096 16384

prints a JSON line of the footprint per device for each row length: a row of 32 query and 8 key
heads of 128 in bfloat16 on each of the 8 devices. A program of its own, since the compilers are
plugins and a process that holds them prints much.
"""

import functools
import importlib
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dcore_jax import sharding
from dcore_jax.plan import topology


def main(kernel: str, target: str, lengths: list[int]) -> None:
  tree_attention = importlib.import_module(f'dcore_jax.models.attention.{kernel}').tree_attention
  mesh = sharding.make_mesh(fsdp=8, devices=topology.target(target).devices)

  # XLA cannot split a kernel by itself: every device calls it on its own rows.
  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=PartitionSpec('fsdp'),
    out_specs=PartitionSpec('fsdp'),
    check_vma=False,
  )
  def out_and_gradients(q, k, v, end, dout):
    out, pull_back = jax.vjp(lambda q, k, v: tree_attention(q, k, v, end), q, k, v)
    return out, *pull_back(dout)

  for T in lengths:
    rows = NamedSharding(mesh, PartitionSpec('fsdp'))
    q, k = (
      jax.ShapeDtypeStruct((8, T, heads, 128), jnp.bfloat16, sharding=rows) for heads in (32, 8)
    )
    end = jax.ShapeDtypeStruct((8, T), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):  # which says what the kernels are compiled for
      compiled = out_and_gradients.lower(q, k, k, end, q).compile()
    print(json.dumps(topology.footprint(compiled)._asdict() | {'tokens': T}), flush=True)


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], [int(length) for length in sys.argv[3:]])
