"""Qwen2.5-14B-Instruct, SFT on the rows that Qwen3-8B distilled (paper, Table 5).

Command:   cat runs/qwen3_8b/distill/rows-*.jsonl > runs/qwen3_8b/rows.jsonl
           python -m experiments.train --config=configs/qwen2_5_14b.py
           --config.model.path=DIR --workdir=runs/qwen2_5_14b
           --config.sft.files="('runs/qwen3_8b/rows.jsonl',)"
Plan:      python -m experiments.plan --config=configs/qwen2_5_14b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      as qwen3_14b.py: SFT 16 h at 40 % MFU
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import SFT_ONLY, paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen2_5_14b')
  c = paper_config(
    'qwen2_5_14b', 'Qwen/Qwen2.5-14B-Instruct', sft_rows=8, lanes=64, stages=SFT_ONLY
  )
  # For whoever adds 'rl' to the stages: a prompt and three responses, merging factor 1.71. An
  # update takes at least 27.4 s, and about 69.9 of 71.3 GiB; four responses would take 72.7 GiB.
  c.rl.capacity = 20_480
  return c
