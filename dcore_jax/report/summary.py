"""The shape of `summary.json`, which other programs read, and the uncertainty that goes with its shares and differences."""

import math
from collections.abc import Callable
from typing import Any

from dcore_jax.statistics import format_difference

KINDS = ('single', 'sequential', 'parallel', 'irrelevant', 'multi_turn')
STAGES = (
  'base',
  'sft',
  'grpo',
  'dr_grpo',
  'rloo',
  'rl_zvp',
  'da_grpo',
)  # in the order a run goes through them

_STAGE_NUMBERS = ('decomposition_rate', 'reflections_per_response', 'reasoning_tokens_mean')
_RL_CURVES = ('zero_variance_fraction', 'reward', 'entropy')


def format_changes(summary: dict[str, Any]) -> str:
  """What stages have changed on held-out tasks, and reinforcement on the prompts it sets aside, a line each; for a terminal."""
  lines = []
  for change in summary['changes']:
    kinds = ', '.join(
      f'{kind} {format_difference(pair, 1, 100)}' for kind, pair in change['accuracy'].items()
    )
    lines.append(f'{change["from"]} -> {change["to"]}, points of held-out tasks right: {kinds}')
  validation = summary.get('rl', {}).get('validation') or {}
  for name, pair in (validation.get('difference') or {}).items():
    before, after = (validation[when][name] for when in ('before', 'after'))
    lines.append(
      f'{name} on {pair["n"]} prompts set aside: {before:.3f} -> {after:.3f}, {format_difference(pair)}'
    )
  return '\n'.join(lines)


def validate_summary(summary: Any) -> None:
  """Checks a summary against the published shape.

    {'stages': {stage: {'accuracy': {kind: share}, 'lazy_ratio': {kind: share}, 'n': {kind: count},
                        'decomposition_rate', 'reflections_per_response', 'reasoning_tokens_mean'}},
     'distill': {'seeds', 'kept', 'success_rate', 'dropped': {reason: count}},
     'changes': [{'from': stage, 'to': stage, 'accuracy': {kind: `paired_difference`}}],
     'rl': {'zero_variance_fraction': [..], 'reward': [..], 'entropy': [..]},   one value per step
     'export': path, 'seconds': {stage: seconds}}

  A stage of `stages`, and `changes`, `distill`, `rl` and `export`, may be absent (a stage that was not run) and None
  stands for a number that could not be measured. Further fields are welcome anywhere.

  Raises:
    ValueError: naming all that is wrong.
  """
  check = _Problems()
  if check.mapping('summary', summary):
    stages = summary.get('stages')
    if check.mapping('stages', stages):
      for name, stage in stages.items():
        check.that(name in STAGES, f'stages.{name} is not one of {", ".join(STAGES)}')
        _check_stage(check, f'stages.{name}', stage)
    for number, change in enumerate(summary.get('changes') or ()):
      _check_change(check, f'changes[{number}]', change, stages)
    if 'distill' in summary:
      _check_distill(check, summary['distill'])
    if 'rl' in summary:
      _check_rl(check, summary['rl'])
    if check.mapping('seconds', summary.get('seconds')):
      check.values('seconds', summary['seconds'], _is_number)
    check.that(isinstance(summary.get('export'), (str, type(None))), 'export is not a path')
  if check.problems:
    raise ValueError('summary: ' + '; '.join(check.problems))


def _check_stage(check: '_Problems', where: str, stage: Any) -> None:
  if not check.mapping(where, stage):
    return
  for field, fits in (('accuracy', _is_share), ('lazy_ratio', _is_share), ('n', _is_count)):
    if check.mapping(f'{where}.{field}', stage.get(field)):
      missing = [kind for kind in KINDS if kind not in stage[field]]
      check.that(not missing, f'{where}.{field} lacks {", ".join(missing)}')
      check.values(f'{where}.{field}', stage[field], fits)
  for field in _STAGE_NUMBERS:
    check.value(where, stage, field, _is_share if field == 'decomposition_rate' else _is_number)


def _check_change(check: '_Problems', where: str, change: Any, stages: Any) -> None:
  if not check.mapping(where, change) or not check.mapping(
    f'{where}.accuracy', change.get('accuracy')
  ):
    return
  check.that(
    {change.get('from'), change.get('to')} <= set(stages or ()), f'{where} is not of two stages'
  )
  for kind, pair in change['accuracy'].items():
    if check.mapping(f'{where}.accuracy.{kind}', pair):
      for field in ('difference', 'standard_error', 'n'):
        check.value(f'{where}.accuracy.{kind}', pair, field, _is_number)


def _check_distill(check: '_Problems', distill: Any) -> None:
  if not check.mapping('distill', distill):
    return
  for field, fits in (('seeds', _is_count), ('kept', _is_count), ('success_rate', _is_share)):
    check.value('distill', distill, field, fits)
  if check.mapping('distill.dropped', distill.get('dropped')):
    check.values('distill.dropped', distill['dropped'], _is_count)


def _check_rl(check: '_Problems', rl: Any) -> None:
  if not check.mapping('rl', rl):
    return
  lengths = {}
  for field in _RL_CURVES:
    curve = rl.get(field)
    if check.that(isinstance(curve, (list, tuple)), f'rl.{field} is not a list'):
      lengths[field] = len(curve)
      fits = _is_share if field == 'zero_variance_fraction' else _is_number
      check.values(f'rl.{field}', dict(enumerate(curve)), fits)
  check.that(len(set(lengths.values())) <= 1, f'the curves of rl differ in length: {lengths}')


class _Problems:
  """Collects what is wrong; each check says whether it held."""

  def __init__(self):
    self.problems: list[str] = []

  def that(self, holds: Any, otherwise: str) -> bool:
    if not holds:
      self.problems.append(otherwise)
    return bool(holds)

  def mapping(self, where: str, value: Any) -> bool:
    return self.that(
      isinstance(value, dict),
      f'{where} is missing' if value is None else f'{where} is not an object',
    )

  def value(self, where: str, owner: dict, field: str, fits: Callable[[Any], bool]) -> None:
    if self.that(field in owner, f'{where}.{field} is missing'):
      self.values(where, {field: owner[field]}, fits)

  def values(self, where: str, owner: dict, fits: Callable[[Any], bool]) -> None:
    for field, value in owner.items():
      self.that(
        value is None or fits(value), f'{where}.{field} = {value!r} is not a {fits.__name__[4:]}'
      )


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
  return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
  return _is_number(value) and value >= 0 and value == int(value)
