"""Configs as typed values: defaults overlaid with plain data, checked field by field.

Whoever writes a config writes plain nested data (a file's `ConfigDict`, a JSON object, keyword
arguments). A field that no section has would be ignored, and one of another kind would fail late:
both are errors here, all of them named at once.
"""

import collections.abc
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

Section = TypeVar('Section')


def overlay(defaults: Section, values: Mapping[str, Any]) -> Section:
  """Returns a copy of a config, or of one section, with other values.

  Args:
    defaults: a frozen dataclass, whose fields may be such dataclasses.
    values: plain nested data. A missing field and a value of None leave the default. A field that
      is a mapping is replaced as a whole; lists become tuples, and whole numbers become floats
      where the field is one.

  Where the values name a preset, its values go to the fields of its section that nothing has set.

  Raises:
    ValueError: names every unknown field, with the nearest known name, every value of another kind,
      and every number outside the range of its field.
  """
  problems: list[str] = []
  result = _overlay(defaults, values, '', problems)
  problems += _range_problems(result, '')
  if problems:
    raise ValueError('config: ' + '; '.join(problems))
  return result


def check_ranges(config: Any, kind: type | None = None, prefix: str = '') -> None:
  """Checks the numbers of a config, or of one section.

  Args:
    config: has the fields of `kind`.
    kind: the dataclass that declares the ranges; by default the config's own.
    prefix: of the names in the error.

  Raises:
    ValueError: names every number outside the range of its field.
  """
  problems = _range_problems(config, prefix, kind)
  if problems:
    raise ValueError('config: ' + '; '.join(problems))


def with_fields(config: Section, **changes: Any) -> Section:
  """`overlay` for single fields, a dot written as two underscores: `rl__alpha=0.4`."""
  values: dict[str, Any] = {}
  for name, value in changes.items():
    *sections, field = name.split('__')
    place = values
    for section in sections:
      place = place.setdefault(section, {})
    place[field] = value
  return overlay(config, values)


def to_plain(config: Any) -> dict[str, Any]:
  """Returns a config as nested dicts, tuples as they are."""
  plain = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      plain[field.name] = to_plain(value)
    elif isinstance(value, collections.abc.Mapping):
      plain[field.name] = dict(value)
    else:
      plain[field.name] = value
  return plain


def to_json(config: Any) -> dict[str, Any]:
  """Returns a config as JSON knows it: what is written beside a run's results."""
  return _listed(to_plain(config))


