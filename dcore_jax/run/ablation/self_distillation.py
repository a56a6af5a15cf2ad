"""Algorithm 1 with SFT, and the policy as its own teacher, at equal numbers of drawn tokens.

Both begin with the base model and see the reference answers of their tasks. Algorithm 1 draws
subtasks and reasonings and keeps what verifies; the other draws answers and learns from the
log-probabilities that the same model gives them with the reference in view
(`rl.estimator = 'self_distillation'`). It takes as many steps as draw about the tokens that
Algorithm 1 drew; `drawn_tokens` says how many each drew in the end.
"""

from collections.abc import Sequence
from typing import Any

from dcore_jax.rollout.policy import load_policy
from dcore_jax.run.ablation import runs, tables
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite
from dcore_jax.train.metrics import read_metrics

_SETTINGS = ('base', 'algorithm_1', 'self_distillation')
# The loss is the policy gradient alone: a KL term would hold the policy to the base.
_TAUGHT = {
  'estimator': 'self_distillation',
  'kl_coefficient': 0.0,
  'psi_words': (),
  'alpha_measure': '',
}


def run_both(job: Job) -> list[dict[str, Any]]:
  """Trains the base model in both ways; returns a record for each, and one for the base."""
  config = runs.reseeded(job.config, job.seed)
  stages = ('evaluate_base', 'distill', 'sft', 'evaluate_sft')
  summary = runs.run_stages(config, job.folder / 'algorithm_1', stages=stages)
  made = summary['distill']
  folder = job.folder / 'self_distillation'
  policy = load_policy(config.model, seed=config.seed)
  if policy.path is None:
    raise ValueError('the suite self_distillation trains its base model, which model.init draws')
  # The RL stage starts from what stands in the place of the SFT stage.
  runs.copy_model(policy.path, folder)
  steps = equal_steps(made, config.rl.prompts * config.rl.group)
  changes = _TAUGHT | {'steps': steps, 'checkpoint_every': min(config.rl.checkpoint_every, steps)}
  taught = runs.run_stages(config, folder, stages=('rl', 'evaluate_rl'), rl=changes)
  rows = read_metrics(folder, 'rl')
  rollouts = config.rl.prompts * config.rl.group
  drawn = sum(row['response_tokens'] * row['responses'] * rollouts for row in rows)
  measured = summary['stages']
  found = {
    'base': runs.model_figures(measured['base']) | {'drawn_tokens': 0.0},
    'algorithm_1': runs.model_figures(measured['sft'])
    | {'drawn_tokens': made['completion_tokens']},
    'self_distillation': runs.model_figures(taught['stages']['self_distillation'])
    | {'drawn_tokens': drawn, 'teacher_kl': rows[-1]['teacher_kl']},
  }
  return [{'setting': name, **job.identity, 'figures': found[name]} for name in _SETTINGS]


def equal_steps(made: dict[str, Any], rollouts: int) -> int:
  """Returns how many steps draw about as many tokens as distillation did, at least one.

  Args:
    made: of distillation, whose `calls` is the number of completions.
    rollouts: of a step. An answer is taken to be as long as a completion.
  """
  return max(1, round(made['calls'] / rollouts))


def self_distillation_table(records: Sequence[dict[str, Any]]) -> list[tables.Row]:
  """A row a way of training."""
  against = {'algorithm_1': 'base', 'self_distillation': 'algorithm_1'}
  return tables.make_table(_SETTINGS, records, against=against, published={})


def self_distillation_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether Algorithm 1 makes a better model than the policy as its own teacher."""
  found = tables.difference_of(table, 'self_distillation', 'accuracy')
  text = 'accuracy of self_distillation less algorithm_1, points'
  return tables.verdict(
    'Algorithm 1 with SFT is better than the policy as its own teacher',
    [tables.Claimed(text, found, -1, 100)],
  )


SUITE = Suite(
  jobs=('models',),
  run=run_both,
  table=self_distillation_table,
  verdict=self_distillation_verdict,
  panels=('accuracy', 'accuracy_sequential', 'accuracy_multi_turn', 'drawn_tokens', 'teacher_kl'),
)
