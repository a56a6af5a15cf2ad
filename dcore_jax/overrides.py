"""Configs as typed values: defaults overlaid with plain data, checked field by field.

Whoever writes a config writes plain nested data (a file's `ConfigDict`, a JSON object, keyword
arguments). A field that no section has would be ignored, and one of another kind would fail late:
both are errors here, all of them named at once.
"""

import collections.abc
import dataclasses
import difflib
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

  Raises:
    ValueError: names every unknown field, with the nearest known name, and every value of another
      kind.
  """
  problems: list[str] = []
  result = _overlay(defaults, values, '', problems)
  if problems:
    raise ValueError('config: ' + '; '.join(problems))
  return result


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
  for field in dataclasses.fields(defaults):
    value = getattr(defaults, field.name)
    if not dataclasses.is_dataclass(value):
      whole.setdefault(field.name, _listed(value))
    elif isinstance(record.get(field.name, {}), dict):
      whole[field.name] = completed(value, record.get(field.name, {}))
  return whole


def describe(config: Any, prefix: str = '') -> Iterator[str]:
  """Yields one line for each field, 'rl.alpha = 0.1: what it means', sections with a heading."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield f'[{prefix}{field.name}] {field.metadata["doc"]}'
      yield from describe(value, f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name} = {value!r}: {field.metadata["doc"]}'


def _overlay(defaults: Any, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
  fields = {field.name: field for field in dataclasses.fields(defaults)}
  kinds = typing.get_type_hints(type(defaults))
  changes = {}
  for name, value in values.items():
    path = prefix + name
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
  return dataclasses.replace(defaults, **changes)


def _suggestion(prefix: str, name: str, fields: Mapping[str, Any]) -> str:
  near = difflib.get_close_matches(name, list(fields), n=1)
  return f' (did you mean {prefix + near[0]!r}?)' if near else ''


def _converted(path: str, kind: Any, value: Any, problems: list[str]) -> Any:
  """Returns the value as the field's type, or notes what the field must be."""
  origin = typing.get_origin(kind) or kind
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  expected = ''
  if origin is bool and not isinstance(value, bool):
    expected = 'a boolean'
  elif origin is int and not (number and float(value).is_integer()):
    expected = 'a whole number'
  elif origin is float and not number:
    expected = 'a number'
  elif origin is str and not isinstance(value, str):
    expected = 'text'
  elif origin is tuple and not isinstance(value, (list, tuple)):
    expected = 'a list'
  elif origin is collections.abc.Mapping and not isinstance(value, collections.abc.Mapping):
    expected = 'a section'
  if expected:
    problems.append(f'field {path!r} must be {expected}, got {value!r}')
    return value
  if origin in (int, float, tuple):
    return origin(value)
  return dict(value) if origin is collections.abc.Mapping else value


def _listed(value: Any) -> Any:
  """Tuples as lists, whatever is inside."""
  if isinstance(value, collections.abc.Mapping):
    return {name: _listed(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_listed(item) for item in value]
  return value
