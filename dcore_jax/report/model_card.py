"""Writes the README.md of an exported model: how it was trained and what was measured."""

import json
from typing import Any

from dcore_jax.models.config import DecoderConfig
from dcore_jax.report.figures import estimate, kinds_of, shown

# Fields of a config that hold names of files, in any section.
_PATHS = ('path', 'tokenizer', 'files', 'wording')
# The YAML that the Hugging Face hub reads. It is the same for every model, so nothing renders it.
_METADATA = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- dcore_jax
- tool-use
---"""
_USAGE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('.', dtype='auto')
tokenizer = AutoTokenizer.from_pretrained('.')
```"""
_TITLES = {'base': 'before training', 'sft': 'after SFT'}


def model_card(
  config: dict[str, Any],
  model: DecoderConfig,
  *,
  stage: str,
  step: int | None = None,
  summary: dict[str, Any],
) -> str:
  """Returns the card as Markdown with the metadata that the Hugging Face hub reads.

  Args:
    config: of the run, as JSON (`run.config.to_json`).
    model: the exported model.
    stage: the last one that the weights went through: 'base', 'sft' or the estimator.
    step: of that stage, where the weights are those of a checkpoint.
    summary: of the run (`report.summary`); what is absent from it is left out.
  """
  # A card describes what its weights have seen: later stages of the run are no part of it.
  stages = _stages(config, stage)
  parts = [_METADATA, f'# {config["name"]}', _introduction(config, model, stage, step)]
  for name, describe in (('distill', _distilled), ('sft', _fine_tuned), ('rl', _reinforced)):
    if name in stages:
      parts.append(describe(config, summary))
  # A part without content is an empty text, which leaves no gap in the card.
  # Configs from before worlds had names are ToolWorld's.
  world = config['world'].get('name', 'toolworld')
  parts += [_figures(summary, stages, step, world), _USAGE, _whole(config)]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _stages(config: dict[str, Any], last: str) -> tuple[str, ...]:
  """Returns the stages that the weights went through."""
  if last == 'base':
    return ()
  # With files of rows the run trains on them, and distils nothing for this model.
  first = ('sft',) if config['sft']['files'] else ('distill', 'sft')
  return first if last == 'sft' else (*first, 'rl')


def _introduction(
  config: dict[str, Any], model: DecoderConfig, stage: str, step: int | None
) -> str:
  path = config['model']['path']
  if config['model']['init']:
    start = 'random weights'
  elif path:
    # Only the last part of a path: a card is published, and folders may say whose they are.
    start = f'`{path.rstrip("/").split("/")[-1]}`'.replace('@', ' at ')
  else:
    start = 'the model organism of dcore_jax'
  # Counted on the exported architecture and not taken from its name.
  size = f'{model.model_type} decoder with {model.param_count / 1e6:,.1f} M parameters'
  if stage == 'base':
    return f'A {size}: {start}, not trained further.'
  state = f'after the stage `{stage}`'
  if step is not None:
    state = f'after step {step} of the stage `{stage}`'
  return (
    f'A {size}, trained with dcore_jax (D-CORE, arXiv 2602.02160) from {start}, {state}. '
    f'Seed {config["seed"]}, config `{config["name"]}`.'
  )


def _distilled(config: dict[str, Any], summary: dict[str, Any]) -> str:
  section = config['distill']
  found = summary.get('distill', {})
  # The summary knows what an endpoint called its model; the config only what was asked for.
  writer = f'`{found.get("model") or section["model"]}`'
  # The local backend is the model itself: the `self` of self-distillation.
  if section['backend'] == 'local':
    writer = 'the model itself'
  references = {
    'shown': 'the reference calls',
    'hidden': 'no reference',
    'pseudo': 'pseudo-labels',
  }
  text = (
    f'**Self-distillation** wrote the training rows with {writer}, '
    f'which saw {references[section["reference"]]} as it decomposed, '
    f'at temperature {section["temperature"]}.'
  )
  # What the summary lacks is left out of the card.
  if found.get('kept') is not None:
    text += (
      f' {found["kept"]:,} of {found["seeds"]:,} seeds were kept; '
      f'dropped: {_listed(found["dropped"])}.'
    )
  return text