def completed(defaults: Any, record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config's JSON record with the fields that it lacks.

  A record of an earlier program has no field that the program has learned since; the default keeps
  what was done then. Fields that are mappings, such as counts by kind, are taken as they stand.
  """
  whole = dict(record)
  for name, value, _ in _fields(defaults):
    if not _is_section(value):
      whole.setdefault(name, _listed(value))
    elif isinstance(record.get(name, {}), dict):
      whole[name] = completed(value, record.get(name, {}))
  return whole


def differences(
  defaults: Any, theirs: Mapping[str, Any], mine: Mapping[str, Any], prefix: str = ''
) -> list[str]:
  """Compares two JSON records of a config -> 'rl.alpha: was 0.1, is 0.4' for each field.

  Fields that may change between two starts of a run (`free` in `dcore_jax.config`) are left out,
  and so is what `mine` lacks: a later program may have dropped it.

  Args:
    defaults: the config, or a mapping of names to configs, that the records are the JSON form of.
      Its fields tell sections from values; what it lacks is a value.
    theirs: the earlier record. A field that it lacks has its default.
    mine: the later one.
    prefix: of the names.
  """
  known = {name: (value, free) for name, value, free in _fields(defaults)}
  theirs = completed(defaults, theirs)
  found = []
  for name, value in mine.items():
    default, free = known.get(name, (None, False))
    was = theirs.get(name)
    if free or was == value:
      continue
    if _is_section(default) and isinstance(was, dict) and isinstance(value, dict):
      found += differences(default, was, value, f'{prefix}{name}.')
    else:
      found.append(f'{prefix}{name}: was {was!r}, is {value!r}')
  return found


def describe(config: Any, prefix: str = '', free: bool = False) -> Iterator[str]:
  """Yields one line for each field, 'rl.alpha = 0.1: what it means', sections with a heading.

  A field that may change between two starts of a run is marked. `free` says so of all fields.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    may_change = free or field.metadata.get('free', False)
    if dataclasses.is_dataclass(value):
      yield f'[{prefix}{field.name}] {field.metadata["doc"]}'
      # A section that is free makes all of its fields free.
      yield from describe(value, f'{prefix}{field.name}.', may_change)
    else:
      mark = ' (may change)' if may_change else ''
      yield f'{prefix}{field.name} = {value!r}{mark}: {field.metadata["doc"]}'


def _overlay(defaults: Any, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
  fields = {field.name: field for field in dataclasses.fields(defaults)}
  kinds = typing.get_type_hints(type(defaults))
  changes = {}
  for name, value in values.items():
    path = f'{prefix}{name}'
    if name not in fields:
      problems.append(f'unknown field {path!r}{_suggestion(prefix, name, fields)}')
      continue
    if value is None:
      continue
    default = getattr(defaults, name)
    if not dataclasses.is_dataclass(default):
      changes[name] = _converted(path, kinds[name], value, problems)
    elif isinstance(value, collections.abc.Mapping):
      changes[name] = _overlay(default, value, path + '.', problems)
    else:
      problems.append(f'field {path!r} must be a section, got {value!r}')
  for name, field in fields.items():
    if 'presets' in field.metadata and changes.get(name):
      changes = _preset(defaults, field, changes, prefix, problems) | changes
  return dataclasses.replace(defaults, **changes)


def _preset(
  defaults: Any,
  field: dataclasses.Field,
  changes: Mapping[str, Any],
  prefix: str,
  problems: list[str],
) -> dict[str, Any]:
  """Returns the values of the preset that `changes` name, for fields that nothing has set."""
  known = field.metadata['presets']
  name = changes[field.name]
  if name not in known:
    problems.append(f'field {prefix + field.name!r} must be one of {sorted(known)}, got {name!r}')
    return {}
  # A preset that the config had before this one has set fields, too; nobody else has.
  before = known.get(getattr(defaults, field.name), {})
  own = {other.name: other.default for other in dataclasses.fields(defaults)}
  wanted = {target: own[target] for target in before} | dict(known[name])
  chosen = {}
  for target, value in wanted.items():
    if getattr(defaults, target) in (own[target], before.get(target, own[target])):
      chosen[target] = value
  return chosen


def _range_problems(config: Any, prefix: str, kind: type | None = None) -> list[str]:
  """What values must be that are outside the range, or are none of the choices, of their field."""
  problems = []
  for field in dataclasses.fields(kind or config):
    value = getattr(config, field.name)
    path = f'{prefix}{field.name}'
    if dataclasses.is_dataclass(value):
      problems += _range_problems(value, f'{path}.')
      continue
    choices = field.metadata.get('choices')
    if choices and value not in choices:
      problems.append(f'{path} = {value!r}; expected one of {choices}')
    limits = field.metadata.get('range')
    numbers = value if isinstance(value, collections.abc.Mapping) else {'': value}
    for name, number in numbers.items():
      # Values of another kind, and of free-form mappings, are not about numbers.
      if limits is None or not _is_number(number):
        continue
      problem = limits.problem(number)
      if problem:
        problems.append(f'{path}.{name}'.rstrip('.') + f' = {number!r} {problem}')
  return problems


def _fields(config: Any) -> Iterator[tuple[str, Any, bool]]:
  """Yields (name, value, whether it may change) of a config's fields, or of a mapping's items."""
  if isinstance(config, collections.abc.Mapping):
    for name, value in config.items():
      yield name, value, False
    return
  for field in dataclasses.fields(config):
    yield field.name, getattr(config, field.name), field.metadata.get('free', False)


def _is_section(value: Any) -> bool:
  return dataclasses.is_dataclass(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _suggestion(prefix: str, name: str, fields: Mapping[str, Any]) -> str:
  near = difflib.get_close_matches(name, list(fields), n=1)
  return f' (did you mean {prefix + near[0]!r}?)' if near else ''


def _converted(path: str, kind: Any, value: Any, problems: list[str]) -> Any:
  """Returns the value as the field's type, or notes what the field must be."""
  origin = typing.get_origin(kind) or kind
  expected = ''
  if origin is bool and not isinstance(value, bool):
    expected = 'a boolean'
  elif origin is int and not _is_whole(value):
    expected = 'a whole number'
  elif origin is float and not _is_number(value):
    expected = 'a number'
  elif origin is str and not isinstance(value, str):
    expected = 'text'
  elif origin is tuple and not _is_list(kind, value):
    expected = 'a list' if not isinstance(value, (list, tuple)) else 'a list of texts'
  elif origin is collections.abc.Mapping and not isinstance(value, collections.abc.Mapping):
    expected = 'a section'
  if expected:
    problems.append(f'field {path!r} must be {expected}, got {value!r}')
    return value
  if origin is collections.abc.Mapping:
    item = typing.get_args(kind)[1]
    # A value of None leaves an entry out, as it leaves a field at its default.
    return {
      name: _converted(f'{path}.{name}', item, each, problems) if item is not Any else each
      for name, each in value.items()
      if each is not None or item is Any
    }
  return origin(value) if origin in (int, float, tuple) else value


def _is_whole(value: Any) -> bool:
  return _is_number(value) and (
    isinstance(value, int) or (math.isfinite(value) and value.is_integer())
  )


def _is_list(kind: Any, value: Any) -> bool:
  """Whether a value is a list, of texts where the field's kind says so."""
  if not isinstance(value, (list, tuple)):
    return False
  return typing.get_args(kind)[0] is not str or all(isinstance(item, str) for item in value)


def _listed(value: Any) -> Any:
  """Tuples as lists, whatever is inside."""
  if isinstance(value, collections.abc.Mapping):
    return {name: _listed(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_listed(item) for item in value]
  return value
