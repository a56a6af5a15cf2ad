"""Looks for known vulnerabilities, secrets and licences: `make audit`.

    python tests/audit.py TOOLS ENVIRONMENT...

TOOLS is the environment with pip-audit and detect-secrets, ENVIRONMENT one with packages of
requirements.lock. Each of the three prints what it found; what it could not do is a line, too, and
the exit status is 1 for either.

Vulnerabilities are those that PyPI knows of the packages of requirements.lock. Secrets are searched
in every file that git tracks; .secrets.baseline holds the hashes of what was looked at and is none.
Licences are those that installed packages of requirements.lock declare.
"""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
LOCK = ROOT / 'requirements.lock'
BASELINE = ROOT / '.secrets.baseline'
# Licences that ask for no more than to be named, or that reach no further than their own files.
ALLOWED = frozenset(
  {
    *('0BSD', 'AFL-2.1', 'Apache-2.0', 'BSD', 'BSD-2-Clause', 'BSD-3-Clause', 'BSL-1.0'),
    *('CC0-1.0', 'CNRI-Python', 'HPND', 'ISC', 'LLVM-exception', 'MIT', 'MIT-0', 'MIT-CMU'),
    *('MPL-2.0', 'PSF-2.0', 'Unlicense', 'Zlib'),
  }
)
# The baseline's own hashes look like secrets.
_APART = ('--exclude-files', rf'^{re.escape(BASELINE.name)}$')
# What packages without an expression of SPDX call them.
NAMES = {
  '3-Clause BSD License': 'BSD-3-Clause',
  'Apache 2.0': 'Apache-2.0',
  'Apache 2.0 License': 'Apache-2.0',
  'Apache License 2.0': 'Apache-2.0',
  'Apache Software License': 'Apache-2.0',
  'BSD License': 'BSD',
  'ISC License (ISCL)': 'ISC',
  'MIT License': 'MIT',
  'Mozilla Public License 2.0 (MPL 2.0)': 'MPL-2.0',
  'Python Software Foundation License': 'PSF-2.0',
}
# Of one package: it compiles for TPUs in tests, and nobody is handed it with this project.
EXCEPTIONS = {'libtpu': 'Google Cloud Platform Terms of Service'}
# A classifier that names no licence.
_NO_LICENCE = ('OSI Approved', 'DFSG approved')


def locked(text: str) -> dict[str, str]:
  """Returns {package: version} of the text of a lock file."""
  lines = [line for line in text.splitlines() if line and not line.startswith('#')]
  return dict(line.split('==') for line in lines)


def vulnerability_problems(report: Mapping[str, Any]) -> list[str]:
  """Returns what pip-audit's report has against packages, and how many it knows nothing of."""
  problems = []
  unknown = []
  for package in report['dependencies']:
    if 'skip_reason' in package:
      unknown.append(package['name'])
    for found in package.get('vulns', ()):
      fixed = ', '.join(found['fix_versions']) or 'no version'
      named = f'{package["name"]} {package["version"]}'
      problems.append(f'vulnerabilities: {named} has {found["id"]}, mended in {fixed}')
  if unknown:
    # pip-audit calls it success where its service answers that it knows no such package.
    problems.append(
      f'vulnerabilities: {len(unknown)} of {len(report["dependencies"])} packages could not be '
      f'looked up ({unknown[0]} ...): the service cannot be reached from here, or lacks them'
    )
  return problems


