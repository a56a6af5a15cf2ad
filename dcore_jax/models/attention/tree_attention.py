"""Attention of packed rows: one function, several implementations, chosen by name.

| name | what it is | memory |
|---|---|---|
| reference | the whole score matrix | T^2 |
| blockwise | plain JAX with a hand-written gradient, skips blocks that hold nothing | T |
| triton | our Pallas kernel for NVIDIA GPUs | T |
| tpu | our Pallas kernel for TPUs | T |

'auto' is the kernel of the backend, blockwise on a CPU.
"""

from collections.abc import Callable

import jax

from dcore_jax import sharding
from dcore_jax.models.attention import blockwise, gpu, reference, tpu, tree_kernels

TreeAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _reference(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, end_BT: jax.Array
) -> jax.Array:
  return reference.attend(
    q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), reference.tree_mask(end_BT)
  )


IMPLEMENTATIONS: dict[str, TreeAttention] = {
  'reference': _reference,
  'blockwise': blockwise.tree_attention,
  'triton': gpu.tree_attention,
  'tpu': tpu.tree_attention,
}
SAVED = tree_kernels.SAVED  # what a rematerialisation policy may keep of a kernel
_AUTO = {'cpu': 'blockwise', 'gpu': 'triton', 'tpu': 'tpu'}


def resolve(name: str) -> str:
  """The implementation that `name` stands for on `sharding.platform()`; ValueError for one that
  does not exist.
  """
  if name == 'auto':
    return _AUTO.get(sharding.platform(), 'blockwise')
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention = {name!r} is not one of 'auto', {', '.join(map(repr, sorted(IMPLEMENTATIONS)))}"
    )
  return name


def attend(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  end_BT: jax.Array,
  implementation: str = 'auto',
) -> jax.Array:
  """softmax(q k / sqrt(H)) v, query i over the keys j <= i < end[j] -> [B, T, N, H].

  Each token must see itself, end[i] > i. Under a mesh (`jax.set_mesh`) rows are split over its
  batch axes and heads over its tensor axis, and each device runs the implementation on its own
  part: no compiler can split a kernel.
  """
  keys = ('batch', 'length', 'kv_heads', 'head_dim')
  return sharding.on_shards(
    IMPLEMENTATIONS[resolve(implementation)],
    (q_BTNH, k_BTKH, v_BTKH, end_BT.astype('int32')),
    (('batch', 'length', 'heads', 'head_dim'), keys, keys, ('batch', 'length')),
  )
