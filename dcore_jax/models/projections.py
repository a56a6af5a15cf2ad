"""The matrices of a layer and their products, in three forms: plain, turned and adapted.

A matrix is [*in, *out], with heads as axes of their own. Shape letters: config.py; O and I are
outputs and inputs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

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
# Projections that have the same inputs, which `turn_layer` joins.
_JOINED = (('q', 'k', 'v'), ('gate', 'up'))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
  """Transposed projections of the same inputs as one matrix, outputs first.

  It serves the few rows of a decode step on a CPU; `turned_product` says why. One product in the
  place of several is less to compile and to dispatch.

  Attributes:
    matrix: [O, I], with the rows of one projection behind those of another.
    outs: the shape *out of each projection; compiled in.
  """

  matrix: jax.Array
  outs: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={'static': True})


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
    [product] = _products(x, weight)
    return product
  # A product of two matrices, not a three-dimensional einsum: of that, XLA's CPU compiler makes a
  # weight gradient that first copies its operand transposed, fused with the activation's derivative
  # (SwiGLU block, 2,304 tokens: 615 ms of CPU time against 346 ms).
  contracted = math.prod(weight.shape[:inputs])
  out = x.reshape(B * T, contracted) @ weight.reshape(contracted, -1)
  return out.reshape(B, T, *weight.shape[inputs:])


def project_all(x: jax.Array, layer: Mapping[str, Any], names: tuple[str, ...]) -> list[jax.Array]:
  """Multiplies [B, T, *in] with several matrices of a layer, which may be joined."""
  joined = layer.get(_key(names))
  if joined is not None:
    return _products(x, joined)
  return [project(x, layer[name]) for name in names]


def _products(x: jax.Array, weight: Turned) -> list[jax.Array]:
  """Returns [B, T, *out] for each of the joined projections."""
  B, T = x.shape[:2]
  product = turned_product(weight.matrix, x.reshape(B * T, -1)).astype(x.dtype)
  found = []
  first = 0
  for out in weight.outs:
    width = math.prod(out)
    found.append(product[:, first : first + width].reshape(B, T, *out))
    first += width
  return found


def _key(names: tuple[str, ...]) -> str:
  """Returns the name of several projections that are joined."""
  return '+'.join(names)


def turn_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
  """Transposes the projections of a layer, and joins those of `_JOINED`; the rest stays.

  Adapted matrices are merged.
  """
  rest = dict(layer)
  turned = {}
  for names in (*_JOINED, ('o',), ('down',)):
    matrices = []
    outs = []
    for name in names:
      weight = merged(rest.pop(name))
      inputs = INPUTS[name]
      out = weight.shape[inputs:]
      matrices.append(weight.reshape(-1, math.prod(out)).T)
      outs.append(out)
    turned[_key(names)] = Turned(jnp.concatenate(matrices), tuple(outs))
  return rest | turned
