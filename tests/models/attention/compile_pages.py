"""Compiles decode steps over a paged cache for an accelerator that is not there.

    python compile_pages.py v5p:2x2x1 bfloat16:64:128:4 int8:128:128:32 ...

prints a JSON line for each DTYPE:C:H:T: the seconds of compiling, and the footprint of a device. A
step writes one key and value a lane and layer and attends, for 32 lanes with T queries a key head,
in 36 layers of 2,048 pages of C slots and 8 key heads of H a device; int8 is the dtype of the
pages, with queries in bfloat16. A program of its own, since the compilers are plugins and a process
that holds them prints much.
"""

import functools
import json
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dcore_jax import sharding
from dcore_jax.models.attention import pages
from dcore_jax.plan import topology

LAYERS = 36
PAGES = 2048
LANES = 32
LIST = 64  # pages that a lane may read
STEPS = 4

QUERIES = PartitionSpec(None, 'tensor')
CACHE = PartitionSpec(None, None, 'tensor')
WHOLE = PartitionSpec()


class Cache(NamedTuple):
  """Keys and values, and their scales where they are int8."""

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None
  v_scale: jax.Array | None


def write_and_attend(cache, q_BKTH, layer, page_B, slot_B, reads):
  """One layer of a step, on one device: its queries also serve as the new keys and values."""
  new_BKH = q_BKTH[:, :, 0]
  new = (new_BKH, new_BKH)
  if cache.k_scale is not None:
    numbers, scale = pages.quantize(new_BKH)
    new = (numbers, numbers, scale, scale)
  written = [
    pages.write(held, x, layer, page_B, slot_B) for held, x in zip(cache, new, strict=False)
  ]
  cache = Cache(*written, *[None] * (4 - len(written)))
  part = pages.partial_pages(q_BKTH, cache.k, cache.v, layer, reads, cache.k_scale, cache.v_scale)
  return cache, pages.finish(part).astype(q_BKTH.dtype)


def steps(mesh, cache, q_BKTH, page_B, slot_B, reads):
  """Some steps of all layers, with the cache in the carry, as the engine's loop has it."""
  split = jax.shard_map(
    write_and_attend,
    mesh=mesh,
    in_specs=(CACHE, QUERIES, *[WHOLE] * 4),
    out_specs=(CACHE, QUERIES),
    check_vma=False,
  )

  prepared = pages.prepare(reads, cache.k)

  def layer_step(carry, layer):
    """One layer."""
    return split(*carry, layer, page_B, slot_B, prepared), None

  def step(carry, _):
    """One step."""
    return jax.lax.scan(layer_step, carry, jnp.arange(LAYERS))[0], None

  return jax.lax.scan(step, (cache, q_BKTH), None, length=STEPS)[0]


def arguments(mesh, name, C, H, T):
  """What `steps` is called with, as shapes."""
  K = 8 * mesh.size

  def shape(dtype, sizes, spec=WHOLE):
    """An array split like `spec`."""
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

  pages_of = shape(name, (LAYERS, PAGES, K, C, H), CACHE)
  scale = shape('float32', (LAYERS, PAGES, K, C), CACHE) if name == 'int8' else None
  lanes = shape('int32', (LANES,))
  queries = shape('bfloat16' if name == 'int8' else name, (LANES, K, T, H), QUERIES)
  reads = pages.PageReads(
    pages_RP=shape('int32', (LANES, LIST)),
    start_R=lanes,
    count_R=lanes,
    position_RT=shape('int32', (LANES, T)),
    limit_R=lanes,
  )
  return Cache(pages_of, pages_of, scale, scale), queries, lanes, lanes, reads


def main(target: str, cases: list[str]) -> None:
  devices = topology.target(target).devices
  mesh = sharding.make_mesh(tensor=len(devices), devices=devices)
  for case in cases:
    name, *sizes = case.split(':')
    with jax.set_mesh(mesh):  # which says what the kernels are compiled for
      begin = time.perf_counter()
      call = jax.jit(functools.partial(steps, mesh), donate_argnums=(0,))
      lowered = call.lower(*arguments(mesh, name, *map(int, sizes)))
      compiled = lowered.compile()
    report = topology.footprint(compiled)._asdict()
    report['seconds'] = round(time.perf_counter() - begin, 1)
    report['kernel'] = 'page_attention' in lowered.as_text()
    print(json.dumps({'case': case} | report), flush=True)


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2:])
