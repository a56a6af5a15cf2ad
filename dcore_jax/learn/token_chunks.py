"""Loss tokens in chunks, on the devices of a mesh.

A mesh splits the vocabulary over its tensor axis, and the tokens over its batch axes. What stands
here knows no loss: it cuts, places and adds up.

Letters: M loss tokens, N chunks of C tokens, D hidden, V vocabulary (of one device).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcore_jax import sharding

# Float32 logits of one chunk: 2^25 of them are 128 MiB, or 220 tokens of Qwen3's vocabulary. An
# accelerator needs more tokens a chunk, 2^29 logits, to hide the traffic of adding a chunk's [V, D]
# gradient to the sum: each of its entries takes 8 bytes of traffic and 6 C operations.
_CHUNK_ENTRIES = {'cpu': 2**25, 'gpu': 2**29, 'tpu': 2**29}
# On a TPU a chunk's tokens are a multiple of this, since its tiles hold 8 rows of float32 and 16 of
# bfloat16. Its compiler takes 150 s for each reshape between [32769, 4096] and [9, 3641, 4096], and
# 1 s between [32832, 4096] and [9, 3648, 4096].
_TILE_ROWS = 16


class Split(NamedTuple):
  """Mesh axes as a device sees them inside of shard_map; empty tuples without a mesh.

  Attributes:
    vocab: the axes that split the rows of the head.
    tokens: those that split the loss tokens.
    columns: those that split the columns of the head where it is stored.
  """

  vocab: tuple[str, ...] = ()
  tokens: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()


class Tokens(NamedTuple):
  """What comes with each loss token: leaves [M, ...], cut into chunks [N, C, ...].

  Attributes:
    hidden: hidden states.
    targets: token ids.
    values: pytree; a chunk in which all of them are 0 is skipped.
    saved: of a backward pass that recomputes logits, what the forward pass kept.
    bars: gradients with respect to (log-probability, entropy), of the same pass.
  """

  hidden: jax.Array
  targets: jax.Array
  values: Any
  saved: Any = None
  bars: Any = None


def chunked(tokens: Tokens, V: int, chunk: int | None) -> Tokens:
  """Cuts leaves [M, ...] into [N, C, ...], filled up with zeros."""
  M = tokens.targets.shape[0]
  # A caller's chunk is an upper bound, hence more chunks; the default is a size to stay near.
  if chunk:
    N = math.ceil(M / chunk)
  else:
    # Rounded down, so that a chunk may be nearly twice as large: two halves of 128 tokens take a
    # third longer than 256 tokens at once.
    N = M // max(1, _CHUNK_ENTRIES.get(sharding.platform(), 2**25) // V)
  N = max(1, N)
  C = math.ceil(M / N)
  # A single chunk is not reshaped, so that its size may stay odd.
  if not chunk and N > 1 and sharding.platform() == 'tpu':
    C += -C % _TILE_ROWS

  def cut(leaf: jax.Array) -> jax.Array:
    # Zeros everywhere: a padding token has weight 0 and target 0, which is a valid id.
    fill = [(0, N * C - M)] + [(0, 0)] * (leaf.ndim - 1)
    return jnp.pad(leaf, fill).reshape(N, C, *leaf.shape[1:])

  return jax.tree.map(cut, tokens)


def joined(chunks_NC: jax.Array, M: int) -> jax.Array:
  """Puts chunks together again, [N, C, ...] -> [M, ...], without what filled them up."""
  return chunks_NC.reshape(-1, *chunks_NC.shape[2:])[:M]


def over_chunks(step: Callable, carry: Any, chunks: Any) -> tuple[Any, Any]:
  """Does what `lax.scan` does, without a loop where there is one chunk.

  A loop would keep the compiler from fusing the chunk with what stands around it.
  """
  if jax.tree.leaves(chunks)[0].shape[0] > 1:
    return jax.lax.scan(step, carry, chunks)
  carry, out = step(carry, jax.tree.map(lambda leaf: leaf[0], chunks))
  return carry, jax.tree.map(lambda leaf: leaf[None], out)


def where_used(step: Callable, nothing: Callable, chunks: Tokens) -> Callable:
  """Returns `step`, or of several chunks `nothing` for those whose values are all 0.

  Batches have room for more loss tokens than most of them hold, and the unused room lies at their
  end. Devices that share a vocabulary hold the same values, so all of them take the same branch.
  """
  leaves = jax.tree.leaves(chunks.values)
  if not leaves or leaves[0].shape[0] == 1:
    return step

  def step_or_nothing(carry, part):
    leaves = jax.tree.leaves(part.values)
    # All leaves count: where only the advantage is 0, an objective may still have a KL term.
    used = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in leaves]))
    # `cond` runs one branch, where `jnp.where` would compute the chunk and discard it.
    return jax.lax.cond(used, step, nothing, carry, part)

  return step_or_nothing


def on_devices(
  function: Callable[[Split, Tokens, jax.Array], Any],
  tokens: Tokens,
  head_VD: jax.Array,
  out_kinds: tuple[str, ...],
) -> Any:
  """Calls function(split, tokens, head), under a mesh on each device's part.

  The head is cast to the dtype of the hidden states first. The kinds of results are: 'tokens' split
  along the first axis like the batch, 'head_gradient' as the head is stored, 'all' the same
  everywhere.
  """
  # Cast before the devices gather it, so that 2 bytes an entry travel instead of 4.
  head_VD = head_VD.astype(tokens.hidden.dtype)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    # Without a mesh the split is empty, and every exchange below is left out.
    return function(Split(), tokens, head_VD)
  by_token = sharding.partition_spec(('batch',), tokens.targets.shape, mesh)
  # Inside, each device has whole rows of the head: `hidden` is never split, as `embed` may be.
  by_vocabulary = sharding.partition_spec(('vocab', 'hidden'), head_VD.shape, mesh)
  specs = {
    'tokens': by_token,
    'head_gradient': sharding.partition_spec(('vocab', 'embed'), head_VD.shape, mesh),
    'all': jax.sharding.PartitionSpec(),
  }
  split = Split(
    vocab=sharding.mesh_axes('vocab'),
    tokens=sharding.mesh_axes('batch'),
    columns=sharding.mesh_axes('embed'),
  )
  run = jax.shard_map(
    functools.partial(function, split),
    in_specs=(by_token, by_vocabulary),
    out_specs=tuple(specs[kind] for kind in out_kinds),
    # Unchecked by jax: results of kind 'all' are equal on all devices because `psum` summed them.
    check_vma=False,
  )
  return run(tokens, head_VD)


def psum(tree: Any, axes: tuple[str, ...]) -> Any:
  """Sums over the devices along mesh axes."""
  # Without axes there is nothing to sum, and no mesh that `psum` could name.
  return jax.lax.psum(tree, axes) if axes else tree


def sum_over_tokens(head_grad_VD: jax.Array, split: Split) -> jax.Array:
  """Sums the head's gradient over the devices that hold other tokens.

  Each device keeps those columns of the sum that it stores.
  """
  # Devices that differ in `columns` scatter; those that do not keep the whole sum.
  whole = tuple(axis for axis in split.tokens if axis not in split.columns)
  head_grad_VD = psum(head_grad_VD, whole)
  if not split.columns:
    return head_grad_VD
  # Scattered as it is summed: each device receives its own columns, not the whole [V, D].
  return jax.lax.psum_scatter(head_grad_VD, split.columns, scatter_dimension=1, tiled=True)


def first_id(V: int, split: Split) -> jax.Array | int:
  """The token id of this device's first row of the head."""
  return jax.lax.axis_index(split.vocab) * V if split.vocab else 0
