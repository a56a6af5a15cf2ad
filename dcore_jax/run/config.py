"""Config files and overrides on the command line, as the typed config that programs read."""

import contextlib
import difflib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dcore_jax import overrides
from dcore_jax.config import RL_PRESETS, RunConfig

_OVERRIDE = re.compile(r'--?config\.([\w.]+)')


def default_config() -> ml_collections.ConfigDict:
  """Returns a fresh, complete config for a config file to change; its fields are `RunConfig`'s.

  Fields that a preset may set are told apart by whether somebody has set them, also to what they
  were.
  """
  config = ml_collections.ConfigDict(overrides.to_plain(RunConfig()))
  # A preset must not override what a person has set, not even to the default value.
  for name in sorted(set().union(*RL_PRESETS.values())):
    config.rl[name] = _Default(config.rl[name])
  return config


class _Default(ml_collections.FieldReference):
  """The value of a field of a `ConfigDict`, which knows whether somebody has set it."""

  def __init__(self, value: Any):
    super().__init__(value)
    self.untouched = True

  def set(self, value: Any, *arguments: Any, **options: Any) -> None:
    """As in ml_collections, which calls it for `config.field = value`."""
    super().set(value, *arguments, **options)
    self.untouched = False

  def __setstate__(self, state: dict[str, Any]) -> None:
    # A copy of a config says as much as the config.
    super().__setstate__(state)
    self.untouched = state['untouched']


def read_config(config: ml_collections.ConfigDict | RunConfig) -> RunConfig:
  """Returns what a config file or the command line says, over the defaults.

  Raises:
    ValueError: names every unknown field, with the nearest known name, every value of another kind,
      and every number outside the range of its field.
  """
  # Already typed: only the ranges can be wrong, since Python does not check them.
  if isinstance(config, RunConfig):
    overrides.check_ranges(config)
    return config
  return overrides.overlay(RunConfig(), _plain(config))


def define_config(
  default: str | None = None, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
  """Defines `--config=path.py[:variant]` with overrides `--config.field=value`.

  Programs share the one flag, so that several of them can be imported into one process (tests,
  notebooks).

  Raises:
    SystemExit: an override of no field, or a file that is not there. ml_collections reads the
      default file and the overrides while the flag is defined, before a program could catch them.
  """
  # absl refuses to define the same flag twice.
  if 'config' in flag_values:
    return flags.FlagHolder(flag_values, flag_values['config'])
  with one_line_errors():
    # ml_collections looks for the flag among the arguments while it is defined.
    sys.argv[1:] = _with_files(sys.argv[1:])
    default = find_config(default) if default else default
    holder = config_flags.DEFINE_config_file(
      # Locked once the file is read, so that an override of a field that does not exist is an
      # error.
      'config',
      default,
      'Config file, path.py or path.py:variant; --config.FIELD=VALUE overrides a field.',
      lock_config=True,
      flag_values=flag_values,
    )
  # --help shows the flags of the program's own module; this one is defined here.
  flag_values.register_key_flag_for_module(sys.argv[0], flag_values['config'])
  return holder


def find_config(name: str) -> str:
  """Returns the file of a config that is named by its path, or as one of the project's own.

  Args:
    name: 'nano', 'configs/nano.py' from wherever it is said, or the path of any file; with a
      variant behind a colon, if it has one.

  Raises:
    ValueError: neither a file nor a config of the project.
  """
  path, colon, variant = name.partition(':')
  if pathlib.Path(path).is_file():
    return name
  spec = importlib.util.find_spec('configs')
  folder = pathlib.Path(spec.origin).parent if spec and spec.origin else None
  known = sorted(file.stem for file in folder.glob('*.py')) if folder else []
  wanted = pathlib.Path(path)
  # Another folder's file is not one of the project's that happens to have its name.
  if str(wanted.parent) in ('.', 'configs') and wanted.stem in known:
    return f'{folder / wanted.stem}.py{colon}{variant}'
  near = difflib.get_close_matches(wanted.stem, known, n=1)
  hint = f'; did you mean {near[0]}?' if near else f'; the project has {", ".join(known)}'
  raise ValueError(f'no file {path}{hint}')


def _with_files(arguments: Sequence[str]) -> list[str]:
  """Returns arguments in which `--config` names a file, whichever way it was said."""
  found = list(arguments)
  for place, argument in enumerate(arguments):
    flag, equals, value = argument.partition('=')
    if flag not in ('--config', '-config'):
      continue
    if equals:
      found[place] = f'{flag}={find_config(value)}'
    elif place + 1 < len(arguments):
      found[place + 1] = find_config(arguments[place + 1])
  return found


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Ends the program with one line where a config file or an override cannot be read."""
  try:
    yield
  # The locked config refuses an override of a field that it lacks.
  except (AttributeError, KeyError) as error:
    sys.exit(f'error: {_unknown_field(sys.argv) or _named(sys.argv, error)}')
  except (ValueError, OSError) as error:
    sys.exit(f'error: --config: {" ".join(str(error).split())}')


def _unknown_field(argv: list[str]) -> str:
  """Returns what is wrong with the first override of a field that a run's config lacks, or ''."""
  for argument in argv:
    found = _OVERRIDE.match(argument)
    if not found:
      continue
    values: Any = None
    # 'rl.alpha' becomes {'rl': {'alpha': None}}, the form that `overlay` checks. The value does not
    # matter for the name.
    for name in reversed(found[1].split('.')):
      values = {name: values}
    try:
      overrides.overlay(RunConfig(), values)
    except ValueError as error:
      return str(error)
  return ''


def _named(argv: list[str], error: AttributeError | KeyError) -> str:
  """Returns what is wrong with an override that the config refuses.

  Entries of a mapping (`distill.tasks.single`) are no fields of a section, and ml_collections tells
  the last name of one alone.
  """
  text = ' '.join(str(error).split())
  for argument in argv:
    found = _OVERRIDE.match(argument)
    if not found:
      continue
    *parents, last = found[1].split('.')
    known: Any = overrides.to_plain(RunConfig())
    for name in parents:
      known = known[name] if isinstance(known, dict) and name in known else {}
    if re.search(rf'\b{last}\b', text) and isinstance(known, dict) and last not in known:
      return f'config: unknown field {found[1]!r}; known are {sorted(known)}'
  return text


def _plain(value: Any) -> Any:
  """Returns a `ConfigDict` as nested dicts without what nobody has set.

  References are resolved.
  """
  frozen = isinstance(value, ml_collections.FrozenConfigDict)
  if isinstance(value, ml_collections.ConfigDict) and not frozen:
    plain = {}
    # Only the reference itself, and not the value that it stands for, knows whether it was set.
    for name, held in value.items(preserve_field_references=True):
      if not (isinstance(held, _Default) and held.untouched):
        plain[name] = _plain(value[name])
    return plain
  if frozen or isinstance(value, dict):
    return {name: _plain(value[name]) for name in value}
  if isinstance(value, (list, tuple)):
    # The typed config holds tuples, which nobody can change.
    return tuple(_plain(item) for item in value)
  return value
