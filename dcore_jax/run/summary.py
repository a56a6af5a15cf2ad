"""The shape of `summary.json`, which other programs read, and the interval that goes with its shares."""
import math
from collections.abc import Callable
from typing import Any

KINDS = ('single', 'sequential', 'parallel', 'irrelevant', 'multi_turn')
STAGES = ('base', 'sft', 'grpo', 'dr_grpo', 'rl_zvp', 'da_grpo')  # in the order a run goes through them

_STAGE_NUMBERS = ('decomposition_rate', 'reflections_per_response', 'reasoning_tokens_mean')
_RL_CURVES = ('zero_variance_fraction', 'reward', 'entropy')
_Z95 = 1.959963984540054  # two-sided 95 % of a normal


def wilson_interval(share: float, n: int) -> tuple[float, float]:
  """95 % Wilson score interval of a share of `n` trials: right also near 0 and 1, unlike the normal one."""
  if n < 1 or not 0 <= share <= 1:
    raise ValueError(f'no interval for share={share} of n={n}')
  z2 = _Z95**2 / n
  centre = (share + z2 / 2) / (1 + z2)
  half = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
  # At 0 and 1 the bounds meet the share exactly; rounding must not put them a hair beyond.
  return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def validate_summary(summary: Any) -> None:
  """Checks a summary against the published shape.

    {'stages': {stage: {'accuracy': {kind: share}, 'lazy_ratio': {kind: share}, 'n': {kind: count},
                        'decomposition_rate', 'reflections_per_response', 'reasoning_tokens_mean'}},
     'distill': {'seeds', 'kept', 'success_rate', 'dropped': {reason: count}},
     'rl': {'zero_variance_fraction': [..], 'reward': [..], 'entropy': [..]},   one value per step
     'export': path, 'seconds': {stage: seconds}}

  A stage of `stages`, and `distill`, `rl` and `export`, may be absent (a stage that was not run) and None
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
    return self.that(isinstance(value, dict), f'{where} is missing' if value is None else f'{where} is not an object')

  def value(self, where: str, owner: dict, field: str, fits: Callable[[Any], bool]) -> None:
    if self.that(field in owner, f'{where}.{field} is missing'):
      self.values(where, {field: owner[field]}, fits)

  def values(self, where: str, owner: dict, fits: Callable[[Any], bool]) -> None:
    for field, value in owner.items():
      self.that(value is None or fits(value), f'{where}.{field} = {value!r} is not a {fits.__name__[4:]}')


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
  return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
  return _is_number(value) and value >= 0 and value == int(value)
