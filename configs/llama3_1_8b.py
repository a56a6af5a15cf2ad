"""Llama-3.1-8B-Instruct, SFT on the rows that Qwen3-8B distilled (paper, Table 5).

Command:   cat runs/qwen3_8b/distill/rows-*.jsonl > runs/qwen3_8b/rows.jsonl
           python -m experiments.train --config=configs/llama3_1_8b.py
           --config.model.path=DIR --workdir=runs/llama3_1_8b
           --config.sft.files="('runs/qwen3_8b/rows.jsonl',)"
Plan:      python -m experiments.plan --config=configs/llama3_1_8b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      as qwen3_8b.py: SFT 9 h at 40 % MFU
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import SFT_ONLY, paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of llama3_1_8b')
  return paper_config(
    'llama3_1_8b', 'meta-llama/Llama-3.1-8B-Instruct', sft_rows=16, stages=SFT_ONLY
  )
