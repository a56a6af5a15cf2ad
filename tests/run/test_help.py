"""Flags of every program stand in groups; read from the source, which costs no import of jax."""

import ast
import pathlib

import pytest

from dcore_jax import cli

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
# So many lines of flags are read at a glance, without a title.
FEW = 4


def flags_and_groups(source):
  """Returns {variable: flag} as the program defines them, and {title: variables}."""
  found, groups = {}, {}
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
      continue
    if node.func.attr.startswith('DEFINE_'):
      found[node.lineno] = node.args[0].value
    elif ast.unparse(node.func) == 'help_lib.group':
      title, *holders = node.args
      assert title.value not in groups, f'the title {title.value!r} stands twice'
      groups[title.value] = [ast.unparse(holder).lstrip('*') for holder in holders]
  names = {}
  tuples = {}
  for node in ast.parse(source).body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
      if node.lineno in found:
        names[node.targets[0].id] = found[node.lineno]
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
      tuples[node.targets[0].id] = [
        name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)
      ]
  for title, holders in groups.items():
    groups[title] = [name for holder in holders for name in tuples.get(holder, [holder])]
  return names, groups


@pytest.mark.parametrize('program', cli.programs())
def test_every_flag_is_in_one_group(program):
  names, groups = flags_and_groups((EXPERIMENTS / f'{program}.py').read_text())
  grouped = [name for members in groups.values() for name in members]
  if groups or len(names) > FEW:
    assert sorted(grouped) == sorted(names)


def test_the_test_sees_what_programs_define():
  # Otherwise a program whose flags are defined otherwise would pass without any.
  names, groups = flags_and_groups((EXPERIMENTS / 'train.py').read_text())
  assert set(names.values()) == {'workdir', 'hosts', 'patience', 'stages'}
  assert groups['several hosts'] == ['_HOSTS', '_PATIENCE']
  for path in EXPERIMENTS.glob('*.py'):
    source = path.read_text()
    assert len(flags_and_groups(source)[0]) == source.count('= flags.DEFINE_'), path.name


@pytest.mark.parametrize('program', cli.programs())
def test_an_example_comes_first(program):
  docstring = ast.get_docstring(ast.parse((EXPERIMENTS / f'{program}.py').read_text()))
  examples = [line for line in docstring.splitlines() if line.startswith('    python -m ')]
  examples += [line for line in docstring.splitlines() if ' python -m ' in line]
  assert f'python -m experiments.{program}' in examples[0]
