"""Which `rl.capacity` a run should have: the tokens of a packed row of its RL updates.

A row that holds a prompt and k of its responses saves k - 1 copies of the prompt. Longer rows save
more, and hold more activations at once. Each capacity at which k grows by one is compared: by the
work of its real rows (plan/group_rows.py), and by memory, of which the temporaries of the update
are estimated. The best one still has to be compiled: `fit.plan` of the config with that capacity.
Letters: R rows, T tokens in a row, and as in models/config.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dcore_jax.config import RlSection, RunConfig
from dcore_jax.models.config import DecoderConfig
from dcore_jax.plan import group_rows, programs, roofline
from dcore_jax.plan.shapes import RunShapes, device_bytes

# The kernels' largest block in tokens (attention/tpu.py). They fill a row up to whole blocks, whose
# last places might as well hold tokens.
_BLOCK = 512
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Choice:
  """One capacity, with an update of the longest groups.

  Attributes:
    capacity: tokens of a row.
    responses: that a row holds behind their prompt.
    dedup: tokens of the flat sequences per token of the rows.
    rows: of a mini-batch.
    micro_batches: that they make.
    bound: least time of an update.
    total: bytes that each device holds in an update, about.
    fits: whether these are within the limit.
  """

  capacity: int
  responses: int
  dedup: float
  rows: int
  micro_batches: int
  bound: roofline.Bound
  total: int
  fits: bool


def candidates(section: RlSection) -> list[int]:
  """Returns the least capacities that hold a longest prompt and 1, 2 ... `group` responses.

  They are rounded up to whole blocks of the kernels, and ascend.
  """
  found = []
  for responses in range(1, section.group + 1):
    tokens = section.max_prompt_tokens + responses * section.max_tokens
    found.append(_BLOCK * math.ceil(tokens / _BLOCK))
  # Short responses may leave several in one block.
  return sorted(set(found))


def compare(
  config: RunConfig, model: DecoderConfig, devices: list[jax.Device], limit: int, accelerator: str
) -> list[Choice]:
  """Returns all candidates, and the config's own capacity, by ascending capacity.

  Args:
    config: of the run.
    model: its model.
    devices: of the target, real or not.
    limit: bytes that a step may use on each device.
    accelerator: of `roofline.ACCELERATORS`, for the times.

  Raises:
    ValueError: sizes that do not fit each other.
  """
  choices = []
  for capacity in sorted({*candidates(config.rl), config.rl.capacity}):
    run = RunShapes(with_capacity(config, capacity), model, devices)
    update = programs.grpo_update(run)
    packed = group_rows.longest(run.config.rl)
    room = capacity - config.rl.max_prompt_tokens
    held = device_bytes(list(update.arguments.values())) + sum(update.beside.values())
    # Those that the program is compiled for, some of which may stay empty.
    compiled_for = update.arguments['batch'].tokens.shape[0]
    total = held + update_temporaries(run, compiled_for)
    choices.append(
      Choice(
        capacity=capacity,
        responses=min(config.rl.group, room // config.rl.max_tokens),
        dedup=packed.dedup,
        rows=packed.rows,
        micro_batches=math.ceil(packed.rows / config.rl.rows),
        bound=roofline.bound(update.work, roofline.ACCELERATORS[accelerator]),
        total=total,
        fits=total <= limit,
      )
    )
  return choices


def best(choices: list[Choice]) -> Choice | None:
  """Returns the one of least time that fits; of equal ones the shortest. None where none fits."""
  fitting = [choice for choice in choices if choice.fits]
  return min(fitting, key=lambda choice: (choice.bound.seconds, choice.capacity), default=None)


def with_best(config: RunConfig, choices: list[Choice]) -> RunConfig:
  """Returns the config with the best capacity; ValueError where none fits."""
  chosen = best(choices)
  if chosen is None:
    raise ValueError(f'no rl.capacity of {[each.capacity for each in choices]} fits')
  return with_capacity(config, chosen.capacity)


def with_capacity(config: RunConfig, capacity: int) -> RunConfig:
  """Returns the config with another `rl.capacity`."""
  return dataclasses.replace(config, rl=dataclasses.replace(config.rl, capacity=capacity))


def update_temporaries(run: RunShapes, micro_batches: int) -> int:
  """Returns about how many bytes of temporaries an update has on each device.

  It is the sum of what is there at the peak, in the backward pass of a layer. The factors are
  fitted to 21 updates that were compiled for A100 with rematerialisation 'full': models of 0.6B to
  32B, rows of 16,384 to 49,152 tokens, 7.6 to 51.2 GiB. The estimates are off by -1.4 to 1.4
  GiB, and by 0.4 GiB for 8B on v5p.
  """
  model = run.model
  D = model.hidden_size
  tensor = run.mesh.shape['tensor']
  F = model.intermediate_size / tensor
  width = model.num_attention_heads * model.head_dim / tensor
  item = jnp.dtype(run.dtype).itemsize
  tokens = run.micro_batch_rows('rl', run.config.rl.rows) / run.shards * run.config.rl.capacity
  kept = model.num_hidden_layers * _kept(run.execution.remat, D, F, width)
  # The layer that is at work: its values, computed again, and their gradients.
  working = 5 * F + 5 * width + 6 * D
  gradients = device_bytes(run.parameters())
  # A loop over micro-batches adds the gradients of one to their sum.
  sums = 2 if micro_batches > 1 else 1
  layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.compute_weights()['layers']))
  gathered = 2 * layers / model.num_hidden_layers / tensor
  # The head's gradient is whole and float32 until the devices have added theirs up.
  head = 4 * model.vocab_size / tensor * D if run.frozen is None else 0
  return int(tokens * item * (kept + working) + sums * gradients + item * gathered + head)


def _kept(remat: str, D: float, F: float, width: float) -> float:
  """Returns the numbers a token and layer that the forward pass keeps (decoder.REMAT), about."""
  # The carry of the layers, and then what attention gives, and what the products give.
  attention = D + width
  dots = D + 3 * width + 2 * D + 3 * F
  return {'full': D, 'attention': attention, 'dots': dots, 'none': dots + attention}[remat]


def to_json(choices: list[Choice], config: RunConfig) -> dict[str, Any]:
  """Returns the comparison as an object of JSON."""
  chosen = best(choices)
  return {
    'capacities': [dataclasses.asdict(choice) for choice in choices],
    'best': chosen.capacity if chosen else None,
    'config': config.rl.capacity,
  }


def table(choices: list[Choice], config: RunConfig, target: str) -> str:
  """Returns the comparison, and which one is best, as text for people."""
  rl = config.rl
  accelerator = roofline.of_target(target)
  lines = [
    f'rl.capacity for prompts of {rl.max_prompt_tokens:,} and {rl.group} responses of '
    f'{rl.max_tokens:,} tokens; an update on {target} at least ({accelerator})',
    f'{"capacity":>10}{"responses":>11}{"factor":>8}{"rows":>6}{"micro-batches":>15}{"seconds":>9}'
    f'{"by":>9}{"GiB":>7}  fits',
  ]
  for choice in choices:
    lines.append(
      f'{choice.capacity:10,}{choice.responses:11}{choice.dedup:8.2f}{choice.rows:6}'
      f'{choice.micro_batches:15}{choice.bound.seconds:9.3f}{choice.bound.by:>9}'
      f'{choice.total / _GIB:7.1f}  {"yes" if choice.fits else "NO"}'
    )
  chosen = best(choices)
  lines.append(f'best: {chosen.capacity:,}' if chosen else 'none of them fits')
  lines[-1] += f'; the config has {rl.capacity:,}. Temporaries are estimated in this table'
  return '\n'.join(lines)
