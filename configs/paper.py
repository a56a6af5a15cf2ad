"""What the configs of real models share: the paper's run, on accelerators.

The defaults of `dcore_jax.config` are the paper's hyperparameters (docs/method.md, sections 2.4 and
3). This file sets what depends on the model and the devices.

The times in the configs are estimates of `experiments.plan`; nothing was measured on such devices.
They take a stated share (MFU) of the A100's 312 Tflop/s, for 40,000 rows in 3 epochs. A row has
4,474 tokens, the mean of the two rows that the paper's authors published. By the same count their
own times on 8 A100-80G (SFT of 8B in 11 h, of 14B in 21 h) are 33 and 30 % MFU.
"""

import ml_collections

from dcore_jax.run.config import default_config

# The stages of the models that learn from Qwen3's trajectories (paper, Table 5).
SFT_ONLY = ('sft', 'export', 'report')


def paper_config(
  preset: str,
  path: str,
  *,
  sft_rows: int,
  rl_rows: int = 8,
  lanes: int = 128,
  tile: int = 64,
  stages: tuple[str, ...] | None = None,
) -> ml_collections.ConfigDict:
  """The paper's run for a model.

  Args:
    preset: name in models/presets.py, and of the config file.
    path: where the checkpoint is expected.
    sft_rows: rows of 16,384 tokens a step; the paper has 2 a device for 8B and 1 for 14B.
    rl_rows: rows of a micro-batch of RL, a multiple of the devices that split rows.
    lanes: rollouts in flight, of the 256 of a step.
    tile: lanes that are decoded together.
    stages: the stages to run; default: all.
  """
  c = default_config()
  c.name = f'configs/{preset}.py'
  c.stages = stages or c.stages
  c.model.update(dict(path=path, preset=preset))
  c.execution.update(dict(remat='full', unroll=False))
  prompt = c.rl.max_prompt_tokens
  response = c.rl.max_tokens
  # Eight rollouts share a prompt, so lanes / 8 trunks are in use at once, and some more while the
  # rollouts of one group end and those of the next begin.
  c.engine.update(
    dict(
      lanes=lanes,
      tile=tile,
      trunks=lanes // 4,
      max_len=prompt + response,
      max_new=response,
      tensor=8,  # the engine splits heads over the 8 devices of a host
    )
  )
  c.evaluate.max_tokens = response
  c.distill.max_tokens = response
  # These tasks give 40,000 rows, as many as the paper has.
  c.distill.tasks.update(
    dict(single=3000, sequential=5000, parallel=6000, irrelevant=3000, multi_turn=2400)
  )
  # These give 5,010 prompts; the paper has 5,000.
  c.rl.tasks.update(dict(single=320, sequential=640, parallel=640, irrelevant=320, multi_turn=214))
  c.sft.rows = sft_rows
  c.rl.rows = rl_rows
  # What experiments.plan finds best where it fits: a row holds a prompt with all its responses, and
  # repeats nothing. An update of Qwen3-8B (GiB that are not compiled are estimated):
  #   capacity  merging factor    8 A100: least time, memory    8 v5p: least time, memory
  #     16,384            1.50            15.6 s    49.5 GiB         10.6 s   49.4 GiB (estimate)
  #     24,576            2.00            12.2 s    53.4 GiB          8.3 s   53.3 GiB (estimate)
  #     40,960            2.40            10.5 s    56.9 GiB          7.1 s   56.9 GiB
  # of 71.3 and 85.5 GiB that may be used.
  c.rl.capacity = prompt + c.rl.group * response
  return c
