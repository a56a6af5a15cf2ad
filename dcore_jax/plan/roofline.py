"""How long a step takes at least: its arithmetic, its memory traffic and what it sends, against what an accelerator can do.

Everything is counted from shapes (the compiler's own count takes the body of a scanned loop once). Where a number depends on
data the most is assumed: full rows, each of them one causal sequence, every token trained.
Letters as in models/config.py; M loss tokens.
"""

import dataclasses
from collections.abc import Mapping

from dcore_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Published numbers of one device: bfloat16 operations a second, memory bytes a second, and bytes a second that it can send
  to its neighbours (NVLink or all of its inter-chip links, one direction; a small slice of TPUs wires half of them)."""

  flops: float
  memory_rate: float
  link_rate: float


ACCELERATORS: Mapping[str, Accelerator] = {
  'a100-80g': Accelerator(312e12, 2.039e12, 300e9),
  'h100': Accelerator(989e12, 3.35e12, 450e9),
  'v5p': Accelerator(459e12, 2.765e12, 600e9),
  'v6e': Accelerator(918e12, 1.64e12, 448e9),
}


@dataclasses.dataclass(frozen=True)
class Work:
  """What one call does on one device.

  Attributes:
    model_flops: operations that the mathematics needs: of a training step three times those of a forward pass.
    flops: operations that are done, rematerialisation included.
    bytes: of memory traffic: operands and results of the matrix products, parameters and moments once each.
    sent: bytes that leave the device.
  """

  model_flops: float
  flops: float
  bytes: float
  sent: float = 0.0

  def __add__(self, other: 'Work') -> 'Work':
    return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  def __mul__(self, times: float) -> 'Work':
    return Work(*(times * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Bound:
  """The least time of a step in seconds, what takes it ('compute', 'memory' or 'links'), and the highest possible share of
  the peak rate that model operations can reach (MFU), all three running at once."""

  seconds: float
  by: str
  mfu: float


def bound(work: Work, accelerator: Accelerator) -> Bound:
  """The roofline (Williams et al. 2009) of one call on one device."""
  times = {
    'compute': work.flops / accelerator.flops,
    'memory': work.bytes / accelerator.memory_rate,
    'links': work.sent / accelerator.link_rate,
  }
  by = max(times, key=times.get)
  return Bound(times[by], by, work.model_flops / accelerator.flops / times[by])


def forward(
  model: DecoderConfig, rows: float, T: int, loss_tokens: float, *, bytes_each: int = 2
) -> Work:
  """A pass over `rows` causal rows of T tokens with the head on `loss_tokens`, on one device that reads whole layers."""
  D, V, N, K, H = (
    model.hidden_size,
    model.vocab_size,
    model.num_attention_heads,
    model.num_key_value_heads,
    model.head_dim,
  )
  head = 2.0 * V * D
  layers = (model.flops_per_token(T) - head) * rows * T
  # Per token and layer what the seven products and attention read and write: D in and out, q, k, v, gate, up, their product.
  widths = 4 * D + 2 * (2 * N * H + 2 * K * H) + 3 * model.intermediate_size + 2 * D
  weights = model.param_count - V * D * (1 if model.tie_word_embeddings else 2)
  moved = bytes_each * (model.num_hidden_layers * widths * rows * T + weights)
  flops = layers + head * loss_tokens
  return Work(flops, flops, moved + bytes_each * (V * D if loss_tokens else 0))


def training(model: DecoderConfig, rows: float, T: int, loss_tokens: float, remat: str) -> Work:
  """Forward and backward of the same: twice the forward again, and once more what `remat` (decoder.REMAT) has not kept."""
  total, layers = forward(model, rows, T, loss_tokens) * 3, forward(model, rows, T, 0)
  attention = (
    model.num_hidden_layers * 2 * model.num_attention_heads * model.head_dim * (T + 1) * rows * T
  )
  again = {
    'none': 0.0,
    'dots': attention,
    'attention': layers.flops - attention,
    'full': layers.flops,
  }[remat]
  moved = layers.bytes if remat in ('attention', 'full') else 0.0
  return dataclasses.replace(total, flops=total.flops + again, bytes=total.bytes + moved)


def update(params_per_device: float) -> Work:
  """AdamW: gradient, parameter and two moments are read, all but the gradient written, 4 bytes each; some 12 operations."""
  return Work(0.0, 12 * params_per_device, 7 * 4 * params_per_device)


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
  """`steps` tokens for each lane, heads split `ways` ways: each step reads the weights and `slots` cached tokens.

  Args:
    model: the configuration.
    ways: devices that share a layer.
    lanes: decoded together.
    slots: of keys and values read at a step, trunks once for all their lanes.
    cached: tokens that a lane sees.
    steps: of a call.
  """
  weights = model.param_count - (
    0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
  )
  # flops_per_token averages over a causal row; a token that sees `cached` ones is the last of a row twice as long.
  flops = lanes * model.flops_per_token(2 * int(cached)) / ways
  return (
    Work(flops, flops, (weights * bytes_each + slots * model.kv_bytes_per_token('bfloat16')) / ways)
    * steps
  )
