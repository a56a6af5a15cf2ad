"""Config files: Python functions returning a `ConfigDict`, checked field by field against what the program reads."""

import difflib
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

_KINDS = ((bool, 'a boolean'), ((int, float), 'a number'), (str, 'text'), ((list, tuple), 'a list'))


def define_config(
  default: str | None = None, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
  """The flag `--config=path.py[:variant]` with overrides `--config.field=value`; an override of no field is an error.

  Programs share the one flag, so that several of them can be imported into one process (tests, notebooks).
  """
  if 'config' in flag_values:
    return flags.FlagHolder(flag_values, flag_values['config'])
  return config_flags.DEFINE_config_file(
    'config',
    default,
    'Config file, path.py or path.py:variant.',
    lock_config=True,
    flag_values=flag_values,
  )


def check_config(
  config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """`defaults` overlaid with `config`, frozen.

  A field that `defaults` lacks, or whose value is of another kind (a number where text is expected), would be ignored
  or fail late; here all of them are named at once. None stands for "not set" and fits any field; an empty `ConfigDict`
  in the defaults takes any fields.

  Raises:
    ValueError: naming every offending field, with the nearest known name.
  """
  problems = []
  merged = ml_collections.ConfigDict(_overlay(config, defaults, '', problems))
  if problems:
    raise ValueError('config: ' + '; '.join(problems))
  return ml_collections.FrozenConfigDict(merged)


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as plain JSON-able data, references resolved: what is written beside a run's results."""
  return _plain(config)


def _overlay(config: Any, defaults: Any, prefix: str, problems: list[str]) -> dict[str, Any]:
  """Plain nested dict of both; appends to `problems`."""
  merged = _plain(defaults)
  for name in config:
    field, value = prefix + name, config[name]
    if name not in defaults:
      near = difflib.get_close_matches(name, list(defaults), n=1)
      problems.append(
        f'unknown field {field!r}' + (f' (did you mean {prefix + near[0]!r}?)' if near else '')
      )
      continue
    default = defaults[name]
    if _is_section(default) and _is_section(value):
      merged[name] = (
        _overlay(value, default, field + '.', problems) if len(default) else _plain(value)
      )
    elif value is not None and default is not None and _kind(value) != _kind(default):
      problems.append(f'field {field!r} must be {_kind(default)}, got {value!r}')
    else:
      merged[name] = value
  return merged


def _is_section(value: Any) -> bool:
  return isinstance(value, (ml_collections.ConfigDict, ml_collections.FrozenConfigDict, dict))


def _kind(value: Any) -> str:
  if _is_section(value):
    return 'a section'
  return next((name for types, name in _KINDS if isinstance(value, types)), type(value).__name__)


def _plain(value: Any) -> Any:
  if _is_section(value):
    return {name: _plain(value[name]) for name in value}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  return value
