"""Qwen3-0.6B on one GPU: the smallest real model, in the paper's geometry.

Command:   python -m experiments.train --config=configs/qwen3_0_6b.py --config.model.path=DIR --workdir=runs/qwen3_0_6b
Plan:      python -m experiments.plan --config=configs/qwen3_0_6b.py --topology=a100:1
Hardware:  one A100-80G
Time:      SFT 11 h at 40 % MFU (roofline 5.7 h); a DA-GRPO step at least 525 s where prompts and responses are as long as they
           may be, 68 h for 468
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_0_6b')
  return paper_config(
    'qwen3_0_6b', 'Qwen3-0.6B', sft_rows=16, accumulate=16, rl_rows=1, lanes=32, tile=32, tensor=0
  )
