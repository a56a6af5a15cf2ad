"""How long a step takes at least: its work against what an accelerator can do.

The work is arithmetic, memory traffic and communication. All of it is counted from shapes, because
the compiler's own count takes the body of a scanned loop once. Where a number depends on data, the
most is assumed: full rows, each of them one causal sequence, every token trained. Rows of rollouts
are those of the longest groups (plan/group_rows.py). Letters as in models/config.py; M loss tokens.
"""

import dataclasses
from collections.abc import Mapping

from dcore_jax.models.config import DecoderConfig

_ADAM_OPERATIONS = 12  # a parameter, about
_ADAM_MOVES = 7  # gradient, parameter and two moments are read; the latter three are written


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Published numbers of one device.

  Attributes:
    flops: bfloat16 operations a second.
    memory_rate: memory bytes a second.
    link_rate: bytes a second that it can send to its neighbours in one direction, over NVLink or
      all of its inter-chip links. A small slice of TPUs has half of them wired.
  """

  flops: float
  memory_rate: float
  link_rate: float


# Dense rates without sparsity, from the vendors' data sheets; data-centre GPUs on SXM boards.
ACCELERATORS: Mapping[str, Accelerator] = {
  'a100-80g': Accelerator(312e12, 2.039e12, 300e9),
  'h100': Accelerator(989e12, 3.35e12, 450e9),
  'h200': Accelerator(989e12, 4.8e12, 450e9),
  'b200': Accelerator(2250e12, 7.7e12, 900e9),
  'rtx4090': Accelerator(165e12, 1.008e12, 32e9),
  'v5e': Accelerator(197e12, 0.819e12, 200e9),
  'v5p': Accelerator(459e12, 2.765e12, 600e9),
  'v6e': Accelerator(918e12, 1.64e12, 448e9),
}


def of_target(target: str) -> str:
  """Returns the accelerator of a target of `topology.target`; an A100 where it has no roofline."""
  kind = target.partition(':')[0]
  for name in ACCELERATORS:
    if name.partition('-')[0] == kind:
      return name
  return 'a100-80g'


@dataclasses.dataclass(frozen=True)
class Work:
  """What one call does on one device.

  Attributes:
    model_flops: operations that the mathematics needs; a training step needs three times those of a
      forward pass.
    flops: operations that are done, rematerialisation included.
    bytes: of memory traffic: operands and results of the matrix products, and parameters and
      moments once each.
    sent: bytes that leave the device.
  """

  model_flops: float
  flops: float
  bytes: float
  sent: float = 0.0

  def __add__(self, other: 'Work') -> 'Work':
    return Work(
      model_flops=self.model_flops + other.model_flops,
      flops=self.flops + other.flops,
      bytes=self.bytes + other.bytes,
      sent=self.sent + other.sent,
    )

  # A count of calls, or the share of the work that one device does.
  def __mul__(self, times: float) -> 'Work':
    return Work(
      model_flops=times * self.model_flops,
      flops=times * self.flops,
      bytes=times * self.bytes,
      sent=times * self.sent,
    )


@dataclasses.dataclass(frozen=True)
class Bound:
  """The least time of a step.

  Attributes:
    seconds: with arithmetic, memory and links all running at once.
    by: what takes it: 'compute', 'memory' or 'links'.
    mfu: the highest possible share of the peak rate that model operations can reach.
  """

  seconds: float
  by: str
  mfu: float


def bound(work: Work, accelerator: Accelerator) -> Bound:
  """Returns the roofline (Williams et al. 2009) of one call on one device."""
  times = {
    'compute': work.flops / accelerator.flops,
    'memory': work.bytes / accelerator.memory_rate,
    'links': work.sent / accelerator.link_rate,
  }
  # The three overlap at best: the slowest is the least time of a call.
  by = max(times, key=times.get)
  return Bound(times[by], by, work.model_flops / accelerator.flops / times[by])


def forward(
  model: DecoderConfig,
  rows: float,
  T: int,
  loss_tokens: float,
  seen: float | None = None,
  *,
  bytes_each: int = 2,
) -> Work:
  """Returns the work of a forward pass on one device that reads whole layers.

  Args:
    model: the model's configuration.
    rows: packed rows.
    T: tokens of a row.
    loss_tokens: tokens that the head runs on.
    seen: keys that a token sees on average; by default those of a causal row, (T + 1) / 2.
    bytes_each: of a number.
  """
  seen = _seen_causally(T) if seen is None else seen
  D = model.hidden_size
  F = model.intermediate_size
  V = model.vocab_size
  N = model.num_attention_heads
  K = model.num_key_value_heads
  H = model.head_dim
  # A multiplication and an addition for each entry.
  head = 2.0 * V * D
  # Two products, q k and p v, of two operations a component. flops_per_token(1) has one key.
  keys = 4.0 * model.num_hidden_layers * N * H * (seen - 1)
  # The head runs on the loss tokens alone, and is counted apart.
  layers = (model.flops_per_token(1) - head + keys) * rows * T
  # Numbers that the seven products and attention read and write, for each token and layer: D in and
  # out, queries, keys, values, gate, up, and the product of the last two.
  widths = 4 * D + 2 * (2 * N * H + 2 * K * H) + 3 * F + 2 * D
  tables = 1 if model.tie_word_embeddings else 2  # [V, D]: embedding and head
  weights = model.param_count - V * D * tables
  moved = bytes_each * (model.num_hidden_layers * widths * rows * T + weights)
  flops = layers + head * loss_tokens
  head_read = V * D if loss_tokens else 0
  return Work(model_flops=flops, flops=flops, bytes=moved + bytes_each * head_read)


def training(
  model: DecoderConfig,
  rows: float,
  T: int,
  loss_tokens: float,
  remat: str,
  seen: float | None = None,
) -> Work:
  """Returns the work of forward and backward of the same rows.

  The backward pass takes twice the forward pass. In addition it recomputes what `remat`
  (decoder.REMAT) has not kept.
  """
  seen = _seen_causally(T) if seen is None else seen
  # The backward pass has two products for each of the forward pass: one for each operand.
  total = forward(model, rows, T, loss_tokens, seen) * 3
  layers = forward(model, rows, T, 0, seen)
  width = model.num_attention_heads * model.head_dim
  # Two products, q k and p v, of 2 * width operations a key.
  attention = model.num_hidden_layers * 4 * width * seen * rows * T
  # What the backward pass does again; `remat` concerns the layers alone.
  again = {
    'none': 0.0,
    'dots': attention,
    'attention': layers.flops - attention,
    'full': layers.flops,
  }[remat]
  # Doing a layer again reads its weights and writes its activations again.
  moved = layers.bytes if remat in ('attention', 'full') else 0.0
  return dataclasses.replace(total, flops=total.flops + again, bytes=total.bytes + moved)


def _seen_causally(T: int) -> float:
  # Token i sees itself and the i tokens before it.
  return (T + 1) / 2


def update(params_per_device: float) -> Work:
  """Returns the work of AdamW in float32."""
  # AdamW reads gradients and writes parameters; no product of the model is part of it.
  return Work(
    model_flops=0.0,
    flops=_ADAM_OPERATIONS * params_per_device,
    bytes=_ADAM_MOVES * 4 * params_per_device,
  )


def decoding(
  model: DecoderConfig,
  ways: int,
  lanes: int,
  slots: int,
  cached: float,
  steps: int,
  *,
  bytes_each: int = 2,
) -> Work:
  """Returns the work of a decode call; each step reads the weights and the cached tokens.

  Args:
    model: the model's configuration.
    ways: devices that share a layer, by heads.
    lanes: decoded together.
    slots: keys and values read at a step, trunks once for all their lanes.
    cached: tokens that a lane sees.
    steps: of a call; each gives every lane a token.
    bytes_each: of a number.
  """
  # Where the embedding is not the head, a step reads one row of it a lane, which is nothing.
  embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
  weights = model.param_count - embedding
  # flops_per_token averages over a causal row: a token that sees `cached` ones is the average of a
  # row twice as long.
  flops = lanes * model.flops_per_token(2 * int(cached)) / ways
  # Attention reads a key and a value of each slot, once a step.
  cache_bytes = slots * model.kv_bytes_per_token('bfloat16')
  step = Work(model_flops=flops, flops=flops, bytes=(weights * bytes_each + cache_bytes) / ways)
  return step * steps
