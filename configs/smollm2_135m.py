"""SmolLM2-135M-Instruct, a real pretrained model, learns tool calls on a laptop's CPU.

SFT on ToolRL's published rows (thoughts, then calls), then DA-GRPO with ToolRL's reward, measured
before and after each stage: format and reward of prompts whose tasks neither stage trains on, and
GSM8K and HumanEval, which nothing here teaches. It is too small to decompose tasks, so that nothing
is distilled.

Command:   make real; or, without the control (plain GRPO from the same SFT), make smollm2 and
           python -m experiments.train --config=configs/smollm2_135m.py --workdir=runs/real
Variants:  :quick  few rows, prompts and steps, for a look at the whole way
           :dry    the same stages with a tiny random model and made-up rows, half a minute
Needs:     ToolRL's rlla_sft.json, GSM8K and HumanEval in the data folder (`DCORE_DATA`), and 93 MB
           from PyPI the first time
Hardware:  2 CPU cores, 12 GB of memory (estimated)
Time:      :quick 42 minutes with the control, measured; the whole run seven hours with it and five
           without, estimated from that
Result:    of :quick, docs/results.md: answers in the format 0 -> 69 % after SFT; the whole run has
           not been made
"""

import ml_collections

from configs.paper import take_random_model
from dcore_jax.run.config import default_config

# Where `make smollm2` writes it.
PATH = '.smollm2/SmolLM2-135M-Instruct'
VARIANTS = ('', 'quick', 'dry')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a variant; '' is the whole run of the docstring above."""
  if variant not in VARIANTS:
    raise ValueError(f'unknown variant {variant!r} of smollm2_135m; expected one of {VARIANTS}')
  c = default_config()
  c.name = 'configs/smollm2_135m.py' + (f':{variant}' if variant else '')
  c.stages = ('evaluate_base', 'sft', 'evaluate_sft', 'rl', 'evaluate_rl', 'export', 'report')
  c.model.path = PATH
  # Scanned: thirty layers that are compiled one by one take minutes before the first step.
  c.execution.unroll = False
  # Half of ToolRL's prompts have at most 448 tokens, and 19 of 20 of their answers at most 512.
  c.engine.update(dict(lanes=16, max_len=960, max_new=512, steps_per_call=16))
  c.evaluate.update(dict(suites=('prompts', 'gsm8k', 'humaneval'), limit=64, max_tokens=256))
  # 307 of the 400 rows have at most 1,024 tokens; longer ones are mostly long lists of tools.
  c.sft.update(
    dict(
      files=('toolrl/rlla_sft.json',),
      hold_out=True,
      epochs=2,
      capacity=1024,
      rows=4,
      # One row at a time keeps the activations of all layers in 2 GB, so that none is recomputed.
      accumulate=4,
      learning_rate=2e-4,
      checkpoint_every=20,
    )
  )
  c.rl.update(
    dict(
      files=('toolrl/rlla_sft.json',),
      steps=24,
      prompts=4,
      group=4,
      updates=1,
      validation=48,
      max_prompt_tokens=448,
      max_tokens=512,
      capacity=2048,
      rows=1,
      learning_rate=2e-5,
      # No reference policy: its pass is a seventh of a step's operations, and in so few steps a
      # coefficient of 0.001 moves nothing.
      kl_coefficient=0.0,
      checkpoint_every=12,
    )
  )
  if variant == 'quick':
    c.evaluate.update(dict(limit=4, max_tokens=128))
    # The 93 shortest rows.
    c.sft.update(dict(epochs=1, capacity=640, rows=2, accumulate=2))
    c.rl.update(dict(steps=2, prompts=2, validation=8, max_tokens=384))
  if variant == 'dry':
    _make_dry(c)
  return c


def _make_dry(c: ml_collections.ConfigDict) -> None:
  """Puts random numbers in the model's place; `experiments.made_up` writes files for it."""
  take_random_model(c, model_type='llama', max_position_embeddings=2048)
  # Without guesses there is less to compile.
  c.engine.update(dict(lanes=8, max_len=960, max_new=32, guesses=0))
  c.evaluate.update(dict(suites=('prompts', 'gsm8k'), limit=2, max_tokens=16))
  c.sft.update(dict(epochs=1, max_rows=12))
  c.rl.update(dict(steps=1, prompts=2, group=2, validation=3, max_prompt_tokens=640, max_tokens=32))
