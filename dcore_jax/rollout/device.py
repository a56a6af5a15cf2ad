"""Passes as one program each, for accelerators and meshes (placeholder while the CPU path is tested)."""

from jax.sharding import NamedSharding

import jax
from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig


def cache_placement(params: decoder.Params, config: DecoderConfig) -> NamedSharding | None:
  held = getattr(params['embed'], 'sharding', None)  # numpy arrays have none
  if not isinstance(held, NamedSharding) or held.mesh.size == 1:
    return None
  axes = ('layers', 'length', 'kv_heads', 'length', 'head_dim')
  shape = (1, 1, config.num_key_value_heads, 1, 1)
  return NamedSharding(held.mesh, sharding.partition_spec(axes, shape, held.mesh))


class MeshExecutor:
  pass
