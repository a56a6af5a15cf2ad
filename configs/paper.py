"""What the configs of real models share: the paper's run (method: sections 2.4 and 3), on accelerators.

The defaults of `run.defaults` are the paper's hyperparameters already; here is what depends on the model and the devices.
Expected times in the configs are rooflines of `experiments.plan` taken at a stated share (MFU) of the A100's 312 Tflop/s, for
40,000 rows in 3 epochs, 4,474 tokens each as in the two rows that the paper's authors published; nothing was measured, there
was no such device. Their own times on 8 A100-80G (11 h for the SFT of 8B, 21 h of 14B) come to 33 and 30 % by the same count.
"""

import ml_collections

from dcore_jax.run.defaults import default_config

SFT_ONLY = (
  'sft',
  'export',
  'report',
)  # what the paper did with the models that learn from Qwen3's trajectories


def paper_config(
  preset: str,
  path: str,
  *,
  sft_rows: int,
  accumulate: int = 1,
  rl_rows: int = 8,
  lanes: int = 128,
  tile: int = 64,
  tensor: int = 8,
  stages: tuple[str, ...] | None = None,
) -> ml_collections.ConfigDict:
  """The paper's run for a model.

  Args:
    preset: of models/presets.py, and the name of the config file.
    path: where the checkpoint is expected.
    sft_rows: rows of 16,384 tokens a step, in `accumulate` micro-batches; in the paper 2 a device for 8B and 1 for 14B.
    rl_rows: rows of a micro-batch, a multiple of the devices that split rows.
    lanes: rollouts in flight, of the 256 of a step; `tile` of them are decoded together.
    tensor: ways that the engine splits heads.
    stages: which are run; default: all.
  """
  c = default_config()
  c.name = f'configs/{preset}.py'
  c.stages = stages or c.stages
  c.model.update(dict(path=path, preset=preset))
  c.execution.update(dict(remat='full', unroll=False))
  prompt, response = c.rl.max_prompt_tokens, c.rl.max_tokens
  # Prompts come in groups of 8: lanes / 8 are in use at once, some more while groups overlap.
  c.engine.update(
    dict(
      lanes=lanes,
      tile=tile,
      trunks=lanes // 4,
      max_len=prompt + response,
      max_new=response,
      tensor=tensor,
    )
  )
  c.evaluate.max_tokens = c.distill.max_tokens = response
  c.distill.tasks.update(
    dict(single=3000, sequential=5000, parallel=6000, irrelevant=3000, multi_turn=2400)
  )  # 40,000 rows
  c.rl.tasks.update(
    dict(single=320, sequential=640, parallel=640, irrelevant=320, multi_turn=214)
  )  # 5,010 prompts
  c.sft.update(dict(rows=sft_rows, accumulate=accumulate))
  c.rl.rows = rl_rows
  return c
