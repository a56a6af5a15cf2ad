"""Qwen3-1.7B in the paper's geometry.

Command:   python -m experiments.train --config=configs/qwen3_1_7b.py
           --config.model.path=DIR --workdir=runs/qwen3_1_7b
Plan:      python -m experiments.plan --config=configs/qwen3_1_7b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      SFT 2.4 h at 40 % MFU (roofline 1.2 h). A DA-GRPO step takes at least 67 s
           where all prompts and responses have their full length, 468 steps 8.7 h
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_1_7b')
  return paper_config('qwen3_1_7b', 'Qwen/Qwen3-1.7B', sft_rows=16)
