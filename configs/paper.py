"""What the configs of real models share: the paper's run, on accelerators.

The defaults of `dcore_jax.config` are the paper's hyperparameters (docs/method.md, sections 2.4 and
3). This file sets what depends on the model and the devices.

The times in the configs are estimates of `experiments.plan`; nothing was measured on such devices.
They take a stated share (MFU) of the A100's 312 Tflop/s, for 40,000 rows in 3 epochs. A row has
4,474 tokens, the mean of the two rows that the paper's authors published. By the same count their
own times on 8 A100-80G (SFT of 8B in 11 h, of 14B in 21 h) are 33 and 30 % MFU.
"""

from typing import Any

import ml_collections

from dcore_jax.data.published import COMMANDS
from dcore_jax.run.config import default_config

# The stages of the models that learn from Qwen3's trajectories (paper, Table 5).
SFT_ONLY = ('sft', 'export', 'report')
# The paper names ToolACE, xLAM (APIGen), APIGen-MT and trajectories of its own, but not how many of
# each. These numbers are ours: they give about 40,000 rows, as many as the paper has. A sequential
# seed gives a row for each call and one for the report, any other seed one row.
SEEDS: dict[str, dict[str, Any]] = {
  'toolace': dict(source='Team-ACE/ToolACE', single=3000, parallel=3000, irrelevant=1500),
  'xlam': dict(source='Salesforce/xlam-function-calling-60k', single=3000, parallel=5000),
  'apigen_mt': dict(source='Salesforce/APIGen-MT-5k', single=1500, sequential=3000),
  'tau2': dict(source='tau2', single=-1, sequential=-1),
  'bfcl': dict(source='bfcl', single=500, sequential=2000, irrelevant=500),
  'toolworld': dict(source='toolworld', single=500, sequential=1000, parallel=1000, irrelevant=800),
}
# ToolRL's 4,000 rows, and as many steps of ToolWorld as the paper's 5,000 prompts lack. Pivot rows
# are an option: --config.recipe.prompts.pivot.count=1000
PROMPTS: dict[str, dict[str, Any]] = {
  'toolrl': dict(source='toolrl/rlla_rl.json', count=4000, get=COMMANDS['toolrl/rlla_rl.json']),
  'toolworld': dict(source='toolworld', single=240, sequential=128, parallel=100, irrelevant=100),
  'pivot': dict(
    source='nvidia/Nemotron-RL-Agentic-Conversational-Tool-Use-Pivot-v1#train.jsonl', count=0
  ),
}


def paper_config(
  preset: str,
  path: str,
  *,
  sft_rows: int,
  rl_rows: int = 8,
  lanes: int = 128,
  stages: tuple[str, ...] | None = None,
) -> ml_collections.ConfigDict:
  """The paper's run for a model.

  Args:
    preset: name in models/presets.py, and of the config file.
    path: where the checkpoint is expected.
    sft_rows: rows of 16,384 tokens a step; the paper has 2 a device for 8B and 1 for 14B.
    rl_rows: rows of a micro-batch of RL, a multiple of the devices that split rows.
    lanes: rollouts in flight, of the 256 of a step.
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
      trunks=lanes // 4,
      max_len=prompt + response,
      max_new=response,
      tensor=8,  # the engine splits heads over the 8 devices of a host
    )
  )
  c.evaluate.max_tokens = response
  c.distill.max_tokens = response
  c.recipe.seeds.update(SEEDS)
  c.recipe.prompts.update(PROMPTS)
  c.evaluate.suites = ('bfcl', 'tau2')
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


def lora_config(preset: str, path: str, *, devices: int, lanes: int) -> ml_collections.ConfigDict:
  """The paper's run with adapters instead of all parameters, on one or a few devices.

  Args:
    preset: name in models/presets.py; the config file is named {preset}_lora.
    path: where the checkpoint is expected.
    devices: that split heads, feed-forward layer and vocabulary, in training as in the engine.
    lanes: rollouts in flight; in distillation and evaluation each has caches of a whole text, and
      the weights of the next stage are loaded beside those of the engine.
  """
  c = paper_config(preset, path, sft_rows=16, rl_rows=1, lanes=lanes)
  c.name = f'configs/{preset}_lora.py'
  # One split for both, so that the engine can read the trainer's base where it lies.
  c.mesh.update(dict(fsdp=1, tensor=devices))
  c.engine.tensor = 0
  # Unmerged, the engine reads the base itself: merged weights would be a second model in memory.
  c.lora.update(dict(rank=64, alpha=64.0, rollouts='unmerged'))
  # One row at a time: a sum of adapters' gradients costs next to nothing.
  c.sft.accumulate = c.sft.rows
  # Ten times the rates of full training, as usual for adapters, whose second factor begins at zero.
  c.sft.learning_rate = 1e-4
  c.rl.learning_rate = 1e-5
  return c


def take_random_model(c: ml_collections.ConfigDict, **differs: Any) -> None:
  """Puts 0.3 million random numbers in the place of a config's model.

  Args:
    c: the config; changed.
    differs: fields of the model that its family needs.
  """
  c.model.update(dict(path='', preset=''))
  c.model.init.update(
    dict(
      vocab_size=640,
      hidden_size=64,
      intermediate_size=128,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      tie_word_embeddings=True,
      **differs,
    )
  )


def dry(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Makes a config small enough to go through all of its stages on a CPU in ten minutes.

  A model of 0.3 million random numbers takes the place of the real one, and references that of its
  answers in distillation. Sources keep their names: `experiments.made_up` writes small files for
  them. Everything else is as in the whole run.
  """
  c.name += ':dry'
  take_random_model(c, model_type='qwen3', head_dim=16, max_position_embeddings=4096)
  c.execution.update(dict(remat='none', unroll=True))
  c.engine.update(dict(lanes=8, trunks=0, max_len=1024, max_new=32, tensor=0))
  for name, entry in SEEDS.items():
    # The tools and policies of these two are longer than the rows here.
    count = 0 if name in ('tau2', 'bfcl') else 4
    c.recipe.seeds[name].update({kind: count for kind in entry.keys() - {'source'}})
  c.recipe.prompts.toolrl.count = 8
  c.recipe.prompts.pivot.count = 4
  c.recipe.prompts.toolworld.update(dict(single=1, sequential=1, parallel=1, irrelevant=1))
  c.distill.backend = 'scripted'
  c.evaluate.update(dict(suites=('gsm8k',), limit=2, max_tokens=16))
  c.sft.update(dict(epochs=1, capacity=1024, rows=2))
  c.rl.update(
    dict(
      steps=1,
      prompts=4,
      group=2,
      updates=1,
      validation=2,
      max_prompt_tokens=960,
      max_tokens=32,
      capacity=1024,
      rows=1,
    )
  )
  return c
