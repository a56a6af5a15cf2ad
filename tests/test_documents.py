"""What documents say of the code is there: programs, flags, fields, files, names and links."""

import ast
import dataclasses
import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

import dcore_jax
from dcore_jax import cli
from dcore_jax.config import RunConfig
from dcore_jax.run.config import find_config

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = ROOT / 'docs' / 'reference'
DOCUMENTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])
# The first lines of these say how they are run.
COMMANDED = sorted([*ROOT.glob('configs/*.py'), *ROOT.glob('experiments/*.py')])
SHELL = re.compile(
  r'python -m ((?:experiments|benchmarks)\.\w+)|\bdcore ([a-z][\w-]*)|\bmake ([a-z][\w-]*)'
)
# What of a docstring is a command, and not prose.
COMMAND = re.compile(r'^ +(?:python|dcore|make) .*|^\w+: +((?:python|make) .*)', re.M)
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}


def code_of(text):
  """Yields the pieces of code of a document: fenced and indented blocks, and spans."""
  fences = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)
  for language, block in fences.findall(text):
    yield language, block
  text = fences.sub('', text)
  for block in re.findall(r'(?:^|\n)\n((?: {4}.*(?:\n|$)|\n(?= {4}))+)', text):
    yield '', textwrap.dedent(block)
  for span in re.findall(r'`([^`]+)`', text):
    yield 'span', ' '.join(span.split())


def commands_of(path):
  """Yields (program or target, its words) of a document, or of a docstring."""
  text = path.read_text(encoding='utf-8')
  if path.suffix == '.py':
    text = ast.get_docstring(ast.parse(text), clean=False) or ''
    # A config's docstring goes on with its command on the next line, where it is indented.
    text = re.sub(r'\\?\n +(?=--)', ' ', text)
    pieces = [found[0] for found in COMMAND.finditer(text)]
  else:
    pieces = [code for _, code in code_of(text)]
  for piece in pieces:
    for line in re.sub(r'\\\n\s*', ' ', piece).splitlines():
      for found in SHELL.finditer(line):
        rest = re.split(r'  +|[;#&`]', line[found.end() :])[0]
        yield found, rest


def flags_of(program):
  """The names of the flags that a program defines, read from its source."""
  names = set()
  for node in ast.walk(ast.parse((ROOT / 'experiments' / f'{program}.py').read_text())):
    if not isinstance(node, ast.Call):
      continue
    called = ast.unparse(node.func)
    if called.startswith('flags.DEFINE'):
      names.add(node.args[0].value)
    if called == 'define_config':
      names.add('config')
  return names | {'help'}


def check_field(path):
  """Refuses a dotted name that is no field of a config; entries of mappings are free."""
  place = RunConfig()
  for name in path.split('.'):
    if not dataclasses.is_dataclass(place):
      assert isinstance(place, dict), path
      return
    assert hasattr(place, name), path
    place = getattr(place, name)


def check_config(value):
  """Refuses a config that is not there, or a variant that it does not have."""
  file, _, variant = value.partition(':')
  find_config(file)
  module = importlib.import_module(f'configs.{pathlib.Path(file).stem}')
  if not variant:
    return
  if module.__name__ == 'configs.mcp_world':  # its variant is a file
    assert variant.partition(',')[0].endswith('.json')
  else:
    module.get_config(variant)


def check_words(program, words):
  known = flags_of(program)
  for word in words:
    if not word.startswith('--'):
      continue
    flag, _, value = word[2:].partition('=')
    if flag.startswith('config.'):
      assert 'config' in known
      check_field(flag.removeprefix('config.'))
      continue
    assert flag in known or flag.removeprefix('no') in known, f'{program} has no --{flag}'
    if flag == 'config' and value not in ('...', 'FILE'):
      check_config(value)


@pytest.mark.parametrize(
  'path', DOCUMENTS + COMMANDED, ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_command_can_be_given(path):
  targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M))
  for found, rest in commands_of(path):
    module, program, target = found.groups()
    if target:
      assert target in targets, found[0]
      continue
    if module and module.startswith('benchmarks.'):
      path = ROOT / module.replace('.', '/')
      assert path.with_suffix('.py').is_file() or (path / '__main__.py').is_file(), module
      continue
    name = module.removeprefix('experiments.') if module else program.replace('-', '_')
    if name == 'NAME':
      continue
    assert name in cli.programs(), found[0]
    check_words(name, shlex.split(rest))


