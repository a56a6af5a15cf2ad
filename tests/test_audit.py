"""What `make audit` reads from its tools and from packages, and the lock file of CI."""

import email.message
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.audit import (
  licence_problems,
  licences,
  locked,
  secret_problems,
  vulnerability_problems,
)

ROOT = pathlib.Path(__file__).parents[1]
LOCK = (ROOT / 'requirements.lock').read_text()
# What CI installs: `make setup`, and `make test-aot`.
EXTRAS = ('test', 'serve', 'evaluate', 'mcp', 'aot')


def package(**fields):
  message = email.message.Message()
  for name, value in fields.items():
    for each in value if isinstance(value, list) else [value]:
      message[name.replace('_', '-')] = each
  return message


def test_the_lock_has_a_version_that_each_requirement_allows():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  wanted = list(project['dependencies'])
  for extra in EXTRAS:
    wanted += project['optional-dependencies'][extra]
  versions = locked(LOCK)
  for each in map(Requirement, wanted):
    name = canonicalize_name(each.name)
    # One version alone, with builds of several names.
    if name != 'torch':
      assert each.specifier.contains(versions[name]), f'{each}: run `make lock`'


def test_the_lock_names_packages_and_nothing_else():
  lines = LOCK.splitlines()
  assert lines[0].startswith('# ')
  assert all(re.fullmatch(r'[a-z0-9-]+==[\w.]+', line) for line in lines[1:])
  assert lines[1:] == sorted(lines[1:], key=lambda line: line.split('==')[0])


def test_a_service_that_answers_nothing_is_no_clean_report():
  known = {'name': 'a', 'version': '1', 'vulns': []}
  hole = {'id': 'PYSEC-1', 'fix_versions': ['2', '3']}
  unknown = {'name': 'b', 'skip_reason': 'not found'}
  assert vulnerability_problems({'dependencies': [known]}) == []
  found = vulnerability_problems({'dependencies': [known | {'vulns': [hole]}, unknown]})
  assert found[0] == 'vulnerabilities: a 1 has PYSEC-1, mended in 2, 3'
  assert '1 of 2 packages could not be looked up (b ...)' in found[1]


def test_a_secret_that_was_looked_at_is_known_by_its_hash_alone():
  secret = {'type': 'Secret Keyword', 'hashed_secret': 'x', 'line_number': 3}
  known = {'results': {'a.py': [secret]}}
  moved = {'results': {'a.py': [secret | {'line_number': 9}]}}
  assert secret_problems(moved, known) == []
  other = {'results': {'a.py': [secret | {'hashed_secret': 'y'}], 'b.py': [secret]}}
  assert secret_problems(other, known) == [
    'secrets: a.py:3: Secret Keyword',
    'secrets: b.py:3: Secret Keyword',
  ]


@pytest.mark.parametrize(
  ('fields', 'allowed'),
  [
    (dict(License_Expression='MIT'), True),
    (dict(License_Expression='GPL-3.0-only OR (MIT AND Zlib)'), True),
    (dict(License_Expression='MIT AND GPL-3.0-only'), False),
    (dict(License_Expression='Apache-2.0 WITH LLVM-exception'), True),
    (dict(License='Apache 2.0'), True),
    (dict(License='GPL-2.0 OR AFL-2.1'), True),
    (dict(License='Proprietary'), False),
    (dict(Classifier=['License :: OSI Approved', 'License :: OSI Approved :: MIT License']), True),
    (dict(Classifier=['Topic :: X'], License='BSD License\n\nlong text'), True),
    (dict(), False),
  ],
)
def test_what_a_package_declares_is_read(fields, allowed):
  problems = licence_problems(['a'], {'a': package(**fields)})
  assert (problems == []) == allowed, licences(package(**fields))


def test_packages_that_are_not_here_are_said():
  problems = licence_problems(['a', 'b'], {'a': package(License='MIT')})
  assert problems == [
    'licences: 1 packages are not installed here and were not read (b); `make setup` and '
    '`make test-aot` install them'
  ]