def _fine_tuned(config: dict[str, Any], summary: dict[str, Any]) -> str:
  section = config['sft']
  found = summary.get('sft', {})
  rows = f'{found["rows"]:,} rows' if 'rows' in found else 'rows'
  if section['files']:
    rows += ' of ' + ', '.join(f'`{_name(file)}`' for file in section['files'])
  text = (
    f'**SFT** on {rows}: {section["epochs"]} epochs, '
    f'{section["rows"]} packed rows of {section["capacity"]:,} tokens a step, '
    f'{section["optimizer"]}, peak learning rate {section["learning_rate"]:g}, '
    f'cosine with {section["warmup"]:.0%} warm-up, weight decay {section["weight_decay"]:g}, '
    f'loss on `{section["loss_mask"]}`.'
  )
  first = found.get('first_loss')
  last = found.get('last_loss')
  # Each is the mean of a tenth of the steps, and null if none of them has a finite loss.
  if first is not None and last is not None:
    text += f' {found["steps"]:,} steps took the loss from {first:.3f} to {last:.3f}.'
  return text


def _reinforced(config: dict[str, Any], summary: dict[str, Any]) -> str:
  section = config['rl']
  estimator = f'`{section["estimator"]}`'
  # Only DA-GRPO has the entropy advantage that these two options shape.
  if section['estimator'] == 'da_grpo':
    estimator += f' with α = {section["alpha"]:g}, δ = {section["delta"]:g}'
  asked = 'prompts'
  reward = f'reward `{section["reward"]}`'
  # Episodes are judged by the state of the world, so the named reward is not used.
  if section['episodes']:
    asked = 'whole tasks'
    reward = 'rewarded by the state that they leave'
  text = (
    f'**Reinforcement learning** by {estimator}: '
    f'{section["steps"]} steps of {section["prompts"]} {asked} x {section["group"]} rollouts, '
    f'{section["updates"]} updates each, {reward}, learning rate {section["learning_rate"]:g}, '
    f'KL coefficient {section["kl_coefficient"]:g}, temperature {section["temperature"]:g}.'
  )
  # Steps without a value are skipped, so that both ends are numbers.
  rewards = [value for value in summary.get('rl', {}).get('reward', []) if value is not None]
  if rewards:
    text += f' The mean reward of a step went from {rewards[0]:.3f} to {rewards[-1]:.3f}.'
  return text


def _figures(summary: dict[str, Any], stages: tuple[str, ...], step: int | None, world: str) -> str:
  """Returns a table of the stages up to the exported one.

  A checkpoint in the middle of a stage was not measured and has no row of its own.
  """
  measured = summary.get('stages', {})
  names = ['base']
  if stages:
    names.append('sft')
  if 'rl' in stages:
    # The third model has the name of its estimator, which the run chose.
    names += [name for name in measured if name not in ('base', 'sft')]
  # The last stage was measured at its end, and not at this checkpoint.
  if step is not None:
    names.pop()
  names = [name for name in names if name in measured]
  if not names:
    return ''
  # Kinds are those of the run's world, which may be another than ToolWorld.
  kinds = kinds_of(measured)
  lines = [
    '## Figures',
    '',
    f'Share of held-out tasks of {world} solved, with 95 % intervals{_not_this(step)}.',
    '',
    '| | ' + ' | '.join(kinds) + ' | lazy, sequential | reasoning tokens |',
    '|---' * (len(kinds) + 3) + '|',
  ]
  for name in names:
    stage = measured[name]
    cells = [shown(estimate(stage, 'accuracy', kind), 1, 100, '%') for kind in kinds]
    # Another world may have no sequential tasks.
    cells.append(shown(estimate(stage, 'lazy_ratio', 'sequential'), 1, 100, '%'))
    cells.append(shown(estimate(stage, 'reasoning_tokens_mean'), 0))
    lines.append(f'| {_TITLES.get(name, f"after {name}")} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def _not_this(step: int | None) -> str:
  return '' if step is None else ', of the stages before; this checkpoint was not measured'


def _whole(config: dict[str, Any]) -> str:
  """Returns the config without folders and endpoints, since a card is published."""
  text = json.dumps(_published(config), indent=2, ensure_ascii=False)
  return f'## The whole config\n\n```json\n{text}\n```'


def _published(section: dict[str, Any]) -> dict[str, Any]:
  shown = {}
  for field, value in section.items():
    # Sections are nested, and a path may stand in any of them.
    if isinstance(value, dict):
      value = _published(value)
    elif field in _PATHS and value:
      value = [_name(path) for path in value] if isinstance(value, (list, tuple)) else _name(value)
    # An endpoint's address may name a machine inside a company.
    elif field == 'base_url' and value:
      value = 'an endpoint'
    shown[field] = value
  return shown


def _name(path: str) -> str:
  """Returns a hub name as it is, and the last part of a path."""
  # A hub name is 'owner/name': exactly one slash, and no start that only a path has.
  if path.count('/') == 1 and not path.startswith(('/', '.', '~')):
    return path
  return path.rstrip('/').split('/')[-1]


def _listed(counts: dict[str, int]) -> str:
  return ', '.join(f'{name} {count:,}' for name, count in counts.items()) or 'none'
