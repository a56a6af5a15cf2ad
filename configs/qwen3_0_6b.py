"""Qwen3-0.6B on one GPU: the smallest real model, in the paper's geometry.

Command:   python -m experiments.train --config=configs/qwen3_0_6b.py
           --config.model.path=DIR --workdir=runs/qwen3_0_6b
Plan:      python -m experiments.plan --config=configs/qwen3_0_6b.py --topology=a100:1
Hardware:  one A100-80G
Time:      SFT 11 h at 40 % MFU (roofline 5.7 h). A DA-GRPO step takes at least 476 s
           where all prompts and responses have their full length, 468 steps 62 h
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_0_6b')
  c = paper_config('qwen3_0_6b', 'Qwen/Qwen3-0.6B', sft_rows=16, rl_rows=1, lanes=32)
  # One device holds one row at a time.
  c.sft.accumulate = 16
  c.engine.tensor = 0
  return c
