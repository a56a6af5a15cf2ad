"""Losses, log-probabilities and entropies from hidden states without the whole logits.

The vocabulary projection of Qwen3 has 151,936 outputs: the logits of 16,384 tokens are 10 GB, and a
plain loss holds several arrays of that size. Here tokens are processed in chunks, forward and
backward, with sums in float32. Under a mesh (`jax.set_mesh`) the vocabulary is split over its
tensor axis and the tokens over its batch axes; devices exchange a few numbers a token.

`token_loss` is for training: its gradient is computed in the forward pass while a chunk's logits
are there, three matrix products in all, where recomputing logits takes four.
`log_probs_and_entropy` is for scoring, and for objectives that are not a sum over tokens.

Letters: M loss tokens, N chunks of C tokens, D hidden, V vocabulary (of one device).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dcore_jax.learn.token_chunks import (
  Split,
  Tokens,
  chunked,
  first_id,
  joined,
  on_devices,
  over_chunks,
  psum,
  sum_over_tokens,
  where_used,
)

Objective = Callable[[jax.Array, jax.Array | None, Any], tuple[jax.Array, Any]]


class _Scores(NamedTuple):
  """What the logits of a chunk come to, each [C]; `partition` is the log of the partition sum."""

  logp: jax.Array
  entropy: jax.Array | None
  partition: jax.Array


def _check(temperature: float, chunk: int | None) -> None:
  if not temperature > 0:
    # Temperature 0 puts all mass on one token: every other log-probability would be -inf.
    raise ValueError(
      f'temperature = {temperature} must be positive; a greedy policy has no log-probabilities'
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunk = {chunk} must be at least 1')


@dataclasses.dataclass(frozen=True)
class LossOptions:
  """What `token_loss` hands to its objective, and how.

  Attributes:
    temperature: > 0; log-probabilities are of softmax(hidden @ head.T / temperature).
    entropy: 'none' passes None to the objective, 'value' the entropies (nats) without their
      gradient, 'gradient' with it.
    chunk: tokens per chunk at most; by default what keeps a chunk's logits below 256 MiB
      (accelerators: 4 GiB).

  Raises:
    ValueError: a temperature that is not positive, a chunk below 1 or an unknown `entropy`.
  """

  temperature: float = 1.0
  entropy: Literal['none', 'value', 'gradient'] = 'none'
  chunk: int | None = None

  def __post_init__(self):
    _check(self.temperature, self.chunk)
    if self.entropy not in ('none', 'value', 'gradient'):
      raise ValueError(f"entropy = {self.entropy!r} is not one of 'none', 'value', 'gradient'")


_DEFAULT_OPTIONS = LossOptions()


def token_loss(
  objective: Objective,
  hidden_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  values: Any,
  options: LossOptions = _DEFAULT_OPTIONS,
) -> tuple[jax.Array, Any]:
  """Sums a loss on the log-probabilities of tokens -> (loss, sums).

  The loss is differentiable in `hidden` and `head` only.

  Args:
    objective: (logp_C, entropy_C or None, values of these tokens) -> (loss, sums), each a scalar
      that adds up over tokens; called once a chunk. Values of 0 must contribute nothing: chunks are
      filled up with them, and those that hold nothing else are skipped. The sums are for logging
      and carry no gradient.
    hidden_MD: hidden states.
    head_VD: vocabulary projection, cast to their dtype; its gradient is summed in float32.
    targets_M: int token ids.
    values: pytree of [M, ...] arrays for the objective: weights, advantages, old log-probabilities.
    options: temperature, entropies and chunks; static.
  """
  # Positional, since `custom_vjp` tells differentiable arguments apart by their place.
  return _token_loss(objective, options, hidden_MD, head_VD, targets_M, values)


def log_probs_and_entropy(
  hidden_MD: jax.Array,
  head_VD: jax.Array,
  targets_M: jax.Array,
  temperature: float = 1.0,
  chunk: int | None = None,
  used_M: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes the log-probability of each target and the entropy (nats, >= 0) of its distribution.

  The distribution is softmax(hidden @ head.T / temperature). Both results, float32 [M], are
  differentiable in `hidden` and `head`; the backward pass computes the logits again, except those
  of a single chunk on one device, which are kept. Where `used_M` is given, chunks in which it is 0
  everywhere are skipped and give 0. Other arguments and errors as for `token_loss`.
  """
  _check(temperature, chunk)
  # A Python float: a static argument must be hashable, which a jax scalar is not.
  return _scores(float(temperature), chunk, hidden_MD, head_VD, targets_M, used_M)


