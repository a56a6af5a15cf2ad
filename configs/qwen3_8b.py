"""Qwen3-8B as in the paper: self-distillation, SFT on 16 rows of 16,384 tokens a step, DA-GRPO.

Command:   python -m experiments.train --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b
           --config.evaluate.suite_options="tau2.user_base_url=URL,tau2.user_model=NAME"
Variants:  :dry  all stages on made-up files with a tiny random model (docs/large_models.md)
Data:      SEEDS and PROMPTS of configs/paper.py; `make harnesses`, which it is compared with
Plan:      python -m experiments.plan --config=configs/qwen3_8b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      SFT 9 h at 40 % MFU (roofline 4.7 h; the paper took 11 h). A DA-GRPO step takes at least
           141 s where all prompts and responses have their full length, 468 steps 18 h. The paper's
           468 steps took 11 h, so its responses were shorter
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import dry, paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config; the variant 'dry' tries all of its stages on a CPU."""
  if variant not in ('', 'dry'):
    raise ValueError(f'unknown variant {variant!r} of qwen3_8b')
  c = paper_config('qwen3_8b', 'Qwen/Qwen3-8B', sft_rows=16)
  return dry(c) if variant else c
