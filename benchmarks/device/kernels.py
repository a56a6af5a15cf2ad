"""Our kernels against plain forms of the same functions on this device, and how fast they are.

Letters as in `models/attention/` and `learn/head.py`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import rows
from benchmarks.device.rows import Row
from benchmarks.device.setting import Setting
from benchmarks.measure import interleaved
from dcore_jax.learn import head
from dcore_jax.models.attention import pages, reference, tree_attention
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.device import SLOTS

_PART = 'kernels'
# Largest error, of the largest entry of the result. bfloat16 rounds to 2^-9 of a number, and the
# terms of a sum are rounded as well; float32 leaves room for other orders of adding up.
_TOLERANCES = {'float32': 1e-4, 'bfloat16': 2**-6, 'int8': 2**-6}
_LAYERS = 8  # of the cache, so that a timed call is long enough
_LOOK_BACK = 1280  # tokens that a row of a decode step reads

Numbers = tuple[jax.Array, ...]


def measure(setting: Setting) -> Iterator[Row]:
  """Yields errors and speeds of tree attention, attention over pages, and the fused head."""
  for name in dict.fromkeys(('float32', setting.dtype)):
    yield from _tree_errors(setting, name)
  yield from _tree_speed(setting)
  for name in dict.fromkeys(('float32', setting.dtype, 'int8')):
    yield _pages_error(setting, name)
  for name in (setting.dtype, 'int8'):
    yield _pages_speed(setting, name)
  for name in dict.fromkeys(('float32', setting.dtype)):
    yield from _head_errors(setting, name)
  yield _head_speed(setting)


def error(found: Any, wanted: Any) -> float:
  """Returns the largest difference, as a share of the largest entry."""
  found = np.asarray(found, np.float32)
  wanted = np.asarray(wanted, np.float32)
  return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


# --- tree attention -------------------------------------------------------------------------------


def forest(T: int, trunk: int, branches: int) -> np.ndarray:
  """Returns `end` [1, T] of a trunk whose branches share the rest of the row."""
  end = np.full((1, T), T, np.int32)
  bounds = np.linspace(trunk, T, branches + 1).astype(int)
  for begin, stop in zip(bounds[:-1], bounds[1:], strict=True):
    end[:, begin:stop] = stop
  return end


def _tree_inputs(model: DecoderConfig, T: int, dtype: str) -> Numbers:
  N = model.num_attention_heads
  K = model.num_key_value_heads
  H = model.head_dim
  return tuple(_normal(seed, (1, T, heads, H), dtype) for seed, heads in enumerate((N, K, K, N)))


@functools.cache
def _gradients(name: str) -> Callable[..., Numbers]:
  """Returns (end, q, k, v, gradient of the output) -> (output, gradients of q, k and v)."""

  def call(end: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, bar: jax.Array) -> Numbers:
    def attend(*qkv: jax.Array) -> jax.Array:
      return tree_attention.attend(*qkv, end, name)

    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(bar)

  return jax.jit(call)


def _tree_errors(setting: Setting, dtype: str) -> Iterator[Row]:
  T = setting.sizes.checked
  end = forest(T, T // 4, 3)
  inputs = _tree_inputs(setting.sizes.trained, T, dtype)
  found = _gradients('auto')(end, *inputs)
  # In float32, with exact products, from the same numbers.
  with jax.default_matmul_precision('highest'):
    wanted = _gradients('reference')(end, *(x.astype(jnp.float32) for x in inputs))
  name = tree_attention.resolve('auto')
  for what, value, exact in zip(('out', 'dq', 'dk', 'dv'), found, wanted, strict=True):
    row = rows.fact(_PART, f'tree attention ({name}), {dtype}, {what}', error(value, exact), 'rel')
    yield rows.within(row, _TOLERANCES[dtype])


def _tree_speed(setting: Setting) -> Iterator[Row]:
  T = setting.sizes.timed
  model = setting.sizes.trained
  inputs = _tree_inputs(model, T, setting.dtype)
  ends = {'causal': np.full((1, T), T, np.int32), 'tree of 8': forest(T, T // 4, 8)}
  for name, end in ends.items():
    call = functools.partial(_gradients('auto'), jnp.asarray(end), *inputs)
    seconds = interleaved({name: call}, setting.sizes.rounds)[name]
    pairs = float((end - np.arange(T)).sum())
    # Two products forward, five backward.
    flops = 7 * 2 * model.num_attention_heads * model.head_dim * pairs
    row = rows.fact(_PART, f'tree attention, {T} tokens, {name}, both ways', seconds, 's')
    bound = flops / setting.machine.flops
    yield rows.against_bound(row, bound, setting.least('tree attention'))


# --- attention over pages -------------------------------------------------------------------------


def _page_inputs(setting: Setting, dtype: str, R: int, P: int) -> tuple[Numbers, pages.PageReads]:
  """Returns ((q, k, v and their scales), reads): each row has P pages of its own."""
  model = setting.sizes.served
  K = model.num_key_value_heads
  T = model.num_attention_heads // K
  H = model.head_dim
  q_RKTH = _normal(0, (R, K, T, H), setting.dtype if dtype == 'int8' else dtype)
  cache = [_normal(seed, (_LAYERS, R * P, K, SLOTS, H), 'float32') for seed in (1, 2)]
  if dtype == 'int8':
    (k, k_scale), (v, v_scale) = (pages.quantize(x) for x in cache)
    numbers = (q_RKTH, k, v, k_scale, v_scale)
  else:
    numbers = (q_RKTH, *(x.astype(dtype) for x in cache))
  order = np.random.default_rng(0).permutation(R * P).reshape(R, P)
  # Rows end at different places of their last page.
  length_R = P * SLOTS - np.arange(R) % SLOTS
  reads = pages.PageReads(
    pages_RP=jnp.asarray(order, jnp.int32),
    start_R=jnp.zeros(R, jnp.int32),
    count_R=jnp.full(R, P, jnp.int32),
    position_RT=jnp.broadcast_to(jnp.asarray(length_R - 1, jnp.int32)[:, None], (R, T)),
    limit_R=jnp.asarray(length_R, jnp.int32),
  )
  return numbers, reads


@jax.jit
def _over_layers(q: jax.Array, *cache_and_reads: Any) -> jax.Array:
  """Attends over the pages of every layer, one after the other."""
  k, v, *scales, reads = cache_and_reads
  prepared = pages.prepare(reads, k)

  def one(total: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
    """Adds a layer's result; each layer waits for the one before, as in a model."""
    part = pages.partial_pages(q + (0 * total).astype(q.dtype), k, v, layer, prepared, *scales)
    return pages.finish(part), None

  start = jnp.zeros(q.shape, jnp.float32)
  return jax.lax.scan(one, start, jnp.arange(_LAYERS, dtype=jnp.int32))[0]


