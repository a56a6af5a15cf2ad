"""What `--help` prints: an example first, what the program does, and its flags in groups.

A config has more fields than a screen has lines: `--help` names the sections, and `--help=SECTION`
or `--help=all` their fields.
"""

import dataclasses
import difflib
import inspect
import pathlib
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dcore_jax import overrides
from dcore_jax.config import RunConfig

_WIDTH = 100
_INDENT = 18  # columns before the meaning of a flag
_ASKED = re.compile(r'(?:-h|--?help(?:short|full)?)(?:=(.*))?')
# What belongs to no section, but to the run.
_RUN = 'run'

_OPTIONS = 'options'  # the title of what no group has
# Title of a group -> the flags in it; both are shown in the order in which a program says them.
_GROUPS: dict[str, tuple[str, ...]] = {}


def group(title: str, *holders: flags.FlagHolder) -> None:
  """Puts flags of the program under a title of their own."""
  _GROUPS[title] = tuple(holder.name for holder in holders)


def asked(arguments: Sequence[str]) -> str | None:
  """Returns what a command line wants help with: '' is the program, None is nothing."""
  for argument in arguments:
    # What follows is no flag of this program.
    if argument == '--':
      return None
    found = _ASKED.fullmatch(argument)
    if found:
      return found[1] or ''
  return None


def text(about: str = '') -> str:
  """Returns the help of the program that runs.

  Args:
    about: '' for the program, a section of the config, or 'all'.

  Raises:
    ValueError: no such section.
  """
  known = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
  config = known.pop('config', None)
  if about:
    if config is None:
      raise ValueError(f'--help={about}: the program has no config')
    return _fields(about)
  lines = _description(inspect.getdoc(sys.modules['__main__']) or '')
  grouped = {name for names in _GROUPS.values() for name in names}
  groups = {_OPTIONS: sorted(known.keys() - grouped)} | _GROUPS
  for title, names in groups.items():
    if names:
      lines += ['', f'{title}:']
      for name in names:
        lines += _flag_lines(known[name])
  if config is not None:
    # The flag's own default is the config that was read, and the name that of its file.
    default = f'configs/{pathlib.Path(config.config_filename).name}' if config.default else ''
    lines += ['', *_config_lines(config.value, default)]
  return '\n'.join(lines)


def _description(docstring: str) -> list[str]:
  """The docstring, its first block of commands before the rest."""
  blocks = docstring.split('\n\n')
  example = next((b for b in blocks if all(line.startswith('    ') for line in b.splitlines())), '')
  if example:
    blocks.remove(example)
    # The sentence before it led over to it.
    blocks[0] = re.sub(r':$', '.', blocks[0])
    blocks.insert(0, textwrap.indent(textwrap.dedent(example), '  '))
  return '\n\n'.join(blocks).rstrip().splitlines()


def _flag_lines(flag: Any) -> list[str]:
  # absl puts the words of an enumeration before its help.
  meaning = re.sub(r'^<[^>]*>: ', '', ' '.join(flag.help.split()))
  choices = getattr(flag.parser, 'enum_values', None)
  if choices:
    meaning += f' One of {", ".join(choices)}.'
  # Empty and false defaults say nothing that the meaning does not.
  if flag.default not in (None, '', False, []):
    meaning += f' Default: {flag.default}.'
  return _entry(f'--{flag.name}', meaning)


def _entry(name: str, meaning: str) -> list[str]:
  lines = textwrap.wrap(meaning, _WIDTH - _INDENT) or ['']
  head = f'  {name}'
  # A long name has a line of its own.
  first = [head] if len(head) >= _INDENT else []
  shown = [' ' * _INDENT + line for line in lines]
  if not first:
    shown[0] = head.ljust(_INDENT) + lines[0]
  return first + shown


def _config_lines(config: Any, default: str) -> list[str]:
  start = f'; default: {default}' if default else ''
  lines = [f'config: --config=FILE or FILE:VARIANT{start}.']
  # The organism's pretraining has a config of its own; None is a program that may do without one.
  if config is not None and not set(_sections()) <= set(config):
    return [*lines, f'  --config.FIELD=VALUE sets a field: {", ".join(config)}.']
  lines.append('  --config.FIELD=VALUE sets a field, as in --config.rl.alpha=0.4. Sections:')
  lines += _entry(_RUN, 'Seed, stages and name.')
  for name, field in _sections().items():
    lines += _entry(name, field.metadata['doc'])
  return [*lines, '  --help=SECTION lists the fields of one, --help=all those of all.']


def _sections() -> Mapping[str, Any]:
  default = RunConfig()
  return {
    field.name: field
    for field in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(getattr(default, field.name))
  }


def _fields(about: str) -> str:
  known = ['all', _RUN, *_sections()]
  if about not in known:
    near = difflib.get_close_matches(about, known, n=1)
    hint = f'did you mean {near[0]}?' if near else f'expected one of {", ".join(known)}'
    raise ValueError(f'--help={about}: the config has no such section; {hint}')
  lines = []
  for line in overrides.describe(RunConfig()):
    heading = line.startswith('[')
    section = line.lstrip('[').partition(']' if heading else ' =')[0].partition('.')
    belongs = section[0] if heading or section[1] else _RUN
    if about in ('all', belongs):
      lines += ['', line] if heading else textwrap.wrap(line, _WIDTH, subsequent_indent='    ')
  lines.append('')
  lines.append('Defaults are those before the config file; "may change": also when a run goes on.')
  return '\n'.join(lines).strip()
