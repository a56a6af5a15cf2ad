"""Writes the reference pages of the documentation from the code itself.

    python -m dcore_jax.run.reference docs/reference

config.md has every field of a run's config, programs.md every program with its flags, and api.md
the functions of `import dcore_jax`. `make reference` calls it; a test compares the files.
"""

import ast
import collections.abc
import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

import dcore_jax
from dcore_jax.config import RL_PRESETS, Range, RunConfig
from dcore_jax.files import replace_text

_MADE = '<!-- Made by `make reference`; change the code, not this file. -->'

# Where the defaults come from: sections of docs/method.md or docs/psi.md, by their anchors.
_PLACES = {
  'paper, 1.6': '../method.md#16-verification',
  'released code, 1.5': '../method.md#15-reasoning-about-one-subtask-after-the-other',
  'paper, 2.2': '../method.md#22-tokens-and-labels',
  'released code, 2.1': '../method.md#21-rows-and-packing',
  'paper, 2.4': '../method.md#24-hyperparameters',
  'paper, 3.1': '../method.md#31-data-and-rollouts',
  'paper, 3.2': '../method.md#32-batch-geometry',
  'paper, 3.3': '../method.md#33-advantages',
  'ours, 3.3': '../method.md#33-advantages',
  'paper, 3.4': '../method.md#34-loss',
  'released code, 3.4': '../method.md#34-loss',
  'paper, 3.5': '../method.md#35-optimizer',
  'released code, 3.6': '../method.md#36-ablations',
  'paper, 4': '../method.md#4-reward',
  'ours, psi.md 5': '../psi.md#5-how-to-test-a-claim-about-psi',
  'rivals, psi.md 6': '../psi.md#6-rivals',
}
_SOURCES = {
  'distill': {
    'paper, 1.6': ('verify',),
    'released code, 1.5': ('retries',),
  },
  'sft': {
    'paper, 2.2': ('loss_mask',),
    'released code, 2.1': ('overlong',),
    'paper, 2.4': (
      *('epochs', 'capacity', 'rows', 'optimizer', 'learning_rate', 'warmup'),
      *('floor', 'weight_decay', 'clip'),
    ),
  },
  'rl': {
    'paper, 3.1': ('temperature', 'max_prompt_tokens', 'max_tokens'),
    'paper, 3.2': ('steps', 'prompts', 'group', 'updates'),
    'paper, 3.3': (
      *('estimator', 'alpha', 'delta', 'psi_multiplier', 'psi_when_wrong', 'entropy_of'),
    ),
    'ours, 3.3': ('zero_test', 'psi_words'),
    'paper, 3.4': ('objective', 'clip_low', 'clip_high', 'dual_clip', 'kl_coefficient'),
    'released code, 3.4': ('aggregation', 'kl_estimator'),
    'paper, 3.5': ('learning_rate', 'weight_decay', 'clip', 'checkpoint_every', 'warmup_steps'),
    'released code, 3.6': (
      *('preset', 'dynamic_rounds', 'overlong_buffer', 'overlong_penalty'),
      *('cov_share', 'cov_penalty'),
    ),
    'paper, 4': ('reward',),
    'ours, psi.md 5': ('cosine_every',),
    'rivals, psi.md 6': (
      *('top_share', 'shaping_kappa', 'virtual_reward', 'positive_weight'),
      *('uniform_kl', 'entropy_bonus', 'entropy_bonus_on'),
    ),
  },
}

# A field's meaning begins with what is counted.
_COUNTED = re.compile(
  r'(?:Further |Packed |Training |Worked |Optimizer |Longer )?(tokens|rollouts|prompts|rows|steps|'
  r'tasks|seconds|characters|requests|seeds|copies|ways|passes|samples|subtasks|decompositions|'
  r'repetitions|solutions|micro-batches|rollout batches|rounds|share|price)\b',
  re.IGNORECASE,
)


