"""Qwen3-4B in the paper's geometry.

Command:   python -m experiments.train --config=configs/qwen3_4b.py
           --config.model.path=DIR --workdir=runs/qwen3_4b
Plan:      python -m experiments.plan --config=configs/qwen3_4b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      SFT 5.8 h at 40 % MFU (roofline 3.0 h). A DA-GRPO step takes at least 111 s
           where all prompts and responses have their full length, 468 steps 14 h
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_4b')
  return paper_config('qwen3_4b', 'Qwen/Qwen3-4B', sft_rows=16)
