"""The stages SFT and DA-GRPO on real text, with a random model.

The tokenizer, the vocabulary of 151,936, the rows and the reward are the published ones.

Command:   python -m experiments.train --config=configs/qwen3_smoke.py --workdir=runs/qwen3_smoke
Variants:  :quick  24 rows and one RL step, four minutes
Needs:     the data folder (`DCORE_DATA`)
Result:    the loss falls (:quick, 6 steps: from 11.94 to 11.06 nats a token; a uniform guess has
           11.93), and prompts that are too long are dropped and counted (27 of 400). A random model
           earns no reward
"""

import ml_collections

from dcore_jax.run.config import default_config


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config; the variant 'quick' has fewer rows and steps."""
  if variant not in ('', 'quick'):
    raise ValueError(f"unknown variant {variant!r} of qwen3_smoke; expected '' or 'quick'")
  c = default_config()
  c.name = 'configs/qwen3_smoke.py' + (f':{variant}' if variant else '')
  c.stages = ('sft', 'rl', 'export', 'report')
  c.model.tokenizer = 'qwen3-tokenizer'
  c.model.init.update(
    dict(
      model_type='qwen3',
      vocab_size=151936,
      hidden_size=256,
      intermediate_size=768,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=64,
      rope_theta=1e6,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      max_position_embeddings=8192,
      initializer_range=0.02,
      eos_token_id=151645,
      pad_token_id=151643,
    )
  )
  c.engine.update(dict(lanes=8, max_len=1088, steps_per_call=16))
  c.sft.update(
    dict(
      files=('dcore_sft_sample/rows.json', 'toolrl/rlla_sft.json'),
      epochs=1,
      capacity=4608,
      rows=1,
      learning_rate=1e-3,
      max_rows=24 if variant == 'quick' else 80,
    )
  )
  c.rl.update(
    dict(
      files=('toolrl/rlla_sft.json',),
      steps=1 if variant == 'quick' else 3,
      prompts=2,
      group=4,
      updates=1,
      validation=0,
      max_prompt_tokens=1024,
      max_tokens=64,
      capacity=2048,
      rows=1,
      learning_rate=1e-5,
      checkpoint_every=1,
    )
  )
  return c
