"""Qwen3-14B with LoRA on two GPUs: the recipe of 8B on one.

Command:   python -m experiments.train --config=configs/qwen3_14b_lora.py
           --config.model.path=DIR --workdir=runs/qwen3_14b_lora
Plan:      python -m experiments.plan --config=configs/qwen3_14b_lora.py --topology=a100:2
Hardware:  two A100-80G
Time:      an SFT step of 16 rows of 16,384 tokens takes at least 46 s; a DA-GRPO step at least
           890 s where all prompts and responses have their full length
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import lora_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_14b_lora')
  return lora_config('qwen3_14b', 'Qwen/Qwen3-14B', devices=2, lanes=32)