def config_page() -> str:
  """Returns every field of a config as Markdown: default, values, unit, meaning and source."""
  parts = [
    _MADE,
    '# Config fields',
    '`--config.SECTION.FIELD=VALUE` sets a field on the command line of every program that takes '
    '`--config`; a config file sets it by `c.SECTION.FIELD = VALUE`.',
    '- **May change**: a run may go on with another value; results do not depend on it. Any other '
    'change is refused.\n'
    '- **Default from**: the paper or the released code, with the section of this documentation '
    'that says so; without one the default is ours.',
  ]
  for prefix, section, doc, free in _sections(RunConfig(), '', 'A whole run.', False):
    parts.append(f'## {prefix.rstrip(".") or "The run itself"}\n\n{_escaped(doc)}')
    kinds = typing.get_type_hints(type(section))
    rows = []
    for field in dataclasses.fields(section):
      if not dataclasses.is_dataclass(getattr(section, field.name)):
        rows.append(_field_row(section, prefix, field, kinds[field.name], free))
    parts.append(_table(['field', 'default', 'values', 'unit', 'meaning', 'default from'], rows))
  parts.append('## Presets of RL\n\nWhat `rl.preset` sets, wherever the config does not.')
  rows = []
  for name, values in RL_PRESETS.items():
    shown = ', '.join(f'`{field}={value!r}`' for field, value in values.items())
    rows.append([f'`{name}`', shown])
  parts.append(_table(['preset', 'sets'], rows))
  return '\n\n'.join(parts) + '\n'


def _sections(
  section: Any, prefix: str, doc: str, free: bool
) -> Iterator[tuple[str, Any, str, bool]]:
  """Yields (prefix of its fields, section, what it is, whether all may change), depth first."""
  yield prefix, section, doc, free
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      inner = free or field.metadata.get('free', False)
      yield from _sections(value, f'{prefix}{field.name}.', inspect.getdoc(value), inner)


def _field_row(
  section: Any, prefix: str, field: dataclasses.Field, kind: Any, free: bool
) -> list[str]:
  default = getattr(section, field.name)
  meaning = _escaped(field.metadata['doc'])
  if free or field.metadata.get('free', False):
    meaning += ' **May change.**'
  source = ''
  for name, fields in _SOURCES.get(prefix.rstrip('.'), {}).items():
    if field.name in fields:
      source = f'[{name}]({_PLACES[name]})'
  return [
    f'`{prefix}{field.name}`',
    f'`{default!r}`',
    _values(field, kind),
    _unit(field, kind),
    meaning,
    source,
  ]


def _values(field: dataclasses.Field, kind: Any) -> str:
  """Returns what a field may hold, in words."""
  if 'choices' in field.metadata:
    return ', '.join(f'`{choice!r}`' for choice in field.metadata['choices'])
  if 'presets' in field.metadata:
    return ', '.join(f'`{name!r}`' for name in ('', *field.metadata['presets']))
  origin = typing.get_origin(kind) or kind
  if origin is bool:
    return 'true or false'
  if origin is str:
    return 'text'
  if origin is tuple:
    return 'texts'
  word = 'whole number' if origin is int else 'number'
  if origin is collections.abc.Mapping:
    if typing.get_args(kind)[1] not in (int, float):
      return 'a mapping'
    word = 'whole numbers by name'
  limits = field.metadata['range']
  return word if limits == Range() else f'{word}, {limits.words()}'


def _unit(field: dataclasses.Field, kind: Any) -> str:
  """Returns the unit of a number, '' where it is a plain one or no number."""
  numbers = (int, float, Mapping[str, int])
  if kind not in numbers:
    return ''
  doc = field.metadata['doc']
  if doc.endswith('nats.'):
    return 'nats'
  counted = _COUNTED.match(doc) or re.match(r'\w+: (share)\b', doc)
  return counted[1].lower() if counted else ''


def programs_page(names: list[str]) -> str:
  """Returns every program as Markdown: what it does, how it is called, and its flags.

  It imports the programs, which define their flags in the process.

  Args:
    names: of the modules in `experiments`.
  """
  parts = [
    _MADE,
    '# Programs and their flags',
    '`python -m experiments.NAME` and, where the package is installed, `dcore NAME` are the same. '
    'A flag stands as `--flag=value`. Programs with `--config` take every '
    '[config field](config.md) as well.',
  ]
  for name in names:
    module = importlib.import_module(f'experiments.{name}')
    parts.append(f'## {name}\n\n{_text(inspect.getdoc(module))}')
    rows = []
    for flag in _take_flags(module.__name__):
      # absl puts the words of an enumeration before its help.
      meaning = _escaped(re.sub(r'^<[^>]*>: ', '', ' '.join(flag.help.split())))
      default = '' if flag.default is None else f'`{flag.default!r}`'
      if flag.name == 'config':
        # The rest of its help lists the fields; the default is an absolute path here.
        meaning = 'Config file, or file:variant; `--config.FIELD=VALUE` sets a field.'
        default = f'`configs/{pathlib.Path(flag.config_filename).name}`' if flag.default else ''
      choices = getattr(flag.parser, 'enum_values', None)
      if choices:
        meaning += ' One of ' + ', '.join(f'`{choice}`' for choice in choices) + '.'
      rows.append([f'`--{flag.name}`', default, meaning])
    if rows:
      parts.append(_table(['flag', 'default', 'meaning'], rows))
  return '\n\n'.join(parts) + '\n'


