"""Qwen3-14B as in the paper: the recipe of 8B with 8 rows a step, one a device.

Command:   python -m experiments.train --config=configs/qwen3_14b.py --workdir=runs/qwen3_14b
           --config.evaluate.suite_options="tau2.user_base_url=URL,tau2.user_model=NAME"
Variants:  :dry  all stages on made-up files with a tiny random model (docs/large_models.md)
Data:      SEEDS and PROMPTS of configs/paper.py; `make harnesses`, which it is compared with
Plan:      python -m experiments.plan --config=configs/qwen3_14b.py --topology=a100:8
Hardware:  8 A100-80G
Time:      SFT 16 h at 40 % MFU (roofline 8.2 h; the paper took 21 h). A DA-GRPO step takes at least
           246 s where all prompts and responses have their full length, 468 steps 32 h. The paper's
           468 steps took 17 h, so its responses were shorter
Result:    none yet: no accelerator was at hand
"""

import ml_collections

from configs.paper import dry, paper_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config; the variant 'dry' tries all of its stages on a CPU."""
  if variant not in ('', 'dry'):
    raise ValueError(f'unknown variant {variant!r} of qwen3_14b')
  # Caches of 128 lanes would take 8.8 GiB more on every device.
  c = paper_config('qwen3_14b', 'Qwen/Qwen3-14B', sft_rows=8, lanes=64)
  # A prompt and four responses, merging factor 2.00: an update takes at least 21.4 s, and 69.8 of
  # 71.3 GiB. Rows of whole groups (40,960 tokens, 2.40, 18.2 s) would take 73.6 GiB. 8 v5p have
  # room for them, --config.rl.capacity=40960: 12.4 s, and about 73.8 of 85.5 GiB.
  c.rl.capacity = 24_576
  c.rl.checkpoint_every = 50
  return dry(c) if variant else c