def test_the_check_of_commands_finds_mistakes():
  assert list(code_of('a `b` c\n\n    x\n      y\n\nz')) == [('', 'x\n  y\n'), ('span', 'b')]
  check_words('train', ['--config=configs/nano.py:grpo', '--config.rl.tasks.single=3'])
  for words in (['--workdri=W'], ['--config.rl.alhpa=1'], ['--config.rl.alpha.x=1']):
    with pytest.raises(AssertionError):
      check_words('train', words)
  for value in ('configs/nanno.py', 'nano:slow'):
    with pytest.raises(ValueError):
      check_config(value)


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_fields_and_files_that_are_named_exist(path):
  text = path.read_text(encoding='utf-8')
  for language, code in code_of(text):
    # What has changed is named as it was.
    if language != 'span' or path.name == 'CHANGELOG.md':
      continue
    named = re.match(r'(\w+)\.(\w+(?:\.\w+)?)(?: ?=|$)', code)
    files = ('html', 'json', 'jsonl', 'md', 'py')
    if named and named[1] in SECTIONS and named[2] not in files:
      check_field(f'{named[1]}.{named[2]}')
    if re.fullmatch(r'(configs|experiments|docs|tests|dcore_jax)/[\w/]+\.(py|md)', code):
      assert (ROOT / code).is_file(), code


def module_names(module):
  """The names that a module defines or imports, without importing it."""
  path = ROOT / module.replace('.', '/')
  path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
  names = {child.stem for child in path.parent.glob('*')} if path.stem == '__init__' else set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      names |= {alias.asname or alias.name for alias in node.names}
    for target in getattr(node, 'targets', []) + [getattr(node, 'target', None)]:
      if isinstance(target, ast.Name):
        names.add(target.id)
  return names


def python_of(path):
  for language, code in code_of(path.read_text(encoding='utf-8')):
    if language == 'python' or (not language and re.match(r'(import|from|def|class|@) ?\w', code)):
      yield code


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_compiles_and_its_names_exist(path):
  for code in python_of(path):
    # A signature of the reference has no body.
    stub = f'{code.rstrip()}: ...' if path.name == 'api.md' else code
    for node in ast.walk(ast.parse(stub)):
      if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'dcore_jax':
        assert node.attr in dcore_jax.__all__, node.attr
      if isinstance(node, ast.ImportFrom) and re.match(r'(dcore_jax|configs)\b', node.module):
        for alias in node.names:
          assert alias.name in {*module_names(node.module), *dcore_jax.__all__}, alias.name


def anchors_of(path):
  text = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.M | re.S)
  found = set()
  for heading in re.findall(r'^#+ (.*)$', text, re.M):
    kept = re.sub(r'[^\w\- ]', '', heading.strip().lower())
    found.add(kept.replace(' ', '-'))
  return found


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
  text = path.read_text(encoding='utf-8')
  for target, anchor in re.findall(r'\]\(([^)#:\s]*)(?:#([\w-]+))?\)', text):
    file = (path.parent / target).resolve() if target else path
    # Pages that hold a file of the root are read in the site alone.
    included = re.fullmatch(r'--8<-- "(.*)"\n', file.read_text() if file.suffix == '.md' else '')
    if included:
      file = ROOT / included[1]
    assert file.is_file(), target
    if anchor:
      assert anchor in anchors_of(file), f'{target}#{anchor}'


def test_the_site_has_every_document():
  listed = set(re.findall(r'"([\w/]+\.md)"', (ROOT / 'zensical.toml').read_text()))
  there = {str(path.relative_to(ROOT / 'docs')) for path in (ROOT / 'docs').rglob('*.md')}
  assert listed == there


def test_the_reference_is_that_of_the_code(tmp_path):
  # A process of its own: it imports every program, and takes their flags out of absl's registry.
  subprocess.run(
    [sys.executable, '-m', 'dcore_jax.run.reference', str(tmp_path)], check=True, cwd=ROOT
  )
  for made in sorted(tmp_path.iterdir()):
    same = made.read_text() == (REFERENCE / made.name).read_text()
    assert same, f'docs/reference/{made.name} is out of date: make reference'
  assert len(list(tmp_path.iterdir())) == len(list(REFERENCE.iterdir())) == 3
