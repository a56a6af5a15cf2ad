"""The whole method on a laptop CPU with the packaged model organism.

Command:   python -m experiments.train --config=configs/nano.py --workdir=runs/nano
Variants:  :quick          small samples, three minutes
           :grpo           the control: plain GRPO
           :agentic        RL acts whole tasks out and rewards the state that they leave
           :decomposition  for the sweep over what the decomposer sees
           :tiny           the smallest run of a sweep; it measures nothing
Hardware:  2 CPU cores
Time:      13 minutes
Result:    share of 128 held-out tasks that are right, base -> SFT -> DA-GRPO:
           sequential 33 -> 88 -> 88 %, parallel 24 -> 59 -> 59 %, multi-turn 59 -> 79 -> 79 %,
           single 98 -> 99 -> 100 %, irrelevant 98 -> 95 -> 95 %
           :agentic, share of 512 episodes (64 tasks set aside) that are right, after SFT -> 16
           steps -> 32 steps: 13 -> 22 -> 33 % (with an earlier version's held-out tasks)
"""

import ml_collections

from dcore_jax.run.config import default_config

VARIANTS = ('', 'quick', 'grpo', 'agentic', 'decomposition', 'tiny')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a variant; '' is the whole run of the docstring above."""
  if variant not in VARIANTS:
    raise ValueError(f'unknown variant {variant!r} of nano; expected one of {VARIANTS}')
  c = default_config()
  c.name = 'configs/nano.py' + (f':{variant}' if variant else '')
  c.evaluate.tasks = 128
  # A lane whose response ends idles for half a call on average. Responses have some 55 tokens, so 8
  # steps waste 6 % of the lanes' time, and 16 would waste 12 %.
  c.engine.steps_per_call = 8
  c.distill.update(dict(wording='organism', examples=0, exact_refusals=True))
  c.distill.tasks.update(dict(single=300, irrelevant=60))
  c.sft.update(
    dict(
      epochs=3,
      capacity=640,
      rows=5,
      optimizer='muon_nadam',  # as the organism was pretrained
      learning_rate=4e-3,
      adam_learning_rate=6e-4,
    )
  )
  # Prompts, rollouts and updates of a step are the published ones, and so are alpha and delta. The
  # organism's entropies are near 0.03 nats a token, so psi is small here (see the sweep of alpha).
  # The learning rate is not 5e-5: at that rate the model learns to report too early. 23 % of the
  # samples then stop before the last subtask (after SFT 2 %), and 75 % of the sequential tasks are
  # right instead of 83 %.
  c.rl.update(
    dict(
      steps=8,
      prompts=32,
      group=8,
      updates=4,
      learning_rate=2e-5,
      max_prompt_tokens=320,
      max_tokens=448,
      capacity=768,
      rows=1,
      checkpoint_every=4,
    )
  )
  if variant == 'grpo':
    c.rl.estimator = 'grpo'
  if variant == 'agentic':
    # Only tasks that take several responses: an episode has four or five of some 90 tokens each. 64
    # tasks with 8 episodes each are set aside.
    # RL starts after one epoch of SFT, when 13 % of the episodes are right and the errors are
    # systematic, so that they can be unlearned. After three epochs 70 % are right and the remaining
    # errors are chance: eight steps at this rate, or four at 1e-4, change nothing.
    c.sft.epochs = 1
    c.rl.update(
      dict(
        episodes=True,
        steps=32,
        prompts=16,
        wave=16,
        updates=2,
        learning_rate=3e-4,
        max_tokens=256,
        capacity=1024,
        validation=64,
        checkpoint_every=16,
      )
    )
    c.rl.tasks.update(dict(single=0, sequential=200, parallel=0, irrelevant=0, multi_turn=200))
  if variant == 'decomposition':
    # A quarter of the seeds and twice the epochs. After two epochs (68 steps) the loss of the rows
    # that were made with the reference in view is still 0.4, and the model gets no task of several
    # subtasks right.
    c.distill.tasks.update(
      dict(single=40, sequential=80, parallel=80, irrelevant=12, multi_turn=24)
    )
    c.sft.epochs = 6
    c.evaluate.tasks = 48
  if variant in ('quick', 'tiny'):
    c.evaluate.tasks = 16
    c.distill.tasks.update(
      dict(single=40, sequential=60, parallel=60, irrelevant=40, multi_turn=20)
    )
    c.sft.epochs = 1
    c.rl.update(dict(steps=2, prompts=8, updates=2, validation=4))
  if variant == 'tiny':
    c.evaluate.tasks = 4
    c.distill.tasks.update(dict(single=10, sequential=16, parallel=16, irrelevant=8, multi_turn=4))
    c.rl.update(dict(steps=1, prompts=4, group=4, updates=1, validation=2))
  return c
