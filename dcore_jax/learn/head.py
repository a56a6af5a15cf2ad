"""Losses, log-probabilities and entropies from hidden states without the whole logits.

The vocabulary projection of Qwen3 has 151,936 outputs: the logits of 16,384 tokens are 10 GB, and a plain loss holds several
arrays of that size. Here tokens are worked off in chunks, forward and backward, with sums in float32. Under a mesh
(`jax.set_mesh`) the vocabulary is split over its tensor axis and the tokens over its batch axes; devices exchange a few
numbers a token.

`token_loss` is for training: its gradient is computed in the forward pass while a chunk's logits are there, three
matrix products in all, where recomputing logits takes four. `log_probs_and_entropy` is for scoring, and for objectives
that are not a sum over tokens.

Letters: M loss tokens, N chunks of C tokens, D hidden, V vocabulary (of one device).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dcore_jax import sharding

# Float32 logits of one chunk: from 128 MiB on a CPU, 220 tokens of Qwen3's vocabulary. Accelerators need more tokens to hide the
# traffic of adding a chunk's [V, D] gradient to the sum: 8 bytes against 6 C operations for each of its entries.
_CHUNK_ENTRIES = {'cpu': 2**25, 'gpu': 2**29, 'tpu': 2**29}
# Tokens of a chunk are a multiple of it on a TPU, whose tiles hold 8 rows of float32, 16 of bfloat16: between [32769, 4096] and
# [9, 3641, 4096] each reshape takes its compiler 150 s, between [32832, 4096] and [9, 3648, 4096] one.
_TILE_ROWS = 16

Objective = Callable[[jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]


class _Split(NamedTuple):
  """The mesh axes inside of shard_map: those that split the vocabulary, the tokens, and the columns of the stored head."""

  vocab: tuple[str, ...] = ()
  tokens: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()


def token_loss(
  objective: Objective,
  hidden_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  values: Any,
  temperature: float = 1.0,
  *,
  entropy: Literal['none', 'value', 'gradient'] = 'none',
  chunk: int | None = None,
) -> tuple[jax.Array, Any]:
  """Sum over tokens of a loss on their log-probabilities -> (loss, sums), differentiable in `hidden` and `head` only.

  Args:
    objective: (logp_C, entropy_C or None, values of these tokens) -> (loss, sums), each a scalar that adds up over
      tokens; called once a chunk. Values of 0 must contribute nothing: chunks are filled up with them, and those that hold
      nothing else are skipped. The sums are for logging and carry no gradient.
    hidden_MD: hidden states.
    head_VD: vocabulary projection, cast to their dtype; its gradient is summed in float32.
    targets_M: int token ids.
    values: pytree of [M, ...] arrays for the objective: weights, advantages, old log-probabilities.
    temperature: static, > 0; log-probabilities are of softmax(hidden @ head.T / temperature).
    entropy: 'none' passes None to the objective, 'value' the entropies (nats) without their gradient, 'gradient' with it.
    chunk: tokens per chunk at most; by default what keeps a chunk's logits below 256 MiB (accelerators: 4 GiB).

  Raises:
    ValueError: a temperature that is not positive or a chunk below 1.
  """
  _check(temperature, chunk)
  if entropy not in ('none', 'value', 'gradient'):
    raise ValueError(f"entropy = {entropy!r} is not one of 'none', 'value', 'gradient'")
  return _token_loss(
    objective, float(temperature), entropy, chunk, hidden_MD, head_VD, targets_M, values
  )


def log_probs_and_entropy(
  hidden_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  temperature: float = 1.0,
  chunk: int | None = None,
  used_M: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and Shannon entropy (nats, >= 0) of softmax(hidden @ head.T / temperature).

  Both results, float32 [M], are differentiable in `hidden` and `head`; the backward pass computes the logits again, but for
  a single chunk on one device, which keeps them. Where `used_M` is given, chunks in which it is 0 everywhere are skipped and
  give 0. Other arguments and errors as for `token_loss`.
  """
  _check(temperature, chunk)
  return _scores(float(temperature), chunk, hidden_MD, head_VD, targets_M, used_M)


