"""The matrices of a layer and their products, in three forms: plain, turned and adapted.

A matrix is [*in, *out], with heads as axes of their own. Shape letters: config.py; O and I are
outputs and inputs.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# How many leading axes of a projection's weight are contracted. 'o' contracts (heads, head_dim).
INPUTS = {
  'q': 1,
  'k': 1,
  'v': 1,
  'o': 2,
  'gate': 1,
  'up': 1,
  'down': 1,
}


class Turned(NamedTuple):
  """A transposed projection, outputs first.

  It serves the few rows of a decode step on a CPU; `turned_product` says why.
  """

  matrix: jax.Array  # [*out, *in]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
  """A matrix with a low-rank update beside it: weight + scale a b (LoRA, Hu et al. 2021).

  The sum is not formed in a training pass, so that there is neither a copy of the matrix nor a
  gradient of its size. In a stack of layers each array has the layers as its first axis.

  Attributes:
    weight: [*in, *out].
    a: [*in, rank].
    b: [rank, *out].
    scale: a number, which is compiled in.
  """

  weight: Any
  a: Any
  b: Any
  scale: float = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix."""
    return self.weight.shape


def is_adapted(leaf: Any) -> bool:
  """Tells whether something in a tree of parameters is an adapted matrix."""
  return isinstance(leaf, Adapted)


def adapter_specs(spec: Any, inputs: int, rank: int) -> tuple[Any, Any]:
  """Returns the specs of `Adapted.a` and `Adapted.b` beside a stacked matrix [L, *in, *out].

  They are float32, whatever the matrix is, since they are what is trained. `a` is drawn with the
  standard deviation 1 / sqrt(3 in) that PEFT draws it with, and `b` is zero: at first the sum is
  the matrix itself.
  """
  split = 1 + inputs
  width = math.prod(spec.shape[1:split])
  a = dataclasses.replace(
    spec,
    shape=(*spec.shape[:split], rank),
    dtype=jnp.dtype(jnp.float32),
    axes=(*spec.axes[:split], 'rank'),
    init=1 / math.sqrt(3 * width),
  )
  b = dataclasses.replace(
    spec,
    shape=(spec.shape[0], rank, *spec.shape[split:]),
    dtype=jnp.dtype(jnp.float32),
    axes=(spec.axes[0], 'rank', *spec.axes[split:]),
    init=0.0,
  )
  return a, b


def merged(weight: Any, dtype: Any = None) -> jax.Array:
  """Returns the matrix of one layer as one array; one that is not adapted is returned as it is.

  The sum is formed in float32 and rounded once, to `dtype`; default: that of the weight.
  """
  if not is_adapted(weight):
    return weight
  # A product of two matrices in full float32, which accelerators would round to fewer bits.
  rank = weight.b.shape[0]
  update = jnp.matmul(
    weight.a.astype(jnp.float32).reshape(-1, rank),
    weight.b.astype(jnp.float32).reshape(rank, -1),
    precision=jax.lax.Precision.HIGHEST,
  )
  total = weight.weight.astype(jnp.float32) + weight.scale * update.reshape(weight.shape)
  return total.astype(dtype or weight.weight.dtype)


def turned_product(matrix_OI: jax.Array, x_MI: jax.Array) -> jax.Array:
  """float32 [M, O] = x matrix^T, computed as matrix x^T.

  XLA's CPU compiler packs the right-hand operand, and packing the few rows costs less than packing
  the weights. 16 products of 512 x 1536 on 2 cores take, in ms, with x @ W in brackets: 2.0 (2.1)
  for 1 row, 4.6 (4.8) for 2, 3.9 (8.4) for 4, 4.8 (9.6) for 8, 7.1 (12.5) for 16, 11.0 (19.0) for
  32.
  """
  # The barriers keep the compiler from transposing the product back.
  columns_IM = jax.lax.optimization_barrier(x_MI.T)
  return jax.lax.optimization_barrier(
    jnp.matmul(matrix_OI, columns_IM, preferred_element_type=jnp.float32)
  ).T


def project(x: jax.Array, weight: jax.Array | Turned | Adapted, inputs: int = 1) -> jax.Array:
  """Multiplies [B, T, *in] with [*in, *out]; `inputs` counts the axes *in of the weight."""
  B, T = x.shape[:2]
  if isinstance(weight, Adapted):
    # From the right: x a has `rank` numbers a token, so that scaling it costs nothing.
    low = weight.scale * project(x, weight.a, inputs)
    return project(x, weight.weight, inputs) + project(low, weight.b)
  if isinstance(weight, Turned):
    out = weight.matrix.shape[:-inputs]
    product = turned_product(weight.matrix.reshape(math.prod(out), -1), x.reshape(B * T, -1))
    return product.astype(x.dtype).reshape(B, T, *out)
  # A product of two matrices, not a three-dimensional einsum: of that, XLA's CPU compiler makes a
  # weight gradient that first copies its operand transposed, fused with the activation's derivative
  # (SwiGLU block, 2,304 tokens: 615 ms of CPU time against 346 ms).
  contracted = math.prod(weight.shape[:inputs])
  out = x.reshape(B * T, contracted) @ weight.reshape(contracted, -1)
  return out.reshape(B, T, *weight.shape[inputs:])
