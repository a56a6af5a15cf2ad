"""Fuzzes the readers of what others wrote.

python -m tests.fuzz.run --inputs=1000000 --target=calls

Inputs that break a promise are saved as cases, which `make test` reads from then on.
"""

import argparse
import pathlib
import sys

from tests.fuzz.engine import fuzz, save
from tests.fuzz.targets import TARGETS

CASES = pathlib.Path(__file__).parent / 'cases'


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--inputs', type=int, default=100_000, help='for each target')
  parser.add_argument('--target', choices=sorted(TARGETS), action='append', help='default: all')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--cases', type=pathlib.Path, default=CASES, help='where inputs are saved')
  args = parser.parse_args()
  found = 0
  for name in args.target or TARGETS:
    failures, speed = fuzz(TARGETS[name], args.inputs, args.seed)
    found += len(failures)
    print(f'{name}: {args.inputs:,} inputs, {speed:,.0f} a second, {len(failures)} failures')
    for failure in failures:
      print(f'  {failure.error}: {save(failure, args.cases, name)}')
  return 1 if found else 0


if __name__ == '__main__':
  sys.exit(main())
