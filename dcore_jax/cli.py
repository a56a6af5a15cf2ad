"""All programs under one name: `dcore train --config=nano`, or `python -m dcore_jax.cli train ...`.

A program is the same as `python -m experiments.NAME`, which works without an installation.
"""

import ast
import difflib
import importlib.util
import pathlib
import runpy
import sys

# The programs in the order in which a person meets them, by what they are for.
GROUPS = {
  'train': ('train', 'distill', 'seeds', 'mcp_tasks', 'ablate', 'pretrain'),
  'measure': ('evaluate', 'analyze', 'compare', 'bfcl_score', 'report', 'traces'),
  'use': ('serve', 'chat', 'export', 'import_model'),
  'look first': ('plan', 'show_rows', 'doctor', 'psi_facts', 'made_up'),
}
_EXAMPLE = """\
  dcore train --config=nano --workdir=runs/nano      the whole method on a laptop
  dcore train --config=nano --config.rl.alpha=0.4    any field of a config is a flag
  dcore doctor --config=qwen3_8b                     does it fit here, and is all there?"""


def main() -> None:
  """Runs the program that the command line names."""
  words = sys.argv[1:]
  if not words or words[0] in ('-h', '--help', 'help'):
    print(_overview())
    return
  # Both spellings are natural: the module has a low line, the README a hyphen.
  name = words[0].replace('-', '_')
  known = programs()
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {near[0]}?' if near else f'expected one of {", ".join(known)}'
    sys.exit(f'error: no program {words[0]!r}; {hint}')
  # A program takes what stands behind its name, and finds itself under its own.
  del sys.argv[1]
  runpy.run_module(f'experiments.{name}', run_name='__main__', alter_sys=True)


def programs() -> list[str]:
  """Returns the names of all programs."""
  return [name for names in GROUPS.values() for name in names]


def _overview() -> str:
  lines = ['usage: dcore PROGRAM [--flag=value ...]', '', _EXAMPLE]
  for group, names in GROUPS.items():
    lines += ['', f'{group}:']
    lines += [f'  {name.replace("_", "-"):14}{summary(name)}' for name in names]
  lines += ['', 'dcore PROGRAM --help lists the flags of a program.']
  return '\n'.join(lines)


def summary(name: str) -> str:
  """Returns the first sentence of a program's docstring, without importing the program."""
  # Importing one takes seconds: it loads jax.
  spec = importlib.util.find_spec(f'experiments.{name}')
  source = pathlib.Path(spec.origin).read_text(encoding='utf-8')
  first = ast.get_docstring(ast.parse(source)).split('\n\n')[0]
  return ' '.join(first.split()).split(': ')[0].rstrip('.:')


if __name__ == '__main__':
  main()