def secret_problems(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
  """Returns the places of what looks like a secret and is not in the baseline."""
  seen = set()
  for path, secrets in known['results'].items():
    seen.update((path, secret['type'], secret['hashed_secret']) for secret in secrets)
  problems = []
  for path, secrets in found['results'].items():
    for secret in secrets:
      if (path, secret['type'], secret['hashed_secret']) not in seen:
        problems.append(f'secrets: {path}:{secret["line_number"]}: {secret["type"]}')
  return problems


def licences(metadata: Any) -> list[list[str]]:
  """Returns the licences that a package declares, as alternatives of licences that hold together.

  An expression of SPDX goes before classifiers, and these before the free text.
  """
  expression = metadata.get('License-Expression')
  classifiers = [
    text.split('::')[-1].strip()
    for text in metadata.get_all('Classifier', [])
    if text.startswith('License ::')
  ]
  named = [text for text in classifiers if text not in _NO_LICENCE]
  if named and not expression:
    return [[NAMES.get(name, name) for name in named]]
  # Many write an expression into the free text; others the whole licence, after its name.
  text = expression or (metadata.get('License') or '').strip().split('\n')[0]
  alternatives = re.split(r'\s+OR\s+', text.replace('(', '').replace(')', ''))
  found = []
  for each in alternatives:
    names = re.split(r'\s+(?:AND|WITH)\s+', each.strip())
    found.append([NAMES.get(name, name) for name in names])
  return found


def licence_problems(packages: Iterable[str], installed: Mapping[str, Any]) -> list[str]:
  """Returns the packages whose licence is not allowed, and how many are not there to be read."""
  problems = []
  absent = []
  for name in packages:
    if name not in installed:
      absent.append(name)
      continue
    declared = licences(installed[name])
    words = ' or '.join(' and '.join(each) for each in declared)
    if not any(ALLOWED.issuperset(each) for each in declared) and EXCEPTIONS.get(name) != words:
      problems.append(f'licences: {name} declares {words!r}, which tests/audit.py does not allow')
  if absent:
    problems.append(
      f'licences: {len(absent)} packages are not installed here and were not read '
      f'({", ".join(absent)}); `make setup` and `make test-aot` install them'
    )
  return problems


def _installed(environments: Sequence[str]) -> dict[str, Any]:
  """Returns the metadata of the packages of some environments, by their normal name."""
  found = {}
  for environment in environments:
    folders = [str(path) for path in pathlib.Path(environment).glob('lib/python*/site-packages')]
    for each in importlib.metadata.distributions(path=folders):
      found[re.sub(r'[-_.]+', '-', each.metadata['Name']).lower()] = each.metadata
  return found


def _told(command: Sequence[str | pathlib.Path]) -> Any:
  """Runs a tool; returns the JSON that it prints.

  Raises:
    ValueError: it prints none; with its last words.
  """
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  try:
    return json.loads(done.stdout)
  except ValueError:
    said = (done.stderr or done.stdout).strip().splitlines() or [f'status {done.returncode}']
    raise ValueError(said[-1]) from None


def main(tools: str, *environments: str) -> list[str]:
  """Looks for all three; returns what is wrong and what could not be done."""
  programs = pathlib.Path(tools).resolve() / 'bin'
  packages = locked(LOCK.read_text(encoding='utf-8'))
  problems = []
  # Without pip, which would resolve and download what is locked already.
  audit = [programs / 'pip-audit', '--requirement', LOCK, '--no-deps', '--disable-pip']
  try:
    problems += vulnerability_problems(_told([*audit, '--format=json', '--progress-spinner=off']))
  except ValueError as error:
    problems.append(f'vulnerabilities: pip-audit could not look: {error}')
  try:
    # Without asking services whether a key works.
    found = _told([programs / 'detect-secrets', 'scan', '--no-verify', *_APART])
    known = json.loads(BASELINE.read_text(encoding='utf-8'))
    problems += secret_problems(found, known)
  except ValueError as error:
    problems.append(f'secrets: detect-secrets could not look: {error}')
  problems += licence_problems(packages, _installed(environments))
  subjects = [problem.partition(':')[0] for problem in problems]
  for subject in ('vulnerabilities', 'secrets', 'licences'):
    if subject not in subjects:
      print(f'{subject}: nothing found ({len(packages)} packages of requirements.lock)')
  return problems


if __name__ == '__main__':
  if len(sys.argv) < 3:
    sys.exit('usage: python tests/audit.py TOOLS ENVIRONMENT...')
  if PROBLEMS := main(*sys.argv[1:]):
    sys.exit('\n'.join(PROBLEMS))
