"""Qwen3-32B, which the paper evaluates and does not train, in its geometry.

Command:   python -m experiments.train --config=configs/qwen3_32b.py
           --config.model.path=DIR --workdir=runs/qwen3_32b
Plan:      python -m experiments.plan --config=configs/qwen3_32b.py --topology=a100:32
Hardware:  32 A100-80G: four hosts, `--hosts=auto` on all
Time:      SFT 9 h at 40 % MFU (roofline 4.9 h). A DA-GRPO step takes at least 354 s
           where all prompts and responses have their full length, 468 steps 46 h
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_32b')
  # One row a device. On 16 devices an update takes 80 of 71.3 GiB, with rows of 16,384 tokens too.
  c = paper_config('qwen3_32b', 'Qwen/Qwen3-32B', sft_rows=32, rl_rows=32, lanes=64)
  # A prompt and two responses, merging factor 1.50: the 8 prompts of an update make 32 rows, one
  # for each device. It takes at least 16.4 s, and 52.9 GiB. Longer rows would leave devices idle.
  c.rl.capacity = 16_384
  return c
