"""Qwen3-32B, which the paper evaluates and does not train, in its geometry.

Command:   python -m experiments.train --config=configs/qwen3_32b.py
           --config.model.path=DIR --workdir=runs/qwen3_32b
Plan:      python -m experiments.plan --config=configs/qwen3_32b.py --topology=a100:16
Hardware:  16 A100-80G: two hosts, `--hosts=auto` on both
Time:      SFT 18 h at 40 % MFU (roofline 9.7 h). A DA-GRPO step takes at least 417 s
           where all prompts and responses have their full length, 468 steps 54 h
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_32b')
  c = paper_config('qwen3_32b', 'Qwen3-32B', sft_rows=16, rl_rows=16, lanes=64, tile=32)
  # A prompt and four responses, factor 2.00: the 8 prompts of an update make 16 rows, one for each
  # device, and take at least 25.3 s. Rows of whole groups would leave half of the devices idle.
  c.rl.capacity = 24_576
  # With the moments on the devices an update would take 80.7 of 71.3 GiB.
  c.execution.offload = ('optimizer',)
  return c
