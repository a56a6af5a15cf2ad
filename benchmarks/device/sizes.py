"""Which models `benchmarks.device` takes, and how large: what fits the memory of the devices.

Weights are random: neither time nor memory depends on their values.
"""

import dataclasses
import math

import ml_collections

from benchmarks.shapes import SMOLLM2
from dcore_jax.models import presets
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.run.config import default_config

_GIB = 2**30

# A shape that a CPU trains in seconds. Its heads have the least size that all kernels take.
TINY = DecoderConfig(
  vocab_size=512,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
  tie_word_embeddings=True,
  max_position_embeddings=1024,
)

# Largest first.
_LADDER = ('qwen3_8b', 'qwen3_4b', 'qwen3_1_7b', 'qwen3_0_6b', 'smollm2_135m')
NAMES = (*_LADDER, 'tiny')

# Bytes of a parameter that a DA-GRPO step holds over all devices: parameters and two moments in
# float32, and engine, reference and what an update gathers of them, in 16 bits.
_TRAINING_BYTES = 18
# What training holds on each device beside that: activations of its rows, and a chunk of the head.
_BESIDE = 8 * _GIB
_TRAINING_SHARE = 0.85  # of a device's memory
_WEIGHT_BYTES = 2
_SERVING_SHARE = 0.6  # weights and caches, of all devices together
_MOST_LANES = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is measured.

  Attributes:
    trained_name, trained: the model of the training steps.
    served_name, served: the model of prefill and decode.
    devices: how many there are.
    row: tokens of a packed row of SFT; a device has two.
    prompt, answer: tokens of the rollouts of RL and of the engine.
    group: rollouts of a prompt.
    prompts: of an RL step.
    lanes: rollouts in flight.
    checked: tokens and pages of the checks against references, which hold every score.
    timed: tokens of the kernels that are timed.
    rounds: how often a thing is timed.
    pipeline: variant of configs/nano.py that is run whole.
  """

  trained_name: str
  trained: DecoderConfig
  served_name: str
  served: DecoderConfig
  devices: int
  row: int
  prompt: int
  answer: int
  group: int
  prompts: int
  lanes: int
  checked: int
  timed: int
  rounds: int
  pipeline: str

  def config(self) -> ml_collections.ConfigDict:
    """Returns the config of a run of these sizes, with random weights."""
    key_heads = math.gcd(self.trained.num_key_value_heads, self.served.num_key_value_heads)
    c = default_config()
    c.model.init.update(self.trained.to_hf())
    c.execution.update(dict(remat='full', unroll=False))
    c.sft.update(dict(capacity=self.row, rows=2 * self.devices))
    c.rl.update(
      dict(
        prompts=self.prompts,
        wave=self.prompts,
        group=self.group,
        updates=1,
        max_prompt_tokens=self.prompt,
        max_tokens=self.answer,
        # A row holds a prompt and all that is sampled for it.
        capacity=self.prompt + self.group * self.answer,
        rows=self.devices,
      )
    )
    c.engine.update(
      dict(
        lanes=self.lanes,
        max_len=self.prompt + self.answer,
        max_new=self.answer,
        # Each guess would be a row more of a pass, and random models cannot be guessed.
        guesses=0,
        # Few, so that prefill and decode can be told apart.
        steps_per_call=max(1, self.answer // 64),
        # Of one device, training's own split is all there is.
        tensor=0 if self.devices == 1 else math.gcd(self.devices, key_heads),
      )
    )
    return c


def model(name: str) -> DecoderConfig:
  """Returns the shape of that name."""
  if name == 'tiny':
    return TINY
  return SMOLLM2 if name == 'smollm2_135m' else presets.config(name)


def choose(platform: str, memory: int, devices: int, name: str = '') -> Sizes:
  """Returns what is measured on these devices.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'.
    memory: bytes of each device.
    devices: how many there are.
    name: of the model, one of NAMES; '' chooses the largest that fits, on a CPU the tiny one.

  Raises:
    ValueError: an unknown name, or not even the smallest model fits.
  """
  if name and name not in NAMES:
    raise ValueError(f'--size={name}: known are {", ".join(NAMES)}')
  if name == 'tiny' or (platform == 'cpu' and not name):
    return _tiny(devices)
  trained = name or _largest_trained(memory, devices)
  served, lanes = _served(memory, devices, name)
  return Sizes(
    trained_name=trained,
    trained=model(trained),
    served_name=served,
    served=model(served),
    devices=devices,
    row=8192,
    prompt=1024,
    answer=256,
    group=8,
    # Every device has a row in each pass.
    prompts=max(8, devices),
    lanes=lanes,
    checked=512,
    timed=8192,
    rounds=5,
    pipeline='quick',
  )


def _tiny(devices: int) -> Sizes:
  return Sizes(
    trained_name='tiny',
    trained=TINY,
    served_name='tiny',
    served=TINY,
    devices=devices,
    row=128,
    prompt=32,
    answer=8,
    group=4,
    prompts=max(2, devices),
    lanes=8,
    checked=64,
    timed=64,
    rounds=2,
    pipeline='tiny',
  )


def training_bytes(shape: DecoderConfig, devices: int) -> float:
  """Returns about how many bytes each device holds in a DA-GRPO step."""
  return _TRAINING_BYTES * shape.param_count / devices + _BESIDE


def _largest_trained(memory: int, devices: int) -> str:
  for name in _LADDER:
    if training_bytes(model(name), devices) <= _TRAINING_SHARE * memory:
      return name
  raise ValueError(
    f'no model fits {memory / _GIB:.1f} GiB: the smallest, {_LADDER[-1]}, takes '
    f'{training_bytes(model(_LADDER[-1]), devices) / _GIB:.1f}; --size=tiny tries the programs'
  )


def _served(memory: int, devices: int, name: str) -> tuple[str, int]:
  """Returns (model, lanes): the largest model whose weights leave room for 8 lanes or more."""
  room = _SERVING_SHARE * memory * devices
  for candidate in (name,) if name else _LADDER:
    shape = model(candidate)
    left = room - _WEIGHT_BYTES * shape.param_count
    # Each lane has a prompt of its own and room for what it samples, both in whole pages.
    sizes = EngineSizes(lanes=1, max_len=1280, max_new=256, trunks=1)
    lane = sizes.pages(128) * 128 * shape.kv_bytes_per_token('bfloat16')
    lanes = min(_MOST_LANES, int(left // lane))
    if lanes >= 8:
      return candidate, lanes - lanes % 8
  raise ValueError(f'{memory / _GIB:.1f} GiB a device hold no model and its rollouts')
