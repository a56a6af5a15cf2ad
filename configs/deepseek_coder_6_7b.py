"""DeepSeek-Coder-6.7B-instruct, SFT on the rows that Qwen3-8B distilled.

Its 32 key heads make caches four times as large as those of Qwen3-8B, so it has fewer lanes.

Command:   cat runs/qwen3_8b/distill/rows-*.jsonl > runs/qwen3_8b/rows.jsonl
           python -m experiments.train --config=configs/deepseek_coder_6_7b.py
           --config.model.path=DIR --workdir=runs/deepseek_coder_6_7b
           --config.sft.files="('runs/qwen3_8b/rows.jsonl',)"
Plan:      python -m experiments.plan --config=configs/deepseek_coder_6_7b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      as qwen3_8b.py, less by the size of the model: SFT 8 h at 40 % MFU
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import SFT_ONLY, paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of deepseek_coder_6_7b')
  return paper_config(
    'deepseek_coder_6_7b',
    'deepseek-ai/deepseek-coder-6.7b-instruct',
    sft_rows=16,
    lanes=64,
    stages=SFT_ONLY,
  )
