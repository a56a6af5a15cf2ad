"""Qwen3-8B as in the paper: self-distillation, SFT on 16 rows of 16,384 tokens a step, DA-GRPO.

Command:   python -m experiments.train --config=configs/qwen3_8b.py
           --config.model.path=DIR --workdir=runs/qwen3_8b
Plan:      python -m experiments.plan --config=configs/qwen3_8b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      SFT 9 h at 40 % MFU (roofline 4.7 h; the paper took 11 h). A DA-GRPO step takes at least
           141 s where all prompts and responses have their full length, 468 steps 18 h. The paper's
           468 steps took 11 h, so its responses were shorter
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_8b')
  return paper_config('qwen3_8b', 'Qwen3-8B', sft_rows=16, tile=128)