def uniform_gap(
  hidden_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """(mean logit - the target's logit + log V) [M], so that KL(uniform || policy) = -logp - gap; differentiable.

  The mean log-probability of the vocabulary needs no logits: a mean of logits is the product with the mean row of the head,
  and their partition sum is the same as in the target's log-probability.
  """
  _check(temperature, None)
  mean_D = jnp.mean(head_VD, axis=0, dtype=jnp.float32)
  rows_MD = mean_D[None, :] - head_VD[targets_M].astype(jnp.float32)
  return jnp.einsum('md,md->m', hidden_MD.astype(jnp.float32), rows_MD) / temperature + math.log(
    head_VD.shape[0]
  )


def _check(temperature: float, chunk: int | None) -> None:
  if not temperature > 0:
    raise ValueError(
      f'temperature = {temperature} must be positive; a greedy policy has no log-probabilities'
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunk = {chunk} must be at least 1')


# --- chunks and devices --------------------------------------------------------------------------------------------------


def _chunked(array: jax.Array, V: int, chunk: int | None) -> jax.Array:
  """[M, ...] -> [N, C, ...], filled up with zeros."""
  if chunk:
    chunks = -(-array.shape[0] // chunk)
  else:  # as many as fit once or nearly twice: two halves of 128 tokens take a third longer than 256 at once
    chunks = array.shape[0] // max(1, _CHUNK_ENTRIES.get(sharding.platform(), 2**25) // V)
  chunks = max(1, chunks)
  size = -(-array.shape[0] // chunks)
  if not chunk and chunks > 1 and sharding.platform() == 'tpu':
    size += -size % _TILE_ROWS
  fill = [(0, chunks * size - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
  return jnp.pad(array, fill).reshape(chunks, size, *array.shape[1:])


def _over_chunks(step: Callable, carry: Any, chunks: Any) -> tuple[Any, Any]:
  """`lax.scan`, without a loop where there is one chunk."""
  if jax.tree.leaves(chunks)[0].shape[0] > 1:
    return jax.lax.scan(step, carry, chunks)
  carry, out = step(carry, jax.tree.map(lambda leaf: leaf[0], chunks))
  return carry, jax.tree.map(lambda leaf: leaf[None], out)


def _where_used(step: Callable, nothing: Callable, chunks: tuple) -> Callable:
  """`step` for `_over_chunks` of (hidden, targets, values, ...), or `nothing` for those of several whose values are all 0.

  Batches have room for more loss tokens than most hold, and the room lies at their end. Devices that share a vocabulary hold
  the same values, so that all of them take the same turn.
  """
  leaves = jax.tree.leaves(chunks[2])
  if not leaves or leaves[0].shape[0] == 1:
    return step

  def step_or_nothing(carry, part):
    used = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(part[2])]))
    return jax.lax.cond(used, step, nothing, carry, part)

  return step_or_nothing


def _on_devices(
  function: Callable, arrays: tuple, kinds: tuple[str, ...], out_kinds: tuple[str, ...]
) -> Any:
  """function(split, *arrays), under a mesh on each device's part.

  Kinds: 'tokens' split along the first axis like the batch, 'head' like the vocabulary, 'head_gradient' as the head is
  stored, 'all' the same everywhere.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function(_Split(), *arrays)
  M, (V, D) = arrays[kinds.index('tokens')].shape[0], arrays[kinds.index('head')].shape
  specs = {
    'tokens': sharding.partition_spec(('batch',), (M,), mesh),
    'head': sharding.partition_spec(('vocab', 'hidden'), (V, D), mesh),
    'head_gradient': sharding.partition_spec(('vocab', 'embed'), (V, D), mesh),
    'all': jax.sharding.PartitionSpec(),
  }
  split = _Split(*map(sharding.mesh_axes, ('vocab', 'batch', 'embed')))
  run = jax.shard_map(
    functools.partial(function, split),
    in_specs=tuple(specs[kind] for kind in kinds),
    out_specs=tuple(specs[kind] for kind in out_kinds),
    check_vma=False,
  )
  return run(*arrays)


def _psum(tree: Any, axes: tuple[str, ...]) -> Any:
  return jax.lax.psum(tree, axes) if axes else tree


def _sum_over_tokens(head_grad_VD: jax.Array, split: _Split) -> jax.Array:
  """Summed over the devices that hold other tokens; of the sum each keeps the columns that it stores."""
  head_grad_VD = _psum(
    head_grad_VD, tuple(axis for axis in split.tokens if axis not in split.columns)
  )
  if not split.columns:
    return head_grad_VD
  return jax.lax.psum_scatter(head_grad_VD, split.columns, scatter_dimension=1, tiled=True)


def _first_id(V: int, split: _Split) -> jax.Array | int:
  """The token id of this device's first row of the head."""
  return jax.lax.axis_index(split.vocab) * V if split.vocab else 0


# --- one chunk -----------------------------------------------------------------------------------------------------------


def _logits(hidden_CD: jax.Array, head_VD: jax.Array, temperature: float) -> jax.Array:
  return (
    jnp.einsum('cd,vd->cv', hidden_CD, head_VD, preferred_element_type=jnp.float32) / temperature
  )


def _summary(
  logits_CV: jax.Array, targets_C: jax.Array, split: _Split, entropy: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """(logp, entropy, log of the partition sum), each [C]."""
  V = logits_CV.shape[1]
  top_C = logits_CV.max(axis=1)
  if split.vocab:
    top_C = jax.lax.pmax(top_C, split.vocab)
  shifted_CV = logits_CV - top_C[:, None]
  exp_CV = jnp.exp(shifted_CV)
  here_C = targets_C - _first_id(V, split)
  hit_C = jnp.take_along_axis(shifted_CV, jnp.clip(here_C, 0, V - 1)[:, None], axis=1)[:, 0]
  sums = {'exp': exp_CV.sum(axis=1), 'hit': jnp.where((0 <= here_C) & (here_C < V), hit_C, 0)}
  if entropy:
    sums['moment'] = (exp_CV * shifted_CV).sum(axis=1)
  sums = _psum(sums, split.vocab)
  log_sum_C = jnp.log(sums['exp'])
  # Rounding alone could make a certain distribution's entropy negative (-1e-7).
  entropy_C = jnp.maximum(log_sum_C - sums['moment'] / sums['exp'], 0) if entropy else None
  return sums['hit'] - log_sum_C, entropy_C, top_C + log_sum_C


def _pull_back(
  logits_CV: jax.Array,
  targets_C: jax.Array,
  entropy_C: jax.Array,
  partition_C: jax.Array,
  logp_bar_C: jax.Array,
  entropy_bar_C: jax.Array | None,
  temperature: float,
  split: _Split,
  hidden_CD: jax.Array,
  head_VD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of one chunk -> (hidden [C, D] of this device's ids alone, head [V, D]), float32."""
  V = head_VD.shape[0]
  log_p_CV = logits_CV - partition_C[:, None]
  # d logp / d z_v = [v = target] - p_v;   d H / d z_v = -p_v (log p_v + H)
  pull_CV = logp_bar_C[:, None]
  if entropy_bar_C is not None:
    pull_CV += entropy_bar_C[:, None] * (log_p_CV + entropy_C[:, None])
  hit_CV = (targets_C - _first_id(V, split))[:, None] == jnp.arange(V)[None, :]
  grad_CV = (jnp.where(hit_CV, logp_bar_C[:, None], 0) - jnp.exp(log_p_CV) * pull_CV) / temperature
  grad_CV = grad_CV.astype(hidden_CD.dtype)
  return (
    jnp.einsum('cv,vd->cd', grad_CV, head_VD, preferred_element_type=jnp.float32),
    jnp.einsum('cv,cd->vd', grad_CV, hidden_CD, preferred_element_type=jnp.float32),
  )


# --- the loss and its gradient in one pass ---------------------------------------------------------------------------------


def _loss_shard(
  objective: Objective,
  temperature: float,
  entropy: str,
  chunk: int | None,
  gradient: bool,
  split: _Split,
  hidden_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  values: Any,
) -> Any:
  """(loss, sums), with `gradient` also (hidden_grad_MD, head_grad_VD)."""
  V = head_VD.shape[0]

  def step(carry, part):
    total, head_grad_VD = carry
    hidden_CD, targets_C, values_C = part
    logits_CV = _logits(hidden_CD, head_VD, temperature)
    logp_C, entropy_C, partition_C = _summary(logits_CV, targets_C, split, entropy != 'none')
    if not gradient:
      return (jax.tree.map(jnp.add, total, objective(logp_C, entropy_C, values_C)), None), None
    if entropy == 'gradient':
      loss, pull, sums = jax.vjp(
        lambda *scores: objective(*scores, values_C), logp_C, entropy_C, has_aux=True
      )
      bars = pull(jnp.ones_like(loss))
    else:
      loss, pull, sums = jax.vjp(
        lambda logp_C: objective(logp_C, entropy_C, values_C), logp_C, has_aux=True
      )
      bars = *pull(jnp.ones_like(loss)), None
    hidden_grad_CD, chunk_grad_VD = _pull_back(
      logits_CV, targets_C, entropy_C, partition_C, *bars, temperature, split, hidden_CD, head_VD
    )
    head_grad_VD = chunk_grad_VD if head_grad_VD is None else head_grad_VD + chunk_grad_VD
    return (jax.tree.map(jnp.add, total, (loss, sums)), head_grad_VD), hidden_grad_CD

  def nothing(carry, part):
    return carry, jnp.zeros(part[0].shape, jnp.float32) if gradient else None

  chunks = jax.tree.map(lambda leaf: _chunked(leaf, V, chunk), (hidden_MD, targets_M, values))
  N, C = chunks[1].shape
  shapes = jax.eval_shape(
    objective,
    jax.ShapeDtypeStruct((C,), jnp.float32),
    None if entropy == 'none' else jax.ShapeDtypeStruct((C,), jnp.float32),
    jax.tree.map(lambda leaf: leaf[0], chunks[2]),
  )
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  head_zero = jnp.zeros(head_VD.shape, jnp.float32) if gradient and N > 1 else None
  (total, head_grad_VD), hidden_grad_NCD = _over_chunks(
    _where_used(step, nothing, chunks), (zeros, head_zero), chunks
  )
  total = _psum(total, split.tokens)
  if not gradient:
    return total
  hidden_grad_MD = hidden_grad_NCD.reshape(N * C, -1)[: hidden_MD.shape[0]]
  return (
    *total,
    _psum(hidden_grad_MD, split.vocab).astype(hidden_MD.dtype),
    _sum_over_tokens(head_grad_VD, split),
  )


_INPUTS = ('tokens', 'head', 'tokens', 'tokens')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _token_loss(objective, temperature, entropy, chunk, hidden_MD, head_VD, targets_M, values):
  function = functools.partial(_loss_shard, objective, temperature, entropy, chunk, False)
  return _on_devices(
    function,
    (hidden_MD, head_VD.astype(hidden_MD.dtype), targets_M, values),
    _INPUTS,
    ('all', 'all'),
  )


def _token_loss_forward(
  objective, temperature, entropy, chunk, hidden_MD, head_VD, targets_M, values
):
  function = functools.partial(_loss_shard, objective, temperature, entropy, chunk, True)
  loss, sums, hidden_grad_MD, head_grad_VD = _on_devices(
    function,
    (hidden_MD, head_VD.astype(hidden_MD.dtype), targets_M, values),
    _INPUTS,
    ('all', 'all', 'tokens', 'head_gradient'),
  )
  return (loss, sums), (hidden_grad_MD, head_grad_VD.astype(head_VD.dtype))


def _token_loss_backward(objective, temperature, entropy, chunk, grads, bars):
  return *(grad * bars[0].astype(grad.dtype) for grad in grads), None, None


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


# --- log-probabilities and entropies ---------------------------------------------------------------------------------------


def _score_shard(
  temperature: float,
  chunk: int | None,
  split: _Split,
  hidden_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  used_M: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """(logp, entropy, log partition sums [M], the logits [M, V] where they are kept)."""
  chunks = jax.tree.map(
    lambda leaf: _chunked(leaf, head_VD.shape[0], chunk), (hidden_MD, targets_M, used_M)
  )
  keep = chunks[1].shape[0] == 1 and not split.vocab

  def step(_, part):
    hidden_CD, targets_C, _ = part
    logits_CV = _logits(hidden_CD, head_VD, temperature)
    return None, (*_summary(logits_CV, targets_C, split, True), logits_CV if keep else None)

  def nothing(_, part):
    return None, (*[jnp.zeros(part[1].shape, jnp.float32)] * 3, None)

  scores = _over_chunks(_where_used(step, nothing, chunks), None, chunks)[1]
  flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: hidden_MD.shape[0]]
  return jax.tree.map(flat, scores)


def _score_gradient_shard(
  temperature: float,
  chunk: int | None,
  split: _Split,
  hidden_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  used_M: jax.Array | None,
  scores: Any,
  bars: Any,
) -> tuple[jax.Array, jax.Array]:
  def step(head_grad_VD, part):
    hidden_CD, targets_C, _, (entropy_C, partition_C, logits_CV), bars_C = part
    if logits_CV is None:
      logits_CV = _logits(hidden_CD, head_VD, temperature)
    hidden_grad_CD, chunk_grad_VD = _pull_back(
      logits_CV, targets_C, entropy_C, partition_C, *bars_C, temperature, split, hidden_CD, head_VD
    )
    return head_grad_VD + chunk_grad_VD, hidden_grad_CD

  def nothing(head_grad_VD, part):
    return head_grad_VD, jnp.zeros(part[0].shape, jnp.float32)

  chunks = jax.tree.map(
    lambda leaf: _chunked(leaf, head_VD.shape[0], chunk),
    (hidden_MD, targets_M, used_M, scores, bars),
  )
  head_grad_VD, hidden_grad_NCD = _over_chunks(
    _where_used(step, nothing, chunks), jnp.zeros(head_VD.shape, jnp.float32), chunks
  )
  hidden_grad_MD = hidden_grad_NCD.reshape(-1, hidden_MD.shape[1])[: hidden_MD.shape[0]]
  return _psum(hidden_grad_MD, split.vocab).astype(hidden_MD.dtype), _sum_over_tokens(
    head_grad_VD, split
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(temperature, chunk, hidden_MD, head_VD, targets_M, used_M):
  return _scores_forward(temperature, chunk, hidden_MD, head_VD, targets_M, used_M)[0]


def _scores_forward(temperature, chunk, *arrays):
  # With symbolic zeros each array comes wrapped; outside of differentiation it does not.
  hidden_MD, head_VD, *given = (getattr(array, 'value', array) for array in arrays)
  logp_M, *kept = _on_devices(
    functools.partial(_score_shard, temperature, chunk),
    (hidden_MD, head_VD.astype(hidden_MD.dtype), *given),
    ('tokens', 'head', 'tokens', 'tokens'),
    ('tokens',) * 4,
  )
  return (logp_M, kept[0]), ((hidden_MD, head_VD, *given), kept)


def _scores_backward(temperature, chunk, residuals, bars):
  (hidden_MD, head_VD, *given), kept = residuals
  logp_bar_M, entropy_bar_M = (None if isinstance(bar, SymbolicZero) else bar for bar in bars)
  if logp_bar_M is None:
    logp_bar_M = jnp.zeros(kept[0].shape, jnp.float32)
  function = functools.partial(_score_gradient_shard, temperature, chunk)
  hidden_grad_MD, head_grad_VD = _on_devices(
    function,
    (hidden_MD, head_VD.astype(hidden_MD.dtype), *given, tuple(kept), (logp_bar_M, entropy_bar_M)),
    ('tokens', 'head', 'tokens', 'tokens', 'tokens', 'tokens'),
    ('tokens', 'head_gradient'),
  )
  return hidden_grad_MD, head_grad_VD.astype(head_VD.dtype), None, None


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)
