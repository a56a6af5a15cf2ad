"""Table 4: how many distilled rows it takes, and what GRPO does without and with them."""

from collections.abc import Sequence
from typing import Any

from dcore_jax.rollout.policy import load_policy
from dcore_jax.run.ablation import runs, tables
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite

# Shares of the config's seeds. The paper has 10, 20 and 40 thousand rows.
_SHARES = {'rows_quarter': 0.25, 'rows_half': 0.5, 'rows_all': 1.0}
# BFCL multi-turn and tau-bench overall of Qwen3-8B, per cent.
_PUBLISHED = {
  'base': (33.0, 29.0),
  'base_grpo': (26.8, 31.5),
  'rows_quarter': (51.5, 22.1),
  'rows_half': (53.1, 37.8),
  'rows_all': (57.5, 36.6),
  'rows_all_grpo': (67.4, 45.2),
}
_AGAINST = {
  'base_grpo': 'base',
  'rows_quarter': 'base',
  'rows_half': 'rows_quarter',
  'rows_all': 'base',
  'rows_all_grpo': 'base_grpo',
}


def run_size(job: Job) -> list[dict[str, Any]]:
  """Trains with a share of the seeds, or with none; returns a record for each model measured.

  The base and all of the rows are also reinforced with plain GRPO, as in the paper.
  """
  config = runs.reseeded(job.config, job.seed)
  if job.name == 'base':
    # GRPO starts from what stands in the place of the SFT stage: here the base model itself.
    policy = load_policy(config.model, seed=config.seed)
    if policy.path is None:
      raise ValueError('the suite distill_size reinforces its base model, which model.init draws')
    runs.copy_model(policy.path, job.folder)
    stages = ('evaluate_base', 'rl', 'evaluate_rl')
    changes = {}
  else:
    stages = ('distill', 'sft', 'evaluate_sft')
    changes = {'distill': {'tasks': scaled(config.distill.tasks, _SHARES[job.name])}}
    if job.name == 'rows_all':
      stages += ('rl', 'evaluate_rl')
  # What the config says of psi would be an error of an estimator without it.
  changes['rl'] = {'estimator': 'grpo', 'psi_words': (), 'alpha_measure': ''}
  measured = runs.run_stages(config, job.folder, stages=stages, **changes)['stages']
  first = 'base' if job.name == 'base' else 'sft'
  found = [runs.record(job, job.name, measured[first])]
  if 'rl' in stages:
    found.append(runs.record(job, f'{job.name}_grpo', measured['grpo']))
  return found


def scaled(tasks: Any, share: float) -> dict[str, int]:
  """Returns a share of the tasks of each kind, at least one of a kind that has any."""
  return {kind: max(1, round(count * share)) if count else 0 for kind, count in tasks.items()}


def size_table(records: Sequence[dict[str, Any]]) -> list[tables.Row]:
  """A row a setting beside the paper's; `against` says what each is compared with."""
  published = {}
  for name, (multi_turn, tau) in _PUBLISHED.items():
    published[name] = {'bfcl_multi_turn': multi_turn, 'tau': tau}
  return tables.make_table(tuple(_PUBLISHED), records, against=_AGAINST, published=published)


def size_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether distillation helps, and GRPO more after it than without."""
  claims = []
  for setting, other in (('rows_all', 'base'), ('rows_all_grpo', 'base_grpo')):
    found = tables.difference_of(table, setting, 'accuracy')
    claims.append(tables.Claimed(f'accuracy of {setting} less {other}, points', found, 1, 100))
  return tables.verdict('self-distillation helps, also beneath GRPO', claims)


SUITE = Suite(
  jobs=('base', *_SHARES),
  run=run_size,
  table=size_table,
  verdict=size_verdict,
  panels=('accuracy', 'accuracy_multi_turn', 'accuracy_sequential', 'accuracy_parallel'),
)
