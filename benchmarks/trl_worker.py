"""trl's GRPOTrainer behind a pipe; runs in the interpreter of its own environment, which
`benchmarks.grpo_step` is told.

The first line on stdin is the job (JSON), every further one asks for one step of reinforcement
learning, answered by a line with its seconds, loss and gradient norm. A job either holds rollouts,
which the trainer takes in place of what it would sample and score, or prompts with reference
answers, and then the step is trl's own from sampling to update. Made for trl 1.16.
"""

import json
import sys
import time
from typing import Any

import datasets
import torch
import transformers
import trl

from dcore_jax.learn import rewards


class Trainer(trl.GRPOTrainer):
  """Tells the losses of its micro-batches; with `rollouts` those are given instead of sampled."""

  rollouts: dict[str, list] | None = None
  losses: list[float]

  def _compute_loss(self, model, inputs):
    loss = super()._compute_loss(model, inputs)
    self.losses.append(loss.item())
    return loss

  def _generate_and_score_completions(self, inputs):
    if self.rollouts is None:
      return super()._generate_and_score_completions(inputs)
    prompts = torch.tensor(self.rollouts['prompts'])
    completions = torch.tensor(self.rollouts['completions'])
    rewards_PG = torch.tensor(self.rollouts['rewards'])
    advantages_PG = (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)) / (
      rewards_PG.std(dim=1, keepdim=True) + 1e-6
    )
    tokens = torch.cat([prompts, completions], dim=1)
    mask = torch.ones_like(completions)
    with torch.no_grad():
      old, *_ = self._get_per_token_logps_and_entropies(
        self.model,
        tokens,
        torch.ones_like(tokens),
        completions.shape[1],
        self.args.per_device_train_batch_size,
      )
    return {
      'prompt_ids': prompts,
      'prompt_mask': torch.ones_like(prompts),
      'completion_ids': completions,
      'completion_mask': mask,
      'advantages': advantages_PG.reshape(-1),
      'num_items_in_batch': mask.sum(),
      'old_per_token_logps': old + torch.tensor(self.rollouts['shift']),
    }


class StepByStep(transformers.TrainerCallback):
  """Waits for a line before each step of `updates` optimizer steps, and answers behind it."""

  def __init__(self, updates: int):
    self._updates = updates
    self.trainer: Trainer | None = None

  def on_step_begin(self, args, state, control, **kwargs):
    """Waits for a line on stdin where a step of reinforcement learning begins."""
    if state.global_step % self._updates == 0:
      if not sys.stdin.readline():
        control.should_training_stop = True
      self.trainer.losses = []
      self._began = time.perf_counter()

  def on_step_end(self, args, state, control, **kwargs):
    """Answers where such a step ends."""
    if state.global_step % self._updates == 0:
      metrics = self.trainer._metrics['train']
      last = {
        name: metrics[name][-1]
        for name in ('reward', 'completions/mean_length')
        if metrics.get(name)
      }
      print(
        'answer '
        + json.dumps(
          {
            'seconds': time.perf_counter() - self._began,
            'loss': sum(self.trainer.losses) / self._updates,
            **last,
          }
        ),
        flush=True,
      )


def make_trainer(job: dict[str, Any]) -> Trainer:
  """The trainer of a job."""
  model = transformers.AutoModelForCausalLM.from_pretrained(job['model'], dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(job['tokenizer'])
  micro = job['micro']
  parts = job['rollouts_per_update'] // job['micro']
  args = trl.GRPOConfig(
    output_dir=job['folder'],
    use_cpu=True,
    bf16=False,
    report_to=[],
    save_strategy='no',
    logging_steps=10**6,
    disable_tqdm=True,
    per_device_train_batch_size=micro,
    gradient_accumulation_steps=parts,
    steps_per_generation=parts * job['updates'],
    num_generations=job['group'],
    max_completion_length=job['max_tokens'],
    shuffle_dataset=False,
    max_steps=10**6,
    loss_type='dapo',
    beta=job['kl_coefficient'],
    temperature=1.0,
    top_k=0,
    gradient_checkpointing=False,
    learning_rate=job['learning_rate'],
    lr_scheduler_type='constant',
    weight_decay=0.01,
    max_grad_norm=1.0,
  )
  references = dict(zip(job['prompts'], job['references'], strict=True))

  def reward(prompts, completions, **_):
    return [
      float(total)
      for total in rewards.batch_reward(
        'toolrl', completions, [references[p] for p in prompts]
      ).total
    ]

  callback = StepByStep(job['updates'])
  trainer = Trainer(
    model=model,
    reward_funcs=reward,
    args=args,
    processing_class=tokenizer,
    callbacks=[callback],
    train_dataset=datasets.Dataset.from_dict({'prompt': job['prompts']}),
  )
  callback.trainer = trainer
  trainer.rollouts = job['rollouts']
  return trainer


def main() -> None:
  """Reads the job and trains."""
  make_trainer(json.loads(sys.stdin.readline())).train()


if __name__ == '__main__':
  main()
