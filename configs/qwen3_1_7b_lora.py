"""Qwen3-1.7B with LoRA on one consumer GPU of 24 GB: shorter texts, adapters of rank 64.

Command:   python -m experiments.train --config=configs/qwen3_1_7b_lora.py
           --config.model.path=DIR --workdir=runs/qwen3_1_7b_lora
Plan:      python -m experiments.plan --config=configs/qwen3_1_7b_lora.py --topology=rtx4090:1
Hardware:  one GPU of 24 GB
Time:      an SFT step of 16 rows of 8,192 tokens takes at least 11 s on an RTX 4090; a DA-GRPO step
           at least 150 s where all prompts and responses have their full length
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import lora_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of qwen3_1_7b_lora')
  c = lora_config('qwen3_1_7b', 'Qwen/Qwen3-1.7B', devices=1, lanes=16)
  # A quarter of the paper's lengths, which 24 GB have room for.
  prompt = 3072
  response = 1024
  c.sft.capacity = 8192
  c.rl.update(dict(max_prompt_tokens=prompt, max_tokens=response))
  c.rl.capacity = prompt + c.rl.group * response
  c.engine.update(dict(max_len=prompt + response, max_new=response))
  c.evaluate.max_tokens = response
  c.distill.max_tokens = response
  return c
