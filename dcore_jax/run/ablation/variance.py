"""Figures 5a, 12, 13 and 14: the spread of rewards before and after, and which tokens are open.

Every model answers the same prompts that RL sets aside, from the same random streams: the base,
the self-distilled one, and the one after RL. A group of equal rewards teaches plain GRPO nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dcore_jax.files import read_json, write_json_atomic
from dcore_jax.learn import advantages
from dcore_jax.overrides import overlay
from dcore_jax.run.ablation import runs, tables
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite
from dcore_jax.run.rl_source import rl_seed, rl_source
from dcore_jax.train.prompt_order import set_aside
from dcore_jax.train.rl_options import sampling_params
from dcore_jax.train.rollout_batch import RolloutBatch

_SETTINGS = ('base', 'sft', 'rl')
_SHOWN = 12  # tokens at either end of the list
_SELDOM = 5  # tokens drawn fewer times than this are left out: their mean says little
_STREAM = 2**32 - 2  # of these rollouts; no step of a run has this number


def run_variance(job: Job) -> list[dict[str, Any]]:
  """Trains from the base to RL, and samples groups of answers with each model on the way."""
  config = runs.reseeded(job.config, job.seed)
  pipeline = runs.Pipeline(overlay(config, {'stages': ('distill', 'sft', 'rl')}), job.folder)
  pipeline.run()
  found = []
  for setting, model in zip(_SETTINGS, ('base', 'sft', pipeline.final), strict=True):
    path = job.folder / f'variance_{setting}.json'
    # Sampling is the slow part, and is not repeated.
    if not path.exists():
      write_json_atomic(path, _measured(pipeline, model))
    found.append({'setting': setting, **job.identity, **read_json(path)})
  return found


def _measured(pipeline: runs.Pipeline, model: str) -> dict[str, Any]:
  """Samples a group for each prompt that RL sets aside -> {'figures', 'tokens'}."""
  config = pipeline.config
  source, _ = rl_source(config, pipeline.policy.tokenizer, pipeline.world)
  seed = rl_seed(config)
  items = set_aside(source.labels, config.rl.validation, config.seed)
  if not items:
    raise ValueError('the suite variance samples the prompts that rl.validation sets aside')
  engine = pipeline.models.engine(pipeline.models.params(model), groups=not config.rl.episodes)
  chosen = []
  keys = []
  for place, item in enumerate(items):
    for g in range(config.rl.group):
      chosen.append(item)
      keys.append((_STREAM, place, g))
  rollouts = source.sample(engine, chosen, keys, sampling_params(config.rl, seed))
  batch = source.judge(items, rollouts)
  return {
    'figures': spread_figures(batch),
    'tokens': open_tokens(batch, pipeline.policy.tokenizer),
  }


def spread_figures(batch: RolloutBatch) -> dict[str, float]:
  """Computes means over groups: reward, its deviation (ddof 1) and shares of equal rewards."""
  zero_P = advantages.uniform_groups(batch.total_PG)[:, 0]
  entropies = []
  for rollout in batch.rollouts:
    entropies += [completion.entropies for _, completion in rollout.exchanges]
  deviation_P = batch.total_PG.std(axis=1, ddof=1) if batch.total_PG.shape[1] > 1 else zero_P * 0.0
  return {
    'reward': float(batch.total_PG.mean()),
    'reward_deviation': float(np.mean(deviation_P)),
    'zero_variance_fraction': float(zero_P.mean()),
    'all_right_fraction': float((zero_P & batch.right_PG.all(axis=1)).mean()),
    'all_wrong_fraction': float((zero_P & ~batch.right_PG.any(axis=1)).mean()),
    'entropy': float(np.concatenate(entropies).mean()),
  }


def open_tokens(batch: RolloutBatch, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
  """Finds the tokens before which the policy was least and most sure, by mean entropy in nats."""
  tokens = []
  entropies = []
  for rollout in batch.rollouts:
    for _, completion in rollout.exchanges:
      tokens.append(completion.tokens)
      entropies.append(completion.entropies)
  ids, place, counts = np.unique(np.concatenate(tokens), return_inverse=True, return_counts=True)
  means = np.bincount(place, weights=np.concatenate(entropies)) / counts
  often = np.flatnonzero(counts >= _SELDOM)
  order = often[np.argsort(means[often], kind='stable')]
  ends = {'lowest': order[:_SHOWN], 'highest': order[::-1][:_SHOWN]}
  found = {}
  for name, places in ends.items():
    found[name] = [
      {
        'token': tokenizer.decode([int(ids[i])]),
        'entropy': float(means[i]),
        'count': int(counts[i]),
      }
      for i in places
    ]
  return found


def variance_table(records: Sequence[dict[str, Any]]) -> list[tables.Row]:
  """A row a model; the tokens are those of its first run."""
  table = tables.make_table(_SETTINGS, records, against={'sft': 'base', 'rl': 'sft'}, published={})
  for row in table:
    first = next(record for record in records if record['setting'] == row['setting'])
    row['tokens'] = first['tokens']
  return table


def variance_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether self-distillation narrows the rewards of a group (figures 5a, 12, 13)."""
  claims = [
    tables.Claimed(
      'deviation, after less before', tables.difference_of(table, 'sft', 'reward_deviation'), -1
    ),
    tables.Claimed(
      'groups without variance, points',
      tables.difference_of(table, 'sft', 'zero_variance_fraction'),
      1,
      100,
    ),
  ]
  return tables.verdict('self-distillation leaves groups without reward variance', claims)


def format_variance(content: dict[str, Any]) -> str:
  """Returns the table, and the tokens at both ends of the list of entropies."""
  lines = [tables.format_rows(content, PANELS)]
  for row in content['table']:
    for name, tokens in row['tokens'].items():
      words = ', '.join(f'{one["token"]!r} {one["entropy"]:.2f}' for one in tokens)
      lines.append(f'{row["setting"]}, {name} entropy, nats: {words}')
  return '\n'.join(lines)


PANELS = ('reward', 'reward_deviation', 'zero_variance_fraction', 'entropy')
SUITE = Suite(
  jobs=('models',),
  run=run_variance,
  table=variance_table,
  verdict=variance_verdict,
  text=format_variance,
  panels=PANELS,
)
