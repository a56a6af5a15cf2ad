"""Qwen3-1.7B in the paper's geometry.

Command:   python -m experiments.train --config=configs/qwen3_1_7b.py --config.model.path=DIR --workdir=runs/qwen3_1_7b
Plan:      python -m experiments.plan --config=configs/qwen3_1_7b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      SFT 2.4 h at 40 % MFU (roofline 1.2 h); a DA-GRPO step at least 78 s where prompts and responses are as long as they
           may be, 10 h for 468
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_1_7b')
  return paper_config('qwen3_1_7b', 'Qwen3-1.7B', sft_rows=16, tile=128)