def uniform_gap(
  hidden_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """Computes (mean logit - the target's logit + log V) [M], differentiable.

  With it KL(uniform || policy) = -logp - gap. The mean log-probability of the vocabulary needs no
  logits: a mean of logits is the product with the mean row of the head, and their partition sum is
  the same as in the target's log-probability.
  """
  _check(temperature, None)
  # Summed in float32: in the head's 16 bits a mean over 151,936 rows would be lost to rounding.
  mean_D = jnp.mean(head_VD, axis=0, dtype=jnp.float32)
  rows_MD = mean_D[None, :] - head_VD[targets_M].astype(jnp.float32)
  gap_M = jnp.einsum('md,md->m', hidden_MD.astype(jnp.float32), rows_MD) / temperature
  return gap_M + math.log(head_VD.shape[0])


# --- one chunk ------------------------------------------------------------------------------------


def _logits(hidden_CD: jax.Array, head_VD: jax.Array, temperature: float) -> jax.Array:
  # In float32: bfloat16 logits near 20 are 0.125 apart.
  logits_CV = jnp.einsum('cd,vd->cv', hidden_CD, head_VD, preferred_element_type=jnp.float32)
  return logits_CV / temperature


def _summary(logits_CV: jax.Array, targets_C: jax.Array, split: Split, entropy: bool) -> _Scores:
  """Reduces the logits of a chunk, of which each device has those of its own ids."""
  V = logits_CV.shape[1]
  # Subtracting the maximum keeps exp below 1. It is taken over all devices of a vocabulary, so that
  # their sums have one scale.
  top_C = logits_CV.max(axis=1)
  if split.vocab:
    top_C = jax.lax.pmax(top_C, split.vocab)
  shifted_CV = logits_CV - top_C[:, None]
  exp_CV = jnp.exp(shifted_CV)
  # Ids of other devices fall outside 0..V - 1: clipped to be looked up, then replaced by 0, so that
  # the sum over devices has one summand.
  here_C = targets_C - first_id(V, split)
  hit_C = jnp.take_along_axis(shifted_CV, jnp.clip(here_C, 0, V - 1)[:, None], axis=1)[:, 0]
  sums = {'exp': exp_CV.sum(axis=1), 'hit': jnp.where((0 <= here_C) & (here_C < V), hit_C, 0)}
  # With m = sum exp(s) s and Z = sum exp(s) over shifted logits s, the entropy is log Z - m / Z.
  if entropy:
    sums['moment'] = (exp_CV * shifted_CV).sum(axis=1)
  # One exchange of three numbers a token.
  sums = psum(sums, split.vocab)
  log_sum_C = jnp.log(sums['exp'])
  entropy_C = None
  if entropy:
    # Rounding alone could make a certain distribution's entropy negative (-1e-7).
    entropy_C = jnp.maximum(log_sum_C - sums['moment'] / sums['exp'], 0)
  return _Scores(logp=sums['hit'] - log_sum_C, entropy=entropy_C, partition=top_C + log_sum_C)


def _logit_gradient(
  logits_CV: jax.Array,
  targets_C: jax.Array,
  scores: _Scores,
  bars: tuple[jax.Array, jax.Array | None],
  split: Split,
) -> jax.Array:
  """Computes the gradient [C, V] with respect to the logits of a chunk, float32.

  `bars` are the gradients with respect to (log-probability, entropy), each [C].
  """
  V = logits_CV.shape[1]
  logp_bar_C, entropy_bar_C = bars
  # Log-probabilities of this device's ids: the partition sum is that of the whole vocabulary.
  log_p_CV = logits_CV - scores.partition[:, None]
  # d logp / d z_v = [v = target] - p_v;   d H / d z_v = -p_v (log p_v + H)
  pull_CV = logp_bar_C[:, None]
  if entropy_bar_C is not None:
    pull_CV += entropy_bar_C[:, None] * (log_p_CV + scores.entropy[:, None])
  # Compared, not scattered: XLA fuses the comparison into the elementwise work that follows.
  hit_CV = (targets_C - first_id(V, split))[:, None] == jnp.arange(V)[None, :]
  return jnp.where(hit_CV, logp_bar_C[:, None], 0) - jnp.exp(log_p_CV) * pull_CV


def _through_projection(
  grad_CV: jax.Array, hidden_CD: jax.Array, head_VD: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """Takes a gradient back through `_logits` -> (hidden [C, D], head [V, D]), float32.

  That of the hidden states has the part of this device's ids only.
  """
  # In the dtype of the hidden states, as a matrix product of float32 takes an accelerator several
  # times as long; the products still add up in float32.
  grad_CV = (grad_CV / temperature).astype(hidden_CD.dtype)
  return (
    jnp.einsum('cv,vd->cd', grad_CV, head_VD, preferred_element_type=jnp.float32),
    jnp.einsum('cv,cd->vd', grad_CV, hidden_CD, preferred_element_type=jnp.float32),
  )


# --- the loss and its gradient in one pass --------------------------------------------------------


def _zero_sums(objective: Objective, options: LossOptions, chunks: Tokens) -> Any:
  """Returns zeros of what the objective gives for a chunk: (loss, sums)."""
  # Shapes suffice to learn what the objective returns; nothing is computed.
  scores = jax.ShapeDtypeStruct(chunks.targets.shape[1:], jnp.float32)
  shapes = jax.eval_shape(
    objective,
    scores,
    None if options.entropy == 'none' else scores,
    jax.tree.map(lambda leaf: leaf[0], chunks.values),
  )
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _loss_shard(
  objective: Objective, options: LossOptions, split: Split, tokens: Tokens, head_VD: jax.Array
) -> tuple[jax.Array, Any]:
  """Returns (loss, sums) without a gradient."""
  chunks = chunked(tokens, head_VD.shape[0], options.chunk)

  def step(total, part):
    logits_CV = _logits(part.hidden, head_VD, options.temperature)
    scores = _summary(logits_CV, part.targets, split, options.entropy != 'none')
    added = objective(scores.logp, scores.entropy, part.values)
    # Losses add up over tokens, so that chunks do, too.
    return jax.tree.map(jnp.add, total, added), None

  def nothing(total, part):
    return total, None

  zeros = _zero_sums(objective, options, chunks)
  total, _ = over_chunks(where_used(step, nothing, chunks), zeros, chunks)
  # Devices of one vocabulary hold the same total; only those with other tokens are summed.
  return psum(total, split.tokens)


def _objective_gradient(
  objective: Objective, options: LossOptions, scores: _Scores, values: Any
) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, jax.Array | None]]:
  """Returns ((loss, sums), gradients with respect to (log-probability, entropy)) of a chunk."""
  # Two cases, because `jax.vjp` over an unused entropy would still compute its term below.
  if options.entropy == 'gradient':
    loss, pull, sums = jax.vjp(
      lambda logp_C, entropy_C: objective(logp_C, entropy_C, values),
      scores.logp,
      scores.entropy,
      has_aux=True,
    )
    # A gradient of 1: `_token_loss_backward` applies that of the loss later.
    logp_bar_C, entropy_bar_C = pull(jnp.ones_like(loss))
    return (loss, sums), (logp_bar_C, entropy_bar_C)
  loss, pull, sums = jax.vjp(
    lambda logp_C: objective(logp_C, scores.entropy, values), scores.logp, has_aux=True
  )
  (logp_bar_C,) = pull(jnp.ones_like(loss))
  return (loss, sums), (logp_bar_C, None)