def _take_flags(module: str) -> list[flags.Flag]:
  """Returns the flags that a program has defined, and takes them out for the next program's."""
  found = list(flags.FLAGS.flags_by_module_dict().get(module, []))
  # All programs share the definition of this one, which another module makes.
  if 'config' in flags.FLAGS:
    found.append(flags.FLAGS['config'])
  for flag in found:
    delattr(flags.FLAGS, flag.name)
  return sorted(found, key=lambda flag: (flag.name != 'config', flag.name))


def api_page() -> str:
  """Returns the public functions, and the classes of what they return, as Markdown."""
  parts = [
    _MADE,
    '# Python interface',
    'Each name is imported when it is first used; `import dcore_jax` itself takes no time. '
    'Fields of a section, as keyword options, are those of [Config fields](config.md).',
  ]
  parts += [_function_part(name, getattr(dcore_jax, name)) for name in dcore_jax.__all__]
  # By way of their functions, because this room lies below that one.
  module = inspect.getmodule(dcore_jax.load)
  for kind in (module.Model, module.Answer, inspect.getmodule(dcore_jax.sample_groups).Group):
    parts.append(f'## {kind.__name__}\n\n{_text(inspect.getdoc(kind))}')
    for name, function in vars(kind).items():
      if inspect.isfunction(function) and not name.startswith('_'):
        parts.append(_function_part(f'{kind.__name__}.{name}', function, level='###'))
  return '\n\n'.join(parts) + '\n'


def _function_part(name: str, function: Any, level: str = '##') -> str:
  source = textwrap.dedent(inspect.getsource(function))
  definition = ast.parse(source).body[0]
  # As it is written, down to its docstring.
  head = '\n'.join(source.splitlines()[: definition.body[0].lineno - 1])
  head = head[head.index('def ') :].rstrip(':')
  return f'{level} {name}\n\n```python\n{head}\n```\n\n{_text(inspect.getdoc(function))}'


def _text(docstring: str) -> str:
  """Returns a docstring as Markdown: code blocks as they are, sections as lists."""
  parts = []
  for block in docstring.split('\n\n'):
    lines = block.splitlines()
    section = re.fullmatch(r'(Args|Attributes|Returns|Raises):', lines[0])
    if section:
      parts.append(f'**{section[1]}**')
      parts.append(_entries(textwrap.dedent('\n'.join(lines[1:]))))
    elif all(line.startswith('    ') for line in lines):
      parts.append(block)
    else:
      parts.append(_escaped(block))
  return '\n\n'.join(parts)


def _entries(text: str) -> str:
  """Returns the entries of a section of a docstring as a list; lines that go on are indented."""
  entries = re.sub(r'\n\s+', ' ', text).splitlines()
  items = []
  for entry in entries:
    name, colon, meaning = entry.partition(': ')
    named = colon and re.fullmatch(r'\**\w+', name)
    items.append(f'- `{name}`: {_escaped(meaning)}' if named else f'- {_escaped(entry)}')
  return '\n'.join(items)


def _escaped(text: str) -> str:
  """Returns text in which Markdown sees no marks but those of code."""
  # Odd parts stand between backticks.
  parts = text.split('`')
  parts[::2] = [re.sub(r'([*_<\[\]])', r'\\\1', part) for part in parts[::2]]
  return '`'.join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
  lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
  for row in rows:
    cells = [' '.join(cell.split()).replace('|', '\\|') for cell in row]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main(folder: str) -> None:
  """Writes the pages into a folder."""
  programs = pathlib.Path(importlib.import_module('experiments').__file__).parent
  names = sorted(path.stem for path in programs.glob('[a-z]*.py'))
  pages = {
    'config.md': config_page(),
    'programs.md': programs_page(names),
    'api.md': api_page(),
  }
  for name, text in pages.items():
    replace_text(pathlib.Path(folder) / name, text)


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python -m dcore_jax.run.reference FOLDER')
  main(sys.argv.pop())
