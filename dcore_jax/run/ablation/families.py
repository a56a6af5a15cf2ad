"""Table 5: the organism's rows train models of other families.

There are no pretrained models of other families at the organism's size. A Llama-shaped and a
Qwen2.5-shaped one begin with the organism's own weights, poured into their shape, which does not
hold all of them: neither family has norms on queries and keys. Their factors go into the
projections, divided by the norm that white inputs would have; Qwen2.5's biases begin at 0. What
that costs is the row `<family>_start`. The paper's counterpart, the same models trained on the
traces of DeepSeek-R1, has none here.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import ModelFiles, save_checkpoint
from dcore_jax.overrides import overlay
from dcore_jax.rollout.policy import load_policy
from dcore_jax.run.ablation import runs, tables
from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.suite import Suite
from dcore_jax.run.export import generation_config

_FAMILIES = {'llama': 'llama', 'qwen2.5': 'qwen2'}
_SETTINGS = ('organism', 'llama_start', 'llama', 'qwen2.5_start', 'qwen2.5')
# BFCL overall and tau-bench of the same families, per cent: on DeepSeek-R1's traces, and D-CORE's.
_PUBLISHED = {
  'llama_start': (27.8, 19.0),
  'llama': (63.7, 36.0),
  'qwen2.5_start': (47.9, 18.2),
  'qwen2.5': (70.5, 41.5),
}


def poured(params: decoder.Params, model: DecoderConfig, family: str) -> tuple[Any, Any]:
  """Pours a Qwen3-shaped model into another family's shape -> (config, parameters).

  q = norm(x W) w becomes x W (w / s), with s the root mean square of x W for white inputs x that
  have the variance that the attention norm gives them.

  Args:
    params: of the model, float32.
    model: its config, with norms on queries and keys.
    family: 'llama' or 'qwen2'.

  Raises:
    ValueError: a model without these norms.
  """
  if not model.qk_norm:
    raise ValueError(f'the suite families begins with a Qwen3-shaped model, not {model.model_type}')
  layers = dict(params['layers'])
  for name in ('q', 'k'):
    # [L, D, heads, H]
    scaled = layers[name] * layers['attn_norm'][:, :, None, None]
    size = jnp.sqrt(jnp.mean(jnp.sum(scaled**2, axis=1, keepdims=True), axis=3, keepdims=True))
    layers[name] = layers[name] * layers.pop(f'{name}_norm')[:, None, None, :] / size
  if family == 'qwen2':
    for name in ('q', 'k', 'v'):
      L, _, heads, H = layers[name].shape
      layers[f'{name}_bias'] = jnp.zeros((L, heads, H), layers[name].dtype)
  config = dataclasses.replace(model, model_type=family)
  return config, params | {'layers': layers}


def write_start(config: Any, family: str, folder: pathlib.Path) -> None:
  """Writes the model that a family begins with, unless it is there."""
  if (folder / 'config.json').exists():
    return
  policy = load_policy(config.model, seed=config.seed)
  model, params = poured(policy.load(None), policy.config, family)
  files = ModelFiles(
    tokenizer_dir=policy.tokenizer_dir,
    generation_config=generation_config(policy.path, policy.config, policy.tokenizer),
  )
  save_checkpoint(folder, model, params, files, dtype='float32', overwrite=True)


def run_family(job: Job) -> list[dict[str, Any]]:
  """Distils with the organism, and trains it or a model of another family on its rows."""
  config = runs.reseeded(job.config, job.seed)
  if job.name == 'organism':
    stages = ('distill', 'sft', 'evaluate_sft')
    measured = runs.run_stages(config, job.folder, stages=stages)['stages']
    return [runs.record(job, 'organism', measured['sft'])]
  # The rows are the organism's own. Each job makes them anew, which takes a minute, so that jobs
  # need not wait for each other.
  teacher = job.folder / 'teacher'
  runs.run_stages(config, teacher, stages=('distill',))
  runs.copy_folder(teacher / 'distill', job.folder / 'student' / 'distill')
  start = job.folder / 'start'
  write_start(config, _FAMILIES[job.name], start)
  student = overlay(config, {'model': {'path': str(start)}})
  stages = ('evaluate_base', 'sft', 'evaluate_sft')
  measured = runs.run_stages(student, job.folder / 'student', stages=stages)['stages']
  return [
    runs.record(job, f'{job.name}_start', measured['base']),
    runs.record(job, job.name, measured['sft']),
  ]


def family_table(records: Sequence[dict[str, Any]]) -> list[tables.Row]:
  """A row a model, before and after the organism's rows."""
  published = {}
  for name, (bfcl, tau) in _PUBLISHED.items():
    published[name] = {'bfcl': bfcl, 'tau': tau}
  against = {family: f'{family}_start' for family in _FAMILIES}
  return tables.make_table(_SETTINGS, records, against=against, published=published)


def family_verdict(table: Sequence[tables.Row]) -> str:
  """Says whether the organism's rows help models of both other families."""
  claims = []
  for family in _FAMILIES:
    found = tables.difference_of(table, family, 'accuracy')
    claims.append(tables.Claimed(f'{family}, points of accuracy', found, 1, 100))
  return tables.verdict("one model's rows train other families", claims)


SUITE = Suite(
  jobs=('organism', *_FAMILIES),
  run=run_family,
  table=family_table,
  verdict=family_verdict,
  panels=('accuracy', 'accuracy_multi_turn', 'accuracy_sequential', 'accuracy_parallel'),
)