def _dense(numbers: Numbers, reads: pages.PageReads) -> jax.Array:
  """Attends over the last layer in plain float32, over copies of the pages of each row."""
  q, k, v, *scales = (x.astype(jnp.float32) for x in numbers)
  if scales:
    k, v = (x * scale[..., None] for x, scale in zip((k, v), scales, strict=True))
  R = len(reads.pages_RP)
  K = q.shape[1]

  def held(x_LNKCH: jax.Array) -> jax.Array:
    """[R, K, S, H], the slots of a row in order."""
    x_RPKCH = x_LNKCH[-1][reads.pages_RP]
    return x_RPKCH.swapaxes(1, 2).reshape(R, K, -1, x_LNKCH.shape[-1])

  score_RKTS = jnp.einsum('rkth,rksh->rkts', q, held(k)) * q.shape[-1] ** -0.5
  slot_S = jnp.arange(score_RKTS.shape[-1])
  seen_RS = slot_S[None, :] < reads.limit_R[:, None]
  score_RKTS = jnp.where(seen_RS[:, None, None, :], score_RKTS, reference.MASKED_SCORE)
  return jnp.einsum('rkts,rksh->rkth', jax.nn.softmax(score_RKTS, axis=-1), held(v))


def _pages_error(setting: Setting, dtype: str) -> Row:
  numbers, reads = _page_inputs(setting, dtype, R=8, P=max(2, setting.sizes.checked // SLOTS))
  found = _over_layers(*numbers, reads)
  with jax.default_matmul_precision('highest'):
    wanted = jax.jit(_dense)(numbers, reads)
  row = rows.fact(_PART, f'page attention, {dtype}', error(found, wanted), 'rel')
  return rows.within(row, _TOLERANCES[dtype])


def _pages_speed(setting: Setting, dtype: str) -> Row:
  model = setting.sizes.served
  R = setting.sizes.lanes
  P = max(2, min(_LOOK_BACK, setting.sizes.timed) // SLOTS)
  numbers, reads = _page_inputs(setting, dtype, R, P)
  call = functools.partial(_over_layers, *numbers, reads)
  seconds = interleaved({'call': call}, setting.sizes.rounds)['call']
  # Numbers, and for int8 a scale of 4 bytes for each slot and head.
  slots = _LAYERS * R * P * SLOTS * model.num_key_value_heads
  bytes_read = 2 * slots * (model.head_dim * numbers[1].dtype.itemsize + 4 * (dtype == 'int8'))
  row = rows.fact(_PART, f'page attention, {R} rows of {P * SLOTS}, {dtype}', seconds, 's')
  bound = bytes_read / setting.machine.memory_rate
  return rows.against_bound(row, bound, setting.least('page attention'))


# --- the fused head -------------------------------------------------------------------------------


def _fused(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weight: jax.Array) -> Any:
  def objective(logp: jax.Array, _: Any, weight: jax.Array) -> tuple[jax.Array, tuple[()]]:
    return -jnp.sum(weight * logp), ()

  return head.token_loss(objective, hidden, matrix, targets, weight)[0]


_fused_gradients = jax.jit(jax.value_and_grad(_fused, (0, 1)))


def _whole(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weight: jax.Array) -> Any:
  logp_MV = jax.nn.log_softmax(hidden @ matrix.T)
  return -jnp.sum(weight * jnp.take_along_axis(logp_MV, targets[:, None], axis=1)[:, 0])


def _head_inputs(setting: Setting, M: int, dtype: str) -> Numbers:
  model = setting.sizes.trained
  hidden_MD = _normal(0, (M, model.hidden_size), dtype)
  # As large as trained logits are.
  matrix_VD = _normal(1, (model.vocab_size, model.hidden_size), dtype) * 0.1
  targets_M = jax.random.randint(jax.random.key(2), (M,), 0, model.vocab_size)
  return hidden_MD, matrix_VD.astype(dtype), targets_M, jnp.ones(M)


def _head_errors(setting: Setting, dtype: str) -> Iterator[Row]:
  inputs = _head_inputs(setting, setting.sizes.checked, dtype)
  # What an engine or a step runs in float32 is to be exact where a person asks for it.
  with jax.default_matmul_precision('highest'):
    found = _fused_gradients(*inputs)
    exact = [x.astype(jnp.float32) for x in inputs[:2]]
    wanted = jax.jit(jax.value_and_grad(_whole, (0, 1)))(*exact, *inputs[2:])
  named = zip(
    ('loss', 'gradient of states', 'gradient of the matrix'),
    (found[0], *found[1]),
    (wanted[0], *wanted[1]),
    strict=True,
  )
  for what, value, other in named:
    row = rows.fact(_PART, f'fused head, {dtype}, {what}', error(value, other), 'rel')
    yield rows.within(row, _TOLERANCES[dtype])


def _head_speed(setting: Setting) -> Row:
  M = setting.sizes.timed
  inputs = _head_inputs(setting, M, setting.dtype)
  call = functools.partial(_fused_gradients, *inputs)
  seconds = interleaved({'head': call}, setting.sizes.rounds)['head']
  model = setting.sizes.trained
  bound = 6.0 * M * model.hidden_size * model.vocab_size / setting.machine.flops
  row = rows.fact(_PART, f'fused head, {M} tokens, loss and gradients', seconds, 's')
  return rows.against_bound(row, bound, setting.least('head'))
