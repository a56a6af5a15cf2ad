"""Qwen3-8B with LoRA on one GPU: the paper's stages and batches, adapters of rank 64.

Command:   python -m experiments.train --config=configs/qwen3_8b_lora.py
           --config.model.path=DIR --workdir=runs/qwen3_8b_lora
Plan:      python -m experiments.plan --config=configs/qwen3_8b_lora.py --topology=a100:1
Hardware:  one A100-80G
Time:      an SFT step of 16 rows of 16,384 tokens takes at least 53 s; a DA-GRPO step at least
           1,400 s where all prompts and responses have their full length
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import lora_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_8b_lora')
  return lora_config('qwen3_8b', 'Qwen/Qwen3-8B', devices=1, lanes=16)
