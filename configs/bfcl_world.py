r"""DA-GRPO as episodes on BFCL's executable APIs, with the packaged model organism.

Command:   make harnesses   (BFCL's code goes to the folder .bfcl)
           python -m experiments.train --config=configs/nano.py:tiny --workdir=runs/tiny \
             --stages=distill
           python -m experiments.train --config=configs/bfcl_world.py --workdir=runs/bfcl_world
Hardware:  2 CPU cores
Time:      7 minutes for the last command, on a busy machine
Result:    Reward on 4 tasks set aside (4 episodes each) -1.1 -> -0.4: of the two that no function
           solves 62 -> 88 % of the episodes are right, of the two that need a call none. Tried with
           34 rows of ToolWorld's reference solutions in place of the distilled ones.

The organism shows that the world runs, and not that a model learns from it: it has read ToolWorld's
words alone, and BFCL's calls are beyond it. For a model with a long context set `model.path`, drop
`world.options`, take the stages of `config.py`, and raise the sizes of `engine` and `rl`.
"""

import ml_collections

from configs import nano

STAGES = ('sft', 'rl', 'evaluate_rl')


def get_config() -> ml_collections.ConfigDict:
  """Sizes of minutes: short lists of functions, single requests, two steps."""
  c = nano.get_config('quick')
  c.name = 'configs/bfcl_world.py'
  c.stages = STAGES
  c.world.name = 'bfcl'
  c.world.max_subtasks = 2
  # The two APIs with the shortest descriptions, and one function more than a task needs: prompts of
  # 400 to 700 of the organism's 1,024 tokens.
  c.world.options = ml_collections.ConfigDict(
    {'classes': ('MessageAPI', 'MathAPI'), 'extra_functions': 1}
  )
  c.evaluate.tasks = 2
  c.evaluate.max_tokens = 96
  c.engine.lanes = 16
  # ToolWorld's rows, because the organism cannot distil from BFCL's seeds.
  c.sft.files = ('runs/tiny/distill/rows-00000.jsonl',)
  c.rl.episodes = True
  c.rl.tasks.update(dict(single=8, sequential=0, parallel=0, irrelevant=8, multi_turn=0))
  c.rl.steps = 2
  c.rl.prompts = 4
  c.rl.wave = 4
  c.rl.group = 4
  c.rl.updates = 1
  c.rl.validation = 4
  c.rl.max_prompt_tokens = 800
  c.rl.max_tokens = 96
  c.rl.capacity = 2048
  c.rl.checkpoint_every = 2
  return c
