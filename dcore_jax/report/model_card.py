"""The README.md of an exported model: how it was trained and what was measured, from a run's config and summary."""

import json
from typing import Any

from dcore_jax.models.config import DecoderConfig
from dcore_jax.report.summary import KINDS
from dcore_jax.statistics import wilson_interval

_PATHS = (
  'path',
  'tokenizer',
  'files',
  'wording',
)  # fields that hold names of files, wherever they are
_TITLES = {'base': 'before training', 'sft': 'after SFT'}


def model_card(
  config: dict[str, Any],
  model: DecoderConfig,
  *,
  stage: str,
  step: int | None = None,
  summary: dict[str, Any],
) -> str:
  """The card as Markdown with the metadata that the Hugging Face hub reads.

  Args:
    config: of the run, as JSON (`run.config.to_json`).
    model: the exported model.
    stage: the last one that the weights went through: 'base', 'sft' or the estimator.
    step: of that stage, where the weights are those of a checkpoint.
    summary: of the run (`report.summary`); what is absent from it is left out.
  """
  stages = _stages(config, stage)
  parts = [_metadata(config), f'# {config["name"]}', _introduction(config, model, stage, step)]
  parts += [
    text
    for name, text in (('distill', _distilled), ('sft', _fine_tuned), ('rl', _reinforced))
    if name in stages
    for text in [text(config, summary)]
  ]
  parts += [_figures(summary, stages, step), _usage(), _whole(config)]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _stages(config: dict[str, Any], last: str) -> tuple[str, ...]:
  """What the weights went through."""
  if last == 'base':
    return ()
  first = ('sft',) if config['sft']['files'] else ('distill', 'sft')
  return first if last == 'sft' else (*first, 'rl')


def _metadata(config: dict[str, Any]) -> str:
  lines = [
    '---',
    'library_name: transformers',
    'pipeline_tag: text-generation',
    'tags:',
    '- dcore_jax',
    '- tool-use',
  ]
  return '\n'.join([*lines, '---'])


def _introduction(
  config: dict[str, Any], model: DecoderConfig, stage: str, step: int | None
) -> str:
  start = (
    'random weights'
    if config['model']['init']
    else f'`{config["model"]["path"].rstrip("/").split("/")[-1]}`'
    if config['model']['path']
    else 'the model organism of dcore_jax'
  )
  size = f'{model.model_type} decoder with {model.param_count / 1e6:,.1f} M parameters'
  if stage == 'base':
    return f'A {size}: {start}, not trained further.'
  state = (
    f'after step {step} of the stage `{stage}`'
    if step is not None
    else f'after the stage `{stage}`'
  )
  return (
    f'A {size}, trained with dcore_jax (D-CORE, arXiv 2602.02160) from {start}, {state}. Seed {config["seed"]}, '
    f'config `{config["name"]}`.'
  )


def _distilled(config: dict[str, Any], summary: dict[str, Any]) -> str:
  c, found = config['distill'], summary.get('distill', {})
  writer = (
    'the model itself' if c['backend'] == 'local' else f'`{found.get("model") or c["model"]}`'
  )
  seen = {'shown': 'the reference calls', 'hidden': 'no reference', 'pseudo': 'pseudo-labels'}[
    c['reference']
  ]
  text = (
    f'**Self-distillation** wrote the training rows with {writer}, which saw {seen} as it decomposed, at temperature '
    f'{c["temperature"]}.'
  )
  if found.get('kept') is not None:
    text += f' {found["kept"]:,} of {found["seeds"]:,} seeds were kept; dropped: {_listed(found["dropped"])}.'
  return text


def _fine_tuned(config: dict[str, Any], summary: dict[str, Any]) -> str:
  c, found = config['sft'], summary.get('sft', {})
  rows = f'{found["rows"]:,} rows' if 'rows' in found else 'rows'
  source = f' of {", ".join(f"`{_name(file)}`" for file in c["files"])}' if c['files'] else ''
  text = (
    f'**SFT** on {rows}{source}: {c["epochs"]} epochs, {c["rows"]} packed rows of {c["capacity"]:,} tokens a step, '
    f'{c["optimizer"]}, peak learning rate {c["learning_rate"]:g}, cosine with {c["warmup"]:.0%} warm-up, weight decay '
    f'{c["weight_decay"]:g}, loss on `{c["loss_mask"]}`.'
  )
  if None not in (found.get('first_loss'), found.get('last_loss')):
    text += f' {found["steps"]:,} steps took the loss from {found["first_loss"]:.3f} to {found["last_loss"]:.3f}.'
  return text


