"""Attention of packed rows: one function, several implementations, chosen by name.

| name | what it is | memory |
|---|---|---|
| reference | the whole score matrix | T^2 |
| blockwise | plain JAX with a hand-written gradient, skips blocks that nobody sees | T |
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
  """Brings keys and values into the layout of `reference.attend`, and makes the mask."""
  return reference.attend(
    q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), reference.tree_mask(end_BT)
  )


# Their shared signature is the contract that tests/models/attention/kernel_contract.py checks.
IMPLEMENTATIONS: dict[str, TreeAttention] = {
  'reference': _reference,
  'blockwise': blockwise.tree_attention,
  'triton': gpu.tree_attention,
  'tpu': tpu.tree_attention,
}
# The name under which a rematerialisation policy may keep a kernel's output.
SAVED = tree_kernels.SAVED  # what a rematerialisation policy may keep of a kernel
# Where a backend has no kernel of its own, plain JAX still skips invisible blocks.
_AUTO = {'cpu': 'blockwise', 'gpu': 'triton', 'tpu': 'tpu'}


def resolve(name: str) -> str:
  """Returns the implementation that `name` stands for on `sharding.platform()`.

  Raises:
    ValueError: there is no such implementation.
  """
  if name == 'auto':
    # The platform of the mesh, not of the process: a plan is compiled for devices that are not
    # there.
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
  batch axes and heads over its tensor axis.
  """
  keys = ('batch', 'length', 'kv_heads', 'head_dim')
  # No compiler can split a kernel, so that each device runs the implementation on its own part.
  # Rows and heads do not depend on each other: nothing is exchanged.
  return sharding.on_shards(
    IMPLEMENTATIONS[resolve(implementation)],
    # The kernels' index arithmetic is int32.
    (q_BTNH, k_BTKH, v_BTKH, end_BT.astype('int32')),
    (('batch', 'length', 'heads', 'head_dim'), keys, keys, ('batch', 'length')),
  )
