"""Log-probabilities and entropies from hidden states without the whole logits.

Letters: M loss tokens, C tokens of a chunk, D hidden, V vocabulary.
"""
import functools

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

# Logits of one chunk: 2^24 float32 entries are 64 MiB, 110 tokens of Qwen3's vocabulary or all tokens of a small one.
_CHUNK_ENTRIES = 2**24


def log_probs_and_entropy(hidden_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array, temperature: float = 1.0,
                          chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and Shannon entropy (nats, >= 0) of softmax(hidden @ head.T / temperature).

  The tokens are worked off in chunks whose logits are recomputed in the backward pass, so that [M, V] never exists; a
  single chunk keeps its logits instead, which is the faster trade. Sums run in float32. Both results are
  differentiable in `hidden` and `head`.

  Args:
    hidden_MD: hidden states.
    head_VD: vocabulary projection.
    targets_M: int token ids.
    temperature: static, > 0.
    chunk: tokens per chunk; by default what keeps the logits of a chunk below 64 MiB.

  Returns:
    (logp_M, entropy_M), float32.

  Raises:
    ValueError: a temperature that is not positive or a chunk below 1.
  """
  if not temperature > 0:
    raise ValueError(f'temperature = {temperature} must be positive; a greedy policy has no log-probabilities')
  M, V = hidden_MD.shape[0], head_VD.shape[0]
  chunk = max(1, _CHUNK_ENTRIES // V) if chunk is None else chunk
  if chunk < 1:
    raise ValueError(f'chunk = {chunk} must be at least 1')
  chunks = max(1, -(-M // chunk))
  size = -(-M // chunks)
  pad = chunks * size - M
  hidden_NCD = jnp.pad(hidden_MD, ((0, pad), (0, 0))).reshape(chunks, size, hidden_MD.shape[1])
  targets_NC = jnp.pad(targets_M, (0, pad)).reshape(chunks, size)
  logp_NC, entropy_NC = _chunked(float(temperature), hidden_NCD, head_VD, targets_NC)
  return logp_NC.reshape(-1)[:M], entropy_NC.reshape(-1)[:M]


def _logits(hidden_CD: jax.Array, head_VD: jax.Array, temperature: float) -> jax.Array:
  return jnp.einsum('cd,vd->cv', hidden_CD, head_VD, preferred_element_type=jnp.float32) / temperature


def _summary(logits_CV: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logp, entropy, log of the partition sum), each [C]."""
  top_C = logits_CV.max(axis=1)
  shifted_CV = logits_CV - top_C[:, None]
  exp_CV = jnp.exp(shifted_CV)
  sum_C = exp_CV.sum(axis=1)
  log_sum_C = jnp.log(sum_C)
  logp_C = jnp.take_along_axis(shifted_CV, targets_C[:, None], axis=1)[:, 0] - log_sum_C
  # Rounding alone could make a certain distribution's entropy negative (-1e-7).
  entropy_C = jnp.maximum(log_sum_C - (exp_CV * shifted_CV).sum(axis=1) / sum_C, 0)
  return logp_C, entropy_C, top_C + log_sum_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(temperature: float, hidden_NCD: jax.Array, head_VD: jax.Array,
             targets_NC: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _run(temperature, hidden_NCD, head_VD, targets_NC)[0]


def _run(temperature, hidden_NCD, head_VD, targets_NC):
  """(results, what the backward pass keeps of them), chunk by chunk."""
  one = hidden_NCD.shape[0] == 1

  def step(chunk):
    hidden_CD, targets_C = chunk
    logits_CV = _logits(hidden_CD, head_VD, temperature)
    logp_C, entropy_C, partition_C = _summary(logits_CV, targets_C)
    return (logp_C, entropy_C), (entropy_C, partition_C, logits_CV if one else None)

  chunks = hidden_NCD, targets_NC
  if one:
    results = jax.tree.map(lambda x: x[None], step(jax.tree.map(lambda x: x[0], chunks)))
  else:
    results = jax.lax.map(step, chunks)
  return results


def _forward(temperature, hidden_NCD, head_VD, targets_NC):
  arrays = hidden_NCD.value, head_VD.value, targets_NC.value
  results, kept = _run(temperature, *arrays)
  return results, (*arrays, kept)


def _backward(temperature, residuals, cotangents):
  hidden_NCD, head_VD, targets_NC, kept = residuals
  logp_bar_NC, entropy_bar_NC = (None if isinstance(bar, SymbolicZero) else bar for bar in cotangents)
  if logp_bar_NC is None:
    logp_bar_NC = jnp.zeros(targets_NC.shape, jnp.float32)

  def step(head_grad_VD, chunk):
    hidden_CD, targets_C, (entropy_C, partition_C, logits_CV), logp_bar_C, entropy_bar_C = chunk
    if logits_CV is None:
      logits_CV = _logits(hidden_CD, head_VD, temperature)
    log_p_CV = logits_CV - partition_C[:, None]
    # d logp / d z_v = [v = target] - p_v;   d H / d z_v = -p_v (log p_v + H)
    pull_CV = logp_bar_C[:, None]
    if entropy_bar_C is not None:
      pull_CV += entropy_bar_C[:, None] * (log_p_CV + entropy_C[:, None])
    hit_CV = targets_C[:, None] == jnp.arange(head_VD.shape[0])[None, :]
    grad_CV = (jnp.where(hit_CV, logp_bar_C[:, None], 0) - jnp.exp(log_p_CV) * pull_CV) / temperature
    grad_CV = grad_CV.astype(hidden_CD.dtype)
    hidden_grad_CD = jnp.einsum('cv,vd->cd', grad_CV, head_VD)
    head_grad_VD += jnp.einsum('cv,cd->vd', grad_CV, hidden_CD, preferred_element_type=jnp.float32)
    return head_grad_VD, hidden_grad_CD.astype(hidden_CD.dtype)

  zero_VD = jnp.zeros(head_VD.shape, jnp.float32)
  head_grad_VD, hidden_grad_NCD = jax.lax.scan(
      step, zero_VD, (hidden_NCD, targets_NC, kept, logp_bar_NC, entropy_bar_NC), unroll=hidden_NCD.shape[0] == 1)
  return hidden_grad_NCD, head_grad_VD.astype(head_VD.dtype), None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)
