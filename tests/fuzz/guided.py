"""Fuzzes one reader with atheris: what reaches new code of ours is mutated further.

    make fuzz-guided TARGET=calls SECONDS=600

or `python -m tests.fuzz.guided calls -max_total_time=600`, with any options of libFuzzer. It runs
until an input breaks the reader's promise, or time is up. That input is saved among the cases that
`make test` reads. What was found on the way is kept in .fuzz/ and is where the next run begins.
"""

import pathlib
import sys

import atheris

# Only modules that are first imported here report which of their branches are taken.
with atheris.instrument_imports(include=['dcore_jax', 'tests.fuzz.targets']):
  from tests.fuzz.engine import LONGEST, SECONDS
  from tests.fuzz.run import CASES
  from tests.fuzz.targets import TARGETS, Target

CORPUS = pathlib.Path('.fuzz')


def prepare(name: str, target: Target) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes a target's seeds and words as libFuzzer reads them -> (folder, dictionary)."""
  folder = CORPUS / name
  folder.mkdir(parents=True, exist_ok=True)
  for number, seed in enumerate(target.seeds):
    (folder / f'seed{number}').write_bytes(seed)
  lines = []
  for word in target.words:
    # Every byte as an escape: which ones may stand as they are is then no question.
    lines.append('"' + ''.join(f'\\x{byte:02x}' for byte in word) + '"\n')
  dictionary = CORPUS / f'{name}.dict'
  dictionary.write_text(''.join(lines), encoding='ascii')
  return folder, dictionary


def main() -> None:
  if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
    sys.exit(f'error: name a target: {", ".join(TARGETS)}')
  name = sys.argv[1]
  target = TARGETS[name]
  folder, dictionary = prepare(name, target)
  CASES.mkdir(exist_ok=True)
  options = [f'-max_len={LONGEST}', f'-timeout={SECONDS}', f'-dict={dictionary}']
  # A case is found by the name of its target.
  options.append(f'-artifact_prefix={CASES}/{name}-')
  atheris.Setup([sys.argv[0], *options, *sys.argv[2:], str(folder)], target.read)
  atheris.Fuzz()


if __name__ == '__main__':
  main()