def _reinforced(config: dict[str, Any], summary: dict[str, Any]) -> str:
  c, rewards = config['rl'], [r for r in summary.get('rl', {}).get('reward', []) if r is not None]
  psi = f' with α = {c["alpha"]:g}, δ = {c["delta"]:g}' if c['estimator'] == 'da_grpo' else ''
  asked, reward = 'prompts', f'reward `{c["reward"]}`'
  if c['episodes']:
    asked, reward = 'whole tasks', 'rewarded by the state that they leave'
  text = (
    f'**Reinforcement learning** by `{c["estimator"]}`{psi}: {c["steps"]} steps of {c["prompts"]} {asked} x {c["group"]} '
    f'rollouts, {c["updates"]} updates each, {reward}, learning rate {c["learning_rate"]:g}, '
    f'KL coefficient {c["kl_coefficient"]:g}, temperature {c["temperature"]:g}.'
  )
  if rewards:
    text += f' The mean reward of a step went from {rewards[0]:.3f} to {rewards[-1]:.3f}.'
  return text


def _figures(summary: dict[str, Any], stages: tuple[str, ...], step: int | None) -> str:
  """A table of the stages up to the exported one; a checkpoint in the middle of a stage has no figures of its own."""
  measured = summary.get('stages', {})
  last = {
    'sft': ['base', 'sft'],
    'rl': ['base', 'sft', *(name for name in measured if name not in ('base', 'sft'))],
  }
  names = last[stages[-1]] if stages else ['base']
  names = [name for name in (names[:-1] if step is not None else names) if name in measured]
  if not names:
    return ''
  lines = [
    '## Figures',
    '',
    f'Share of held-out ToolWorld tasks solved, with 95 % intervals{_not_this(step)}.',
    '',
    '| | ' + ' | '.join(KINDS) + ' | lazy, sequential | reasoning tokens |',
    '|---' * (len(KINDS) + 3) + '|',
  ]
  for name in names:
    stage = measured[name]
    cells = [_share(stage['accuracy'][kind], stage['n'][kind]) for kind in KINDS]
    lazy, tokens = stage['lazy_ratio']['sequential'], stage['reasoning_tokens_mean']
    cells += ['-' if lazy is None else f'{lazy:.1%}', '-' if tokens is None else f'{tokens:.0f}']
    lines.append(f'| {_TITLES.get(name, f"after {name}")} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def _not_this(step: int | None) -> str:
  return '' if step is None else ', of the stages before; this checkpoint was not measured'


def _share(share: float | None, n: int) -> str:
  if share is None or not n:
    return '-'
  low, high = wilson_interval(share, n)
  return f'{share:.1%} ({low:.0%} to {high:.0%})'


def _usage() -> str:
  return (
    '## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
    "model = AutoModelForCausalLM.from_pretrained('.', dtype='auto')\n"
    "tokenizer = AutoTokenizer.from_pretrained('.')\n```"
  )


def _whole(config: dict[str, Any]) -> str:
  """The config; of paths only the names, and of endpoints nothing, since a card is published."""
  return f'## The whole config\n\n```json\n{json.dumps(_published(config), indent=2, ensure_ascii=False)}\n```'


def _published(section: dict[str, Any]) -> dict[str, Any]:
  shown = {}
  for field, value in section.items():
    if isinstance(value, dict):
      value = _published(value)
    elif field in _PATHS and value:
      value = [_name(path) for path in value] if isinstance(value, (list, tuple)) else _name(value)
    elif field == 'base_url' and value:
      value = 'an endpoint'
    shown[field] = value
  return shown


def _name(path: str) -> str:
  """A hub name as it is, of a path the last part."""
  return (
    path.rstrip('/').split('/')[-1]
    if path.startswith(('/', '.', '~')) or path.count('/') != 1
    else path
  )


def _listed(counts: dict[str, int]) -> str:
  return ', '.join(f'{name} {count:,}' for name, count in counts.items()) or 'none'