def _loss_and_gradient_shard(
  objective: Objective, options: LossOptions, to_head: bool, split: Split, *arrays: Any
) -> tuple[Any, ...]:
  """Returns (loss, sums, gradient of hidden [M, D], gradient of the head [V, D] if `to_head`)."""
  tokens, head_VD = arrays
  chunks = chunked(tokens, head_VD.shape[0], options.chunk)

  def step(carry, part):
    total, head_grad_VD = carry
    logits_CV = _logits(part.hidden, head_VD, options.temperature)
    scores = _summary(logits_CV, part.targets, split, options.entropy != 'none')
    added, bars = _objective_gradient(objective, options, scores, part.values)
    # While the chunk's logits are there: computing them again would be a fourth product.
    grad_CV = _logit_gradient(logits_CV, part.targets, scores, bars, split)
    hidden_grad_CD, chunk_grad_VD = _through_projection(
      grad_CV, part.hidden, head_VD, options.temperature
    )
    if to_head:  # the compiler leaves a product out that is not used
      head_grad_VD = chunk_grad_VD if head_grad_VD is None else head_grad_VD + chunk_grad_VD
    return (jax.tree.map(jnp.add, total, added), head_grad_VD), hidden_grad_CD

  def nothing(carry, part):
    return carry, jnp.zeros(part.hidden.shape, jnp.float32)

  # A single chunk needs no sum to add to: [V, D] in float32 are 2.5 GB for Qwen3 8B.
  several = chunks.targets.shape[0] > 1
  head_zero = jnp.zeros(head_VD.shape, jnp.float32) if several and to_head else None
  zeros = _zero_sums(objective, options, chunks)
  (total, head_grad_VD), hidden_grad_NCD = over_chunks(
    where_used(step, nothing, chunks), (zeros, head_zero), chunks
  )
  loss, sums = psum(total, split.tokens)
  hidden_grad_MD = joined(hidden_grad_NCD, tokens.targets.shape[0])
  # Each device has pulled back through its own ids; their sum is the gradient.
  hidden_grad_MD = psum(hidden_grad_MD, split.vocab).astype(tokens.hidden.dtype)
  if not to_head:
    return loss, sums, hidden_grad_MD
  return loss, sums, hidden_grad_MD, sum_over_tokens(head_grad_VD, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_loss(objective, options, hidden_MD, head_VD, targets_M, values):
  tokens = Tokens(hidden=hidden_MD, targets=targets_M, values=values)
  function = functools.partial(_loss_shard, objective, options)
  return on_devices(function, tokens, head_VD, ('all', 'all'))


def _token_loss_forward(objective, options, *arrays):
  hidden_MD, head_VD, targets_M, values = jax.tree.map(lambda array: array.value, arrays)
  tokens = Tokens(hidden=hidden_MD, targets=targets_M, values=values)
  # A head that is not trained (LoRA) has no gradient: [V, D] in float32 are 2.5 GB for Qwen3-8B.
  to_head = arrays[1].perturbed
  function = functools.partial(_loss_and_gradient_shard, objective, options, to_head)
  kinds = ('all', 'all', 'tokens', 'head_gradient')
  loss, sums, *grads = on_devices(function, tokens, head_VD, kinds if to_head else kinds[:-1])
  if to_head:
    # In the head's own dtype, as jax requires of a gradient.
    grads[1] = grads[1].astype(head_VD.dtype)
  return (loss, sums), tuple(grads)


def _token_loss_backward(objective, options, grads, bars):
  loss_bar, _ = bars  # the sums are for logging
  # The loss is a scalar, so that its gradient only scales what the forward pass has computed.
  hidden_grad_MD, *head_grad = (grad * loss_bar.astype(grad.dtype) for grad in grads)
  return hidden_grad_MD, head_grad[0] if head_grad else None, None, None


_token_loss.defvjp(_token_loss_forward, _token_loss_backward, symbolic_zeros=True)


# --- log-probabilities and entropies --------------------------------------------------------------


def _score_shard(
  temperature: float, chunk: int | None, split: Split, tokens: Tokens, head_VD: jax.Array
) -> tuple[_Scores, jax.Array | None]:
  """Returns (scores [M], the logits [M, V] where they are kept)."""
  chunks = chunked(tokens, head_VD.shape[0], chunk)
  # One chunk's logits fit by choice of the chunk size. Under a split vocabulary each device has
  # others, which `on_devices` cannot return by token.
  keep = chunks.targets.shape[0] == 1 and not split.vocab

  def step(_, part):
    logits_CV = _logits(part.hidden, head_VD, temperature)
    scores = _summary(logits_CV, part.targets, split, True)
    return None, (scores, logits_CV if keep else None)

  def nothing(_, part):
    zeros_C = jnp.zeros(part.targets.shape, jnp.float32)
    # 0 is what the docstring promises for tokens that are not used.
    return None, (_Scores(logp=zeros_C, entropy=zeros_C, partition=zeros_C), None)

  _, scores = over_chunks(where_used(step, nothing, chunks), None, chunks)
  return jax.tree.map(lambda leaf: joined(leaf, tokens.targets.shape[0]), scores)


def _score_gradient_shard(
  temperature: float, chunk: int | None, split: Split, tokens: Tokens, head_VD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns (gradient of hidden [M, D], gradient of the head [V, D])."""
  chunks = chunked(tokens, head_VD.shape[0], chunk)

  def step(head_grad_VD, part):
    scores, logits_CV = part.saved
    if logits_CV is None:
      logits_CV = _logits(part.hidden, head_VD, temperature)
    grad_CV = _logit_gradient(logits_CV, part.targets, scores, part.bars, split)
    hidden_grad_CD, chunk_grad_VD = _through_projection(grad_CV, part.hidden, head_VD, temperature)
    return head_grad_VD + chunk_grad_VD, hidden_grad_CD

  def nothing(head_grad_VD, part):
    return head_grad_VD, jnp.zeros(part.hidden.shape, jnp.float32)

  head_grad_VD, hidden_grad_NCD = over_chunks(
    where_used(step, nothing, chunks), jnp.zeros(head_VD.shape, jnp.float32), chunks
  )
  hidden_grad_MD = joined(hidden_grad_NCD, tokens.targets.shape[0])
  hidden_grad_MD = psum(hidden_grad_MD, split.vocab).astype(tokens.hidden.dtype)
  return hidden_grad_MD, sum_over_tokens(head_grad_VD, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(temperature, chunk, hidden_MD, head_VD, targets_M, used_M):
  return _scores_forward(temperature, chunk, hidden_MD, head_VD, targets_M, used_M)[0]


def _scores_forward(temperature, chunk, *arrays):
  # With symbolic zeros each array comes wrapped; outside of differentiation it does not.
  hidden_MD, head_VD, targets_M, used_M = (getattr(array, 'value', array) for array in arrays)
  tokens = Tokens(hidden=hidden_MD, targets=targets_M, values=used_M)
  function = functools.partial(_score_shard, temperature, chunk)
  scores, logits_MV = on_devices(function, tokens, head_VD, ('tokens', 'tokens'))
  # The backward pass has no use for the log-probabilities themselves.
  tokens = tokens._replace(saved=(scores._replace(logp=None), logits_MV))
  # Chunks are cut again in the backward pass: `tokens` is kept as the caller gave it.
  return (scores.logp, scores.entropy), (tokens, head_VD)


def _scores_backward(temperature, chunk, residuals, bars):
  tokens, head_VD = residuals
  # A result that nobody differentiates costs nothing: with an entropy bar of None the term of the
  # entropy is not computed.
  logp_bar_M, entropy_bar_M = (None if isinstance(bar, SymbolicZero) else bar for bar in bars)
  if logp_bar_M is None:
    logp_bar_M = jnp.zeros(tokens.targets.shape, jnp.float32)
  function = functools.partial(_score_gradient_shard, temperature, chunk)
  hidden_grad_MD, head_grad_VD = on_devices(
    function,
    tokens._replace(bars=(logp_bar_M, entropy_bar_M)),
    head_VD,
    ('tokens', 'head_gradient'),
  )
  return hidden_grad_MD, head_grad_VD.astype(head_VD.dtype), None, None


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)
